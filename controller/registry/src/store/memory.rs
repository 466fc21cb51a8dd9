//! The embedded store: one controller's state in memory, with the semantics of etcd.
//!
//! [`State`] is pure: operations and the time in, answers out. [`MemoryStore`] is its shell: a lock, and a task that
//! ends leases when their time comes. All that it holds is bounded by [`MemoryConfig`]; what goes beyond is refused.
//!
//! Nothing survives the process; that is why a store starts at a revision derived from the time of its start:
//! revisions, and with them leader and role epochs, keep growing over restarts, and a watch that an earlier
//! life had promised is answered with "compacted".

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Compare, Event, KeyRange, KeyValue, Lease, LeaseId, Listing, Operation, Revision, Store, StoreError, Txn,
    TxnOutcome, Watch, WatchBatch, WatchError, lease_seconds,
};

/// Batches a watch holds for a slow reader. One more and it is cut off, to resume by revision.
const WATCH_CAPACITY: usize = 1024;

#[derive(Debug, Clone, Copy)]
pub struct MemoryConfig {
    /// The revision the store starts at. Must be above any that an earlier life of the store reached: milliseconds
    /// since 1970 are, as long as fewer than a thousand changes are made in a second.
    pub start: Revision,
    /// Past events kept for watches that resume; older ones are compacted.
    pub history_events: usize,
    /// Watches at a time.
    pub watches: usize,
    /// Keys at a time.
    pub keys: usize,
    /// Leases at a time.
    pub leases: usize,
}

impl MemoryConfig {
    pub fn new(start: Revision) -> Self {
        Self { start, history_events: 16_384, watches: 4096, keys: 65_536, leases: 1024 }
    }
}

/// The embedded store. Cheap to clone; all clones are one store.
#[derive(Clone)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
    /// Told when the next lease to end may be an earlier one than before.
    leases_changed: Arc<Notify>,
}

impl MemoryStore {
    /// Starts an empty store and, on `tasks`, what ends its leases; it stops on `shutdown`.
    pub fn start(config: MemoryConfig, shutdown: CancellationToken, tasks: &TaskTracker) -> Self {
        let store =
            Self { state: Arc::new(Mutex::new(State::new(config))), leases_changed: Arc::new(Notify::new()) };
        tasks.spawn(store.clone().end_leases(shutdown));
        store
    }

