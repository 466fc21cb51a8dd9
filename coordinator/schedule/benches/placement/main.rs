//! The judge of placement: a trace replayed over a simulated fleet by this crate's placement and by those of others, and
//! how long a decision takes.
//!
//! `cargo bench -p baton-schedule --bench placement -- --help`, or `./deploy/run bench placement`. [`replay`] is the
//! simulation, [`decide`] the clock on decisions, [`report`] the tables. Without `--trace` the traffic is made up, and
//! the output says so. Nothing fails unless `--judge` asks for it.

mod decide;
/// The coordinator's heap.
#[path = "../../../src/memory.rs"]
mod memory;
mod replay;
mod report;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use baton_schedule::Settings;
use clap::{Args, Parser, Subcommand, ValueEnum};

use replay::{
    chooser::Chooser,
    coordinators::Coordinators,
    figures::Figures,
    machine::Machine,
    peers::{Peer, Rule},
    simulation::{Setup, run},
    synthetic,
    trace::{Trace, TraceError},
};
use report::{Key, Runs};

/// Requests of a trace that is made up.
const SYNTHETIC_REQUESTS: usize = 3_000;

#[derive(Debug, Parser)]
#[command(
    name = "placement",
    about = "How well requests are placed, and how fast",
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    only: Option<Only>,
    #[command(flatten)]
    replay: ReplayArgs,
    #[command(flatten)]
    decide: DecideArgs,
    /// Exit with 1 unless this placement is ahead of every peer on goodput and p99 TTFT where the load is .60 to .95, and
    /// decides in time.
    #[arg(long, global = true)]
    judge: bool,
    /// As `cargo bench` passes it.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Only {
    /// The replay alone.
    Replay(ReplayArgs),
    /// The time of decisions alone.
    Decide(DecideArgs),
}

#[derive(Debug, Args)]
struct ReplayArgs {
    /// Requests as lines of JSON: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (of blocks of 512 tokens).
    /// Without it some are made up.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// How many times as fast as they came requests come.
    #[arg(long, value_delimiter = ',', num_args = 1.., default_values_t = [0.8, 1.0, 1.2, 1.4, 1.6], value_parser = speed)]
    speeds: Vec<f64>,
    /// Who places them.
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_values_t = Policy::ALL)]
    policies: Vec<Policy>,
    /// Blocks of 512 tokens that each prefill instance keeps.
    #[arg(long, value_delimiter = ',', num_args = 1.., default_values_t = [1_000, 4_000], value_parser = clap::value_parser!(u32).range(320..=1_000_000))]
    cache_blocks: Vec<u32>,
    /// Figures are medians over this many seeds: of noise, of arrivals, of which instances are slow.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Prefill instances, and as many for decode.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pairs: u32,
    /// The trace so many times over, with nothing in common between the copies; for more `--pairs`.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=128))]
    copies: u32,
    /// Each request comes up to so many milliseconds later than the trace says, before it is made faster. Traces round
    /// down: 3000 undoes Mooncake's.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    spread_millis: u64,
    /// The coordinator's requests wait while more than so many milliseconds of work are queued everywhere.
    #[arg(long, default_value_t = Settings::DEFAULT.room.as_millis() as u64)]
    room_millis: u64,
    /// So many coordinators of this one's kind place, each what comes to it; those of other kinds are alone.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    coordinators: u32,
    /// How often each instance reports its load; a coordinator asks fleets of up to 500 instances for one each 50 ms.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    report_millis: u64,
    /// The coordinator is told of one cached block of 16 tokens for so many tokens.
    #[arg(long, default_value_t = Settings::DEFAULT.index_every_tokens, value_parser = clap::value_parser!(u32).range(0..=512))]
    every_tokens: u32,
}

#[derive(Debug, Args)]
struct DecideArgs {
    /// Fleets of so many instances, half of them prefill.
    #[arg(long, value_delimiter = ',', num_args = 1.., default_values_t = [10, 1_000, 10_000], value_parser = clap::value_parser!(u32).range(2..=99_999))]
    instances: Vec<u32>,
    /// Decisions for each.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    decisions: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Policy {
    Production,
    /// With decode instances that compute no prompt.
    Apart,
    RoundRobin,
    LeastRequests,
    LeastLoad,
    CacheAware,
    Dynamo,
    DynamoDecay,
    Smetric,
}

