//! The Store contract: what every keeper of cluster state offers, with etcd's semantics.
//!
//! One revision counts every change of the whole store; a transaction is one revision. A watch starts from a revision
//! and delivers every later change in order, a transaction never split; when that history is gone it says
//! [`WatchError::Compacted`] and the reader lists again. Keys put under a lease end with it.
//!
//! Called by [`crate::election`], [`crate::fleet`] and the controller. One conformance suite
//! (`tests/conformance.rs`) holds every implementation to this text.

use std::{fmt, ops::RangeInclusive, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};

pub mod etcd;
mod failover;
pub mod memory;
pub mod remote;
pub mod service;
pub mod settings;
mod wire;

/// Lease times outside of this are an error; etcd keeps whole seconds, so shorter ones are rounded up.
pub const LEASE_TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);

/// The largest value, as etcd's default request limit is 1.5 MiB.
pub const VALUE_MAX_BYTES: usize = 1 << 20;

/// The number of changes made to a store so far. Of a key: of the transaction that created or last changed it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl Revision {
    /// The one after.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a granted lease. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// A granted lease and the time it really got: an implementation may round up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub id: LeaseId,
    pub ttl: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    pub value: Bytes,
    pub create_revision: Revision,
    pub mod_revision: Revision,
    /// 1 at creation, one more with each put.
    pub version: u64,
    pub lease: Option<LeaseId>,
}

/// Which keys are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRange {
    /// This key alone.
    Exact(String),
    /// Every key that starts so. The empty prefix is every key.
    Prefix(String),
}

impl KeyRange {
    pub fn exact(key: impl Into<String>) -> Self {
        Self::Exact(key.into())
    }

    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self::Prefix(prefix.into())
    }

    pub fn contains(&self, key: &str) -> bool {
        match self {
            Self::Exact(exact) => key == exact,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
        }
    }
}

/// What a range read found: the keys in order, all as of `revision`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub revision: Revision,
    pub items: Vec<KeyValue>,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    Absent { key: String },
    CreateRevision { key: String, equals: Revision },
    ModRevision { key: String, equals: Revision },
    Value { key: String, equals: Bytes },
}

impl Compare {
    pub fn absent(key: impl Into<String>) -> Self {
        Self::Absent { key: key.into() }
    }

    pub fn create_revision(key: impl Into<String>, equals: Revision) -> Self {
        Self::CreateRevision { key: key.into(), equals }
    }

    pub fn mod_revision(key: impl Into<String>, equals: Revision) -> Self {
        Self::ModRevision { key: key.into(), equals }
    }

    pub fn value(key: impl Into<String>, equals: impl Into<Bytes>) -> Self {
        Self::Value { key: key.into(), equals: equals.into() }
    }

    pub fn key(&self) -> &str {
        match self {
            Self::Absent { key }
            | Self::CreateRevision { key, .. }
            | Self::ModRevision { key, .. }
            | Self::Value { key, .. } => key,
        }
    }
}

/// A change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    Put { key: String, value: Bytes, lease: Option<LeaseId> },
    Delete { key: String },
    DeletePrefix { prefix: String },
}

/// Changes that are made together, as one revision, if every condition holds; else none is.
///
/// A key may be changed once only: two puts of it, or a put and a delete that covers it, are
/// [`StoreError::Invalid`]. A transaction that changes nothing makes no revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    pub conditions: Vec<Compare>,
    pub operations: Vec<Operation>,
}

