//! Which blocks are held, by name: an open-addressed table. Pure.
//!
//! Names are scrambled already, so that a part of one says where its block is looked for first; if that place is taken, in the
//! next ones. So a block is found in the cache line it is looked for in, or the one behind, where a table of the standard
//! library takes one for its tags and one for the entry. What is removed leaves no mark: what is behind it moves up.
//!
//! It grows by half, so that it is at least half full once it has grown, and at most three quarters.

use super::{Scrambled, holders::Holders};

/// Places that a table begins with.
const LEAST: usize = 4;

/// A place; a block that nobody holds is none.
#[derive(Debug, Default)]
struct Entry {
    name: u64,
    holders: Holders,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<Entry>,
    blocks: usize,
}

impl Table {
    /// Blocks that somebody holds.
    pub(super) fn len(&self) -> usize {
        self.blocks
    }

    pub(super) fn get(&self, name: Scrambled) -> Option<&Holders> {
        let at = self.find(name).ok()?;
        Some(&self.entries[at].holders)
    }

    /// Reads where a block would be, so that it is in the processor's cache when it is wanted.
    pub(super) fn touch(&self, name: Scrambled) -> u64 {
        self.entries.get(self.home(name)).map_or(0, |entry| entry.name)
    }

    /// What `change` makes of a block's holders, who may be none before and after.
    pub(super) fn change<T>(&mut self, name: Scrambled, change: impl FnOnce(&mut Holders) -> T) -> T {
        match self.find(name) {
            Ok(at) => {
                let result = change(&mut self.entries[at].holders);
                if self.entries[at].holders.is_empty() {
                    self.remove(at);
                }
                result
            }
            Err(vacant) => {
                let mut holders = Holders::default();
                let result = change(&mut holders);
                if !holders.is_empty() {
                    self.insert(vacant, Entry { name: name.0, holders });
                }
                result
            }
        }
    }

    /// Has each block's holders changed, and drops the blocks of which it says no, or that nobody holds any more.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(Scrambled, &mut Holders) -> bool) {
        let before = std::mem::take(self);
        let kept = before.entries.into_iter().filter_map(|mut entry| {
            let stays = !entry.holders.is_empty() && stays(Scrambled(entry.name), &mut entry.holders);
            (stays && !entry.holders.is_empty()).then_some(entry)
        });
        let kept: Vec<Entry> = kept.collect();
        *self = Self::of(kept.len() * 4 / 3 + 1, kept);
    }

    /// A table of at least so many places with these.
    fn of(places: usize, blocks: Vec<Entry>) -> Self {
        if blocks.is_empty() {
            return Self::default();
        }
        let entries = (0..places.max(LEAST)).map(|_| Entry::default()).collect();
        let mut table = Self { entries, blocks: 0 };
        for entry in blocks {
            if let Err(vacant) = table.find(Scrambled(entry.name)) {
                table.entries[vacant] = entry;
                table.blocks += 1;
            }
        }
        table
    }

    /// Where it is looked for first. The bits of the name are others than those that say its part of the index, and whether
    /// it survives when blocks are halved.
    fn home(&self, name: Scrambled) -> usize {
        let bits = (name.0 >> 48 << 16) | (name.0 & 0xffff);
        (bits as usize * self.entries.len()) >> 32
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() { 0 } else { at + 1 }
    }

    /// Where it is, or the place for it: some place is always vacant.
    fn find(&self, name: Scrambled) -> Result<usize, usize> {
        let mut at = self.home(name);
        loop {
            match self.entries.get(at) {
                Some(entry) if entry.holders.is_empty() => return Err(at),
                Some(entry) if entry.name == name.0 => return Ok(at),
                Some(_) => at = self.after(at),
                None => return Err(0),
            }
        }
    }

    fn insert(&mut self, vacant: usize, entry: Entry) {
        if (self.blocks + 1) * 4 <= self.entries.len() * 3 {
            self.entries[vacant] = entry;
            self.blocks += 1;
            return;
        }
        let places = (self.entries.len() * 3).div_ceil(2);
        let mut blocks: Vec<Entry> = std::mem::take(&mut self.entries);
        blocks.retain(|entry| !entry.holders.is_empty());
        blocks.push(entry);
        *self = Self::of(places, blocks);
    }

    /// What is behind moves up, as far as it is not where it is looked for first.
    fn remove(&mut self, at: usize) {
        self.blocks -= 1;
        let (mut hole, mut next) = (at, self.after(at));
        while !self.entries[next].holders.is_empty() {
            let home = self.home(Scrambled(self.entries[next].name));
            // Whether the hole is on the way from its home to where it is, past the table's end or not.
            let on_the_way =
                if home <= next { (home..next).contains(&hole) } else { hole >= home || hole < next };
            if on_the_way {
                self.entries.swap(hole, next);
                hole = next;
            }
            next = self.after(next);
        }
        self.entries[hole] = Entry::default();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// Names that are looked for at few places, so that they are in each other's way.
    fn name(number: u64) -> Scrambled {
        Scrambled((number % 5) << 61 | (number % 3) << 20 | number << 36)
    }

    proptest! {
        #[test]
        fn it_is_as_a_map_is(
            steps in prop::collection::vec((0u64..60, 0u32..4, any::<bool>()), 1..400),
            dropped in 0u64..4,
        ) {
            let (mut table, mut map) = (Table::default(), BTreeMap::<u64, BTreeSet<u32>>::new());
            for (number, slot, comes) in steps {
                let name = name(number);
                if comes {
                    table.change(name, |holders| holders.insert(slot));
                    map.entry(name.0).or_default().insert(slot);
                } else {
                    table.change(name, |holders| holders.remove(slot));
                    if let Some(slots) = map.get_mut(&name.0) {
                        slots.remove(&slot);
                    }
                    map.retain(|_, slots| !slots.is_empty());
                }
                prop_assert_eq!(table.len(), map.len());
            }
            let same = |table: &Table, map: &BTreeMap<u64, BTreeSet<u32>>| {
                (0..60).map(name).all(|name| {
                    let held = |slot: &u32| table.get(name).is_some_and(|holders| holders.has(*slot));
                    let slots = map.get(&name.0);
                    (0..4).all(|slot| held(&slot) == slots.is_some_and(|slots| slots.contains(&slot)))
                })
            };
            prop_assert!(same(&table, &map));
            table.retain(|name, holders| {
                holders.retain(|slot| slot != 1);
                name.0 >> 36 & 3 != dropped
            });
            map.values_mut().for_each(|slots| _ = slots.remove(&1));
            map.retain(|name, slots| name >> 36 & 3 != dropped && !slots.is_empty());
            prop_assert_eq!(table.len(), map.len());
            prop_assert!(same(&table, &map));
        }
    }

    #[test]
    fn it_is_as_full_as_is_said_while_it_grows() {
        let mut table = Table::default();
        for number in 1..2000u64 {
            let name = Scrambled(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            table.change(name, |holders| holders.insert(7));
            let places = table.entries.len();
            assert!(
                number as usize * 4 <= places * 3 && places <= LEAST.max(number as usize * 2),
                "{number} in {places}"
            );
        }
    }
}
