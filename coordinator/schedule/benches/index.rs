//! What it takes the index to take in that a block was stored or evicted, as instances of several fleets say it.
//!
//! `cargo bench -p baton-schedule --bench index`. Each instance keeps so many blocks and computes one long prompt after
//! another, of which it stores all blocks and evicts as many; a pair of instances has the same, as prefill and decode do.
//! Processor time, medians of five rounds.

use std::{collections::VecDeque, hint::black_box, time::Duration};

use baton_schedule::index::{PrefixIndex, Slot};
use tabled::{builder::Builder, settings::Style};

/// Blocks of a prompt: 32,000 tokens, 16 a block.
const PROMPT: usize = 2_000;
const ROUNDS: usize = 5;
/// Prompts of each round.
const PROMPTS: usize = 50;
/// Blocks that are changed at a time, as the coordinator does it.
const AT_ONCE: usize = 512;

/// Two instances that have the same.
struct Pair {
    slots: [Slot; 2],
    /// Oldest first.
    kept: VecDeque<u64>,
}

struct Fleet {
    index: PrefixIndex,
    pairs: Vec<Pair>,
    names: u64,
}

impl Fleet {
    fn new(pairs: usize, blocks: usize) -> Self {
        let mut index = PrefixIndex::new(1 << 28, (0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9));
        let pairs = (0..pairs)
            .map(|_| {
                let slots = [index.open(), index.open()];
                slots.iter().for_each(|slot| index.publish(*slot, None));
                Pair { slots, kept: VecDeque::new() }
            })
            .collect();
        let mut fleet = Self { index, pairs, names: 0 };
        for pair in 0..fleet.pairs.len() {
            while fleet.pairs[pair].kept.len() < blocks {
                fleet.prompt(pair, 0);
            }
        }
        fleet
    }

    /// A pair computes a prompt, and lets go what it has had for longest; so many changes it were.
    fn prompt(&mut self, pair: usize, evicts: usize) -> usize {
        let stored: Vec<u64> = (0..PROMPT).map(|_| self.name()).collect();
        let Pair { slots, kept } = &mut self.pairs[pair];
        let evicted: Vec<u64> = kept.drain(..evicts).collect();
        kept.extend(&stored);
        for slot in slots {
            evicted.chunks(AT_ONCE).for_each(|some| self.index.change(*slot, &[], some));
            stored.chunks(AT_ONCE).for_each(|some| self.index.change(*slot, some, &[]));
        }
        2 * (stored.len() + evicted.len())
    }

    /// Looks like half of a hash.
    fn name(&mut self) -> u64 {
        self.names += 1;
        let mixed = (self.names ^ self.names >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

/// Processor time that this process has had.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn main() {
    let mut table = Builder::default();
    table.push_record(["pairs of instances", "blocks of each", "blocks in all", "ns a change"]);
    // What else a coordinator does between two prompts takes the place of the index in the processor's caches.
    let mut other = vec![1u8; 4 << 20];
    for (pairs, blocks) in [(1, 16_384), (1, 65_536), (16, 65_536), (64, 65_536)] {
        let mut fleet = Fleet::new(pairs, blocks);
        let mut rounds: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let (mut changes, mut taken) = (0, Duration::ZERO);
                for prompt in 0..PROMPTS {
                    other.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(3));
                    black_box(&mut other);
                    let began = processor_time();
                    changes += fleet.prompt(prompt % pairs, PROMPT);
                    taken += processor_time() - began;
                }
                taken.as_nanos() as f64 / changes as f64
            })
            .collect();
        rounds.sort_by(f64::total_cmp);
        let total = fleet.index.blocks();
        table.push_record([
            pairs.to_string(),
            blocks.to_string(),
            total.to_string(),
            format!("{:.0}", rounds[ROUNDS / 2]),
        ]);
    }
    println!("{}", table.build().with(Style::markdown()));
}
