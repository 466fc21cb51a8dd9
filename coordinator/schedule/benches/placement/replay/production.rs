//! This crate's own placement, asked as the coordinator asks it: through the board, with the ledger of what is under way.
//!
//! All here that knows how production is called is in this file.

use std::{collections::HashMap, convert::Infallible, num::NonZeroU32, sync::Arc, time::Duration};

use baton_proto::{GroupName, Incarnation, InstanceId, LegId, Protocols, RoleEpoch, Sieve};
use baton_schedule::{
    Among, Assignee, NoPlace, Placement, Prompt, Settings, Side, Wanted,
    board::{Board, Credit, LegNews},
    caches::Feed,
    chains::{Chain, Dialect, Names},
    fleet::{Duty, Load, Role, Spec},
    queue::{Queue, Rank, Wish},
};
use tokio::{
    runtime::{Builder, EnterGuard, Runtime},
    time::{Instant, advance},
};

use super::{
    cache::Changes,
    chooser::{Choice, Place, Report, Sight},
    machine::{Machine, Target},
    trace::{BLOCK_TOKENS, LONGEST_TOKENS},
};

/// Tokens of an instance's KV block: each of the trace's is several, and what is known of caches is told by these.
pub(crate) const KV_BLOCK_TOKENS: u32 = 16;
/// Of one token, in bytes: [`super::machine::Machine::NODE`]'s, at 25 GB/s.
const TOKEN_BYTES: u64 = 320 << 10;
/// What requests allow their answers; how long these turn out nobody knows beforehand.
const MAX_TOKENS: u32 = 2_000;
pub(crate) const REVISION: &str = "simulated";

pub(crate) fn id(place: Place) -> InstanceId {
    let name = match place {
        Place::Prefill(index) => format!("p{index:05}"),
        Place::Decode(index) => format!("d{index:05}"),
    };
    InstanceId::new(name).expect("letters and digits are an id")
}

/// A board on which all instances are up, and have not said how busy they are.
pub(crate) fn board(prefills: usize, decodes: usize, settings: Settings) -> Arc<Board> {
    let board = Board::new(Duration::from_secs(60), settings);
    let places = (0..decodes).map(Place::Decode).chain((0..prefills).map(Place::Prefill));
    let places: Vec<Place> = places.collect();
    let specs: Vec<Spec> = places.iter().map(|place| spec(id(*place))).collect();
    board.list(&specs, Instant::now());
    for (place, spec) in places.iter().zip(&specs) {
        let role = match place {
            Place::Prefill(_) => Role::Prefill,
            Place::Decode(_) => Role::Decode,
        };
        board.up(&spec.id, spec.incarnation, Duty { role, epoch: RoleEpoch(1), ready: true });
    }
    board
}

fn spec(id: InstanceId) -> Spec {
    Spec {
        inference_endpoint: format!("{id}:1"),
        handoff_endpoint: format!("{id}:2"),
        id,
        incarnation: Incarnation(1),
        group: GroupName::default(),
        model: REVISION.into(),
        revision: REVISION.into(),
        context_tokens: 2 * LONGEST_TOKENS,
        hardware: String::new(),
        layout: "one".into(),
        handoff_protocols: Protocols::FIRST,
        block_tokens: KV_BLOCK_TOKENS,
        token_bytes: TOKEN_BYTES,
    }
}

/// `seen`: the last of the coordinator's legs that the report knows of.
pub(crate) fn load(place: Place, report: &Report, seen: LegId) -> Load {
    let (rate, prefills) = (report.tokens_per_second as u64, matches!(place, Place::Prefill(_)));
    Load {
        sequences: report.sequences,
        running: report.sequences,
        sequences_most: NonZeroU32::new(report.sequences_most),
        step_tokens: NonZeroU32::new(Machine::NODE.chunk_tokens),
        waiting_room: None,
        queued_prefill_tokens: report.queued_uncached_tokens,
        queued_prefill_pairs: report.queued_uncached_pairs,
        kv_blocks_total: report.cache_tokens / KV_BLOCK_TOKENS,
        kv_blocks_free: report.cache_free_tokens / KV_BLOCK_TOKENS,
        prefill_tokens_per_second: if prefills { rate } else { 0 },
        decode_step_micros: report.step_micros,
        timed: report.timed,
        transfers: 0,
        seen_leg: Some(seen),
    }
}

