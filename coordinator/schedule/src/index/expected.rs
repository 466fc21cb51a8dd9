//! What instances will hold once requests in flight have been computed. Pure.
//!
//! Kept apart from what they say that they hold, so that what is taken back was never counted as theirs, and one entry a
//! request, so that a long prompt costs no more than a short one. A chain's names follow from all before them: of two
//! chains everything up to the last common name is common, which a few comparisons find.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use tokio::time::Instant;

use super::{Depths, Slot};

/// Requests in flight that are kept; over it the oldest is forgotten.
const MOST: usize = 16 << 10;

/// A request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Debug)]
struct Entry {
    slot: Slot,
    chain: Arc<[u64]>,
}

#[derive(Debug, Default)]
pub(super) struct Expected {
    next: u64,
    entries: BTreeMap<Ticket, Entry>,
    /// When to forget which, the soonest first.
    ending: VecDeque<(Instant, Ticket)>,
}

impl Expected {
    pub(super) fn add(&mut self, slot: Slot, chain: Arc<[u64]>) -> Ticket {
        if self.entries.len() >= MOST {
            self.entries.pop_first();
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.entries.insert(ticket, Entry { slot, chain });
        ticket
    }

    /// Ends are given in order; one before the last given is taken for that.
    pub(super) fn settle(&mut self, ticket: Ticket, until: Instant) {
        if self.entries.contains_key(&ticket) {
            let last = self.ending.back().map_or(until, |(last, _)| *last);
            self.ending.push_back((until.max(last), ticket));
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((until, ticket)) = self.ending.front()
            && *until <= now
        {
            self.entries.remove(ticket);
            self.ending.pop_front();
        }
    }

    /// The instance is found under another slot from now on.
    pub(super) fn follow(&mut self, old: Slot, new: Slot) {
        self.entries.values_mut().filter(|entry| entry.slot == old).for_each(|entry| entry.slot = new);
    }

    pub(super) fn forget(&mut self, slot: Slot) {
        self.entries.retain(|_, entry| entry.slot != slot);
    }

    /// Deepens what was found of `chain`.
    pub(super) fn depths(&self, chain: &[u64], into: &mut Depths) {
        for entry in self.entries.values() {
            match common(&entry.chain, chain) {
                0 => {}
                blocks => into.at_least(entry.slot, blocks),
            }
        }
    }
}

/// How many names two chains begin with alike.
fn common(a: &[u64], b: &[u64]) -> u32 {
    let most = a.len().min(b.len());
    // Most prompts part early: looked at 1, 3, 7, ... names from the start, then in halves.
    let (mut alike, mut step) = (0, 1);
    while alike + step <= most && a[alike + step - 1] == b[alike + step - 1] {
        alike += step;
        step *= 2;
    }
    let mut end = (alike + step - 1).min(most);
    while alike < end {
        let middle = alike + (end - alike) / 2;
        if a[middle] == b[middle] {
            alike = middle + 1;
        } else {
            end = middle;
        }
    }
    alike as u32
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn chains_part_where_their_names_do() {
        let chain = |shared: usize, own: u64, length: usize| -> Vec<u64> {
            (0..length as u64).map(|n| if (n as usize) < shared { n } else { own + n }).collect()
        };
        for length in 0..40 {
            for shared in 0..=length {
                let (a, b) = (chain(shared, 1000, length), chain(shared, 2000, 33));
                assert_eq!(common(&a, &b), shared.min(33) as u32, "{shared} of {length}");
            }
        }
    }

    #[test]
    fn the_oldest_makes_room_and_nothing_of_it_stays() {
        let (mut expected, now) = (Expected::default(), Instant::now());
        let tickets: Vec<Ticket> = (0..MOST + 3).map(|_| expected.add(Slot(0), Arc::default())).collect();
        assert_eq!(expected.entries.len(), MOST);
        tickets.iter().for_each(|&ticket| expected.settle(ticket, now));
        assert_eq!(expected.ending.len(), MOST);
        expected.expire(now - Duration::from_millis(1));
        assert_eq!(expected.entries.len(), MOST);
        expected.expire(now);
        assert!(expected.entries.is_empty() && expected.ending.is_empty());
    }
}
