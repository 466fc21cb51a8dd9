//! How long production placement takes to decide, in fleets of several sizes, with other requests under way.
//!
//! Timed is what a request waits for: the choice and its entry on the ledger, on one thread that nobody competes with. With
//! prompts of which nobody has anything, with short ones, which decode may compute as well, and with long ones of which some have
//! the half: then the prompt is looked for in the index, and is put down there for both legs. Whoever has served one, prefill or
//! decode, has it for a while. For what is known and forgotten by time, each request takes a second.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use baton_proto::{InstanceId, LegId, Sieve};
use baton_schedule::{
    Placement, Prompt, Settings, Wanted,
    board::{Board, Booking},
    caches::Feed,
    chains::{Chain, Chains, Dialect, KnownStrides},
};
use tabled::{builder::Builder, settings::Style};

use crate::replay::{
    chooser::{Place, Report},
    figures::percentile,
    machine::Draws,
    production::{Clock, KV_BLOCK_TOKENS, REVISION, board, id, load},
};

/// Requests under way at a time, for each instance, and how long each takes.
const UNDER_WAY: usize = 4;
const TAKES_MICROS: u64 = 1_000_000;
const UNDER_WAY_MOST: usize = 2_000;
/// Decisions before those that count.
const WARM_UP: u32 = 100;
/// Tokens of a short prompt.
const SHORT_TOKENS: u32 = 1_000;
/// Tokens of a long prompt, and how many of them instances have that have any: one in ten, of some of the beginnings there are.
const LONG_TOKENS: u32 = 32_768;
const SHARED_TOKENS: u32 = LONG_TOKENS / 2;
const HOLDERS: usize = 10;
const BEGINNINGS: usize = 8;
/// Prompts that an instance keeps of those that it served.
const KEPT: usize = 2;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prompts {
    /// As long as chats are.
    Chats,
    Short,
    Cached,
}

impl Prompts {
    fn name(self) -> String {
        match self {
            Self::Chats => "not cached".to_owned(),
            Self::Short => format!("{SHORT_TOKENS} tokens, not cached"),
            Self::Cached => format!("{LONG_TOKENS} tokens, half of them cached by one in {HOLDERS}"),
        }
    }

