//! Who holds one block. Pure.
//!
//! Most blocks are held by very few: up to three are kept in place. More are kept in words of 64 slots each, those
//! without any left out, so that eight holders of ten thousand take 128 bytes and all of them 2.5 KB.

/// What no holder is.
const NOBODY: u32 = u32::MAX;
/// Fewer holders than this are kept in place again.
const FEW_AGAIN: u32 = 3;

/// Some slots, as a set.
#[derive(Debug, Default)]
pub(super) struct SlotSet(Vec<u64>);

impl SlotSet {
    pub(super) fn insert(&mut self, slot: u32) {
        let at = slot as usize / 64;
        if at >= self.0.len() {
            self.0.resize(at + 1, 0);
        }
        self.0[at] |= 1 << (slot % 64);
    }

    pub(super) fn remove(&mut self, slot: u32) {
        if let Some(word) = self.0.get_mut(slot as usize / 64) {
            *word &= !(1 << (slot % 64));
        }
    }

    pub(super) fn has(&self, slot: u32) -> bool {
        self.word(slot / 64) & (1 << (slot % 64)) != 0
    }

    fn word(&self, at: u32) -> u64 {
        self.0.get(at as usize).copied().unwrap_or(0)
    }
}

/// Slots 64 `at` to 64 `at` + 63; never empty.
#[derive(Debug, Clone, Copy)]
struct Word {
    at: u32,
    bits: u64,
}

impl Word {
    fn each(self, mut each: impl FnMut(u32)) {
        let mut left = self.bits;
        while left != 0 {
            each(self.at * 64 + left.trailing_zeros());
            left &= left - 1;
        }
    }
}

/// In the order of `at`.
#[derive(Debug, Default)]
pub(super) struct Words(Vec<Word>);

impl Words {
    fn find(&self, slot: u32) -> Result<usize, usize> {
        self.0.binary_search_by_key(&(slot / 64), |word| word.at)
    }

    fn has(&self, slot: u32) -> bool {
        self.find(slot).is_ok_and(|at| self.0[at].bits & (1 << (slot % 64)) != 0)
    }

    fn insert(&mut self, slot: u32) -> bool {
        let bit = 1 << (slot % 64);
        match self.find(slot) {
            Ok(at) => {
                let word = &mut self.0[at];
                let new = word.bits & bit == 0;
                word.bits |= bit;
                new
            }
            Err(at) => {
                self.0.insert(at, Word { at: slot / 64, bits: bit });
                true
            }
        }
    }

    fn count(&self) -> u32 {
        self.0.iter().map(|word| word.bits.count_ones()).sum()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) enum Holders {
    Few([u32; 3]),
    Many(Box<Words>),
}

impl Default for Holders {
    fn default() -> Self {
        Self::Few([NOBODY; 3])
    }
}

impl Holders {
    /// False: it was there.
    pub(super) fn insert(&mut self, slot: u32) -> bool {
        match self {
            Self::Few(few) if few.contains(&slot) => false,
            Self::Few(few) => match few.iter_mut().find(|held| **held == NOBODY) {
                Some(free) => {
                    *free = slot;
                    true
                }
                None => {
                    let mut words = Words::default();
                    few.iter().chain([&slot]).for_each(|&slot| _ = words.insert(slot));
                    *self = Self::Many(Box::new(words));
                    true
                }
            },
            Self::Many(words) => words.insert(slot),
        }
    }

    /// Leaves those that `keeps` says.
    pub(super) fn retain(&mut self, keeps: impl Fn(u32) -> bool) {
        match self {
            Self::Few(few) => few.iter_mut().filter(|slot| !keeps(**slot)).for_each(|slot| *slot = NOBODY),
            Self::Many(words) => {
                for word in &mut words.0 {
                    let gone = &mut 0;
                    word.each(|slot| *gone |= u64::from(!keeps(slot)) << (slot % 64));
                    word.bits &= !*gone;
                }
                words.0.retain(|word| word.bits != 0);
                self.settle();
            }
        }
    }

    /// False: it was not there.
    pub(super) fn remove(&mut self, slot: u32) -> bool {
        if !self.has(slot) {
            return false;
        }
        match self {
            Self::Few(few) => few.iter_mut().filter(|held| **held == slot).for_each(|held| *held = NOBODY),
            Self::Many(words) => {
                if let Ok(at) = words.find(slot) {
                    words.0[at].bits &= !(1 << (slot % 64));
                    if words.0[at].bits == 0 {
                        words.0.remove(at);
                    }
                }
                self.settle();
            }
        }
        true
    }

    /// Few are kept in place.
    fn settle(&mut self) {
        if let Self::Many(words) = self
            && words.0.len() < FEW_AGAIN as usize
            && words.count() < FEW_AGAIN
        {
            let mut few = [NOBODY; 3];
            let mut free = few.iter_mut();
            self.for_each(|slot| {
                if let Some(free) = free.next() {
                    *free = slot;
                }
            });
            *self = Self::Few(few);
        }
    }

    pub(super) fn has(&self, slot: u32) -> bool {
        match self {
            Self::Few(few) => few.contains(&slot),
            Self::Many(words) => words.has(slot),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Few(few) => *few == [NOBODY; 3],
            Self::Many(words) => words.0.is_empty(),
        }
    }

