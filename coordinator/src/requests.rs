//! The requests this coordinator carries, for operators.
//!
//! Every request has a [`Card`] from arrival to its end; [`crate::admin`] lists them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use baton_proto::{InstanceId, RequestId};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::schedule::Placement;

/// How far a request has come. Tokens are those of all its prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Its body is being read, checked and tokenised.
    Preparing,
    /// Waits for admission.
    Queued { prompt_tokens: u32 },
    /// Its legs are with instances; of several prompts, those of the one that was placed last.
    Placed { prompt_tokens: u32, prefill: InstanceId, decode: InstanceId },
}

/// One request, as operators see it.
#[derive(Debug)]
pub struct Card {
    pub request: RequestId,
    pub arrived: Instant,
    stage: Mutex<Stage>,
    completion_tokens: AtomicU32,
}

impl Card {
    pub fn stage(&self) -> Stage {
        self.stage.lock().clone()
    }

    pub fn completion_tokens(&self) -> u32 {
        self.completion_tokens.load(Ordering::Relaxed)
    }
}

/// All cards.
#[derive(Debug, Default)]
pub struct Roster {
    cards: Mutex<HashMap<u64, Arc<Card>>>,
    next: AtomicU64,
}

impl Roster {
    /// A request has arrived; it is listed until the guard is dropped.
    pub fn enter(self: &Arc<Self>, request: RequestId, arrived: Instant) -> CardGuard {
        let card = Card {
            request,
            arrived,
            stage: Mutex::new(Stage::Preparing),
            completion_tokens: AtomicU32::new(0),
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
}

/// Keeps a request listed.
#[derive(Debug)]
pub struct CardGuard {
    roster: Arc<Roster>,
    key: u64,
    card: Arc<Card>,
}

impl CardGuard {
    pub fn card(&self) -> &Card {
        &self.card
    }

    pub fn set(&self, stage: Stage) {
        *self.card.stage.lock() = stage;
    }

    /// The request, or one of its prompts, has been placed, or placed again.
    pub fn placed(&self, placement: &Placement) {
        let (prefill, decode) = match placement {
            Placement::Alone(seat) => (seat, seat),
            Placement::Apart { prefill, decode } => (prefill, decode),
        };
        let mut stage = self.card.stage.lock();
        let prompt_tokens = match *stage {
            Stage::Preparing => 0,
            Stage::Queued { prompt_tokens } | Stage::Placed { prompt_tokens, .. } => prompt_tokens,
        };
        *stage = Stage::Placed {
            prompt_tokens,
            prefill: prefill.instance.clone(),
            decode: decode.instance.clone(),
        };
    }

    pub fn set_completion_tokens(&self, tokens: u32) {
        self.card.completion_tokens.store(tokens, Ordering::Relaxed);
    }
}

impl Drop for CardGuard {
    fn drop(&mut self) {
        self.roster.cards.lock().remove(&self.key);
    }
}
