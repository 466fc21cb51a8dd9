//! Room for connections: for those that have shown what they belong to, and, apart, for those that have not yet.
//!
//! Anybody can connect and say nothing. Were there one room for all, so many strangers would keep every peer out for as
//! long as they may take for their hello. So those without a proof have a room of their own, which never refuses: over
//! it, the one that has waited longest is cut, and a peer shows its proof as soon as it has connected.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// How many connections of one kind there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound {
    /// What they are for, as the log says it.
    pub(super) what: &'static str,
    /// Those with a proof.
    pub(super) connections: usize,
    /// Those without one yet.
    pub(super) unproven: usize,
}

/// See the module.
pub(super) struct Guests {
    bound: Bound,
    proven: Arc<Semaphore>,
    /// Without a proof, the oldest first: what cuts each of them.
    unproven: Mutex<VecDeque<Arc<CancellationToken>>>,
}

impl Guests {
    pub(super) fn new(bound: Bound) -> Arc<Self> {
        let (proven, unproven) = (Arc::new(Semaphore::new(bound.connections)), Mutex::default());
        Arc::new(Self { bound, proven, unproven })
    }

    pub(super) fn what(&self) -> &'static str {
        self.bound.what
    }

    /// One more connection, which has shown nothing yet; in place of the oldest such if there is no room.
    pub(super) fn enter(self: &Arc<Self>) -> Guest {
        let cut = Arc::new(CancellationToken::new());
        let mut unproven = self.unproven.lock();
        if unproven.len() >= self.bound.unproven.max(1)
            && let Some(oldest) = unproven.pop_front()
        {
            oldest.cancel();
        }
        unproven.push_back(cut.clone());
        Guest { guests: self.clone(), cut, proven: None }
    }

    /// Whether it was still there.
    fn leave(&self, cut: &Arc<CancellationToken>) -> bool {
        let mut unproven = self.unproven.lock();
        let at = unproven.iter().position(|other| Arc::ptr_eq(other, cut));
        at.and_then(|at| unproven.remove(at)).is_some()
    }
}

/// A connection's place, given back when dropped.
pub(super) struct Guest {
    guests: Arc<Guests>,
    cut: Arc<CancellationToken>,
    proven: Option<OwnedSemaphorePermit>,
}

/// Why a connection has no place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoom {
    #[error("no more than {limit} {what} connections")]
    Proven { what: &'static str, limit: usize },
    #[error("others came while it had shown nothing yet, and there were too many")]
    Unproven,
}

impl Guest {
    /// Cancelled when it is to be closed for the sake of newer ones; never once it is proven.
    pub(super) fn cut(&self) -> CancellationToken {
        CancellationToken::clone(&self.cut)
    }

    /// It has shown what it belongs to.
    pub(super) fn prove(&mut self) -> Result<(), NoRoom> {
        if !self.guests.leave(&self.cut) {
            return Err(NoRoom::Unproven);
        }
        let Bound { what, connections: limit, .. } = self.guests.bound;
        let permit = self.guests.proven.clone().try_acquire_owned();
        self.proven = Some(permit.map_err(|_| NoRoom::Proven { what, limit })?);
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.proven.is_none() {
            self.guests.leave(&self.cut);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_stranger_gives_way_and_whoever_is_proven_stays() {
        let guests = Guests::new(Bound { what: "test", connections: 2, unproven: 2 });
        let mut peer = guests.enter();
        peer.prove().expect("room");
        let strangers: Vec<_> = (0..5).map(|_| guests.enter()).collect();
        let cut = |guests: &[Guest]| guests.iter().map(|it| it.cut().is_cancelled()).collect::<Vec<_>>();
        assert_eq!(cut(&strangers), [true, true, true, false, false]);
        assert!(!peer.cut().is_cancelled());
        let mut late = strangers.into_iter().next().expect("five");
        assert_eq!(late.prove(), Err(NoRoom::Unproven), "cut already");

        let (mut second, mut third) = (guests.enter(), guests.enter());
        second.prove().expect("room");
        assert_eq!(third.prove(), Err(NoRoom::Proven { what: "test", limit: 2 }));
        drop((peer, third));
        guests.enter().prove().expect("room again");
        drop(second);
        assert_eq!(guests.unproven.lock().len(), 0);
        assert_eq!(guests.proven.available_permits(), 2);
    }
}
