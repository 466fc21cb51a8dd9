//! What waits to be sent on one coordinator's stream.
//!
//! Filled by the engine's thread, which never waits for it; emptied by the stream. Updates of a leg's choice
//! that still wait are merged, so a slow coordinator costs one entry for each of them, and each at most its
//! tokens (with log probabilities 20 pairs of numbers beside each). Only refusals add entries without a live
//! leg; the reader of the stream stops reading while there are too many ([`Outbox::room`]).
//!
//! Beside them lies the instance's load, only the latest, which the engine puts there together with the updates that led
//! to it. Whoever takes it takes all updates with it: so whatever a load no longer counts has been said before it, and
//! whatever is said after it, it still counted.

use std::{collections::HashMap, ops::Range};

use baton_proto::LegId;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::engine::{
    load::Load,
    sequence::{LegUpdate, SequenceId},
};

/// Entries that may wait before no more dispatches are read.
pub const CAPACITY: usize = 4096;

/// How busy the instance is, as the coordinator of one stream is told.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Report {
    pub load: Load,
    /// The last leg of the stream that the load counts; 0 = none.
    pub seen_leg: LegId,
}

impl Report {
    /// Whether it says something new. That the engine has come a step further is no news by itself: it is told with what is.
    fn is_news_after(&self, told: &Self) -> bool {
        let mut same = *self;
        same.load.done.progress = told.load.done.progress;
        same != *told
    }
}

/// What is taken out of the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Updates alone.
    Updates,
    /// The report too, if it has changed since it was last taken.
    News,
    /// The report in any case.
    Report,
}

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
    report: Report,
    /// It has not been taken since it changed.
    is_news: bool,
    /// Whoever takes waits for it.
    is_wanted: bool,
}

#[derive(Debug)]
struct Live {
    id: SequenceId,
    choices: u32,
    /// Choices that have not ended.
    open: u32,
}

impl Outbox {
    /// Of a stream that begins under this load.
    pub fn new(load: Load) -> Self {
        let outbox = Self::default();
        outbox.state.lock().report.load = load;
        outbox
    }

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

    /// The sequence of a leg that has not ended, and which of its choices are meant by `choice`; `None` = all. Nothing if the
    /// leg has not as many: the sequences that follow it are others', of other streams maybe.
    pub fn choices(&self, leg: LegId, choice: Option<u32>) -> Option<(SequenceId, Range<u32>)> {
        let state = self.state.lock();
        let live = state.live.get(&leg)?;
        let choices = match choice {
            None => 0..live.choices,
            Some(choice) if choice < live.choices => choice..choice + 1,
            Some(_) => return None,
        };
        Some((live.id, choices))
    }

    /// Takes in an update that is not the engine's. Never blocks.
    pub fn put(&self, update: LegUpdate) {
        self.state.lock().put(update);
        self.filled.notify_one();
    }

    /// Takes in what the engine says of legs, and the load after it. Never blocks.
    pub fn tell(&self, updates: Vec<LegUpdate>, report: Report) {
        let mut state = self.state.lock();
        state.is_news |= report.is_news_after(&state.report);
        state.report = report;
        // Most steps change the load, and few streams are to be told yet.
        let awaited = !updates.is_empty() || (state.is_news && state.is_wanted);
        updates.into_iter().for_each(|update| state.put(update));
        drop(state);
        if awaited {
            self.filled.notify_one();
        }
    }

    /// What is wanted of all that waits, as soon as there is any. Cancel safe. One caller at a time.
    pub async fn take(&self, want: Want) -> (Vec<LegUpdate>, Option<Report>) {
        loop {
            let (updates, report) = self.take_now(want);
            if !updates.is_empty() || report.is_some() {
                return (updates, report);
            }
            self.filled.notified().await;
        }
    }

    /// What is wanted of all that waits; maybe nothing.
    pub fn take_now(&self, want: Want) -> (Vec<LegUpdate>, Option<Report>) {
        let mut state = self.state.lock();
        state.entries.clear();
        let updates = std::mem::take(&mut state.updates);
        let report = match want {
            Want::Updates => None,
            Want::News => state.is_news.then_some(state.report),
            Want::Report => Some(state.report),
        };
        state.is_news &= report.is_none();
        state.is_wanted = want != Want::Updates;
        drop(state);
        self.emptied.notify_one();
        (updates, report)
    }

    /// Resolves while there is room for more. One caller at a time.
    pub async fn room(&self) {
        while self.state.lock().updates.len() >= CAPACITY {
            self.emptied.notified().await;
        }
    }
}

impl State {
    fn put(&mut self, update: LegUpdate) {
        if update.end.is_some() {
            self.choice_ended(update.leg);
        }
        self.merge(update);
    }

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
            waiting.cached_tokens = waiting.cached_tokens.or(update.cached_tokens);
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
    use crate::engine::{
        load::Done,
        sequence::{FinishReason, LegEnd},
    };

    fn update(leg: u64, first_position: u32, tokens: &[u32]) -> LegUpdate {
        LegUpdate {
            leg: LegId(leg),
            choice: 0,
            first_position,
            tokens: tokens.to_vec(),
            logprobs: Vec::new(),
            cached_tokens: None,
            end: None,
        }
    }

    fn end() -> Option<LegEnd> {
        let reason = FinishReason::Stop;
        Some(LegEnd::Finished { reason, prompt_tokens: 1, cached_tokens: 0, completion_tokens: 3 })
    }

    fn put(outbox: &Outbox, updates: impl IntoIterator<Item = LegUpdate>) {
        updates.into_iter().for_each(|update| outbox.put(update));
    }

