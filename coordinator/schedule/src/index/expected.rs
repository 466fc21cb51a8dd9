//! What instances will hold once requests in flight have been computed. Pure.
//!
//! Kept apart from what they say that they hold, so that what is taken back was never counted as theirs, and one entry a
//! request, so that a long prompt costs little more than a short one ([`Names`]). In the order of their names, the
//! chains that have most in common with one are its neighbours, so that few are looked at of however many.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
};

use tokio::time::Instant;

use super::{Depths, Slot, holders::SlotSet};
use crate::chains::Names;

/// Requests in flight that are kept; over it the oldest is forgotten.
const MOST: usize = 16 << 10;

/// Neighbours on each side that are looked at. Beyond them lies what has less in common with a prompt than all of these:
/// what many prompts begin with, which somebody has computed before.
const NEIGHBOURS: usize = 256;

/// A request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Debug, Default)]
pub(super) struct Expected {
    next: u64,
    chains: BTreeMap<Ticket, Arc<Names>>,
    slots: BTreeMap<(Arc<Names>, Ticket), Slot>,
    /// How many chains each slot has, of those that have any.
    by_slot: HashMap<Slot, usize>,
    /// When to forget which, the soonest first.
    ending: VecDeque<(Instant, Ticket)>,
}

impl Expected {
    pub(super) fn add(&mut self, slot: Slot, chain: &Arc<Names>) -> Ticket {
        if self.chains.len() >= MOST
            && let Some((&oldest, _)) = self.chains.first_key_value()
        {
            self.remove(oldest);
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.chains.insert(ticket, chain.clone());
        self.slots.insert((chain.clone(), ticket), slot);
        *self.by_slot.entry(slot).or_default() += 1;
        ticket
    }

    fn remove(&mut self, ticket: Ticket) {
        let Some(chain) = self.chains.remove(&ticket) else { return };
        if let Some(slot) = self.slots.remove(&(chain, ticket))
            && let Entry::Occupied(mut chains) = self.by_slot.entry(slot)
        {
            *chains.get_mut() -= 1;
            if *chains.get() == 0 {
                chains.remove();
            }
        }
    }

    /// Ends are given in order; one before the last given is taken for that.
    pub(super) fn settle(&mut self, ticket: Ticket, until: Instant) {
        if self.chains.contains_key(&ticket) {
            let last = self.ending.back().map_or(until, |(last, _)| *last);
            self.ending.push_back((until.max(last), ticket));
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((until, ticket)) = self.ending.front().copied()
            && until <= now
        {
            self.remove(ticket);
            self.ending.pop_front();
        }
    }

    /// The instance is found under another slot from now on.
    pub(super) fn follow(&mut self, old: Slot, new: Slot) {
        if let Some(chains) = self.by_slot.remove(&old) {
            self.slots.values_mut().filter(|slot| **slot == old).for_each(|slot| *slot = new);
            *self.by_slot.entry(new).or_default() += chains;
        }
    }

    pub(super) fn forget(&mut self, slot: Slot) {
        let Self { chains, slots, by_slot, .. } = self;
        if by_slot.remove(&slot).is_none() {
            return;
        }
        slots.retain(|(_, ticket), at| {
            let stays = *at != slot;
            if !stays {
                chains.remove(ticket);
            }
            stays
        });
    }

    /// Deepens what was found of `chain`.
    pub(super) fn depths(&self, chain: &Arc<Names>, into: &mut Depths) {
        if self.slots.is_empty() {
            return;
        }
        let place = (chain.clone(), Ticket(0));
        self.look(self.slots.range(..&place).rev(), &place.0, into);
        self.look(self.slots.range(&place..), &place.0, into);
    }

    /// On one side of `chain`, the nearest first: of each slot's the first has most in common with it.
    fn look<'a>(
        &self,
        neighbours: impl Iterator<Item = (&'a (Arc<Names>, Ticket), &'a Slot)>,
        chain: &Names,
        into: &mut Depths,
    ) {
        let (mut seen, mut unseen) = (SlotSet::default(), self.by_slot.len());
        for ((other, _), slot) in neighbours.take(NEIGHBOURS) {
            if seen.has(slot.0) {
                continue;
            }
            let blocks = other.common(chain) as u32;
            if blocks == 0 {
                return;
            }
            into.at_least(*slot, blocks);
            seen.insert(slot.0);
            unseen -= 1;
            if unseen == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn names(chain: &[u64]) -> Arc<Names> {
        Arc::new(chain.into())
    }

    fn common(a: &[u64], b: &[u64]) -> u32 {
        a.iter().zip(b).take_while(|(a, b)| a == b).count() as u32
    }

    #[test]
    fn names_that_fall_together_lose_nobody() {
        // The third name of the first two is the same by somebody's work, and the third chain lies between them.
        let chains = [vec![5, 10, 7, 90], vec![5, 20, 7, 30], vec![5, 15, 8, 1], vec![5, 10], vec![]];
        let now = Instant::now();
        for first in 0..chains.len() {
            let mut expected = Expected::default();
            let turn = (0..chains.len()).map(|at| chains[(first + at) % chains.len()].clone());
            let tickets: Vec<Ticket> = turn.map(|chain| expected.add(Slot(0), &names(&chain))).collect();
            tickets.into_iter().rev().for_each(|ticket| expected.settle(ticket, now));
            expected.expire(now);
            assert!(expected.slots.is_empty() && expected.by_slot.is_empty(), "from {first}");
        }
    }

    #[test]
    fn neighbours_tell_as_much_as_all() {
        let mut random = 1u64;
        let mut draw = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        // A tree of prompts: each goes on from an earlier one for some blocks, under names that follow from all before.
        let mut chains: Vec<Vec<u64>> = vec![vec![]];
        for own in 0..200 {
            let from = chains[draw(chains.len() as u64) as usize].clone();
            let kept = draw(from.len() as u64 + 1) as usize;
            let more = (0..1 + draw(6)).map(|n| own * 7919 % 1009 + n * 1_000_003);
            chains.push(from[..kept].iter().copied().chain(more).collect());
        }
        let mut expected = Expected::default();
        for (number, chain) in chains.iter().enumerate() {
            expected.add(Slot(number as u32 % 7), &names(chain));
        }
        let holds = |expected: &mut Expected, of: &dyn Fn(u32) -> Option<Slot>| {
            for chain in &chains {
                let mut depths = Depths::default();
                expected.depths(&names(chain), &mut depths);
                for slot in 0..7u32 {
                    let of_slot = chains.iter().skip(slot as usize).step_by(7);
                    let deepest = of_slot.map(|other| common(other, chain)).max().unwrap_or_default();
                    let found = of(slot).map(|slot| depths.of(slot));
                    assert!(found.is_none_or(|found| found == deepest), "{chain:?} at {slot}: {found:?}");
                }
            }
        };
        holds(&mut expected, &|slot| Some(Slot(slot)));
        expected.follow(Slot(3), Slot(70));
        expected.forget(Slot(5));
        holds(&mut expected, &|slot| match slot {
            3 => Some(Slot(70)),
            5 => None,
            _ => Some(Slot(slot)),
        });
        let mut gone = Depths::default();
        chains.iter().for_each(|chain| expected.depths(&names(chain), &mut gone));
        assert_eq!((gone.of(Slot(3)), gone.of(Slot(5))), (0, 0));
    }

    #[test]
    fn the_oldest_makes_room_and_nothing_of_it_stays() {
        let (mut expected, now) = (Expected::default(), Instant::now());
        let tickets: Vec<Ticket> = (0..MOST + 3).map(|_| expected.add(Slot(0), &Arc::default())).collect();
        assert_eq!(expected.chains.len(), MOST);
        tickets.iter().for_each(|&ticket| expected.settle(ticket, now));
        assert_eq!(expected.ending.len(), MOST);
        expected.expire(now - Duration::from_millis(1));
        assert_eq!(expected.chains.len(), MOST);
        expected.expire(now);
        assert!(expected.chains.is_empty() && expected.slots.is_empty() && expected.ending.is_empty());
        assert!(expected.by_slot.is_empty());
    }
}
