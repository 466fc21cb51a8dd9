//! Room for connections: for those that have shown what they belong to, of which no one peer takes all, and, apart, for
//! [`Strangers`].

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    hello::LinkId,
    strangers::{Stranger, Strangers},
};

/// One control stream may have this part of all connections, ...
const SHARE_OF_ONE: usize = 8;
/// ... and so many in any case: more than the paths of two transports take.
const LEAST_OF_ONE: usize = 32;

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

impl Bound {
    /// Those of one control stream.
    fn of_one(&self) -> usize {
        (self.connections / SHARE_OF_ONE).max(LEAST_OF_ONE).min(self.connections)
    }
}

/// See the module.
pub(super) struct Guests {
    bound: Bound,
    proven: Mutex<Proven>,
    strangers: Arc<Strangers>,
}

#[derive(Default)]
struct Proven {
    all: usize,
    of: HashMap<LinkId, usize>,
}

impl Guests {
    pub(super) fn new(bound: Bound) -> Arc<Self> {
        Arc::new(Self { bound, proven: Mutex::default(), strangers: Strangers::new(bound.unproven) })
    }

    pub(super) fn what(&self) -> &'static str {
        self.bound.what
    }

    /// One more connection, which has shown nothing yet.
    pub(super) fn enter(self: &Arc<Self>) -> Guest {
        Guest { guests: self.clone(), stranger: self.strangers.enter(), proven: None }
    }
}

/// A connection's place, given back when dropped.
pub(super) struct Guest {
    guests: Arc<Guests>,
    stranger: Stranger,
    proven: Option<LinkId>,
}

/// Why a connection has no place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoom {
    #[error("no more than {limit} {what} connections")]
    Proven { what: &'static str, limit: usize },
    #[error("no more than {limit} {what} connections of one peer")]
    OfOne { what: &'static str, limit: usize },
    #[error("others came while it had shown nothing yet, and there were too many")]
    Unproven,
}

impl Guest {
    /// Cancelled when it is to be closed for the sake of newer ones; never once it is proven.
    pub(super) fn cut(&self) -> CancellationToken {
        self.stranger.cut()
    }

    /// It has shown which control stream it belongs to.
    pub(super) fn prove(&mut self, link: LinkId) -> Result<(), NoRoom> {
        if !self.stranger.leave() {
            return Err(NoRoom::Unproven);
        }
        let bound = self.guests.bound;
        let (what, limit) = (bound.what, bound.connections);
        let proven = &mut *self.guests.proven.lock();
        if proven.all >= limit {
            return Err(NoRoom::Proven { what, limit });
        }
        let of_this = proven.of.entry(link).or_default();
        if *of_this >= bound.of_one() {
            return Err(NoRoom::OfOne { what, limit: bound.of_one() });
        }
        *of_this += 1;
        proven.all += 1;
        self.proven = Some(link);
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let Some(link) = self.proven.take() else { return };
        let proven = &mut *self.guests.proven.lock();
        proven.all -= 1;
        if let Some(of_this) = proven.of.get_mut(&link) {
            *of_this -= 1;
            if *of_this == 0 {
                proven.of.remove(&link);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkId = [1; 16];

    #[test]
    fn the_oldest_stranger_gives_way_and_whoever_is_proven_stays() {
        let guests = Guests::new(Bound { what: "test", connections: 2, unproven: 2 });
        let mut peer = guests.enter();
        peer.prove(LINK).expect("room");
        let strangers: Vec<_> = (0..5).map(|_| guests.enter()).collect();
        let cut = |guests: &[Guest]| guests.iter().map(|it| it.cut().is_cancelled()).collect::<Vec<_>>();
        assert_eq!(cut(&strangers), [true, true, true, false, false]);
        assert!(!peer.cut().is_cancelled());
        let mut late = strangers.into_iter().next().expect("five");
        assert_eq!(late.prove(LINK), Err(NoRoom::Unproven), "cut already");

        let (mut second, mut third) = (guests.enter(), guests.enter());
        second.prove(LINK).expect("room");
        assert_eq!(third.prove([2; 16]), Err(NoRoom::Proven { what: "test", limit: 2 }));
        drop((peer, third));
        guests.enter().prove(LINK).expect("room again");
        drop(second);
        assert_eq!(guests.strangers.len(), 0);
        let left = guests.proven.lock();
        assert_eq!((left.all, left.of.len()), (0, 0));
    }

    #[test]
    fn one_peer_takes_a_part_of_the_room_only() {
        let guests = Guests::new(Bound { what: "test", connections: 320, unproven: 2 });
        let prove = |link| {
            let mut guest = guests.enter();
            guest.prove(link).map(|()| guest)
        };
        let mut held: Vec<_> = (0..40).map(|_| prove(LINK).expect("room")).collect();
        assert_eq!(prove(LINK).err(), Some(NoRoom::OfOne { what: "test", limit: 40 }));
        held.push(prove([2; 16]).expect("there is room for another"));
        held.remove(0);
        prove(LINK).expect("room again");
    }
}