impl Txn {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    pub fn when(mut self, condition: Compare) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Adds a put. Without a lease the key loses any lease it had.
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: Option<LeaseId>) -> Self {
        self.operations.push(Operation::Put { key: key.into(), value: value.into(), lease });
        self
    }

    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.operations.push(Operation::Delete { key: key.into() });
        self
    }

    pub fn delete_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.operations.push(Operation::DeletePrefix { prefix: prefix.into() });
        self
    }

    /// Refuses what etcd would refuse, with the same outcome whatever the store.
    pub fn check(&self) -> Result<(), StoreError> {
        let mut puts = std::collections::BTreeSet::new();
        for operation in &self.operations {
            if let Operation::Put { key, value, .. } = operation {
                if key.is_empty() {
                    return Err(StoreError::Invalid("a key must not be empty".into()));
                }
                if value.len() > VALUE_MAX_BYTES {
                    let size = value.len();
                    return Err(StoreError::Invalid(format!(
                        "the value of {key} has {size} bytes, over the limit of {VALUE_MAX_BYTES}"
                    )));
                }
                if !puts.insert(key.as_str()) {
                    return Err(StoreError::Invalid(format!("key {key} is put twice in one transaction")));
                }
            }
        }
        let covered = self.operations.iter().find_map(|operation| match operation {
            Operation::Put { .. } => None,
            Operation::Delete { key } => puts.get(key.as_str()),
            Operation::DeletePrefix { prefix } => puts.iter().find(|key| key.starts_with(prefix.as_str())),
        });
        match covered {
            Some(key) => Err(StoreError::Invalid(format!("key {key} is put and deleted in one transaction"))),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether the conditions held and the changes were made.
    pub succeeded: bool,
    /// Of the store afterwards.
    pub revision: Revision,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put(KeyValue),
    Delete { key: String, revision: Revision },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(item) => &item.key,
            Self::Delete { key, .. } => key,
        }
    }

    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(item) => item.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// One whole transaction. `revision` is how far the watch has come: every change of the watched keys up to and
/// including it has been delivered, so a later watch goes on from `revision.next()`. May be empty: only progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    pub revision: Revision,
    pub events: Vec<Event>,
}

/// Why a watch ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The history asked for is gone up to here: list again, then watch from the listing's revision.
    #[error("the history before revision {0} has been compacted: list again")]
    Compacted(Revision),
    /// The connection broke or this reader fell behind: watch again from the last batch's revision.
    #[error("the watch broke: {0}")]
    Broken(String),
}

/// A standing watch. Dropping it ends it.
pub struct Watch(BoxStream<'static, Result<WatchBatch, WatchError>>);

impl Watch {
    /// Wraps a stream that ends after its first error.
    pub fn new(batches: impl Stream<Item = Result<WatchBatch, WatchError>> + Send + 'static) -> Self {
        Self(batches.boxed())
    }

    /// The next batch. Cancel safe. After an error the watch has ended.
    pub async fn next(&mut self) -> Result<WatchBatch, WatchError> {
        self.0.next().await.unwrap_or_else(|| Err(WatchError::Broken("the store closed it".into())))
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// Why a store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing was done.
    #[error("the state store cannot be reached: {0}")]
    Unavailable(String),
    /// The answer was lost: the change may or may not have been made. Read before doing it again.
    #[error("the state store did not answer, so it is unknown whether the change was made: {0}")]
    Unknown(String),
    #[error("lease {:x} has ended", .0.0)]
    LeaseNotFound(LeaseId),
    #[error("the state store refuses the request: {0}")]
    Invalid(String),
    /// The caller may not, or the store is out of space: an operator has to act.
    #[error("the state store refuses to work: {0}")]
    Refused(String),
}

/// A keeper of cluster state.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Reads keys, in order, linearizably.
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError>;

    /// Makes changes if conditions hold.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Watches keys from a revision on (inclusive; 1 at least), or from now. When this returns, the watch stands: no later change
    /// is missed.
    async fn watch(&self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError>;

    /// Grants a lease that ends `ttl` after its last renewal; see [`LEASE_TTL`].
    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError>;

    /// Renews a lease and says for how long.
    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError>;

    /// Ends a lease and its keys at once. One that has ended already is no error.
    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError>;
}

/// Checks a lease time and rounds it up to what etcd can keep.
pub(crate) fn lease_seconds(ttl: Duration) -> Result<u64, StoreError> {
    if LEASE_TTL.contains(&ttl) {
        Ok(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0))
    } else {
        let (low, high) = (LEASE_TTL.start().as_secs(), LEASE_TTL.end().as_secs());
        Err(StoreError::Invalid(format!("a lease lasts {low} to {high} s, not {ttl:?}")))
    }
}
