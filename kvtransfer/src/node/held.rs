//! Offers that nobody expects yet, and how those ended that nobody came to expect.
//!
//! A part of [`super::table`], under its lock. Both are kept by id *and* sender: who names a transfer that is not its own
//! neither takes the place of the sender that it is expected from nor speaks for it. What is remembered here is apart from
//! the ends of transfers, and room for one more comes from whoever fills it: no number of offers makes a node forget what
//! it has released, or what it refused another peer, and none keeps another peer's offers out.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use baton_proto::{InstanceId, TransferId};

use crate::TransferError;

#[derive(Debug)]
pub(super) struct Held<T> {
    offers: ByPeer<Arc<T>>,
    ends: ByPeer<TransferError>,
}

/// Where one more offer of a peer finds its place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Room {
    Free,
    /// That of another peer's offer, its oldest.
    InPlaceOf(TransferId, InstanceId),
    None,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self { offers: ByPeer::default(), ends: ByPeer::default() }
    }
}

impl<T> Held<T> {
    /// Offers that are held.
    pub(super) fn len(&self) -> usize {
        self.offers.len
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.offers.by_id.values().flatten().map(|(_, offer)| offer)
    }

    /// Whether anybody has offered this transfer.
    pub(super) fn knows(&self, id: &TransferId) -> bool {
        self.offers.by_id.contains_key(id) || self.ends.by_id.contains_key(id)
    }

    /// All offers of one transfer.
    pub(super) fn of(&self, id: &TransferId) -> Vec<Arc<T>> {
        self.offers.by_id.get(id).into_iter().flatten().map(|(_, offer)| offer.clone()).collect()
    }

    pub(super) fn get(&self, id: &TransferId, peer: &InstanceId) -> Option<&Arc<T>> {
        self.offers.get(id, peer)
    }

    /// Whether `most` have room for one more of `peer`. Whoever has two more than it gives way, so that all come to have
    /// equally many, and one alone has all.
    pub(super) fn room(&self, peer: &InstanceId, most: usize) -> Room {
        if self.offers.len < most {
            return Room::Free;
        }
        match self.offers.greediest() {
            Some((greediest, theirs)) if theirs.len() > self.offers.of(peer) + 1 => match theirs.front() {
                Some(oldest) => Room::InPlaceOf(*oldest, greediest.clone()),
                None => Room::None,
            },
            _ => Room::None,
        }
    }

    /// A peer has one offer of a transfer at most.
    pub(super) fn add(&mut self, id: TransferId, peer: &InstanceId, offer: Arc<T>) {
        self.offers.add(id, peer, offer);
    }

    /// Takes an offer out, whichever it is.
    pub(super) fn take(&mut self, id: &TransferId, peer: &InstanceId) -> Option<Arc<T>> {
        self.offers.remove(id, peer)
    }

    /// Takes this very offer out; false if it is not here.
    pub(super) fn remove(&mut self, id: &TransferId, peer: &InstanceId, offer: &T) -> bool {
        let is_it = self.get(id, peer).is_some_and(|held| std::ptr::eq(Arc::as_ptr(held), offer));
        is_it && self.take(id, peer).is_some()
    }

    /// Why a peer's offer came to nothing.
    pub(super) fn end(&self, id: &TransferId, peer: &InstanceId) -> Option<&TransferError> {
        self.ends.get(id, peer)
    }

    /// Keeps the first reason of each peer and id, `most` in all: the oldest of the peer that has the most is forgotten.
    pub(super) fn remember(&mut self, id: TransferId, peer: &InstanceId, reason: TransferError, most: usize) {
        if self.end(&id, peer).is_some() {
            return;
        }
        self.ends.add(id, peer, reason);
        while self.ends.len > most {
            let oldest = |(peer, ids): (&InstanceId, &VecDeque<_>)| Some((*ids.front()?, peer.clone()));
            let Some((id, peer)) = self.ends.greediest().and_then(oldest) else { return };
            self.ends.remove(&id, &peer);
        }
    }
}

/// Values by id and peer, of which one can tell who has how many.
#[derive(Debug)]
struct ByPeer<V> {
    by_id: HashMap<TransferId, Vec<(InstanceId, V)>>,
    /// The ids of each peer, oldest first. None is without any.
    order: HashMap<InstanceId, VecDeque<TransferId>>,
    len: usize,
}

impl<V> Default for ByPeer<V> {
    fn default() -> Self {
        Self { by_id: HashMap::new(), order: HashMap::new(), len: 0 }
    }
}

