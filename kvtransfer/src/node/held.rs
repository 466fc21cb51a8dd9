//! Offers that nobody expects yet, and how those ended that nobody came to expect.
//!
//! A part of [`super::table`], under its lock. Both are kept by id *and* sender: who names a transfer that is not its own
//! neither takes the place of the sender that it is expected from nor speaks for it. What is remembered here is apart from
//! the ends of transfers, and room for one more comes from whoever fills it: no number of offers makes a node forget what
//! it has released, or what it refused another peer.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use baton_proto::{InstanceId, TransferId};

use crate::TransferError;

#[derive(Debug)]
pub(super) struct Held<T> {
    offers: HashMap<TransferId, Vec<(InstanceId, Arc<T>)>>,
    ends: HashMap<TransferId, Vec<(InstanceId, TransferError)>>,
    /// The ids in `ends`, by peer, oldest first.
    order: HashMap<InstanceId, VecDeque<TransferId>>,
    /// How many that are.
    remembered: usize,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        let (offers, ends, order) = Default::default();
        Self { offers, ends, order, remembered: 0 }
    }
}

impl<T> Held<T> {
    /// Offers that are held.
    pub(super) fn len(&self) -> usize {
        self.offers.values().map(Vec::len).sum()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.offers.values().flatten().map(|(_, offer)| offer)
    }

    /// Whether anybody has offered this transfer.
    pub(super) fn knows(&self, id: &TransferId) -> bool {
        self.offers.contains_key(id) || self.ends.contains_key(id)
    }

    /// All offers of one transfer.
    pub(super) fn of(&self, id: &TransferId) -> Vec<Arc<T>> {
        self.offers.get(id).into_iter().flatten().map(|(_, offer)| offer.clone()).collect()
    }

    pub(super) fn get(&self, id: &TransferId, peer: &InstanceId) -> Option<&Arc<T>> {
        self.offers.get(id)?.iter().find(|(sender, _)| sender == peer).map(|(_, offer)| offer)
    }

    /// A peer has one offer of a transfer at most.
    pub(super) fn add(&mut self, id: TransferId, peer: InstanceId, offer: Arc<T>) {
        self.offers.entry(id).or_default().push((peer, offer));
    }

    /// Takes an offer out; false if it is not here.
    pub(super) fn remove(&mut self, id: &TransferId, offer: &T) -> bool {
        let Some(offers) = self.offers.get_mut(id) else { return false };
        let before = offers.len();
        offers.retain(|(_, held)| !std::ptr::eq(Arc::as_ptr(held), offer));
        let removed = offers.len() < before;
        if offers.is_empty() {
            self.offers.remove(id);
        }
        removed
    }

    /// Why a peer's offer came to nothing.
    pub(super) fn end(&self, id: &TransferId, peer: &InstanceId) -> Option<&TransferError> {
        self.ends.get(id)?.iter().find(|(sender, _)| sender == peer).map(|(_, reason)| reason)
    }

    /// Keeps the first reason of each peer and id, `most` in all.
    pub(super) fn remember(&mut self, id: TransferId, peer: &InstanceId, reason: TransferError, most: usize) {
        if self.end(&id, peer).is_some() {
            return;
        }
        self.ends.entry(id).or_default().push((peer.clone(), reason));
        self.order.entry(peer.clone()).or_default().push_back(id);
        self.remembered += 1;
        while self.remembered > most {
            self.forget_one();
        }
    }

    /// Forgets the oldest of the peer that has the most.
    fn forget_one(&mut self) {
        let Some((peer, ids)) = self.order.iter_mut().max_by_key(|(_, ids)| ids.len()) else { return };
        let (peer, oldest) = (peer.clone(), ids.pop_front());
        if ids.is_empty() {
            self.order.remove(&peer);
        }
        self.remembered -= 1;
        let Some(id) = oldest else { return };
        if let Some(ends) = self.ends.get_mut(&id) {
            ends.retain(|(sender, _)| *sender != peer);
            if ends.is_empty() {
                self.ends.remove(&id);
            }
        }
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
        assert_eq!((kept, held.remembered, held.ends.len()), (3, 4, 4));
        assert!(held.end(&many[99], &loud).is_some(), "the last one is kept");
        assert!(held.end(&many[99], &quiet).is_none(), "and is not another peer's");
        let mut none = Held::<u32>::default();
        none.remember(first, &quiet, TransferError::ShuttingDown, 0);
        assert!(!none.knows(&first) && none.order.is_empty());
    }

    #[test]
    fn peers_offer_one_id_beside_each_other() {
        let mut held = Held::<u32>::default();
        let id = TransferId::generate();
        let offers = [Arc::new(1), Arc::new(1)];
        held.add(id, peer("one"), offers[0].clone());
        held.add(id, peer("two"), offers[1].clone());
        assert_eq!((held.len(), held.of(&id).len(), held.all().count()), (2, 2, 2));
        assert!(held.remove(&id, &offers[0]) && !held.remove(&id, &offers[0]));
        assert!(held.get(&id, &peer("one")).is_none() && held.get(&id, &peer("two")).is_some());
        assert!(held.remove(&id, &offers[1]) && !held.knows(&id));
    }
}
