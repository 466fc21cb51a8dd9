//! The store of the simulation: etcd's semantics in memory, on virtual time, behind a network that the world decides.
//!
//! A controller has a [`Client`], whose calls wait in an outbox until the world takes them. What reaches the
//! [`Keeper`] is carried out at that moment, and audited: who wrote, under which fence, and what.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use baton_proto::Role;
use baton_registry::{
    Compare, DesiredRole, KeyRange, KeyValue, Lease, LeaseId, Listing, Operation, Revision, Store,
    StoreError, Txn, TxnOutcome, Watch, keys,
};
use tokio::sync::oneshot;

#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Range(KeyRange),
    Txn(Txn),
    Grant(Duration),
    KeepAlive(LeaseId),
    Revoke(LeaseId),
}

#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Listing(Listing),
    Outcome(TxnOutcome),
    Lease(Lease),
    Left(Duration),
    Done,
}

pub(crate) type Answered = Result<Answer, StoreError>;

/// A call on its way to the store.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) answer: oneshot::Sender<Answered>,
}

/// A controller's end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Client {
    outbox: Arc<Mutex<Vec<Request>>>,
}

impl Client {
    pub(crate) fn take(&self) -> Vec<Request> {
        std::mem::take(&mut self.outbox.lock().expect("nobody panicked"))
    }

    async fn call(&self, ask: Ask) -> Answered {
        let (answer, answered) = oneshot::channel();
        self.outbox.lock().expect("nobody panicked").push(Request { ask, answer });
        answered.await.unwrap_or_else(|_| Err(StoreError::Unavailable("the world has ended".into())))
    }
}

#[async_trait]
impl Store for Client {
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError> {
        match self.call(Ask::Range(range)).await? {
            Answer::Listing(listing) => Ok(listing),
            other => panic!("not a listing: {other:?}"),
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        match self.call(Ask::Txn(txn)).await? {
            Answer::Outcome(outcome) => Ok(outcome),
            other => panic!("not an outcome: {other:?}"),
        }
    }

    async fn watch(&self, _: KeyRange, _: Option<Revision>) -> Result<Watch, StoreError> {
        Err(StoreError::Invalid("controllers of the simulation poll".into()))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        match self.call(Ask::Grant(ttl)).await? {
            Answer::Lease(lease) => Ok(lease),
            other => panic!("not a lease: {other:?}"),
        }
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        match self.call(Ask::KeepAlive(lease)).await? {
            Answer::Left(left) => Ok(left),
            other => panic!("not a time: {other:?}"),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.call(Ask::Revoke(lease)).await.map(drop)
    }
}

#[derive(Debug)]
struct Held {
    ttl_ms: u64,
    ends: u64,
}

/// What is kept. Times are virtual milliseconds.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    items: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, Held>,
    last_lease: u64,
    revision: Revision,
    /// A key that is refused whatever it should hold.
    pub(crate) refuses: Option<String>,
    /// The role of every key and epoch that were ever stored.
    ever: BTreeMap<(String, u64), Role>,
    /// Under which lease each leader put its key.
    leaders: BTreeMap<u64, LeaseId>,
}

impl Keeper {
    /// Carries a call out. `author` is the epoch under which its controller leads; `lag` is how late a lease ends.
    /// The outer error is a violation of an invariant.
    pub(crate) fn carry_out(
        &mut self,
        ask: &Ask,
        author: Option<u64>,
        (now, lag): (u64, u64),
    ) -> Result<Answered, String> {
        self.expire(now);
        Ok(Ok(match ask {
            Ask::Range(range) => {
                let items = self.items.values().filter(|item| range.contains(&item.key)).cloned().collect();
                Answer::Listing(Listing { revision: self.revision, items })
            }
            Ask::Txn(txn) => match self.transact(txn, author)? {
                Ok(outcome) => Answer::Outcome(outcome),
                Err(error) => return Ok(Err(error)),
            },
            Ask::Grant(ttl) => {
                self.last_lease += 1;
                let (id, ttl_ms) = (LeaseId(self.last_lease), millis(*ttl).div_ceil(1000) * 1000);
                self.leases.insert(id, Held { ttl_ms, ends: now + ttl_ms + lag });
                Answer::Lease(Lease { id, ttl: Duration::from_millis(ttl_ms) })
            }
            Ask::KeepAlive(id) => match self.leases.get_mut(id) {
                Some(held) => {
                    held.ends = now + held.ttl_ms + lag;
                    Answer::Left(Duration::from_millis(held.ttl_ms))
                }
                None => return Ok(Err(StoreError::LeaseNotFound(*id))),
            },
            Ask::Revoke(id) => {
                self.end(*id);
                Answer::Done
            }
        }))
    }

    pub(crate) fn expire(&mut self, now: u64) {
        let ended: Vec<_> =
            self.leases.iter().filter(|(_, held)| held.ends <= now).map(|(id, _)| *id).collect();
        for id in ended {
            self.end(id);
        }
    }

    fn end(&mut self, id: LeaseId) {
        self.leases.remove(&id);
        let before = self.items.len();
        self.items.retain(|_, item| item.lease != Some(id));
        if self.items.len() < before {
            self.revision = self.revision.next();
        }
    }