impl<V> ByPeer<V> {
    fn get(&self, id: &TransferId, peer: &InstanceId) -> Option<&V> {
        self.by_id.get(id)?.iter().find(|(of, _)| of == peer).map(|(_, value)| value)
    }

    /// How many a peer has.
    fn of(&self, peer: &InstanceId) -> usize {
        self.order.get(peer).map_or(0, VecDeque::len)
    }

    /// The peer that has the most, and their ids.
    fn greediest(&self) -> Option<(&InstanceId, &VecDeque<TransferId>)> {
        self.order.iter().max_by_key(|(_, ids)| ids.len())
    }

    fn add(&mut self, id: TransferId, peer: &InstanceId, value: V) {
        self.by_id.entry(id).or_default().push((peer.clone(), value));
        self.order.entry(peer.clone()).or_default().push_back(id);
        self.len += 1;
    }

    fn remove(&mut self, id: &TransferId, peer: &InstanceId) -> Option<V> {
        let values = self.by_id.get_mut(id)?;
        let at = values.iter().position(|(of, _)| of == peer)?;
        let (_, value) = values.remove(at);
        if values.is_empty() {
            self.by_id.remove(id);
        }
        if let Some(ids) = self.order.get_mut(peer) {
            if let Some(at) = ids.iter().position(|of| of == id) {
                ids.remove(at);
            }
            if ids.is_empty() {
                self.order.remove(peer);
            }
        }
        self.len -= 1;
        Some(value)
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use super::*;

    fn peer(name: &str) -> InstanceId {
        InstanceId::new(name).expect("a valid name")
    }

    #[test]
    fn whoever_fills_the_memory_forgets_its_own() {
        let mut held = Held::<u32>::default();
        let (quiet, loud) = (peer("quiet"), peer("loud"));
        let first = TransferId::generate();
        held.remember(first, &quiet, TransferError::ShuttingDown, 4);
        let many: Vec<_> = (0..100).map(|_| TransferId::generate()).collect();
        many.iter().for_each(|&id| held.remember(id, &loud, TransferError::ShuttingDown, 4));
        assert!(held.end(&first, &quiet).is_some());
        let kept = many.iter().filter(|id| held.end(id, &loud).is_some()).count();
        assert_eq!((kept, held.ends.len, held.ends.by_id.len()), (3, 4, 4));
        assert!(held.end(&many[99], &loud).is_some(), "the last one is kept");
        assert!(held.end(&many[99], &quiet).is_none(), "and is not another peer's");
        let mut none = Held::<u32>::default();
        none.remember(first, &quiet, TransferError::ShuttingDown, 0);
        assert!(!none.knows(&first) && none.ends.order.is_empty());
    }

    #[test]
    fn peers_offer_one_id_beside_each_other() {
        let mut held = Held::<u32>::default();
        let id = TransferId::generate();
        let (one, two) = (peer("one"), peer("two"));
        let offers = [Arc::new(1), Arc::new(1)];
        held.add(id, &one, offers[0].clone());
        held.add(id, &two, offers[1].clone());
        assert_eq!((held.len(), held.of(&id).len(), held.all().count()), (2, 2, 2));
        assert!(!held.remove(&id, &one, &offers[1]), "another's");
        assert!(held.remove(&id, &one, &offers[0]) && !held.remove(&id, &one, &offers[0]));
        assert!(held.get(&id, &one).is_none() && held.get(&id, &two).is_some());
        assert!(held.remove(&id, &two, &offers[1]) && !held.knows(&id));
        assert!(held.len() == 0 && held.offers.order.is_empty());
    }

    #[test]
    fn whoever_has_the_most_makes_room_until_all_have_equally_many() {
        let mut held = Held::<u32>::default();
        let (loud, quiet) = (peer("loud"), peer("quiet"));
        let ids: Vec<_> = (0..4).map(|_| TransferId::generate()).collect();
        for &id in &ids {
            assert_eq!(held.room(&loud, 4), Room::Free);
            held.add(id, &loud, Arc::new(0));
        }
        assert_eq!(held.room(&loud, 4), Room::None, "not at its own expense");
        for &oldest in &ids[..2] {
            let room = held.room(&quiet, 4);
            assert_eq!(room, Room::InPlaceOf(oldest, loud.clone()));
            assert!(held.take(&oldest, &loud).is_some());
            held.add(TransferId::generate(), &quiet, Arc::new(0));
        }
        assert_eq!((held.room(&quiet, 4), held.room(&loud, 4)), (Room::None, Room::None));
        assert_eq!(Held::<u32>::default().room(&quiet, 0), Room::None);
    }
}