    /// What it takes beyond its place, in words of 16 bytes.
    pub(super) fn words(&self) -> usize {
        match self {
            Self::Few(_) => 0,
            Self::Many(words) => words.0.len(),
        }
    }

    pub(super) fn for_each(&self, mut each: impl FnMut(u32)) {
        match self {
            Self::Few(few) => few.iter().filter(|slot| **slot != NOBODY).for_each(|slot| each(*slot)),
            Self::Many(words) => words.0.iter().for_each(|word| word.each(&mut each)),
        }
    }

    /// Whether all of these, so far as they are `live`, are among `others`, too.
    pub(super) fn are_all_in(&self, others: Option<&Self>, live: &SlotSet) -> bool {
        self.missing(others, live, |_| false)
    }

    /// Those of these that are `live` and not among `others`.
    pub(super) fn each_not_in(&self, others: Option<&Self>, live: &SlotSet, mut each: impl FnMut(u32)) {
        self.missing(others, live, |word| {
            word.each(&mut each);
            true
        });
    }

    /// Goes through those that are missing from `others` for as long as `goes_on` says; true: to the end.
    fn missing(&self, others: Option<&Self>, live: &SlotSet, mut goes_on: impl FnMut(Word) -> bool) -> bool {
        let words = match self {
            Self::Few(few) => {
                let missing = |slot: u32| {
                    slot != NOBODY && live.has(slot) && !others.is_some_and(|others| others.has(slot))
                };
                let mut few = few.iter().filter(|slot| missing(**slot));
                return few.all(|slot| goes_on(Word { at: slot / 64, bits: 1 << (slot % 64) }));
            }
            Self::Many(words) => words,
        };
        let mut behind: &[Word] = match others {
            Some(Self::Many(others)) => &others.0,
            _ => &[],
        };
        words.0.iter().all(|word| {
            let mut bits = word.bits & live.word(word.at);
            if let Some(Self::Few(few)) = others {
                let here = few.iter().filter(|slot| **slot / 64 == word.at);
                here.for_each(|slot| bits &= !(1 << (slot % 64)));
            }
            while let [first, rest @ ..] = behind
                && first.at < word.at
            {
                behind = rest;
            }
            if let [first, ..] = behind
                && first.at == word.at
            {
                bits &= !first.bits;
            }
            bits == 0 || goes_on(Word { at: word.at, bits })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn holders(slots: &BTreeSet<u32>) -> Holders {
        let mut holders = Holders::default();
        slots.iter().for_each(|&slot| assert!(holders.insert(slot)));
        holders
    }

    fn listed(holders: &Holders) -> BTreeSet<u32> {
        let mut slots = BTreeSet::new();
        holders.for_each(|slot| assert!(slots.insert(slot), "{slot} twice"));
        slots
    }

    #[test]
    fn a_block_takes_no_more_than_is_said() {
        assert_eq!(size_of::<(u64, Holders)>(), 24);
        assert_eq!(size_of::<Word>(), 16);
        let eight = holders(&(0..8).map(|n| n * 1000).collect());
        assert_eq!(eight.words(), 8);
        assert_eq!(holders(&(0..10_000).collect()).words(), 157);
        assert_eq!(holders(&(0..3).collect()).words(), 0);
    }

    proptest! {
        #[test]
        fn they_are_as_a_set_is(
            steps in prop::collection::vec((0u32..200, any::<bool>()), 1..80),
            odd in any::<bool>(),
        ) {
            let (mut set, mut held) = (BTreeSet::new(), Holders::default());
            for (slot, comes) in steps {
                if comes {
                    prop_assert_eq!(held.insert(slot), set.insert(slot));
                } else {
                    prop_assert_eq!(held.remove(slot), set.remove(&slot));
                }
                prop_assert_eq!(listed(&held), set.clone());
                prop_assert_eq!(held.is_empty(), set.is_empty());
                prop_assert_eq!(held.has(slot), comes);
            }
            held.retain(|slot| (slot % 2 == 1) == odd);
            set.retain(|slot| (slot % 2 == 1) == odd);
            prop_assert_eq!(listed(&held), set);
        }

        #[test]
        fn inclusion_counts_the_living_alone(
            a in prop::collection::btree_set(0u32..150, 0..20),
            b in prop::collection::btree_set(0u32..150, 0..40),
            gone in prop::collection::btree_set(0u32..150, 0..140),
            joined in any::<bool>(),
        ) {
            let b = if joined { &a | &b } else { b };
            let mut live = SlotSet::default();
            (0..150).filter(|slot| !gone.contains(slot)).for_each(|slot| live.insert(slot));
            let expected = a.iter().all(|slot| gone.contains(slot) || b.contains(slot));
            prop_assert_eq!(holders(&a).are_all_in(Some(&holders(&b)), &live), expected);
            prop_assert_eq!(holders(&a).are_all_in(None, &live), a.iter().all(|slot| gone.contains(slot)));
            let mut missing = BTreeSet::new();
            holders(&a).each_not_in(Some(&holders(&b)), &live, |slot| _ = missing.insert(slot));
            prop_assert_eq!(missing, &(&a - &b) - &gone);
        }
    }
}
