//! What waits to be sent on one coordinator's stream.
//!
//! Filled by the engine's thread, which never waits for it; emptied by the stream. Updates of a leg's choice
//! that still wait are merged, so a slow coordinator costs one entry for each of them, and each at most its
//! tokens (with log probabilities 20 pairs of numbers beside each). Only refusals add entries without a live
//! leg; the reader of the stream stops reading while there are too many ([`Outbox::room`]).

use std::collections::HashMap;

use baton_proto::LegId;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::engine::sequence::{LegUpdate, SequenceId};

/// Entries that may wait before no more dispatches are read.
pub const CAPACITY: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<State>,
    filled: Notify,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// In the order in which their legs first had something to say.
    updates: Vec<LegUpdate>,
    /// Where in `updates` the entry of a leg's choice is.
    entries: HashMap<(LegId, u32), usize>,
    /// Legs that have not ended.
    live: HashMap<LegId, Live>,
}

#[derive(Debug)]
struct Live {
    id: SequenceId,
    choices: u32,
    /// Choices that have not ended.
    open: u32,
}

impl Outbox {
    /// Registers a leg of so many choices. False if one of that number lives.
    #[must_use]
    pub fn open(&self, leg: LegId, id: SequenceId, choices: u32) -> bool {
        let mut state = self.state.lock();
        if state.live.contains_key(&leg) {
            return false;
        }
        state.live.insert(leg, Live { id, choices, open: choices });
        true
    }

    /// The sequence and the choices of a leg that has not ended.
    pub fn sequence(&self, leg: LegId) -> Option<(SequenceId, u32)> {
        self.state.lock().live.get(&leg).map(|live| (live.id, live.choices))
    }

    /// Takes updates in. Never blocks.
    pub fn put(&self, updates: impl IntoIterator<Item = LegUpdate>) {
        let mut state = self.state.lock();
        for update in updates {
            if update.end.is_some() {
                state.choice_ended(update.leg);
            }
            state.merge(update);
        }
        drop(state);
        self.filled.notify_one();
    }

    /// Everything that waits, as soon as anything does. Cancel safe. One caller at a time.
    pub async fn take(&self) -> Vec<LegUpdate> {
        loop {
            let updates = self.take_now();
            if !updates.is_empty() {
                return updates;
            }
            self.filled.notified().await;
        }
    }

    /// Everything that waits; maybe nothing.
    pub fn take_now(&self) -> Vec<LegUpdate> {
        let mut state = self.state.lock();
        state.entries.clear();
        let updates = std::mem::take(&mut state.updates);
        drop(state);
        self.emptied.notify_one();
        updates
    }

    /// Resolves while there is room for more. One caller at a time.
    pub async fn room(&self) {
        while self.state.lock().updates.len() >= CAPACITY {
            self.emptied.notified().await;
        }
    }
}

impl State {
    fn choice_ended(&mut self, leg: LegId) {
        let Some(live) = self.live.get_mut(&leg) else { return };
        live.open = live.open.saturating_sub(1);
        if live.open == 0 {
            self.live.remove(&leg);
        }
    }

    fn merge(&mut self, update: LegUpdate) {
        if let Some(&at) = self.entries.get(&(update.leg, update.choice))
            && let Some(waiting) = self.updates.get_mut(at)
            && waiting.end.is_none()
        {
            debug_assert_eq!(
                waiting.first_position as usize + waiting.tokens.len(),
                update.first_position as usize
            );
            waiting.tokens.extend(update.tokens);
            waiting.logprobs.extend(update.logprobs);
            waiting.end = update.end;
        } else {
            self.entries.insert((update.leg, update.choice), self.updates.len());
            self.updates.push(update);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::sequence::{FinishReason, LegEnd};

    fn update(leg: u64, first_position: u32, tokens: &[u32]) -> LegUpdate {
        LegUpdate {
            leg: LegId(leg),
            choice: 0,
            first_position,
            tokens: tokens.to_vec(),
            logprobs: Vec::new(),
            end: None,
        }
    }

    fn end() -> Option<LegEnd> {
        let reason = FinishReason::Stop;
        Some(LegEnd::Finished { reason, prompt_tokens: 1, cached_tokens: 0, completion_tokens: 3 })
    }

    #[tokio::test]
    async fn what_waits_is_merged_by_leg() {
        let outbox = Outbox::default();
        assert!(outbox.open(LegId(1), SequenceId(10), 1));
        assert!(!outbox.open(LegId(1), SequenceId(11), 1));
        outbox.put([update(1, 0, &[5]), update(2, 7, &[6])]);
        outbox.put([update(1, 1, &[7])]);
        outbox.put([LegUpdate { end: end(), ..update(1, 2, &[8]) }]);
        assert_eq!(outbox.sequence(LegId(1)), None, "an ended leg lives on");
        let taken = outbox.take().await;
        assert_eq!(taken, [LegUpdate { end: end(), ..update(1, 0, &[5, 7, 8]) }, update(2, 7, &[6])]);
        assert!(futures::poll!(Box::pin(outbox.take())).is_pending());
    }

    #[tokio::test]
    async fn a_leg_lives_until_its_last_choice_has_ended() {
        let outbox = Outbox::default();
        assert!(outbox.open(LegId(1), SequenceId(10), 2));
        let of_choice = |choice, tokens| LegUpdate { choice, ..update(1, 0, tokens) };
        outbox.put([of_choice(0, &[5]), of_choice(1, &[6])]);
        outbox.put([LegUpdate { end: end(), choice: 1, ..update(1, 1, &[]) }]);
        assert_eq!(outbox.sequence(LegId(1)), Some((SequenceId(10), 2)));
        let taken = outbox.take().await;
        assert_eq!(taken, [of_choice(0, &[5]), LegUpdate { end: end(), ..of_choice(1, &[6]) }]);
        outbox.put([LegUpdate { end: end(), ..of_choice(0, &[]) }]);
        assert_eq!(outbox.sequence(LegId(1)), None);
    }

    #[tokio::test]
    async fn a_number_used_again_after_its_end_is_a_new_entry() {
        let outbox = Outbox::default();
        outbox.put([LegUpdate { end: end(), ..update(1, 0, &[]) }]);
        outbox.put([LegUpdate { end: end(), ..update(1, 0, &[]) }]);
        assert_eq!(outbox.take().await.len(), 2);
    }

    #[tokio::test]
    async fn reading_stops_while_it_is_full() {
        let outbox = Outbox::default();
        outbox.put((0..CAPACITY as u64).map(|leg| update(leg, 0, &[1])));
        let mut room = Box::pin(outbox.room());
        assert!(futures::poll!(&mut room).is_pending());
        outbox.take().await;
        room.await;
    }

    #[tokio::test]
    async fn a_sleeping_reader_is_woken() {
        let outbox = std::sync::Arc::new(Outbox::default());
        let reader = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.take().await }
        });
        tokio::task::yield_now().await;
        outbox.put([update(1, 0, &[1])]);
        assert_eq!(reader.await.expect("the reader"), [update(1, 0, &[1])]);
    }
}
