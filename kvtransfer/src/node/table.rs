//! The transfers of one direction: those alive, and the last of those that ended.
//!
//! Remembering the ended ones is what keeps an id from being used twice and tells a late message from a wrong one. What
//! peers offer that nobody expects yet is in [`super::held`], under the same lock.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
};

use baton_proto::{InstanceId, TransferId};
use tokio_util::sync::CancellationToken;

use super::held::{Held, Room};
use crate::{TransferError, sync::Mutex};

/// How a transfer ended.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    /// The other side, if it ever was known.
    pub(super) peer: Option<InstanceId>,
    /// `None` = released.
    pub(super) reason: Option<TransferError>,
}

#[derive(Debug)]
pub(super) struct Table<T> {
    state: Mutex<State<T>>,
    bounds: Bounds,
}

/// How much a table keeps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Ended transfers, and apart from them as many ends of offers that nobody came to expect.
    pub(super) remember: usize,
    /// Offers that nobody expects yet.
    pub(super) hold: usize,
}

/// How many transfers a table has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) live: usize,
    pub(super) held: usize,
}

/// What a table does with an offer.
pub(super) struct Holding<T> {
    /// `Unknown` = it is held from now on.
    pub(super) found: Lookup<T>,
    /// Another peer's offer, whose place it took: not held any more, for the caller to refuse with the reason.
    pub(super) displaced: Option<(Arc<T>, TransferError)>,
}

#[derive(Debug)]
struct State<T> {
    live: HashMap<TransferId, Arc<T>>,
    /// Nobody here expects them yet.
    held: Held<T>,
    ended: HashMap<TransferId, Ended>,
    /// Ended ids, oldest first.
    order: VecDeque<TransferId>,
    /// Ids that somebody waits for; an entry goes with the last of those who wait.
    awaited: HashMap<TransferId, Weak<CancellationToken>>,
}

/// One who waits for an id to come alive or to be refused. The signal is cancelled when it is.
struct Waiter<'a, T> {
    table: &'a Table<T>,
    id: TransferId,
    /// `None` only while it is dropped.
    signal: Option<Arc<CancellationToken>>,
}

/// What an id stands for.
pub(super) enum Lookup<T> {
    Live(Arc<T>),
    Ended(Ended),
    Unknown,
}

/// What a table does with an expectation.
pub(super) struct Expecting<T, P> {
    pub(super) found: Expected<T, P>,
    /// Other peers' offers of its id, for the caller to refuse.
    pub(super) strays: Vec<Arc<T>>,
}

/// What became of an id that is to be expected, with a place for what comes.
pub(super) enum Expected<T, P> {
    /// It is alive from now on.
    Made(Arc<T>),
    /// It is alive from now on, and is the offer that was held, which has no place yet.
    Offered(Arc<T>, P),
    Exists,
    Ended(Ended),
}

impl<T> Table<T> {
    pub(super) fn new(bounds: Bounds) -> Self {
        let state = State {
            live: HashMap::new(),
            held: Held::default(),
            ended: HashMap::new(),
            order: VecDeque::new(),
            awaited: HashMap::new(),
        };
        Self { state: Mutex::new(state), bounds }
    }

    pub(super) fn get(&self, id: &TransferId) -> Lookup<T> {
        self.state.lock().get(id)
    }

    /// Adds a transfer under an id that was never used; nobody else can add it in between. `make` gets the number of live
    /// transfers and must not come back to this table.
    ///
    /// # Errors
    /// `AlreadyExists`, or that of `make`.
    pub(super) fn add(
        &self,
        id: TransferId,
        make: impl FnOnce(usize) -> Result<Arc<T>, TransferError>,
    ) -> Result<Arc<T>, TransferError> {
        let mut state = self.state.lock();
        if !matches!(state.get(&id), Lookup::Unknown) {
            return Err(TransferError::AlreadyExists(id));
        }
        let made = make(state.live.len())?;
        state.live.insert(id, made.clone());
        let awaited = state.no_longer_awaited(&id);
        // Not under the lock: who is woken may come straight back here.
        drop(state);
        wake(awaited);
        Ok(made)
    }

    /// What an id stands for when `peer` names it: a live transfer, or that peer's offer.
    pub(super) fn get_from(&self, id: &TransferId, peer: &InstanceId) -> Lookup<T> {
        self.state.lock().get_from(id, peer)
    }