    fn tokens(self, draws: &mut Draws) -> u32 {
        match self {
            Self::Chats => (6_500.0 * (1.1 * draws.normal()).exp()).clamp(100.0, 126_000.0) as u32,
            Self::Short => SHORT_TOKENS,
            Self::Cached => LONG_TOKENS,
        }
    }
}

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
    for instances in fleets {
        for of in [Prompts::Chats, Prompts::Short, Prompts::Cached] {
            let prompts = of.name();
            eprintln!("{decisions} decisions among {instances} instances, prompts {prompts}");
            let taken = decisions_micros(*instances as usize, decisions, of);
            let (median, most) = (percentile(&taken, 0.5), percentile(&taken, 0.99));
            let target = target_micros(*instances);
            table.push_record([
                instances.to_string(),
                prompts.clone(),
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

/// What an instance has, and says of it.
struct Keeps {
    feed: Feed,
    /// It has this beginning for good.
    beginning: Vec<u64>,
    served: VecDeque<Vec<u64>>,
}

impl Keeps {
    /// A prompt has been served here: the oldest goes, but for what others begin with.
    fn serve(&mut self, keys: Vec<u64>) {
        let gone = if self.served.len() == KEPT { self.served.pop_front() } else { None };
        let gone = gone.unwrap_or_default();
        let others = self.served.iter().chain([&self.beginning, &keys]);
        let alike = |other: &Vec<u64>| gone.iter().zip(other).take_while(|(a, b)| a == b).count();
        let still = others.map(alike).max().unwrap_or(0);
        self.feed.change(&keys, &gone[still..]);
        self.served.push_back(keys);
    }
}

/// Prompts that begin alike, and who has what of them.
struct Shared {
    dialect: Dialect,
    sieve: Sieve,
    beginnings: Vec<Vec<u32>>,
    keeps: HashMap<InstanceId, Keeps>,
}

impl Shared {
    fn new(board: &Arc<Board>, places: &[Place], draws: &mut Draws) -> Self {
        let dialect = Dialect::new("one", KV_BLOCK_TOKENS).expect("blocks of some tokens");
        let sieve = Sieve::new(Settings::DEFAULT.index_every_tokens, KV_BLOCK_TOKENS);
        let beginnings: Vec<_> = (0..BEGINNINGS).map(|_| tokens(draws, SHARED_TOKENS)).collect();
        let keys = |tokens: &Vec<u32>| {
            told(sieve, &Chains::new(tokens.as_slice().into()).say(&[dialect], &[], &KnownStrides::default()))
        };
        let said: Vec<_> = beginnings.iter().map(keys).collect();
        let other = keys(&tokens(draws, KV_BLOCK_TOKENS * 64));
        let keep = |place: &Place| {
            let (Place::Prefill(at) | Place::Decode(at)) = *place;
            // Whoever has none of them has something else.
            let beginning = if at % HOLDERS == 0 { &said[at / HOLDERS % BEGINNINGS] } else { &other };
            let mut feed = board.feed(&id(*place));
            feed.begin();
            feed.store(beginning);
            feed.publish(dialect).expect("the only dialect");
            (id(*place), Keeps { feed, beginning: beginning.clone(), served: VecDeque::new() })
        };
        let keeps = places.iter().map(keep).collect();
        Self { dialect, sieve, beginnings, keeps }
    }

    /// The next prompt, as whoever prepares it says it.
    fn chain(&self, draws: &mut Draws) -> Vec<Chain> {
        let mut prompt = self.beginnings[draws.below(BEGINNINGS)].clone();
        prompt.extend(tokens(draws, LONG_TOKENS - SHARED_TOKENS));
        Chains::new(prompt.into()).say(&[self.dialect], &[], &KnownStrides::default())
    }

    /// A request is over: both of its instances have its prompt.
    fn serve(&mut self, placement: &Placement, chains: &[Chain]) {
        let assignees = match placement {
            Placement::Apart { prefill, decode } => vec![prefill, decode],
            Placement::Alone(alone) => vec![alone],
        };
        let keys = told(self.sieve, chains);
        for assignee in assignees {
            if let Some(keeps) = self.keeps.get_mut(&assignee.instance) {
                keeps.serve(keys.clone());
            }
        }
    }
}

/// Of a prompt's blocks those that instances tell of.
fn told(sieve: Sieve, chains: &[Chain]) -> Vec<u64> {
    chains[0].keys.iter().copied().filter(|key| sieve.keeps(*key)).collect()
}

fn tokens(draws: &mut Draws, many: u32) -> Vec<u32> {
    (0..many).map(|_| draws.below(100_000) as u32).collect()
}

fn decisions_micros(instances: usize, decisions: u32, prompts: Prompts) -> Vec<f64> {
    let (prefills, decodes) = (instances / 2, instances - instances / 2);
    let mut clock = Clock::new();
    let start = clock.at(0);
    let board = board(prefills, decodes, Settings::default());
    let mut draws = Draws::new(1);
    let places = (0..prefills).map(Place::Prefill).chain((0..decodes).map(Place::Decode));
    let places: Vec<Place> = places.collect();
    places.iter().for_each(|place| reported(&board, *place, &mut draws));
    let mut shared = (prompts == Prompts::Cached).then(|| Shared::new(&board, &places, &mut draws));
    let most = (UNDER_WAY * instances).min(UNDER_WAY_MOST);
    let mut under_way = VecDeque::with_capacity(most + 1);
    for _ in 0..most {
        under_way.extend(decision(&board, prompts, shared.as_ref(), &mut draws).0);
    }
    let mut taken = Vec::with_capacity(decisions as usize);
    drop(start);
    for turn in 0..WARM_UP + decisions {
        let _now = clock.at(u64::from(turn) * TAKES_MICROS / most as u64);
        reported(&board, places[draws.below(places.len())], &mut draws);
        let (booked, time) = decision(&board, prompts, shared.as_ref(), &mut draws);
        if let (Some((Booking { placement, credit, .. }, chains)), Some(shared)) =
            (under_way.pop_front(), &mut shared)
        {
            shared.serve(&placement, &chains);
            drop(credit);
        }
        under_way.extend(booked);
        if turn >= WARM_UP {
            taken.push(time.as_secs_f64() * 1e6);
        }
    }
    taken
}

/// What was booked, of which prompt, and how long that took.
fn decision(
    board: &Arc<Board>,
    prompts: Prompts,
    shared: Option<&Shared>,
    draws: &mut Draws,
) -> (Option<(Booking, Vec<Chain>)>, Duration) {
    let chains = shared.map(|shared| shared.chain(draws)).unwrap_or_default();
    let prompt = Prompt { tokens: prompts.tokens(draws), chains: &chains };
    let began = Instant::now();
    board.arrived(REVISION);
    let booked = board.book(&Wanted::new(prompt, 2_000, REVISION));
    let time = began.elapsed();
    (booked.ok().map(|booking| (booking, chains)), time)
}

fn reported(board: &Board, place: Place, draws: &mut Draws) {
    let prefills = matches!(place, Place::Prefill(_));
    let report = Report {
        sequences: draws.below(32) as u32,
        queued_uncached_tokens: if prefills { draws.below(100_000) as u64 } else { 0 },
        cache_tokens: 2_000_000,
        cache_free_tokens: draws.below(2_000_000) as u32,
        tokens_per_second: 6_000.0 + draws.below(2_000) as f64,
        step_micros: 22_000 + draws.below(10_000) as u64,
        ..Report::default()
    };
    board.load(&id(place), load(place, &report, LegId(0)));
}
