//! What the prefix cache holds, for readers outside the engine: the whole of it once, then each change.
//!
//! Filled by the engine's thread after each step, read by [`crate::kv_cache`] for each subscriber. The engine never
//! waits for a reader: the newest changes are kept, as many as [`Kept`] says, for those that are slow and those that come
//! back; one that has missed others gets the whole again.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use baton_proto::BlockHash;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::blocks::CacheChange;

/// What one step changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Counts changes from 1.
    pub sequence: u64,
    pub stored: Vec<BlockHash>,
    /// No hash is in both.
    pub evicted: Vec<BlockHash>,
}

impl Change {
    fn blocks(&self) -> usize {
        self.stored.len() + self.evicted.len()
    }
}

/// What a reader gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// Everything, after the change of this number; readers of the same number share it.
    Snapshot { sequence: u64, stored: Arc<[BlockHash]> },
    /// What came after the event before it.
    Change(Arc<Change>),
}

/// How much is kept of what has been: whichever is less.
#[derive(Debug, Clone, Copy)]
struct Kept {
    changes: usize,
    /// Of all those changes, in blocks of 16 bytes; the newest change is kept however many it has.
    blocks: usize,
}

/// Some seconds of a busy engine's steps, in a megabyte.
const KEPT: Kept = Kept { changes: 1024, blocks: 64 << 10 };

/// See the module.
#[derive(Debug)]
pub struct CacheEvents {
    state: Mutex<State>,
    kept: Kept,
    /// The last change's number.
    news: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    stored: HashSet<BlockHash>,
    /// The last changes, in order, and how many blocks are in them.
    changes: VecDeque<Arc<Change>>,
    changed_blocks: usize,
    /// What is stored, as it was copied for a reader since the last change. Copying holds up the engine, so that all that
    /// come at once, as after a break of the network, make do with one copy.
    copied: Option<Arc<[BlockHash]>>,
}

impl State {
    fn keep(&mut self, change: Change, kept: Kept) {
        self.sequence = change.sequence;
        self.copied = None;
        self.changed_blocks += change.blocks();
        self.changes.push_back(Arc::new(change));
        let over = |state: &Self| state.changes.len() > kept.changes || state.changed_blocks > kept.blocks;
        while self.changes.len() > 1 && over(self) {
            let oldest = self.changes.pop_front();
            self.changed_blocks -= oldest.map_or(0, |change| change.blocks());
        }
    }

    /// The change that follows one, if it is kept.
    fn change_after(&self, sequence: u64) -> Option<&Arc<Change>> {
        let before_kept = self.sequence - self.changes.len() as u64;
        self.changes.get(usize::try_from(sequence.checked_sub(before_kept)?).ok()?)
    }
}

impl Default for CacheEvents {
    fn default() -> Self {
        Self::new(KEPT)
    }
}

impl CacheEvents {
    fn new(kept: Kept) -> Self {
        Self { state: Mutex::default(), kept, news: watch::Sender::new(0) }
    }

    /// Takes in what changed, in order. Of what came and went nothing is said.
    pub fn publish(&self, changes: Vec<CacheChange>) {
        if changes.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        // By hash, whether it was stored before.
        let mut touched: HashMap<BlockHash, bool> = HashMap::new();
        for change in changes {
            let (hash, was) = match change {
                CacheChange::Stored(hash) => (hash, !state.stored.insert(hash)),
                CacheChange::Evicted(hash) => (hash, state.stored.remove(&hash)),
            };
            touched.entry(hash).or_insert(was);
        }
        let mut change = Change { sequence: state.sequence + 1, ..Change::default() };
        for (hash, was) in touched {
            match (was, state.stored.contains(&hash)) {
                (false, true) => change.stored.push(hash),
                (true, false) => change.evicted.push(hash),
                (true, true) | (false, false) => {}
            }
        }
        if change.blocks() > 0 {
            state.keep(change, self.kept);
            let sequence = state.sequence;
            drop(state);
            self.news.send_replace(sequence);
        }
    }