    fn holds(&self, condition: &Compare) -> bool {
        let item = self.items.get(condition.key());
        match condition {
            Compare::Absent { .. } => item.is_none(),
            Compare::CreateRevision { equals, .. } => {
                item.is_some_and(|item| item.create_revision == *equals)
            }
            Compare::ModRevision { equals, .. } => item.is_some_and(|item| item.mod_revision == *equals),
            Compare::Value { equals, .. } => item.is_some_and(|item| item.value == *equals),
        }
    }

    fn transact(&mut self, txn: &Txn, author: Option<u64>) -> Result<Result<TxnOutcome, StoreError>, String> {
        let refused = txn.operations.iter().find(|operation| Some(key(operation)) == self.refuses.as_deref());
        if let Some(refused) = refused {
            return Ok(Err(StoreError::Invalid(format!("{} is not wanted here", key(refused)))));
        }
        if !txn.conditions.iter().all(|condition| self.holds(condition)) {
            return Ok(Ok(TxnOutcome { succeeded: false, revision: self.revision }));
        }
        let lease = |operation: &Operation| match operation {
            Operation::Put { lease, .. } => *lease,
            _ => None,
        };
        if let Some(gone) = txn.operations.iter().filter_map(lease).find(|id| !self.leases.contains_key(id)) {
            return Ok(Err(StoreError::LeaseNotFound(gone)));
        }
        for operation in &txn.operations {
            self.audit(operation, author)?;
        }
        let next = self.revision.next();
        for operation in &txn.operations {
            match operation {
                Operation::Put { key, value, lease } => {
                    let old = self.items.get(key);
                    let item = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: old.map_or(next, |old| old.create_revision),
                        mod_revision: next,
                        version: old.map_or(1, |old| old.version + 1),
                        lease: *lease,
                    };
                    if key == keys::LEADER && item.version == 1 {
                        self.leaders.insert(next.0, lease.expect("a leader has a lease"));
                    }
                    self.items.insert(key.clone(), item);
                    self.revision = next;
                }
                Operation::Delete { key } => {
                    if self.items.remove(key).is_some() {
                        self.revision = next;
                    }
                }
                Operation::DeletePrefix { prefix } => self.items.retain(|key, _| !key.starts_with(prefix)),
            }
        }
        Ok(Ok(TxnOutcome { succeeded: true, revision: self.revision }))
    }

    /// Only who leads writes of the fleet; epochs of an instance grow; one epoch is one role.
    fn audit(&mut self, operation: &Operation, author: Option<u64>) -> Result<(), String> {
        let key = key(operation);
        if key == keys::LEADER {
            return Ok(());
        }
        let leads = self.leader();
        if leads != author {
            return Err(format!("{key} is written by the leader of {author:?}, while {leads:?} leads"));
        }
        let Operation::Put { key, value, .. } = operation else { return Ok(()) };
        if !key.starts_with(keys::ROLES) {
            return Ok(());
        }
        let new = DesiredRole::decode(value).expect("a role record");
        if let Some(old) = self.role(key)
            && old.epoch > new.epoch
        {
            return Err(format!("{key} goes back from {old:?} to {new:?}"));
        }
        match self.ever.insert((key.clone(), new.epoch.0), new.role) {
            Some(before) if before != new.role => {
                Err(format!("{key} has two roles under one epoch: {before:?}, then {new:?}"))
            }
            _ => Ok(()),
        }
    }

    /// The epoch of who leads.
    pub(crate) fn leader(&self) -> Option<u64> {
        self.items.get(keys::LEADER).map(|item| item.create_revision.0)
    }

    /// Of the leader key that made a controller lead.
    pub(crate) fn lease_of(&self, leader: u64) -> LeaseId {
        self.leaders[&leader]
    }

    pub(crate) fn role(&self, key: &str) -> Option<DesiredRole> {
        self.items.get(key).map(|item| DesiredRole::decode(&item.value).expect("a role record"))
    }

    pub(crate) fn was_stored(&self, key: String, role: &DesiredRole) -> bool {
        self.ever.get(&(key, role.epoch.0)) == Some(&role.role)
    }

    pub(crate) fn value(&self, key: &str) -> Option<&[u8]> {
        self.items.get(key).map(|item| &*item.value)
    }

    pub(crate) fn keys_under(&self, prefix: &str) -> Vec<&str> {
        self.items.keys().map(String::as_str).filter(|key| key.starts_with(prefix)).collect()
    }

    /// When each key was changed last; without what is held of health, which time alone changes.
    pub(crate) fn changes(&self) -> BTreeMap<String, u64> {
        let lasting = self.items.iter().filter(|(key, _)| !key.starts_with(keys::HEALTH));
        lasting.map(|(key, item)| (key.clone(), item.mod_revision.0)).collect()
    }
}

fn key(operation: &Operation) -> &str {
    match operation {
        Operation::Put { key, .. } | Operation::Delete { key } => key,
        Operation::DeletePrefix { prefix } => prefix,
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).expect("a short time")
}
