//! The control streams of the peers that send to this node: one of each peer, its latest.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use baton_proto::InstanceId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{config::Limits, peer_link::PeerLink};
use crate::{TransferError, sync::Mutex, transport::LinkId};

pub(super) struct Peers {
    by_id: Mutex<HashMap<InstanceId, Arc<PeerLink>>>,
    most: usize,
    /// Room for streams of peers that have proven nothing yet.
    unproven: Arc<Semaphore>,
    most_unproven: usize,
    numbers: AtomicU64,
}

impl Peers {
    pub(super) fn new(limits: &Limits) -> Self {
        let most_unproven = limits.unproven_streams;
        Self {
            by_id: Mutex::default(),
            most: limits.peers,
            unproven: Arc::new(Semaphore::new(most_unproven)),
            most_unproven,
            numbers: AtomicU64::new(0),
        }
    }

    /// Room for one more stream whose peer has proven nothing yet, until the permit is dropped.
    ///
    /// # Errors
    /// `Limit`: there is none.
    pub(super) fn room_for_unproven(&self) -> Result<OwnedSemaphorePermit, TransferError> {
        let (what, limit) = ("control streams without a proof", self.most_unproven);
        self.unproven.clone().try_acquire_owned().map_err(|_| TransferError::Limit { what, limit })
    }

    /// A number that no other stream of this process has.
    pub(super) fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a stream in place of the one that its peer had before; that one, if there was one.
    ///
    /// # Errors
    /// `StalePeer`: a later start of the peer has one. `Limit`: there are as many peers as there may be.
    pub(super) fn admit(&self, link: &Arc<PeerLink>) -> Result<Option<Arc<PeerLink>>, TransferError> {
        let mut peers = self.by_id.lock();
        match peers.get(link.peer()) {
            Some(old) if old.incarnation() > link.incarnation() => Err(TransferError::StalePeer {
                instance: link.peer().clone(),
                expected: old.incarnation(),
                found: link.incarnation(),
            }),
            None if peers.len() >= self.most => {
                Err(TransferError::Limit { what: "peers that send", limit: self.most })
            }
            _ => Ok(peers.insert(link.peer().clone(), link.clone())),
        }
    }

    /// Forgets a stream that has ended, unless another has taken its place.
    pub(super) fn forget(&self, link: &PeerLink) {
        let mut peers = self.by_id.lock();
        if peers.get(link.peer()).is_some_and(|current| current.number() == link.number()) {
            peers.remove(link.peer());
        }
    }

    /// The stream that data connections of this id belong to.
    pub(super) fn of(&self, id: &LinkId) -> Option<Arc<PeerLink>> {
        self.by_id.lock().values().find(|link| link.pass().id == *id).cloned()
    }
}