    /// A new reader; its first event is a snapshot.
    pub fn subscribe(self: &Arc<Self>) -> Reader {
        Reader { events: self.clone(), news: self.news.subscribe(), at: None }
    }

    /// One that has everything up to a change, whose first event is the next; `None`: not all of those since are kept.
    pub fn resume(self: &Arc<Self>, sequence: u64) -> Option<Reader> {
        let can = {
            let state = self.state.lock();
            sequence == state.sequence || state.change_after(sequence).is_some()
        };
        can.then(|| Reader { at: Some(sequence), ..self.subscribe() })
    }

    /// What a reader gets who has everything up to a change, if there is any; `None` has nothing.
    fn after(&self, at: Option<u64>) -> Option<CacheEvent> {
        let state = &mut *self.state.lock();
        let at_the_end = at == Some(state.sequence);
        let change = at.and_then(|at| state.change_after(at)).cloned().map(CacheEvent::Change);
        let State { sequence, stored, copied, .. } = state;
        let snapshot = || {
            let stored = copied.get_or_insert_with(|| stored.iter().copied().collect()).clone();
            CacheEvent::Snapshot { sequence: *sequence, stored }
        };
        (!at_the_end).then(|| change.unwrap_or_else(snapshot))
    }
}

/// One subscriber.
#[derive(Debug)]
pub struct Reader {
    events: Arc<CacheEvents>,
    news: watch::Receiver<u64>,
    /// Of its last event; `None` = it had none.
    at: Option<u64>,
}

