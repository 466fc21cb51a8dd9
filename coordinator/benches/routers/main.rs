//! The cost bench: what a request costs in the coordinator and in other routers of prefill and decode, side by side.
//!
//! `cargo bench -p baton-coordinator --bench routers -- --help`, or `./deploy/run bench routers`, which brings the others.
//! [`run`] has the rounds, [`lines`] what is measured, [`targets`] who; [`worker`], [`floor`] and [`client`] are processes of their
//! own (this program once more), spoken to as [`protocol`] says, so that [`procfs`] sees the routers alone. [`report`] has the
//! tables and what is wanted of the figures; nothing fails unless `--judge` asks for it.

mod child;
mod client;
mod error;
mod floor;
mod lines;
mod model;
mod procfs;
mod protocol;
mod report;
mod run;
mod targets;
mod words;
mod worker;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use error::BenchError;
use lines::{Answer, Line, Prompt};
use report::Report;
use run::{Bench, Setup};
use targets::{Programs, Target};

/// What a request costs in the coordinator, beside other routers of prefill and decode: processor time, memory, latency.
#[derive(Debug, Parser)]
#[command(name = "routers", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    child: Option<Child>,
    #[command(flatten)]
    programs: Programs,
    /// The model whose tokeniser the coordinator uses, a GGUF file of the LLaMA family; `baton up --fetch-only` has one.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Requests in flight.
    #[arg(long, value_delimiter = ',', num_args = 1.., default_values_t = [1, 64, 512], value_parser = clap::value_parser!(u32).range(1..=16_384))]
    streams: Vec<u32>,
    /// Short prompts are measured with every kind of answer, those of 32k tokens paced, those of 220 KB not streamed.
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_values_t = [Prompt::Short, Prompt::Tokens32k, Prompt::Bytes220k])]
    prompt: Vec<Prompt>,
    /// Only these kinds of answers, of 128 tokens each.
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_values_t = [Answer::Paced, Answer::Unpaced, Answer::Whole])]
    only: Vec<Answer>,
    /// Who is measured. What is added to latency is told only where `direct` is among them.
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_values_t = Target::ALL)]
    targets: Vec<Target>,
    /// Figures are medians over so many rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Requests of each line in a round, where the default, enough to measure their processor time, is not wanted.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: Option<u32>,
    /// Each prompt is a text that was never sent before, up to 8,192 of a line. Else they are made of 32 texts that were, each with
    /// a number of its own in front: their KV caches are of no use to each other, but most of a long one was tokenised before, as
    /// of a chat that goes on.
    #[arg(long)]
    fresh: bool,
    /// Prefill instances, and as many for decode.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pairs: u32,
    /// Exit with 1 unless the coordinator costs as little as it is to.
    #[arg(long)]
    judge: bool,
    /// As `cargo bench` passes it.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Child {
    /// The process that is all instances; spoken to on its standard input.
    #[command(hide = true)]
    Worker,
    /// The process that only writes; spoken to on its standard input.
    #[command(hide = true)]
    Floor,
    /// The process that makes the requests; spoken to on its standard input.
    #[command(hide = true)]
    Client,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match cli.child {
        Some(Child::Worker) => worker::run().map(|()| true),
        Some(Child::Floor) => floor::run().map(|()| true),
        Some(Child::Client) => client::run().map(|()| true),
        None => measure(&cli),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the figures are as they are to be, if that was asked.
fn measure(cli: &Cli) -> Result<bool, BenchError> {
    let Some(from) = &cli.model else {
        eprintln!("nothing is measured without --model: ./deploy/run bench routers fetches one and names it");
        return Ok(!cli.bench);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(BenchError::io("start a runtime"))?;
    let folder = tempfile::tempdir().map_err(BenchError::io("make a folder"))?;
    let (model, served) = run::open(from, folder.path())?;
    let words = model::words(&served)?;
    let tokenised_per_second = model::tokenised_per_second(&served, &words, Prompt::Bytes220k.words());
    drop(served);
    let lines = Line::all(&cli.prompt, &cli.only, &cli.streams);
    let runs = runtime.block_on(async {
        let setup = Setup {
            programs: &cli.programs,
            wanted: &cli.targets,
            pairs: cli.pairs,
            fresh: cli.fresh,
            words,
            model: &model,
            folder: folder.path(),
        };
        let mut bench = Bench::start(setup).await.inspect_err(|_| show_logs(folder.path()))?;
        let left_out = cli.targets.iter().filter(|&&target| !bench.has(target));
        left_out.for_each(|target| eprintln!("{} is left out: its program is not named", target.name()));
        let runs = bench.rounds(cli.rounds, cli.requests, &lines, &cli.targets).await;
        runs.inspect_err(|_| show_logs(folder.path()))
    })?;
    let report = Report { runs: &runs, tokenised_per_second };
    let (rounds, pairs) = (cli.rounds, cli.pairs);
    let texts =
        if cli.fresh { "of texts never sent before" } else { "of few texts, each with a number in front" };
    println!(
        "answers of 128 tokens, prompts {texts}, {pairs} prefill and {pairs} decode instances, medians of {rounds} rounds\n"
    );
    println!("{}\n", report.text());
    report.long().for_each(|(text, _)| println!("{text}"));
    let faults = report.faults();
    faults.iter().for_each(|fault| println!("not as it is to be: {fault}"));
    Ok(!cli.judge || faults.is_empty())
}

/// The last words of all routers, where one of them has failed.
fn show_logs(folder: &std::path::Path) {
    const LINES: usize = 20;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "log")
            && let Ok(text) = std::fs::read_to_string(&path)
        {
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES)..];
            eprintln!("-- {}\n{}", path.display(), last.join("\n"));
        }
    }
}