    async fn end_leases(self, shutdown: CancellationToken) {
        loop {
            let next = {
                let mut state = self.state.lock();
                state.expire(Instant::now());
                state.next_expiry()
            };
            let idle = Instant::now() + Duration::from_secs(3600);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.leases_changed.notified() => {}
                () = tokio::time::sleep_until(next.unwrap_or(idle)) => {}
            }
        }
    }

    /// Forgets the history up to and including `revision`.
    pub fn compact(&self, revision: Revision) {
        self.state.lock().compact(revision);
    }

    /// The state as of now: leases that are due have ended, whether or not the task has run.
    fn now<R>(&self, act: impl FnOnce(&mut State, Instant) -> R) -> R {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.expire(now);
        act(&mut state, now)
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryStore")
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError> {
        Ok(self.now(|state, _| state.range(&range)))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        self.now(|state, _| state.txn(txn))
    }

    async fn watch(&self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError> {
        self.now(|state, _| state.watch(range, from))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let ttl = Duration::from_secs(lease_seconds(ttl)?);
        let lease = self.now(|state, now| state.grant(ttl, now))?;
        self.leases_changed.notify_one();
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.now(|state, now| state.keep_alive(lease, now))
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.now(|state, _| state.end_lease(lease));
        Ok(())
    }
}

struct HeldLease {
    ttl: Duration,
    ends: Instant,
    keys: BTreeSet<String>,
}

struct Watcher {
    range: KeyRange,
    batches: mpsc::Sender<Result<WatchBatch, WatchError>>,
}

/// Keys, leases, history and watchers. Time is an argument.
struct State {
    config: MemoryConfig,
    revision: Revision,
    keys: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, HeldLease>,
    last_lease: u64,
    /// One entry per transaction, oldest first; together at most `history_events` events.
    history: VecDeque<WatchBatch>,
    history_events: usize,
    /// The last revision whose events are gone.
    compacted: Revision,
    watchers: Vec<Watcher>,
}

impl State {
    fn new(config: MemoryConfig) -> Self {
        Self {
            config,
            revision: config.start,
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            // Ids of an earlier life's leases are not those of other leases now.
            last_lease: config.start.0,
            history: VecDeque::new(),
            history_events: 0,
            compacted: config.start,
            watchers: Vec::new(),
        }
    }

    fn range(&self, range: &KeyRange) -> Listing {
        let items = match range {
            KeyRange::Exact(key) => self.keys.get(key).cloned().into_iter().collect(),
            KeyRange::Prefix(prefix) => self
                .keys
                .range::<str, _>((std::ops::Bound::Included(prefix.as_str()), std::ops::Bound::Unbounded))
                .take_while(|(key, _)| key.starts_with(prefix.as_str()))
                .map(|(_, item)| item.clone())
                .collect(),
        };
        Listing { revision: self.revision, items }
    }

    fn holds(&self, condition: &Compare) -> bool {
        let item = self.keys.get(condition.key());
        let revision_is = |found: Option<Revision>, wanted: Revision| found.unwrap_or_default() == wanted;
        match condition {
            Compare::Absent { .. } => item.is_none(),
            Compare::CreateRevision { equals, .. } => {
                revision_is(item.map(|item| item.create_revision), *equals)
            }
            Compare::ModRevision { equals, .. } => revision_is(item.map(|item| item.mod_revision), *equals),
            Compare::Value { equals, .. } => item.is_some_and(|item| item.value == equals),
        }
    }

    /// `txn` has been checked.
    fn txn(&mut self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if !txn.conditions.iter().all(|condition| self.holds(condition)) {
            return Ok(TxnOutcome { succeeded: false, revision: self.revision });
        }
        for operation in &txn.operations {
            if let Operation::Put { lease: Some(lease), .. } = operation
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseNotFound(*lease));
            }
        }
        self.has_room(&txn)?;
        let revision = self.revision.next();
        let mut events = Vec::with_capacity(txn.operations.len());
        for operation in txn.operations {
            match operation {
                Operation::Put { key, value, lease } => events.push(self.put(key, value, lease, revision)),
                Operation::Delete { key } => events.extend(self.delete(&key, revision)),
                Operation::DeletePrefix { prefix } => {
                    let doomed: Vec<_> = self
                        .range(&KeyRange::Prefix(prefix))
                        .items
                        .into_iter()
                        .map(|item| item.key)
                        .collect();
                    events.extend(doomed.iter().filter_map(|key| self.delete(key, revision)));
                }
            }
        }
        self.commit(revision, events);
        Ok(TxnOutcome { succeeded: true, revision: self.revision })
    }

    /// Whether the keys that `txn` would add still fit. What it deletes is not counted: a full store takes
    /// deletions, and puts of keys it has, but nothing new beside them.
    fn has_room(&self, txn: &Txn) -> Result<(), StoreError> {
        let limit = self.config.keys;
        let added = txn
            .operations
            .iter()
            .filter(|made| matches!(made, Operation::Put { key, .. } if !self.keys.contains_key(key)))
            .count();
        if added == 0 || self.keys.len() + added <= limit {
            return Ok(());
        }
        let held = self.keys.len();
        Err(StoreError::Refused(format!("{held} keys are kept already and the limit is {limit}")))
    }

    fn put(&mut self, key: String, value: bytes::Bytes, lease: Option<LeaseId>, revision: Revision) -> Event {
        let before = self.keys.get(&key).map(|item| (item.create_revision, item.version, item.lease));
        let (create_revision, version, old_lease) = before.unwrap_or((revision, 0, None));
        if let Some(old) = old_lease.and_then(|old| self.leases.get_mut(&old)) {
            old.keys.remove(&key);
        }
        if let Some(held) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.insert(key.clone());
        }
        let version = version + 1;
        let item =
            KeyValue { key: key.clone(), value, create_revision, mod_revision: revision, version, lease };
        self.keys.insert(key, item.clone());
        Event::Put(item)
    }

    fn delete(&mut self, key: &str, revision: Revision) -> Option<Event> {
        let item = self.keys.remove(key)?;
        if let Some(held) = item.lease.and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.remove(key);
        }
        Some(Event::Delete { key: item.key, revision })
    }

    /// Makes a revision of the events, remembers them and tells the watchers.
    fn commit(&mut self, revision: Revision, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        self.revision = revision;
        let batch = WatchBatch { revision, events };
        self.watchers.retain(|watcher| match part(&batch, &watcher.range) {
            // A reader whose queue is full loses its watch, not its events: it resumes by revision.
            Some(part) => watcher.batches.try_send(Ok(part)).is_ok(),
            None => !watcher.batches.is_closed(),
        });
        self.history_events += batch.events.len();
        self.history.push_back(batch);
        while self.history_events > self.config.history_events {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(batch) = self.history.pop_front() {
            self.history_events -= batch.events.len();
            self.compacted = batch.revision;
        }
    }

    fn compact(&mut self, revision: Revision) {
        while self.history.front().is_some_and(|batch| batch.revision <= revision) {
            self.forget_oldest();
        }
    }

    fn watch(&mut self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError> {
        let from = from.unwrap_or(self.revision.next());
        // A revision still to come was promised by an earlier life of this store: that history is gone, too.
        if from <= self.compacted || from > self.revision.next() {
            let gone = Err(WatchError::Compacted(self.revision));
            return Ok(Watch::new(stream::iter([gone])));
        }
        self.watchers.retain(|watcher| !watcher.batches.is_closed());
        if self.watchers.len() >= self.config.watches {
            let limit = self.config.watches;
            return Err(StoreError::Refused(format!("{limit} watches stand already, which is the limit")));
        }
        let past: Vec<_> = self
            .history
            .iter()
            .filter(|batch| batch.revision >= from)
            .filter_map(|batch| part(batch, &range).map(Ok))
            .collect();
        let (batches, receiver) = mpsc::channel(WATCH_CAPACITY);
        self.watchers.push(Watcher { range, batches });
        Ok(Watch::new(stream::iter(past).chain(ReceiverStream::new(receiver))))
    }

    fn grant(&mut self, ttl: Duration, now: Instant) -> Result<Lease, StoreError> {
        if self.leases.len() >= self.config.leases {
            let limit = self.config.leases;
            return Err(StoreError::Refused(format!("{limit} leases run already, which is the limit")));
        }
        self.last_lease += 1;
        let id = LeaseId(self.last_lease);
        self.leases.insert(id, HeldLease { ttl, ends: now + ttl, keys: BTreeSet::new() });
        Ok(Lease { id, ttl })
    }

    fn keep_alive(&mut self, lease: LeaseId, now: Instant) -> Result<Duration, StoreError> {
        let held = self.leases.get_mut(&lease).ok_or(StoreError::LeaseNotFound(lease))?;
        held.ends = now + held.ttl;
        Ok(held.ttl)
    }

    fn end_lease(&mut self, lease: LeaseId) {
        let Some(held) = self.leases.remove(&lease) else { return };
        let revision = self.revision.next();
        let events = held.keys.iter().filter_map(|key| self.delete(key, revision)).collect();
        self.commit(revision, events);
    }

    fn expire(&mut self, now: Instant) {
        let due: Vec<_> =
            self.leases.iter().filter(|(_, held)| held.ends <= now).map(|(lease, _)| *lease).collect();
        for lease in due {
            self.end_lease(lease);
        }
    }

    fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|held| held.ends).min()
    }
}

/// What of a transaction lies in a range.
fn part(batch: &WatchBatch, range: &KeyRange) -> Option<WatchBatch> {
    let events: Vec<_> = batch.events.iter().filter(|event| range.contains(event.key())).cloned().collect();
    (!events.is_empty()).then_some(WatchBatch { revision: batch.revision, events })
}