/// A request under way.
struct UnderWay {
    credit: Credit,
    /// Under which numbers its instances know it; decode alone if it does all of it.
    legs: (Option<LegId>, LegId),
}

/// The simulation's time as the coordinator's code reads it: that of a runtime whose clock stands unless it is moved.
pub(crate) struct Clock {
    runtime: Runtime,
    at_micros: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        Self { runtime: runtime.expect("a runtime of this thread"), at_micros: 0 }
    }

    /// It is this late for as long as the guard lives.
    pub(crate) fn at(&mut self, now_micros: u64) -> EnterGuard<'_> {
        let passed = Duration::from_micros(now_micros - self.at_micros);
        self.at_micros = now_micros;
        self.runtime.block_on(advance(passed));
        self.runtime.enter()
    }
}

/// A request that waits for room.
struct Waiting {
    index: usize,
    /// When its first token is wanted, as the coordinator has it.
    first_token: Instant,
    tokens: u32,
    chains: [Chain; 1],
}

pub(crate) struct Production {
    waiting: Queue<Waiting>,
    clock: Clock,
    board: Arc<Board>,
    dialect: Dialect,
    /// What instances tell of.
    sieve: Sieve,
    feeds: HashMap<Place, Feed>,
    places: HashMap<InstanceId, usize>,
    /// Legs that each instance was given.
    prefill_legs: Vec<u64>,
    decode_legs: Vec<u64>,
    under_way: HashMap<usize, UnderWay>,
}

impl Production {
    pub(crate) fn new(prefills: usize, decodes: usize, settings: Settings) -> Self {
        let all = (0..prefills).map(|index| (id(Place::Prefill(index)), index));
        let places = all.chain((0..decodes).map(|index| (id(Place::Decode(index)), index))).collect();
        let dialect = Dialect::new("one", KV_BLOCK_TOKENS).expect("blocks of some tokens");
        let mut clock = Clock::new();
        let now = clock.at(0);
        let board = board(prefills, decodes, settings);
        let feed = |place| {
            let mut feed = board.feed(&id(place));
            feed.begin();
            feed.publish(dialect).expect("the only dialect");
            (place, feed)
        };
        let all = (0..prefills).map(Place::Prefill).chain((0..decodes).map(Place::Decode));
        let feeds = all.map(feed).collect();
        drop(now);
        Self {
            waiting: Queue::default(),
            clock,
            dialect,
            sieve: Sieve::new(settings.index_every_tokens, KV_BLOCK_TOKENS),
            feeds,
            board,
            places,
            prefill_legs: vec![0; prefills],
            decode_legs: vec![0; decodes],
            under_way: HashMap::new(),
        }
    }

    fn place(&self, assignee: &Assignee) -> usize {
        self.places[&assignee.instance]
    }
}

/// What the KV blocks of these blocks of the trace are called: numbers that look like halves of hashes, and begin with their
/// place in their chain as far as a block of the trace tells it: to a sieve of 512 tokens.
fn names(blocks: &[u64]) -> impl Iterator<Item = u64> {
    const EACH: u64 = (BLOCK_TOKENS / KV_BLOCK_TOKENS) as u64;
    let name = |number: u64| {
        let mixed = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    };
    let at = move |number: u64, place: u64| name(number) & !0xff | place;
    blocks.iter().flat_map(move |block| (0..EACH).map(move |part| at(block * EACH + part, part)))
}

fn next(legs: &mut u64) -> LegId {
    *legs += 1;
    LegId(*legs)
}

impl Production {
    /// A request has come: it waits for [`Self::bind`].
    pub(crate) fn take_in(&mut self, sight: &Sight<'_>) {
        let _now = self.clock.at(sight.now_micros);
        let tokens = sight.request.prompt_tokens;
        // A block that is not full is nobody's.
        let keys: Names = names(&sight.request.chain).take((tokens / KV_BLOCK_TOKENS) as usize).collect();
        let wish = Wish {
            rank: Rank { band: 0, tenant: "all".into(), weight: 1, priority: 0 },
            wanted: Instant::now() + Duration::from_micros(Target::ttft_micros(sight.request) as u64),
            work: tokens.into(),
        };
        let chains = [Chain { dialect: self.dialect, keys: keys.into() }];
        self.board.arrived(REVISION);
        let (index, now) = (sight.index, Instant::now());
        let first_token = now + self.board.ttft_target(tokens);
        self.waiting.push(wish, Waiting { index, first_token, tokens, chains }, now);
    }