    /// Looks up what `peer` offers; if it is unknown, `make` may have it held. A refusal, of `make`'s or for want of room,
    /// is this peer's answer from then on. `make` must not come back to this table.
    pub(super) fn hold(
        &self,
        id: TransferId,
        peer: &InstanceId,
        make: impl FnOnce() -> Result<Arc<T>, TransferError>,
    ) -> Result<Holding<T>, TransferError> {
        let Bounds { remember, hold: limit } = self.bounds;
        let mut state = self.state.lock();
        let found = state.get_from(&id, peer);
        if !matches!(found, Lookup::Unknown) {
            return Ok(Holding { found, displaced: None });
        }
        let full = TransferError::Limit { what: "offers that nobody expects yet", limit };
        let (made, displaced) = match state.held.room(peer, limit) {
            Room::Free => (make(), None),
            Room::None => (Err(full.clone()), None),
            Room::InPlaceOf(oldest, greediest) => match make() {
                Ok(offer) => (Ok(offer), state.displace(oldest, &greediest, &full, remember)),
                refused => (refused, None),
            },
        };
        match &made {
            Ok(offer) => state.held.add(id, peer, offer.clone()),
            Err(reason) => state.held.remember(id, peer, reason.clone(), remember),
        }
        let awaited = state.no_longer_awaited(&id);
        drop(state);
        wake(awaited);
        made.map(|_| Holding { found, displaced: displaced.map(|offer| (offer, full)) })
    }

    /// Has an id come alive that `from` is to send, unless it is known already: as the offer of it that is held, which
    /// `place` is then given back for, or as what `make` makes of `place`. `room` gets the number of live transfers;
    /// neither must come back to this table.
    pub(super) fn expect<P>(
        &self,
        id: TransferId,
        from: &InstanceId,
        place: P,
        room: impl FnOnce(usize) -> Result<(), TransferError>,
        make: impl FnOnce(P) -> Arc<T>,
    ) -> Result<Expecting<T, P>, TransferError> {
        let alone = |found| Ok(Expecting { found, strays: Vec::new() });
        let mut state = self.state.lock();
        match state.get(&id) {
            Lookup::Live(_) => return alone(Expected::Exists),
            Lookup::Ended(ended) => return alone(Expected::Ended(ended)),
            Lookup::Unknown => {}
        }
        if let Some(reason) = state.held.end(&id, from) {
            let ended = Ended { peer: Some(from.clone()), reason: Some(reason.clone()) };
            return alone(Expected::Ended(ended));
        }
        room(state.live.len())?;
        let (live, found) = match state.held.take(&id, from) {
            Some(offer) => (offer.clone(), Expected::Offered(offer, place)),
            None => {
                let made = make(place);
                (made.clone(), Expected::Made(made))
            }
        };
        state.live.insert(id, live);
        let strays = state.held.of(&id);
        let awaited = state.no_longer_awaited(&id);
        drop(state);
        wake(awaited);
        Ok(Expecting { found, strays })
    }

    /// Takes leave of one that was received or was to be: a live transfer ends, an offer that was held is remembered as
    /// its peer's, and so is one that was displaced, already.
    pub(super) fn leave(&self, id: TransferId, peer: &InstanceId, it: &T, reason: Option<TransferError>) {
        let mut state = self.state.lock();
        if state.held.remove(&id, peer, it) {
            if let (Some(reason), false) = (reason, state.ended.contains_key(&id)) {
                state.held.remember(id, peer, reason, self.bounds.remember);
            }
        } else if state.live.get(&id).is_some_and(|live| std::ptr::eq(Arc::as_ptr(live), it)) {
            state.live.remove(&id);
            state.remember(id, Ended { peer: Some(peer.clone()), reason }, self.bounds.remember);
        }
    }

    /// Resolves once `id` is known, at once if it is: alive, offered, or ended.
    pub(super) async fn known(&self, id: TransferId) {
        let Some(waiter) = self.wait(id) else { return };
        if let Some(signal) = &waiter.signal {
            signal.cancelled().await;
        }
    }

