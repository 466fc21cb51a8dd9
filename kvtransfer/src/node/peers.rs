//! The control streams of the peers that send to this node: one of each peer, its latest.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use baton_proto::InstanceId;

use super::{limits::Limits, peer_link::PeerLink};
use crate::{
    TransferError,
    sync::Mutex,
    transport::{LinkId, Stranger, Strangers},
};

pub(super) struct Peers {
    by_id: Mutex<HashMap<InstanceId, Arc<PeerLink>>>,
    most: usize,
    /// A peer that has said nothing for so long has no transfer: they are renewed more often.
    quiet: Duration,
    strangers: Arc<Strangers>,
    numbers: AtomicU64,
}

impl Peers {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            by_id: Mutex::default(),
            most: limits.peers,
            quiet: limits.seal_grace,
            strangers: Strangers::new(limits.unproven_streams),
            numbers: AtomicU64::new(0),
        }
    }

    /// One more stream, whose peer has proven nothing yet.
    pub(super) fn stranger(&self) -> Stranger {
        self.strangers.enter()
    }

    /// A number that no other stream of this process has.
    pub(super) fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a stream in, in place of the one that its peer had before, or, over the limit, of that of the peer which has
    /// been quiet longest; which that is.
    ///
    /// # Errors
    /// `StalePeer`: a later start of the peer has one. `Limit`: there are as many peers as there may be, none quiet.
    pub(super) fn admit(
        &self,
        link: &Arc<PeerLink>,
        now: Instant,
    ) -> Result<Option<Arc<PeerLink>>, TransferError> {
        let mut peers = self.by_id.lock();
        match peers.get(link.peer()) {
            Some(old) if old.incarnation() > link.incarnation() => Err(TransferError::StalePeer {
                instance: link.peer().clone(),
                expected: old.incarnation(),
                found: link.incarnation(),
            }),
            None if peers.len() >= self.most => {
                let longest = peers.values().min_by_key(|link| link.heard());
                let quiet = longest.filter(|link| now.duration_since(link.heard()) >= self.quiet).cloned();
                let full = TransferError::Limit { what: "peers that send", limit: self.most };
                let left = peers.remove(quiet.ok_or(full)?.peer());
                peers.insert(link.peer().clone(), link.clone());
                Ok(left)
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
