//! Which controller leads, and writes that only the leader can make.
//!
//! The leader key is created, under a lease, by a transaction that needs it to be absent. Its create revision is the
//! [`LeaderEpoch`]. A [`Leadership`] lasts as long as [`Leadership::hold`] renews the lease; every write of the leader
//! carries the condition that the key is still as this leader last put it, so that what a deposed leader still sends
//! has no effect, whatever its clock or its pauses. A write whose answer was lost might still be under way: before the
//! next one the leader puts its key again, so that the lost one, if it comes late, finds another key and fails.

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use baton_proto::LeaderEpoch;
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};
use tracing::{debug, info, warn};

use crate::{
    Compare, Event, KeyRange, LeaderRecord, Lease, LeaseId, Revision, StateFormats, Store, StoreError, Txn,
    TxnOutcome, WatchError, format::Found, keys,
};

/// After an error, before the leader key is looked at again.
const RETRY: Duration = Duration::from_millis(300);
/// Before a state of another format is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// A controller that would lead.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub store: Arc<dyn Store>,
    pub record: LeaderRecord,
    /// How long a leader may be silent before another takes over.
    pub ttl: Duration,
    /// Of the state, what this build reads and writes.
    pub formats: StateFormats,
}

/// What became of a fenced write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced {
    /// It was made, as this revision.
    Applied(Revision),
    /// A condition of its own did not hold.
    Conflict,
    /// This controller leads no more: nothing was written.
    Deposed,
}

/// The right to write, until another controller has it. Clones share it.
#[derive(Debug, Clone)]
pub struct Leadership {
    store: Arc<dyn Store>,
    lease: Lease,
    epoch: LeaderEpoch,
    record: LeaderRecord,
    fence: Arc<Mutex<Fence>>,
    /// Until when the lease is known to be good.
    ends: watch::Sender<Instant>,
}

/// A leader's term: until when its leadership is known to last, for what its fence does not guard: actions outside the store. By this
/// process's monotonic clock, which goes on while the process is stopped; not while the whole machine is. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Term {
    ends: watch::Receiver<Instant>,
}

#[derive(Debug)]
struct Fence {
    /// Of the leader key, as this leader last put it.
    mod_revision: Revision,
    /// A write is unanswered.
    in_doubt: bool,
}

/// Why a leadership ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    #[error("the lease of the leadership has ended")]
    LeaseEnded,
    #[error("the lease of the leadership could not be renewed in time: {0}")]
    NotRenewed(StoreError),
    #[error("another controller leads")]
    Superseded,
}

/// Why a candidate does not lead yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Candidacy {
    /// The controller of this name does.
    Behind(String),
    /// The store does not say who does.
    Cut(String),
    /// The state has a format that this build does not know: another has to lead.
    Foreign(String),
}