    /// `None` if `id` is known already.
    fn wait(&self, id: TransferId) -> Option<Waiter<'_, T>> {
        let mut state = self.state.lock();
        if !matches!(state.get(&id), Lookup::Unknown) || state.held.knows(&id) {
            return None;
        }
        let signal = state.awaited.get(&id).and_then(Weak::upgrade).unwrap_or_default();
        state.awaited.insert(id, Arc::downgrade(&signal));
        Some(Waiter { table: self, id, signal: Some(signal) })
    }

    /// Moves a transfer to the ended ones.
    pub(super) fn end(&self, id: TransferId, how: Ended) {
        let mut state = self.state.lock();
        state.live.remove(&id);
        state.remember(id, how, self.bounds.remember);
    }

    /// Has an id that is not alive ended before it ever was; one that has ended stays as it is. A live transfer is
    /// returned instead, for the caller to end, and so is what is held of the id: neither can come alive unseen in
    /// between.
    pub(super) fn end_unless_live(&self, id: TransferId, how: Ended) -> Vec<Arc<T>> {
        let mut state = self.state.lock();
        match state.get(&id) {
            Lookup::Live(live) => return vec![live],
            Lookup::Ended(_) => return Vec::new(),
            Lookup::Unknown => {}
        }
        state.remember(id, how, self.bounds.remember);
        let offers = state.held.of(&id);
        let awaited = state.no_longer_awaited(&id);
        drop(state);
        wake(awaited);
        offers
    }

    /// Takes back an addition as if it had not been.
    pub(super) fn forget(&self, id: &TransferId) {
        self.state.lock().live.remove(id);
    }

    /// Live transfers, and offers that are held.
    pub(super) fn all(&self) -> Vec<Arc<T>> {
        let state = self.state.lock();
        state.live.values().chain(state.held.all()).cloned().collect()
    }

    /// How many [`Self::all`] are.
    pub(super) fn len(&self) -> usize {
        let Counts { live, held } = self.counts();
        live + held
    }

    pub(super) fn counts(&self) -> Counts {
        let state = self.state.lock();
        Counts { live: state.live.len(), held: state.held.len() }
    }

    /// Ids that somebody waits for.
    #[cfg(test)]
    pub(super) fn awaited(&self) -> usize {
        self.state.lock().awaited.len()
    }
}

impl<T> State<T> {
    fn get(&self, id: &TransferId) -> Lookup<T> {
        match (self.live.get(id), self.ended.get(id)) {
            (Some(live), _) => Lookup::Live(live.clone()),
            (None, Some(ended)) => Lookup::Ended(ended.clone()),
            (None, None) => Lookup::Unknown,
        }
    }

    fn get_from(&self, id: &TransferId, peer: &InstanceId) -> Lookup<T> {
        let found = self.get(id);
        if !matches!(found, Lookup::Unknown) {
            return found;
        }
        match (self.held.get(id, peer), self.held.end(id, peer)) {
            (Some(offer), _) => Lookup::Live(offer.clone()),
            (None, Some(reason)) => {
                Lookup::Ended(Ended { peer: Some(peer.clone()), reason: Some(reason.clone()) })
            }
            (None, None) => Lookup::Unknown,
        }
    }

    /// Takes a peer's offer out for another one's; its end is remembered as that peer's.
    fn displace(
        &mut self,
        id: TransferId,
        peer: &InstanceId,
        reason: &TransferError,
        remember: usize,
    ) -> Option<Arc<T>> {
        let offer = self.held.take(&id, peer)?;
        self.held.remember(id, peer, reason.clone(), remember);
        Some(offer)
    }

    /// The signal of those who wait for an id that is known now.
    fn no_longer_awaited(&mut self, id: &TransferId) -> Option<Arc<CancellationToken>> {
        self.awaited.remove(id).and_then(|signal| signal.upgrade())
    }

    fn remember(&mut self, id: TransferId, how: Ended, most: usize) {
        if self.ended.insert(id, how).is_none() {
            self.order.push_back(id);
        }
        while self.order.len() > most {
            if let Some(oldest) = self.order.pop_front() {
                self.ended.remove(&oldest);
            }
        }
    }
}

fn wake(awaited: Option<Arc<CancellationToken>>) {
    if let Some(signal) = awaited {
        signal.cancel();
    }
}

impl<T> Drop for Waiter<'_, T> {
    fn drop(&mut self) {
        let Some(signal) = self.signal.take() else { return };
        let mut state = self.table.state.lock();
        // Signals are shared out and given back under the lock only, so the last one knows that it is.
        let own = state.awaited.get(&self.id).is_some_and(|held| held.as_ptr() == Arc::as_ptr(&signal));
        if own && Arc::strong_count(&signal) == 1 {
            state.awaited.remove(&self.id);
        }
        drop(signal);
        drop(state);
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests;
