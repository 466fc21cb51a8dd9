//! Which instance has how much of a prompt cached. Pure.
//!
//! By block, who holds it; blocks by the first 64 bits of their names ([`crate::chains`]). Fed by [`super::caches`] with
//! what instances say, asked for each request that is placed.
//!
//! **Depths.** Who holds a block holds those before it in its chain, as a rule: servers take blocks from a chain's start,
//! and let go, and evict, from its end. So the holders of a prompt's blocks, in order, are sets of which each contains the
//! next, and where both ends of a stretch have the same holders, so has all that is between. Stretches are halved until
//! that is so: a prompt of 126,000 tokens costs a few dozen look-ups in place of 7,900, though all instances share its
//! first block, and never more than [`LOOKUPS_MOST`]. The exceptions are few: a block that two sequences computed side by
//! side is kept once, by the one that may let go first; events are on their way; somebody lies. An instance that lacks the
//! first block is then taken to have nothing, and one that lacks another either to end there or not to lack it. It is an
//! estimate that is wrong, and the server finds for itself what it has.
//!
//! **Sieve.** Instances tell of a part of the blocks ([`Sieve`]): depths are rounded down to one of which they tell.
//!
//! **Slots.** An instance is a number here. A snapshot is taken in under a new slot beside the old one, and takes its
//! place when it is whole. What a slot held is never looked for when it is gone: it does not count from then on, and
//! [`PrefixIndex::sweep`] goes through the table, a 4,096th part of it at a time. A slot is not used again before that.
//!
//! **Memory.** A block that up to three instances hold takes 24 bytes, so 32 to 48 with the room that tables keep; more
//! holders take a word of 16 bytes (up to 32 while it grows) for each 64 slots that have one of them, beside some 90 for
//! the first, and each of those counts as a block of its own. Over the limit every second block is forgotten, then every
//! second of those that are left, chosen by bits of the name: of each prompt it is known which blocks are looked for.
//! Depths are then rounded down to such a block. What was forgotten comes back when everything has gone: the loss is a
//! few blocks a prompt.

mod expected;
mod holders;
mod table;

use std::{collections::VecDeque, hint::black_box, sync::Arc};

use baton_proto::Sieve;
use tokio::time::Instant;

use expected::Expected;
pub use expected::Ticket;
use holders::{Holders, SlotSet};
use table::Table;

use crate::chains::{Names, scrambled};

/// Most memory that a block takes, in bytes.
pub const BLOCK_BYTES: usize = 48;
/// The table is in as many parts: each grows, and is swept, by itself, within microseconds.
pub const SHARDS: usize = 4096;
/// Blocks of one prompt that are looked up: where holders end in more places than these tell apart, what lies between two
/// of them is rounded down. Prompts of fewer blocks that are told are always told exactly.
const LOOKUPS_MOST: usize = 256;
/// Blocks that are looked for at a time in the table.
const AHEAD: usize = 64;
/// At least one of 2^16 blocks is remembered.
const HALVINGS_MOST: u8 = 16;

/// An instance's cache, as one snapshot and what followed it have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u32);

/// How many blocks of a prompt each slot has from the start.
#[derive(Debug, Default)]
pub struct Depths {
    by_slot: Vec<u32>,
    touched: Vec<Slot>,
    /// Room for [`LookedFor::These`].
    kept: Vec<u32>,
}

impl Depths {
    pub fn of(&self, slot: Slot) -> u32 {
        self.by_slot.get(slot.0 as usize).copied().unwrap_or(0)
    }

    pub fn clear(&mut self) {
        for slot in self.touched.drain(..) {
            self.by_slot[slot.0 as usize] = 0;
        }
    }

    /// Nobody has anything.
    pub fn is_empty(&self) -> bool {
        self.touched.is_empty()
    }

    fn at_least(&mut self, slot: Slot, blocks: u32) {
        let at = slot.0 as usize;
        if at >= self.by_slot.len() {
            self.by_slot.resize(at + 1, 0);
        }
        if self.by_slot[at] == 0 {
            self.touched.push(slot);
        }
        self.by_slot[at] = self.by_slot[at].max(blocks);
    }
}

#[derive(Debug, Default)]
struct Shard {
    blocks: Table,
    /// How often the blocks in it were halved.
    halvings: u8,
}

/// A name, scrambled with the index's seed: nobody outside knows which names fall together.
#[derive(Debug, Clone, Copy)]
struct Scrambled(u64);

impl Scrambled {
    /// The table itself goes by the 16 lowest and the 16 highest bits.
    fn shard(self) -> usize {
        (self.0 >> 36) as usize % SHARDS
    }

    fn survives(self, halvings: u8) -> bool {
        (self.0 >> 20) & ((1 << halvings) - 1) == 0
    }
}

/// A slot that is gone.
#[derive(Debug)]
struct Gone {
    slot: u32,
    /// Parts of the table that may still have it.
    parts: usize,
}