    /// As a [`super::chooser::Chooser`]'s, and so are those below.
    pub(crate) fn bind(&mut self, now_micros: u64) -> Option<(usize, Choice)> {
        if self.waiting.is_empty() {
            return None;
        }
        let _now = self.clock.at(now_micros);
        let board = &self.board;
        let fits = |waiting: &Waiting, overdue: bool| -> Option<Result<_, Infallible>> {
            let prompt = Prompt { tokens: waiting.tokens, chains: &waiting.chains };
            let new = Wanted::new(prompt, MAX_TOKENS, REVISION);
            let among = if overdue { Among::Waiting } else { Among::Roomy };
            let first_token = Some(waiting.first_token);
            match board.book(&Wanted { among, first_token, ..new }) {
                Ok(booked) => Some(Ok(booked)),
                Err(NoPlace::Busy) => None,
                Err(error) => panic!("both roles are there, and no prompt is too long: {error}"),
            }
        };
        let (Waiting { index, .. }, Ok(mut booked)) = self.waiting.next(Instant::now(), fits)?;
        let choice = match &booked.placement {
            Placement::Apart { prefill, decode } => {
                Choice { prefill: Some(self.place(prefill)), decode: self.place(decode), in_time: true }
            }
            // More than one token is wanted: it is for decode.
            Placement::Alone(assignee) => {
                Choice { prefill: None, decode: self.place(assignee), in_time: true }
            }
        };
        let prefill = choice.prefill.map(|prefill| next(&mut self.prefill_legs[prefill]));
        let legs = (prefill, next(&mut self.decode_legs[choice.decode]));
        if let Some(leg) = prefill {
            booked.credit.dispatched(Side::Prefill, leg, 1);
        }
        booked.credit.dispatched(Side::Decode, legs.1, 1);
        self.under_way.insert(index, UnderWay { credit: booked.credit, legs });
        Some((index, choice))
    }

    pub(crate) fn prefilled(&mut self, index: usize, now_micros: u64) {
        let _now = self.clock.at(now_micros);
        if let Some(UnderWay { credit, legs }) = self.under_way.get_mut(&index) {
            let instance = credit.instance(Side::Prefill).clone();
            match *legs {
                (Some(leg), _) => {
                    self.board.take_news(&instance, &[LegNews::Prefilled(leg), LegNews::ChoiceEnded(leg)]);
                }
                (None, leg) => self.board.take_news(&instance, &[LegNews::Prefilled(leg)]),
            }
            credit.prefilled();
        }
    }

    pub(crate) fn handed_off(&mut self, index: usize, now_micros: u64) {
        let _now = self.clock.at(now_micros);
        if let Some(UnderWay { credit, .. }) = self.under_way.get_mut(&index) {
            credit.prefill_ended();
        }
    }

    pub(crate) fn finished(&mut self, index: usize, output_tokens: u32, now_micros: u64) {
        let _now = self.clock.at(now_micros);
        if let Some(UnderWay { credit, legs: (_, leg) }) = self.under_way.remove(&index) {
            credit.answered(output_tokens);
            self.board.take_news(credit.instance(Side::Decode), &[LegNews::ChoiceEnded(leg)]);
        }
    }

    pub(crate) fn heard(&mut self, place: Place, report: &Report, seen: LegId, now_micros: u64) {
        let _now = self.clock.at(now_micros);
        self.board.load(&id(place), load(place, report, seen));
    }

    pub(crate) fn cached(&mut self, place: Place, changes: &Changes, now_micros: u64) {
        let _now = self.clock.at(now_micros);
        let told = |blocks: &[u64]| names(blocks).filter(|key| self.sieve.keeps(*key)).collect::<Vec<_>>();
        let (stored, evicted) = (told(&changes.stored), told(&changes.evicted));
        if let Some(feed) = self.feeds.get_mut(&place) {
            feed.change(&stored, &evicted);
        }
    }
}
