//! How long production placement takes to decide, in fleets of several sizes, with other requests under way.
//!
//! Timed is what a request waits for: the choice and its entry on the ledger, on one thread that nobody competes with. Once with
//! prompts of which nobody has anything, and once with long ones of which some have the half: then each block of the prompt is
//! looked for in the index.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_proto::{LegId, Sieve};
use baton_schedule::{
    Prompt, Settings, Wanted,
    board::{Board, Booking},
    caches::Feed,
    chains::{Chain, Chains, Dialect},
};
use tabled::{builder::Builder, settings::Style};

use crate::replay::{
    chooser::{Place, Report},
    figures::percentile,
    machine::Draws,
    production::{KV_BLOCK_TOKENS, REVISION, board, id, load},
};

/// Requests under way at a time, for each instance.
const UNDER_WAY: usize = 4;
const UNDER_WAY_MOST: usize = 2_000;
/// Decisions before those that count.
const WARM_UP: u32 = 100;
/// Tokens of a long prompt, and how many of them instances have that have any: one in ten, of some of the beginnings there are.
const LONG_TOKENS: u32 = 32_768;
const SHARED_TOKENS: u32 = LONG_TOKENS / 2;
const HOLDERS: usize = 10;
const BEGINNINGS: usize = 8;

/// Microseconds that the 99th percentile is to be below, for fleets of up to so many instances.
fn target_micros(instances: u32) -> Option<f64> {
    match instances {
        0..=10 => Some(20.0),
        11..=1_000 => Some(200.0),
        1_001..=10_000 => Some(1_000.0),
        _ => None,
    }
}

/// The table, and which targets are missed.
pub(crate) fn measure(fleets: &[u32], decisions: u32) -> (String, Vec<String>) {
    let mut table = Builder::default();
    table.push_record(["instances", "prompts", "decision p50 us", "p99 us", "to be"]);
    let mut faults = Vec::new();
    let long = format!("{LONG_TOKENS} tokens, half of them cached by one in {HOLDERS}");
    for instances in fleets {
        for (prompts, cached) in [("not cached", false), (&*long, true)] {
            eprintln!("{decisions} decisions among {instances} instances, prompts {prompts}");
            let taken = decisions_micros(*instances as usize, decisions, cached);
            let (median, most) = (percentile(&taken, 0.5), percentile(&taken, 0.99));
            let target = target_micros(*instances);
            table.push_record([
                instances.to_string(),
                prompts.to_owned(),
                format!("{median:.1}"),
                format!("{most:.1}"),
                target.map_or_else(String::new, |target| format!("< {target:.0}")),
            ]);
            if let Some(target) = target.filter(|target| most >= *target) {
                let missed = format!("p99 of decisions {most:.1} us, not below {target:.0}");
                faults.push(format!("{instances} instances, prompts {prompts}: {missed}"));
            }
        }
    }
    (format!("\n{}", table.build().with(Style::markdown())), faults)
}

/// Prompts that begin alike, and who has these beginnings.
struct Shared {
    dialect: Dialect,
    beginnings: Vec<Vec<u32>>,
    /// What they say holds for as long as these are here.
    _feeds: Vec<Feed>,
}

impl Shared {
    fn new(board: &Arc<Board>, places: &[Place], draws: &mut Draws) -> Self {
        let dialect = Dialect::new("one", KV_BLOCK_TOKENS).expect("blocks of some tokens");
        let sieve = Sieve::new(Settings::DEFAULT.index_every_tokens, KV_BLOCK_TOKENS);
        let beginnings: Vec<_> = (0..BEGINNINGS).map(|_| tokens(draws, SHARED_TOKENS)).collect();
        let keys = |beginning: &Vec<u32>| {
            let chains = Chains::new(beginning.as_slice().into()).say(&[dialect], &[]);
            chains[0].keys.iter().copied().filter(|key| sieve.keeps(*key)).collect::<Vec<_>>()
        };
        let keys: Vec<_> = beginnings.iter().map(keys).collect();
        let feed = |(at, place): (usize, &Place)| {
            let mut feed = board.feed(&id(*place));
            feed.begin();
            if at % HOLDERS == 0 {
                feed.store(&keys[at / HOLDERS % BEGINNINGS]);
            }
            feed.publish(dialect).expect("the only dialect");
            feed
        };
        let feeds = places.iter().enumerate().map(feed).collect();
        Self { dialect, beginnings, _feeds: feeds }
    }

    /// The next prompt, as whoever prepares it says it.
    fn chain(&self, draws: &mut Draws) -> Vec<Chain> {
        let mut prompt = self.beginnings[draws.below(BEGINNINGS)].clone();
        prompt.extend(tokens(draws, LONG_TOKENS - SHARED_TOKENS));
        Chains::new(prompt.into()).say(&[self.dialect], &[])
    }
}

fn tokens(draws: &mut Draws, many: u32) -> Vec<u32> {
    (0..many).map(|_| draws.below(100_000) as u32).collect()
}

fn decisions_micros(instances: usize, decisions: u32, cached: bool) -> Vec<f64> {
    let (prefills, decodes) = (instances / 2, instances - instances / 2);
    let board = board(prefills, decodes, Settings::default());
    let mut draws = Draws::new(1);
    let places = (0..prefills).map(Place::Prefill).chain((0..decodes).map(Place::Decode));
    let places: Vec<Place> = places.collect();
    places.iter().for_each(|place| reported(&board, *place, &mut draws));
    let shared = cached.then(|| Shared::new(&board, &places, &mut draws));
    let decision = |draws: &mut Draws| decision(&board, shared.as_ref(), draws);
    let most = (UNDER_WAY * instances).min(UNDER_WAY_MOST);
    let mut under_way: VecDeque<Booking> = (0..most).filter_map(|_| decision(&mut draws).0).collect();
    let mut taken = Vec::with_capacity(decisions as usize);
    for turn in 0..WARM_UP + decisions {
        reported(&board, places[draws.below(places.len())], &mut draws);
        let (booking, time) = decision(&mut draws);
        under_way.pop_front();
        under_way.extend(booking);
        if turn >= WARM_UP {
            taken.push(time.as_secs_f64() * 1e6);
        }
    }
    taken
}

fn decision(board: &Arc<Board>, shared: Option<&Shared>, draws: &mut Draws) -> (Option<Booking>, Duration) {
    let chains = shared.map(|shared| shared.chain(draws)).unwrap_or_default();
    let prompt_tokens = match shared {
        Some(_) => LONG_TOKENS,
        None => (6_500.0 * (1.1 * draws.normal()).exp()).clamp(100.0, 126_000.0) as u32,
    };
    let prompt = Prompt { tokens: prompt_tokens, chains: &chains };
    let began = Instant::now();
    board.arrived(REVISION);
    let booked = board.book(&Wanted::new(prompt, 2_000, REVISION));
    let time = began.elapsed();
    (booked.ok(), time)
}

fn reported(board: &Board, place: Place, draws: &mut Draws) {
    let report = Report {
        sequences: draws.below(32) as u32,
        queued_tokens: draws.below(100_000) as u64,
        cache_tokens: 2_000_000,
        cache_free_tokens: draws.below(2_000_000) as u32,
        tokens_per_second: 6_000.0 + draws.below(2_000) as f64,
        step_micros: 22_000 + draws.below(10_000) as u64,
        ..Report::default()
    };
    board.load(&id(place), load(place, &report, LegId(0)));
}