impl Reader {
    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> CacheEvent {
        loop {
            if let Some(event) = self.events.after(self.at) {
                self.at = Some(match &event {
                    CacheEvent::Snapshot { sequence, .. } => *sequence,
                    CacheEvent::Change(change) => change.sequence,
                });
                return event;
            }
            // It cannot be closed while `events` is held.
            let _ = self.news.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

    const FEW: Kept = Kept { changes: 4, blocks: 12 };

    fn hash(number: u32) -> BlockHash {
        BlockHash::root("test", "").child(&[number])
    }

    fn stored(numbers: impl IntoIterator<Item = u32>) -> Vec<CacheChange> {
        numbers.into_iter().map(|number| CacheChange::Stored(hash(number))).collect()
    }

    /// What a reader knows after it has been told.
    fn learn(known: &mut Option<(u64, HashSet<BlockHash>)>, event: CacheEvent) {
        match event {
            CacheEvent::Snapshot { sequence, stored } => {
                *known = Some((sequence, stored.iter().copied().collect()))
            }
            CacheEvent::Change(change) => {
                let (sequence, known) = known.as_mut().expect("a snapshot comes first");
                assert_eq!(change.sequence, *sequence + 1, "something is missing");
                *sequence = change.sequence;
                assert!(change.stored.iter().all(|hash| known.insert(*hash)), "stored twice");
                assert!(change.evicted.iter().all(|hash| known.remove(hash)), "evicted, not stored");
            }
        }
    }

    #[test]
    fn a_snapshot_comes_first_and_again_to_a_reader_that_missed_changes() {
        let events = Arc::new(CacheEvents::new(FEW));
        events.publish(stored([1]));
        let mut reader = events.subscribe();
        let next = |reader: &mut Reader| reader.next().now_or_never();
        assert_eq!(next(&mut reader), Some(CacheEvent::Snapshot { sequence: 1, stored: [hash(1)].into() }));
        assert_eq!(next(&mut reader), None);
        events.publish(stored([2]));
        assert!(matches!(next(&mut reader), Some(CacheEvent::Change(change)) if change.sequence == 2));
        (3..8).for_each(|number| events.publish(stored([number])));
        let Some(CacheEvent::Snapshot { sequence: 7, stored }) = next(&mut reader) else {
            panic!("no snapshot")
        };
        assert_eq!(stored.len(), 7);
        assert_eq!(next(&mut reader), None);
    }

    #[test]
    fn of_what_came_and_went_within_a_step_nothing_is_said() {
        let events = Arc::new(CacheEvents::new(FEW));
        let evicted = |number| CacheChange::Evicted(hash(number));
        events.publish([stored([1]), vec![evicted(1)]].concat());
        events.publish(Vec::new());
        assert_eq!(events.state.lock().sequence, 0);
        events.publish(stored([1, 2]));
        events.publish([vec![evicted(1)], stored([1, 3]), vec![evicted(2)]].concat());
        let mut reader = events.resume(2).expect("there is nothing to miss");
        assert_eq!(events.state.lock().stored, HashSet::from([hash(1), hash(3)]));
        events.publish([vec![evicted(1)], stored([1, 4]), vec![evicted(3)]].concat());
        let change = Change { sequence: 3, stored: vec![hash(4)], evicted: vec![hash(3)] };
        assert_eq!(reader.next().now_or_never(), Some(CacheEvent::Change(Arc::new(change))));
    }

    #[test]
    fn whoever_comes_back_gets_what_came_since_if_that_is_kept() {
        let events = Arc::new(CacheEvents::new(FEW));
        (1..=10).for_each(|number| events.publish(stored([number])));
        for kept in 6..=10 {
            let mut reader = events.resume(kept).expect("is kept");
            for sequence in kept + 1..=10 {
                let change = Change { sequence, stored: vec![hash(sequence as u32)], evicted: Vec::new() };
                assert_eq!(reader.next().now_or_never(), Some(CacheEvent::Change(Arc::new(change))));
            }
            assert_eq!(reader.next().now_or_never(), None);
        }
        for lost in [0, 5, 11, u64::MAX] {
            assert!(events.resume(lost).is_none(), "{lost}");
        }
        // As many blocks as four changes may not have together, and then as one alone may.
        events.publish(stored(20..29));
        assert!(events.resume(7).is_some() && events.resume(6).is_none());
        events.publish(stored(40..44));
        assert!(events.resume(11).is_some() && events.resume(10).is_none());
        events.publish(stored(50..80));
        assert!(events.resume(12).is_some() && events.resume(11).is_none());
        assert_eq!(events.state.lock().changed_blocks, 30);
    }

    #[test]
    fn readers_that_come_at_once_share_one_copy() {
        let events = Arc::new(CacheEvents::new(FEW));
        events.publish(stored([1, 2]));
        let snapshot = || match events.subscribe().next().now_or_never() {
            Some(CacheEvent::Snapshot { stored, .. }) => stored,
            other => panic!("{other:?}"),
        };
        let first = snapshot();
        events.publish(Vec::new());
        events.publish(vec![CacheChange::Evicted(hash(1)), CacheChange::Stored(hash(1))]);
        assert!(Arc::ptr_eq(&first, &snapshot()), "nothing has changed");
        events.publish(stored([3]));
        assert_eq!(snapshot().len(), 3);
    }

    proptest! {
        #[test]
        fn whoever_reads_whenever_knows_what_is_stored(
            steps in prop::collection::vec((prop::collection::vec(0u32..12, 0..6), 0usize..8, 0..4), 1..120),
        ) {
            let events = Arc::new(CacheEvents::new(FEW));
            let (mut reader, mut known) = (events.subscribe(), None);
            let mut truth = HashSet::new();
            for (numbers, reads, again) in steps {
                let flip = |number| {
                    let hash = hash(number);
                    let stored = truth.insert(hash) || !truth.remove(&hash);
                    if stored { CacheChange::Stored(hash) } else { CacheChange::Evicted(hash) }
                };
                events.publish(numbers.into_iter().map(flip).collect());
                match (again, &known) {
                    (0, _) => (reader, known) = (events.subscribe(), None),
                    (1, Some((sequence, _))) => match events.resume(*sequence) {
                        Some(back) => reader = back,
                        None => (reader, known) = (events.subscribe(), None),
                    },
                    _ => {}
                }
                (0..reads).filter_map(|_| reader.next().now_or_never()).for_each(|event| learn(&mut known, event));
            }
            while let Some(event) = reader.next().now_or_never() {
                learn(&mut known, event);
            }
            prop_assert_eq!(known.expect("a snapshot").1, truth);
        }
    }
}