/// See the module.
#[derive(Debug)]
pub struct PrefixIndex {
    seed: (u64, u64),
    shards: Vec<Shard>,
    /// Most blocks and words together.
    limit: usize,
    blocks: usize,
    words: usize,
    /// How often blocks are to be halved, and how many shards have been.
    halvings: u8,
    halved: usize,
    /// Slots given out so far, and those of them to give out again.
    slots: u32,
    free: Vec<u32>,
    /// Slots whose word is taken, and of them those that depths are told of.
    open: SlotSet,
    live: SlotSet,
    gone: Vec<Gone>,
    swept: usize,
    expected: Expected,
}

impl PrefixIndex {
    /// Remembers at most `limit` blocks, of [`BLOCK_BYTES`] each; `seed` is anything that nobody knows.
    pub fn new(limit: usize, seed: (u64, u64)) -> Self {
        let seed = (seed.0, seed.1 | 1);
        Self {
            seed,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            limit: limit.max(1),
            blocks: 0,
            words: 0,
            halvings: 0,
            halved: SHARDS,
            slots: 0,
            free: Vec::new(),
            open: SlotSet::default(),
            live: SlotSet::default(),
            gone: Vec::new(),
            swept: 0,
            expected: Expected::default(),
        }
    }

    /// Blocks that are remembered, each once.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// A slot that holds nothing, and that no depth is told of yet.
    pub fn open(&mut self) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots += 1;
            self.slots - 1
        });
        self.open.insert(slot);
        Slot(slot)
    }

    /// Depths are told of this slot, and no longer of `old`, whose requests in flight it has.
    pub fn publish(&mut self, slot: Slot, old: Option<Slot>) {
        self.live.insert(slot.0);
        if let Some(old) = old {
            self.expected.follow(old, slot);
            self.close(old);
        }
    }

    /// The slot is gone, with all it holds.
    pub fn close(&mut self, slot: Slot) {
        if self.open.has(slot.0) {
            self.open.remove(slot.0);
            self.live.remove(slot.0);
            self.expected.forget(slot);
            self.gone.push(Gone { slot: slot.0, parts: SHARDS });
        }
    }

    /// What the instance of a slot has stored, and what it has evicted.
    pub fn change(&mut self, slot: Slot, stored: &[u64], evicted: &[u64]) {
        if self.open.has(slot.0) {
            for keys in evicted.chunks(AHEAD) {
                self.touch(keys);
                keys.iter().for_each(|&key| self.evict(slot, key));
            }
            for keys in stored.chunks(AHEAD) {
                self.touch(keys);
                keys.iter().for_each(|&key| self.store(slot, key));
            }
        }
    }

    /// Reads where these are in the table: what is not in the processor's cache comes for all of them at once.
    fn touch(&self, keys: &[u64]) {
        let read = keys.iter().fold(0, |read, &key| {
            let scrambled = self.scrambled(key);
            read ^ self.shards[scrambled.shard()].blocks.touch(scrambled)
        });
        black_box(read);
    }

    fn store(&mut self, slot: Slot, key: u64) {
        let scrambled = self.scrambled(key);
        self.make_room();
        if !scrambled.survives(self.halvings) || self.blocks + self.words >= self.limit {
            return;
        }
        if self.shards[scrambled.shard()].halvings != self.halvings {
            self.halve(scrambled.shard());
        }
        let table = &mut self.shards[scrambled.shard()].blocks;
        let before = table.len();
        self.words += table.change(scrambled, |holders| {
            let words = holders.words();
            holders.insert(slot.0);
            holders.words() - words
        });
        self.blocks += table.len() - before;
    }

    fn evict(&mut self, slot: Slot, key: u64) {
        let scrambled = self.scrambled(key);
        let table = &mut self.shards[scrambled.shard()].blocks;
        let before = table.len();
        self.words -= table.change(scrambled, |holders| {
            let words = holders.words();
            holders.remove(slot.0);
            words - holders.words()
        });
        if table.len() < before {
            self.blocks -= 1;
            self.begin_anew();
        }
    }

    /// Forgets blocks until there is room for one more, or one of 2^16 is left.
    fn make_room(&mut self) {
        while self.blocks + self.words >= self.limit {
            if self.halved < SHARDS {
                self.halve(self.halved);
                self.halved += 1;
            } else if self.halvings < HALVINGS_MOST {
                self.halvings += 1;
                self.halved = 0;
            } else {
                return;
            }
        }
    }

    fn halve(&mut self, shard: usize) {
        let halvings = self.halvings;
        let shard = &mut self.shards[shard];
        if shard.halvings == halvings {
            return;
        }
        shard.halvings = halvings;
        let (before, mut words) = (shard.blocks.len(), 0);
        shard.blocks.retain(|name, holders| {
            let stays = name.survives(halvings);
            words += if stays { 0 } else { holders.words() };
            stays
        });
        self.blocks -= before - shard.blocks.len();
        self.words -= words;
    }

    /// Where nothing is left, everything is remembered again.
    fn begin_anew(&mut self) {
        if self.blocks == 0 && self.halvings > 0 {
            self.shards.iter_mut().for_each(|shard| *shard = Shard::default());
            (self.halvings, self.halved) = (0, SHARDS);
        }
    }

    /// Frees a part of the table of what gone slots held. False: there is nothing to free.
    pub fn sweep(&mut self) -> bool {
        if self.gone.is_empty() {
            return false;
        }
        let (open, table) = (&self.open, &mut self.shards[self.swept].blocks);
        let (before, mut freed) = (table.len(), 0);
        table.retain(|_, holders| {
            let words = holders.words();
            holders.retain(|slot| open.has(slot));
            freed += words - holders.words();
            true
        });
        self.blocks -= before - table.len();
        self.words -= freed;
        self.swept = (self.swept + 1) % SHARDS;
        self.gone.iter_mut().for_each(|gone| gone.parts -= 1);
        let free = &mut self.free;
        self.gone.retain(|gone| {
            if gone.parts == 0 {
                free.push(gone.slot);
            }
            gone.parts > 0
        });
        self.begin_anew();
        !self.gone.is_empty()
    }

    /// The instance of a slot is about to compute, or to receive, the blocks of this chain.
    pub fn expect(&mut self, slot: Slot, chain: &Arc<Names>) -> Ticket {
        self.expected.add(slot, chain)
    }

    /// It has, or will not: until then what is expected counts, and afterwards only what it says.
    pub fn settle(&mut self, ticket: Ticket, until: Instant) {
        self.expected.settle(ticket, until);
    }

    /// Adds, for each slot, how many blocks `chain` begins with that it has or is to have. Looked for are those that pass
    /// the sieve: of others it need not have been told.
    pub fn depths(&mut self, chain: &Arc<Names>, sieve: Sieve, now: Instant, into: &mut Depths) {
        self.expected.expire(now);
        self.expected.depths(chain, into);
        let mut kept = std::mem::take(&mut into.kept);
        kept.clear();
        let places = (0..chain.len() as u32).step_by(sieve.one_of());
        let (looked_for, count) = if self.halvings == 0 {
            (LookedFor::EachOf(sieve.one_of()), places.len())
        } else {
            kept.extend(places.filter(|at| self.scrambled(chain[*at as usize]).survives(self.halvings)));
            (LookedFor::These(&kept), kept.len())
        };
        Search { index: self, chain, looked_for, into }.run(count);
        into.kept = kept;
    }

    fn scrambled(&self, key: u64) -> Scrambled {
        Scrambled(scrambled(key, self.seed))
    }
}