impl Policy {
    const ALL: [Self; 9] = [
        Self::Production,
        Self::Apart,
        Self::RoundRobin,
        Self::LeastRequests,
        Self::LeastLoad,
        Self::CacheAware,
        Self::Dynamo,
        Self::DynamoDecay,
        Self::Smetric,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Production => "baton",
            Self::Apart => "baton, apart",
            Self::RoundRobin => "round robin",
            Self::LeastRequests => "least requests",
            Self::LeastLoad => "SMG least-load",
            Self::CacheAware => "SMG cache-aware",
            Self::Dynamo => "Dynamo",
            Self::DynamoDecay => "Dynamo, decay",
            Self::Smetric => "vLLM smetric",
        }
    }

    fn chooser(self, setup: &Setup) -> Box<dyn Chooser> {
        let rule = match self {
            Self::Production | Self::Apart => {
                let Setup { coordinators, prefills, decodes, mut settings, .. } = *setup;
                if self == Self::Apart {
                    settings.local_prefill_tokens = 0;
                }
                return Box::new(Coordinators::new(coordinators, prefills, decodes, settings));
            }
            Self::RoundRobin => Rule::RoundRobin,
            Self::LeastRequests => Rule::LeastRequests,
            Self::LeastLoad => Rule::LeastLoad,
            Self::CacheAware => Rule::CacheAware,
            Self::Dynamo => Rule::Dynamo(0.0),
            Self::DynamoDecay => Rule::Dynamo(1.0),
            Self::Smetric => Rule::Smetric,
        };
        Box::new(Peer::new(rule, setup.machine, setup.prefills, setup.decodes))
    }
}

fn speed(text: &str) -> Result<f64, String> {
    let speed: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.01..=100.0).contains(&speed) { Ok(speed) } else { Err("a speed is 0.01 to 100".into()) }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (replay, decide) = match &cli.only {
        Some(Only::Replay(replay)) => (Some(replay), None),
        Some(Only::Decide(decide)) => (None, Some(decide)),
        None => (Some(&cli.replay), Some(&cli.decide)),
    };
    let mut faults = Vec::new();
    if let Some(args) = replay {
        match replayed(args) {
            Ok(runs) => {
                println!("{}", report::text(&runs));
                faults.extend(report::faults(&runs));
            }
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    if let Some(args) = decide {
        let (text, late) = decide::measure(&args.instances, args.decisions);
        println!("{text}");
        faults.extend(late);
    }
    if !cli.judge {
        return ExitCode::SUCCESS;
    }
    faults.iter().for_each(|fault| println!("judged: {fault}"));
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Replays everything that is asked for.
fn replayed(args: &ReplayArgs) -> Result<Runs, TraceError> {
    let trace = match &args.trace {
        Some(path) => Trace::read(path)?,
        None => {
            println!(
                "no --trace: {SYNTHETIC_REQUESTS} requests are made up in the proportions of real chats\n"
            );
            synthetic::trace(SYNTHETIC_REQUESTS, 1)
        }
    };
    let trace = trace.times(args.copies);
    let (requests, seen) = (trace.requests.len(), trace.seen_share() * 100.0);
    println!(
        "{requests} requests, {pairs} prefill and {pairs} decode instances, at best {seen:.1} % cached, median of {seeds} seeds\n",
        pairs = args.pairs,
        seeds = args.seeds,
    );
    let jobs = jobs(args);
    let done = Mutex::new(BTreeMap::new());
    let next = AtomicUsize::new(0);
    let began = Instant::now();
    let work = || {
        while let Some((key, setup)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = run(&trace, setup, &mut *key.policy.chooser(setup));
            let figures = Figures::of(&trace, &setup.machine, &outcome);
            let mut done = done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            done.entry((*key, setup.seed)).or_insert(figures);
            let seconds = began.elapsed().as_secs();
            eprintln!("{} of {} replays, {seconds} s: {}", done.len(), jobs.len(), key);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |threads| threads.get()) {
            scope.spawn(work);
        }
    });
    let mut runs = Runs::default();
    for ((key, _), figures) in done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        runs.entry(key).or_default().push(figures);
    }
    Ok(runs)
}

fn jobs(args: &ReplayArgs) -> Vec<(Key, Setup)> {
    let room = Duration::from_millis(args.room_millis);
    let settings = Settings { room, index_every_tokens: args.every_tokens, ..Settings::default() };
    let mut jobs = Vec::new();
    for cache_blocks in &args.cache_blocks {
        for speed in &args.speeds {
            for seed in 0..args.seeds {
                let setup = Setup {
                    settings,
                    coordinators: args.coordinators as usize,
                    report_micros: args.report_millis * 1_000,
                    prefills: args.pairs as usize,
                    decodes: args.pairs as usize,
                    cache_blocks: *cache_blocks as usize,
                    speed: *speed,
                    spread_micros: args.spread_millis * 1_000,
                    seed,
                    machine: Machine::NODE,
                };
                let key = |policy: &Policy| Key {
                    cache_blocks: *cache_blocks,
                    speed_percent: (speed * 100.0).round() as u32,
                    policy: *policy,
                };
                jobs.extend(args.policies.iter().map(|policy| (key(policy), setup)));
            }
        }
    }
    jobs
}