impl Candidate {
    /// Waits until this controller leads, and tells why it does not yet. Cancel safe: a lease left behind ends by itself.
    pub async fn campaign(&self, standing: impl Fn(Candidacy)) -> Leadership {
        loop {
            match self.try_lead().await {
                Ok(Some(leadership)) => {
                    info!(epoch = %leadership.epoch, controller = self.record.controller_id, "leading");
                    return leadership;
                }
                Ok(None) => self.wait_for_vacancy(&standing).await,
                Err(error) => {
                    standing(Candidacy::Cut(error.to_string()));
                    warn!(%error, "cannot stand for leadership; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Takes the leadership if it is vacant, and the state is of a format that this build knows.
    pub async fn try_lead(&self) -> Result<Option<Leadership>, StoreError> {
        if !self.store.range(KeyRange::exact(keys::LEADER)).await?.items.is_empty() {
            return Ok(None);
        }
        let found = Found::read(&*self.store).await?;
        if found.refusal(self.formats).is_some() {
            return Ok(None);
        }
        let renewed = Instant::now();
        let lease = self.store.grant_lease(self.ttl).await?;
        let txn = Txn::new().when(Compare::absent(keys::LEADER)).put(
            keys::LEADER,
            self.record.encode(),
            Some(lease.id),
        );
        let outcome = self.store.txn(found.take_over(txn, self.formats)).await;
        // The key tells, also when the answer to the transaction was lost.
        let held = match outcome {
            Ok(outcome) if !outcome.succeeded => None,
            Ok(_) | Err(StoreError::Unknown(_)) => self.held_under(lease.id).await?,
            Err(error) => return Err(error),
        };
        match held {
            Some(created) => {
                let epoch = LeaderEpoch(created.0);
                let fence = Arc::new(Mutex::new(Fence { mod_revision: created, in_doubt: false }));
                let (store, record) = (self.store.clone(), self.record.clone());
                let ends = watch::Sender::new(renewed + lease.ttl);
                Ok(Some(Leadership { store, lease, epoch, record, fence, ends }))
            }
            None => {
                if let Err(error) = self.store.revoke_lease(lease.id).await {
                    debug!(%error, "a lease that is not needed was left to end by itself");
                }
                Ok(None)
            }
        }
    }

    /// The create revision of the leader key, if it stands under this lease.
    async fn held_under(&self, lease: LeaseId) -> Result<Option<Revision>, StoreError> {
        let listing = self.store.range(KeyRange::exact(keys::LEADER)).await?;
        Ok(listing.items.first().filter(|item| item.lease == Some(lease)).map(|item| item.create_revision))
    }

    /// Returns when the leader key may be gone, or the state be of another format.
    async fn wait_for_vacancy(&self, standing: &impl Fn(Candidacy)) {
        if let Some(why) = Found::read(&*self.store).await.ok().and_then(|found| found.refusal(self.formats))
        {
            standing(Candidacy::Foreign(why));
            return tokio::time::sleep(LOOK_AGAIN).await;
        }
        let Ok(listing) = self.store.range(KeyRange::exact(keys::LEADER)).await else {
            return tokio::time::sleep(RETRY).await;
        };
        let Some(held) = listing.items.first() else { return };
        let leader = LeaderRecord::decode(&held.value).map(|record| record.controller_id);
        standing(Candidacy::Behind(leader.unwrap_or_else(|_| "another controller".to_owned())));
        let Ok(mut watch) =
            self.store.watch(KeyRange::exact(keys::LEADER), Some(listing.revision.next())).await
        else {
            return tokio::time::sleep(RETRY).await;
        };
        loop {
            match watch.next().await {
                Ok(batch) if batch.events.iter().any(|event| matches!(event, Event::Delete { .. })) => return,
                Ok(_) => {}
                Err(WatchError::Compacted(_)) => return,
                Err(WatchError::Broken(_)) => return tokio::time::sleep(RETRY).await,
            }
        }
    }
}

impl Term {
    /// Goes on with an action only while the leadership is known to last; none if it may have ended meanwhile. That is looked
    /// at before each step: a process that is stopped in between does not go on with it.
    pub async fn within<T>(&self, action: impl Future<Output = T>) -> Option<T> {
        let mut action = pin!(action);
        poll_fn(|context| {
            if Instant::now() >= *self.ends.borrow() {
                return Poll::Ready(None);
            }
            action.as_mut().poll(context).map(Some)
        })
        .await
    }
}

impl Leadership {
    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    pub fn term(&self) -> Term {
        Term { ends: self.ends.subscribe() }
    }

    /// Renews the lease until that is no longer possible, and says why. The holder must not act as leader afterwards.
    /// Returns before the lease can have ended at the store as long as this process runs; fencing covers the rest.
    pub async fn hold(&self) -> Lost {
        let mut wait = self.lease.ttl / 3;
        loop {
            tokio::time::sleep(wait).await;
            let asked = Instant::now();
            let ends = *self.ends.borrow();
            let answer = tokio::time::timeout_at(ends, self.store.keep_alive(self.lease.id)).await;
            let late = || StoreError::Unavailable("no answer before the lease ended".into());
            match answer.unwrap_or_else(|_| Err(late())) {
                Ok(_) => {
                    self.ends.send_replace(asked + self.lease.ttl);
                    wait = self.lease.ttl / 3;
                }
                Err(StoreError::LeaseNotFound(_)) => return Lost::LeaseEnded,
                Err(error) if Instant::now() >= ends => return Lost::NotRenewed(error),
                Err(error) => {
                    warn!(%error, "the leadership's lease was not renewed; trying again");
                    wait = RETRY.min(ends.saturating_duration_since(Instant::now()));
                }
            }
        }
    }

    /// Makes a write that only this leader can make. One at a time: writes of clones wait for each other.
    pub async fn txn(&self, txn: Txn) -> Result<Fenced, StoreError> {
        let mut fence = self.fence.lock().await;
        if fence.in_doubt {
            let again = Txn::new().when(Compare::create_revision(keys::LEADER, Revision(self.epoch.0))).put(
                keys::LEADER,
                self.record.encode(),
                Some(self.lease.id),
            );
            let outcome = self.store.txn(again).await?;
            if !outcome.succeeded {
                return Ok(Fenced::Deposed);
            }
            *fence = Fence { mod_revision: outcome.revision, in_doubt: false };
        }
        // Set before the wait: a caller that gives up waiting leaves the write in doubt, too.
        fence.in_doubt = true;
        let outcome = self.store.txn(txn.when(Compare::mod_revision(keys::LEADER, fence.mod_revision))).await;
        fence.in_doubt = matches!(outcome, Err(StoreError::Unknown(_)));
        if let TxnOutcome { succeeded: true, revision } = outcome? {
            return Ok(Fenced::Applied(revision));
        }
        let listing = self.store.range(KeyRange::exact(keys::LEADER)).await?;
        match listing.items.first().filter(|item| item.create_revision.0 == self.epoch.0) {
            Some(item) => {
                // A renewed key of ours whose answer was lost has arrived.
                fence.mod_revision = item.mod_revision;
                Ok(Fenced::Conflict)
            }
            None => Ok(Fenced::Deposed),
        }
    }

    /// Gives the leadership up at once, so that another need not wait for the lease.
    pub async fn resign(&self) -> Result<(), StoreError> {
        self.ends.send_replace(Instant::now());
        self.store.revoke_lease(self.lease.id).await
    }
}