    async fn updates(outbox: &Outbox) -> Vec<LegUpdate> {
        outbox.take(Want::Updates).await.0
    }

    fn report(seen_leg: u64) -> Report {
        Report { seen_leg: LegId(seen_leg), ..Report::default() }
    }

    #[tokio::test]
    async fn what_waits_is_merged_by_leg() {
        let outbox = Outbox::default();
        assert!(outbox.open(LegId(1), SequenceId(10), 1));
        assert!(!outbox.open(LegId(1), SequenceId(11), 1));
        put(&outbox, [update(1, 0, &[5]), update(2, 7, &[6])]);
        put(&outbox, [update(1, 1, &[7])]);
        put(&outbox, [LegUpdate { end: end(), ..update(1, 2, &[8]) }]);
        assert_eq!(outbox.choices(LegId(1), None), None, "an ended leg lives on");
        let taken = updates(&outbox).await;
        assert_eq!(taken, [LegUpdate { end: end(), ..update(1, 0, &[5, 7, 8]) }, update(2, 7, &[6])]);
        assert!(futures::poll!(Box::pin(updates(&outbox))).is_pending());
    }

    #[tokio::test]
    async fn a_leg_lives_until_its_last_choice_has_ended() {
        let outbox = Outbox::default();
        assert!(outbox.open(LegId(1), SequenceId(10), 2));
        let of_choice = |choice, tokens| LegUpdate { choice, ..update(1, 0, tokens) };
        put(&outbox, [of_choice(0, &[5]), of_choice(1, &[6])]);
        put(&outbox, [LegUpdate { end: end(), choice: 1, ..update(1, 1, &[]) }]);
        assert_eq!(outbox.choices(LegId(1), None), Some((SequenceId(10), 0..2)));
        assert_eq!(outbox.choices(LegId(1), Some(1)), Some((SequenceId(10), 1..2)));
        assert_eq!(outbox.choices(LegId(1), Some(2)), None, "it has two");
        let taken = updates(&outbox).await;
        assert_eq!(taken, [of_choice(0, &[5]), LegUpdate { end: end(), ..of_choice(1, &[6]) }]);
        put(&outbox, [LegUpdate { end: end(), ..of_choice(0, &[]) }]);
        assert_eq!(outbox.choices(LegId(1), None), None);
    }

    #[tokio::test]
    async fn a_number_used_again_after_its_end_is_a_new_entry() {
        let outbox = Outbox::default();
        put(&outbox, [LegUpdate { end: end(), ..update(1, 0, &[]) }]);
        put(&outbox, [LegUpdate { end: end(), ..update(1, 0, &[]) }]);
        assert_eq!(updates(&outbox).await.len(), 2);
    }

    #[tokio::test]
    async fn reading_stops_while_it_is_full() {
        let outbox = Outbox::default();
        put(&outbox, (0..CAPACITY as u64).map(|leg| update(leg, 0, &[1])));
        let mut room = Box::pin(outbox.room());
        assert!(futures::poll!(&mut room).is_pending());
        updates(&outbox).await;
        room.await;
    }

    #[tokio::test]
    async fn a_sleeping_reader_is_woken() {
        let outbox = std::sync::Arc::new(Outbox::default());
        let reader = tokio::spawn({
            let outbox = outbox.clone();
            async move { updates(&outbox).await }
        });
        tokio::task::yield_now().await;
        put(&outbox, [update(1, 0, &[1])]);
        assert_eq!(reader.await.expect("the reader"), [update(1, 0, &[1])]);
    }

    #[tokio::test]
    async fn a_report_comes_with_all_that_led_to_it() {
        let outbox = Outbox::default();
        let told = |legs: &[u64], seen| {
            outbox.tell(legs.iter().map(|&leg| update(leg, 0, &[1])).collect(), report(seen));
        };
        told(&[1], 1);
        assert_eq!(outbox.take_now(Want::Updates), (vec![update(1, 0, &[1])], None));
        told(&[2], 2);
        told(&[3], 3);
        let all = vec![update(2, 0, &[1]), update(3, 0, &[1])];
        assert_eq!(outbox.take_now(Want::News), (all, Some(report(3))));
        told(&[4], 3);
        assert_eq!(outbox.take_now(Want::News), (vec![update(4, 0, &[1])], None), "nothing new of the load");
        assert_eq!(outbox.take_now(Want::Report), (vec![], Some(report(3))));
    }

    #[tokio::test]
    async fn a_new_load_wakes_whoever_wants_it_and_nobody_else() {
        let outbox = Outbox::default();
        assert!(futures::poll!(Box::pin(updates(&outbox))).is_pending());
        outbox.tell(Vec::new(), report(3));
        assert!(
            futures::poll!(Box::pin(outbox.filled.notified())).is_pending(),
            "only updates are waited for"
        );
        assert_eq!(outbox.take(Want::News).await, (vec![], Some(report(3))), "and it is not lost");

        let outbox = Outbox::default();
        assert!(futures::poll!(Box::pin(outbox.take(Want::News))).is_pending());
        let done = Done { progress: 5, ..Done::default() };
        outbox.tell(Vec::new(), Report { load: Load { done, ..Load::default() }, ..report(0) });
        assert!(futures::poll!(Box::pin(outbox.filled.notified())).is_pending(), "it has not changed");
        let mut news = Box::pin(outbox.take(Want::News));
        assert!(futures::poll!(&mut news).is_pending());
        outbox.tell(Vec::new(), report(7));
        assert_eq!(news.await, (vec![], Some(report(7))));
    }
}
