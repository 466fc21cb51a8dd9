//! What the prefix cache holds, for readers outside the engine: the whole of it once, then each change.
//!
//! Filled by the engine's thread after each step, read by [`crate::kv_cache`] for each subscriber. The engine never
//! waits for a reader: of the changes that a reader has not taken the newest [`CAPACITY`] are kept, and one that has
//! missed some gets the whole again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use baton_proto::BlockHash;
use parking_lot::Mutex;
use tokio::sync::broadcast::{self, error::RecvError};

use super::blocks::CacheChange;

/// Changes that are kept for slow readers.
pub const CAPACITY: usize = 256;

/// What one step changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Counts changes from 1.
    pub sequence: u64,
    pub stored: Vec<BlockHash>,
    /// No hash is in both.
    pub evicted: Vec<BlockHash>,
}

/// What a reader gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// Everything, after the change of this number; readers of the same number share it.
    Snapshot { sequence: u64, stored: Arc<[BlockHash]> },
    /// What came after the event before it.
    Change(Arc<Change>),
}

/// See the module.
#[derive(Debug)]
pub struct CacheEvents {
    state: Mutex<State>,
    changes: broadcast::Sender<Arc<Change>>,
}

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    stored: HashSet<BlockHash>,
    /// What is stored, as it was copied for a reader since the last change. Copying holds up the engine, so that all that
    /// come at once, as after a break of the network, make do with one copy.
    copied: Option<Arc<[BlockHash]>>,
}

impl Default for CacheEvents {
    fn default() -> Self {
        Self::new(CAPACITY)
    }
}

impl CacheEvents {
    fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), changes: broadcast::Sender::new(capacity) }
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
        if !change.stored.is_empty() || !change.evicted.is_empty() {
            state.sequence = change.sequence;
            state.copied = None;
            // Under the lock, so that a snapshot and what follows it fit. An error means that nobody reads.
            let _ = self.changes.send(Arc::new(change));
        }
    }

    /// A new reader; its first event is a snapshot.
    pub fn subscribe(self: &Arc<Self>) -> Reader {
        Reader { events: self.clone(), changes: None }
    }

    fn snapshot(&self) -> (CacheEvent, broadcast::Receiver<Arc<Change>>) {
        let State { sequence, stored, copied } = &mut *self.state.lock();
        let stored = copied.get_or_insert_with(|| stored.iter().copied().collect()).clone();
        (CacheEvent::Snapshot { sequence: *sequence, stored }, self.changes.subscribe())
    }
}

/// One subscriber.
#[derive(Debug)]
pub struct Reader {
    events: Arc<CacheEvents>,
    changes: Option<broadcast::Receiver<Arc<Change>>>,
}

impl Reader {
    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> CacheEvent {
        if let Some(changes) = &mut self.changes {
            match changes.recv().await {
                Ok(change) => return CacheEvent::Change(change),
                // `Closed` does not come while `events` is held.
                Err(RecvError::Lagged(_) | RecvError::Closed) => {}
            }
        }
        let (snapshot, changes) = self.events.snapshot();
        self.changes = Some(changes);
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

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
        let events = Arc::new(CacheEvents::new(4));
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
        let events = Arc::new(CacheEvents::new(4));
        let evicted = |number| CacheChange::Evicted(hash(number));
        events.publish([stored([1]), vec![evicted(1)]].concat());
        events.publish(Vec::new());
        assert_eq!(events.state.lock().sequence, 0);
        events.publish(stored([1, 2]));
        events.publish([vec![evicted(1)], stored([1, 3]), vec![evicted(2)]].concat());
        let mut reader = events.changes.subscribe();
        assert_eq!(events.state.lock().stored, HashSet::from([hash(1), hash(3)]));
        events.publish([vec![evicted(1)], stored([1, 4]), vec![evicted(3)]].concat());
        let change = reader.try_recv().expect("a change");
        assert_eq!(*change, Change { sequence: 3, stored: vec![hash(4)], evicted: vec![hash(3)] });
    }

    #[test]
    fn readers_that_come_at_once_share_one_copy() {
        let events = Arc::new(CacheEvents::new(4));
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
            steps in prop::collection::vec((prop::collection::vec(0u32..12, 0..6), 0usize..8, any::<bool>()), 1..120),
        ) {
            let events = Arc::new(CacheEvents::new(3));
            let (mut reader, mut known) = (events.subscribe(), None);
            let mut truth = HashSet::new();
            for (numbers, reads, again) in steps {
                let flip = |number| {
                    let hash = hash(number);
                    let stored = truth.insert(hash) || !truth.remove(&hash);
                    if stored { CacheChange::Stored(hash) } else { CacheChange::Evicted(hash) }
                };
                events.publish(numbers.into_iter().map(flip).collect());
                if again {
                    (reader, known) = (events.subscribe(), None);
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