/// Which blocks of a chain are looked for.
#[derive(Debug, Clone, Copy)]
enum LookedFor<'a> {
    /// The first and then every so-many-th, as a [`Sieve`] has it.
    EachOf(usize),
    /// At these places.
    These(&'a [u32]),
}

/// Finds the places in a chain where holders fall away.
struct Search<'a> {
    index: &'a PrefixIndex,
    chain: &'a [u64],
    looked_for: LookedFor<'a>,
    into: &'a mut Depths,
}

impl<'a> Search<'a> {
    /// Of so many blocks that are looked for.
    fn run(&mut self, looked_for: usize) {
        let Some(first) = self.holders(0) else { return };
        let index = self.index;
        let live = &index.live;
        // From a block to a later one, or the end, with the holders of both; the longest first.
        let mut stretches = VecDeque::from([((0, first), (looked_for, None))]);
        let mut lookups = 0;
        while let Some((low, high)) = stretches.pop_front() {
            if low.1.are_all_in(high.1, live) {
                continue;
            }
            if high.0 - low.0 > 1 && lookups < LOOKUPS_MOST {
                lookups += 1;
                let middle = low.0 + (high.0 - low.0) / 2;
                let holders = self.holders(middle);
                stretches.push_back((low, (middle, holders)));
                stretches.extend(holders.map(|holders| ((middle, holders), high)));
                continue;
            }
            let blocks = self.position(low.0).map_or(0, |position| position + 1);
            low.1.each_not_in(high.1, live, |slot| {
                if first.has(slot) {
                    self.into.at_least(Slot(slot), blocks);
                }
            });
        }
    }

    fn holders(&self, at: usize) -> Option<&'a Holders> {
        let scrambled = self.index.scrambled(*self.chain.get(self.position(at)? as usize)?);
        self.index.shards[scrambled.shard()].blocks.get(scrambled)
    }

    fn position(&self, at: usize) -> Option<u32> {
        match self.looked_for {
            LookedFor::EachOf(step) => Some((at * step) as u32),
            LookedFor::These(places) => places.get(at).copied(),
        }
    }
}

#[cfg(test)]
mod tests;
