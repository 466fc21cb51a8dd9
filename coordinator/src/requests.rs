//! The requests this coordinator carries, for operators.
//!
//! Every request of a caller who is known has a [`Card`] from arrival to its end, with why it was placed where it was, or
//! refused; [`crate::admin`] shows them. Those of the last that have ended are kept for the question that comes afterwards:
//! [`ENDED_KEPT`] that were placed, and as many that were not, so that whoever sends what is refused pushes out none that was placed.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_process::prefetch::prefetch;
use baton_proto::{ApiError, InstanceId, RequestId};
use baton_schedule::{Placement, Receipt, board::Booking};
use parking_lot::Mutex;
use tokio::time::Instant;

/// How far a request has come. Tokens are those of all its prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Its body is being read, checked and tokenised.
    Preparing,
    /// Waits for admission, in the line of its model.
    Queued { model: Arc<str>, prompt_tokens: u32 },
    /// Its legs are with instances; of several prompts, those of the one that was placed last.
    Placed { model: Arc<str>, prompt_tokens: u32, prefill: InstanceId, decode: InstanceId },
}

/// Cards of ended requests that are kept, of those that were placed and of the others.
pub const ENDED_KEPT: usize = 1024;
/// Placings that a card keeps, the last ones.
const PLACINGS_KEPT: usize = 8;

/// That a request, or one of its prompts, was placed.
#[derive(Debug, Clone)]
pub struct Placing {
    pub at: Instant,
    /// The error for which it left the place it had; `None` = it had none.
    pub because: Option<ApiError>,
    /// In the line of its model, before.
    pub waited: Duration,
    pub placement: Placement,
    pub receipt: Receipt,
}

#[derive(Debug, Default)]
struct Placings {
    kept: VecDeque<Placing>,
    left_out: u32,
}

/// One request, as operators see it.
#[derive(Debug)]
pub struct Card {
    pub request: RequestId,
    pub arrived: Instant,
    /// The name of the API key it came with; empty without one.
    pub api_key: Arc<str>,
    stage: Mutex<Stage>,
    completion_tokens: AtomicU32,
    placings: Mutex<Placings>,
    error: OnceLock<ApiError>,
}

impl Placing {
    /// As it was just booked.
    pub fn new(booking: &Booking, because: Option<ApiError>, waited: Duration) -> Self {
        let (placement, receipt) = (booking.placement.clone(), booking.receipt.clone());
        Self { at: Instant::now(), because, waited, placement, receipt }
    }
}

impl Card {
    pub fn stage(&self) -> Stage {
        self.stage.lock().clone()
    }

    /// Has the processor fetch what changes with every token.
    pub fn prefetch(&self) {
        prefetch(&self.completion_tokens);
    }

    pub fn completion_tokens(&self) -> u32 {
        self.completion_tokens.load(Ordering::Relaxed)
    }

    /// It is refused, or fails; what it is told first counts.
    pub fn failed(&self, error: &ApiError) {
        self.error.get_or_init(|| error.clone());
    }

    /// For what it was refused, or failed.
    pub fn error(&self) -> Option<&ApiError> {
        self.error.get()
    }

    fn was_placed(&self) -> bool {
        !self.placings.lock().kept.is_empty()
    }

    /// Where it was placed and why, in order, and how many earlier ones are not kept.
    pub fn placings(&self) -> (Vec<Placing>, u32) {
        let placings = self.placings.lock();
        (placings.kept.iter().cloned().collect(), placings.left_out)
    }
}

/// Cards of requests that have ended, the oldest first.
#[derive(Debug, Default)]
struct Ended {
    placed: VecDeque<Arc<Card>>,
    never_placed: VecDeque<Arc<Card>>,
}

impl Ended {
    fn keep(&mut self, card: Arc<Card>) {
        let kept = if card.was_placed() { &mut self.placed } else { &mut self.never_placed };
        if kept.len() >= ENDED_KEPT {
            kept.pop_front();
        }
        kept.push_back(card);
    }

    /// The one that came last.
    fn find(&self, is: impl FnMut(&&Arc<Card>) -> bool) -> Option<Arc<Card>> {
        self.placed.iter().chain(&self.never_placed).filter(is).max_by_key(|card| card.arrived).cloned()
    }
}

/// All cards.
#[derive(Debug, Default)]
pub struct Roster {
    cards: Mutex<HashMap<u64, Arc<Card>>>,
    ended: Mutex<Ended>,
    next: AtomicU64,
}

/// A request that is known, and whether it runs.
#[derive(Debug, Clone)]
pub enum Lookup {
    Running(Arc<Card>),
    Ended(Arc<Card>),
}

impl Roster {
    /// A request has arrived; it is listed until the guard is dropped.
    pub fn enter(self: &Arc<Self>, request: RequestId, arrived: Instant, api_key: Arc<str>) -> CardGuard {
        let card = Card {
            request,
            arrived,
            api_key,
            stage: Mutex::new(Stage::Preparing),
            completion_tokens: AtomicU32::new(0),
            placings: Mutex::default(),
            error: OnceLock::new(),
        };
        let card = Arc::new(card);
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        self.cards.lock().insert(key, card.clone());
        CardGuard { roster: self.clone(), key, card }
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<Arc<Card>> {
        let mut cards: Vec<_> = self.cards.lock().iter().map(|(key, card)| (*key, card.clone())).collect();
        cards.sort_unstable_by_key(|(key, _)| *key);
        cards.into_iter().map(|(_, card)| card).collect()
    }

    /// The last one of this id, whether it runs or is among the last that have ended.
    pub fn find(&self, request: &str) -> Option<Lookup> {
        let is = |card: &&Arc<Card>| card.request.as_str() == request;
        let running = self.list().iter().rev().find(is).cloned();
        running.map(Lookup::Running).or_else(|| self.ended.lock().find(is).map(Lookup::Ended))
    }
}

/// Keeps a request listed.
#[derive(Debug)]
pub struct CardGuard {
    roster: Arc<Roster>,
    key: u64,
    card: Arc<Card>,
}

impl CardGuard {
    pub fn card(&self) -> &Arc<Card> {
        &self.card
    }

    pub fn set(&self, stage: Stage) {
        *self.card.stage.lock() = stage;
    }

    /// The request, or one of its prompts, has been placed; again, if that is `because` of a failure.
    pub fn placed(&self, placing: Placing) {
        let [prefill, decode] = placing.placement.both();
        let mut stage = self.card.stage.lock();
        let (model, prompt_tokens) = match &*stage {
            Stage::Preparing => (Arc::default(), 0),
            Stage::Queued { model, prompt_tokens } | Stage::Placed { model, prompt_tokens, .. } => {
                (model.clone(), *prompt_tokens)
            }
        };
        *stage = Stage::Placed {
            model,
            prompt_tokens,
            prefill: prefill.instance.clone(),
            decode: decode.instance.clone(),
        };
        drop(stage);
        let placings = &mut *self.card.placings.lock();
        if placings.kept.len() >= PLACINGS_KEPT {
            placings.kept.pop_front();
            placings.left_out += 1;
        }
        placings.kept.push_back(placing);
    }

    pub fn set_completion_tokens(&self, tokens: u32) {
        self.card.completion_tokens.store(tokens, Ordering::Relaxed);
    }
}

impl Drop for CardGuard {
    fn drop(&mut self) {
        self.roster.cards.lock().remove(&self.key);
        self.roster.ended.lock().keep(self.card.clone());
    }
}
