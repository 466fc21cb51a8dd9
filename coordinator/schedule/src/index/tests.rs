//! The index against naive sets, its bounds, and what a long prompt costs.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use proptest::prelude::*;

use super::*;

const SEED: (u64, u64) = (0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9);

/// Every block is told.
const ALL: Sieve = Sieve::ALL;

/// A name that looks like half of a hash, and begins with its place as those do.
fn name(chain: u64, block: u64) -> u64 {
    let mut hash = (chain << 32 | block).wrapping_add(SEED.0);
    for shift in [30, 27, 31] {
        hash = (hash ^ hash >> shift).wrapping_mul(SEED.1);
    }
    hash & !255 | block & 255
}

/// The names of a prompt that has so many blocks in common with all, and then its own.
fn chain(own: u64, shared: u64, length: u64) -> Vec<u64> {
    (0..length).map(|block| if block < shared { name(0, block) } else { name(own, block) }).collect()
}

fn index(limit: usize) -> PrefixIndex {
    PrefixIndex::new(limit, SEED)
}

fn with(index: &mut PrefixIndex, stored: &[u64]) -> Slot {
    let slot = index.open();
    index.change(slot, stored, &[]);
    index.publish(slot, None);
    slot
}

fn depths(index: &mut PrefixIndex, chain: &[u64], now: Instant) -> Depths {
    let mut depths = Depths::default();
    index.depths(&Arc::new(chain.into()), ALL, now, &mut depths);
    depths
}

fn leading(held: &HashSet<u64>, chain: &[u64]) -> u32 {
    chain.iter().take_while(|key| held.contains(key)).count() as u32
}

#[test]
fn a_snapshot_counts_when_it_is_whole_and_replaces_what_was_before() {
    let (mut index, now) = (index(1000), Instant::now());
    let prompt = chain(1, 4, 10);
    let old = with(&mut index, &prompt[..3]);
    let new = index.open();
    index.change(new, &prompt[..7], &[]);
    let told = depths(&mut index, &prompt, now);
    assert_eq!((told.of(old), told.of(new)), (3, 0));
    index.publish(new, Some(old));
    let told = depths(&mut index, &prompt, now);
    assert_eq!((told.of(old), told.of(new)), (0, 7));
    index.change(old, &prompt, &[]);
    index.change(new, &prompt[7..8], &[prompt[3]]);
    let told = depths(&mut index, &prompt, now);
    assert_eq!((told.of(old), told.of(new)), (0, 8), "of a chain that is not whole the ends are believed");
    index.change(new, &[], &prompt[4..]);
    assert_eq!(depths(&mut index, &prompt, now).of(new), 3);
}

#[test]
fn what_is_gone_is_swept_and_its_number_used_again_only_then() {
    let mut index = index(100_000);
    let slots: Vec<Slot> = (0..20).map(|n| with(&mut index, &chain(n + 1, 50, 100))).collect();
    assert_eq!(index.blocks(), 50 + 20 * 50);
    slots[..19].iter().for_each(|&slot| index.close(slot));
    slots[..19].iter().for_each(|&slot| index.close(slot));
    let fresh = index.open();
    assert!(!slots.contains(&fresh), "a number is used whose blocks are still there");
    let parts = std::iter::from_fn(|| index.sweep().then_some(())).count() + 1;
    assert_eq!(parts, SHARDS);
    assert_eq!(index.blocks(), 100);
    assert_eq!(index.words, 0);
    assert!(slots.contains(&index.open()) && !index.sweep());
    let told = depths(&mut index, &chain(20, 50, 100), Instant::now());
    assert_eq!((told.of(slots[19]), told.of(slots[3])), (100, 0));
}

#[test]
fn what_is_expected_counts_until_it_is_settled_and_moves_with_its_instance() {
    let (mut index, now) = (index(1000), Instant::now());
    let (prompt, longer) = (chain(1, 4, 10), chain(1, 4, 20));
    let slot = with(&mut index, &prompt[..2]);
    let ticket = index.expect(slot, &Arc::new(prompt.as_slice().into()));
    assert_eq!(depths(&mut index, &longer, now).of(slot), 10);
    assert_eq!(depths(&mut index, &chain(2, 4, 10), now).of(slot), 4);
    let (hour, second) = (now + Duration::from_secs(3600), now + Duration::from_secs(1));
    assert_eq!(depths(&mut index, &longer, hour).of(slot), 10, "a prompt may wait for long");
    let again = index.open();
    index.publish(again, Some(slot));
    let told = depths(&mut index, &longer, now);
    assert_eq!((told.of(slot), told.of(again)), (0, 10));
    index.settle(ticket, second);
    assert_eq!(depths(&mut index, &longer, now).of(again), 10);
    assert_eq!(depths(&mut index, &longer, second).of(again), 0);
    let ticket = index.expect(again, &Arc::new(prompt.as_slice().into()));
    index.close(again);
    assert!(depths(&mut index, &longer, second).is_empty());
    index.settle(ticket, second);
}

#[test]
fn over_the_limit_it_knows_less_of_each_prompt_and_takes_no_more() {
    const LIMIT: usize = 2000;
    let (mut index, now) = (index(LIMIT), Instant::now());
    let prompts: Vec<Vec<u64>> = (1..40).map(|n| chain(n, 0, 400)).collect();
    let slots: Vec<Slot> = prompts.iter().map(|prompt| with(&mut index, &prompt[..300])).collect();
    assert!(index.blocks() <= LIMIT && index.blocks() > LIMIT / 4, "{} blocks", index.blocks());
    assert!(index.halvings >= 2 && index.halvings <= 5, "{} halvings", index.halvings);
    let mut sum = 0;
    for (prompt, slot) in prompts.iter().zip(&slots) {
        let told = depths(&mut index, prompt, now).of(*slot);
        assert!(told <= 300, "{told} blocks, and it has 300");
        sum += told;
    }
    // Of eight blocks, say, one is known.
    assert!(sum / 39 > 270, "{} blocks of 300 on average", sum / 39);
    assert_eq!(depths(&mut index, &chain(99, 0, 400), now).of(slots[0]), 0);
    // However many more come.
    (100..1000).for_each(|n| _ = with(&mut index, &chain(n, 0, 400)));
    assert!(index.blocks() + index.words <= LIMIT);
    // With nothing left it begins anew.
    (0..index.slots).for_each(|slot| index.close(Slot(slot)));
    while index.sweep() {}
    assert_eq!((index.blocks(), index.words, index.halvings), (0, 0, 0));
    let slot = with(&mut index, &prompts[0]);
    assert_eq!(depths(&mut index, &prompts[0], now).of(slot), 400);
}

/// Some instances, prompts that share their beginnings, and what happens to them.
#[derive(Debug, Clone)]
enum Step {
    /// An instance holds so much of a prompt, which it had less, or more, of.
    Holds {
        instance: usize,
        prompt: usize,
        blocks: usize,
    },
    /// It says anew what it has.
    Snapshot {
        instance: usize,
    },
    Gone {
        instance: usize,
    },
    Sweep,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0usize..70, 0usize..12, 0usize..40)
            .prop_map(|(instance, prompt, blocks)| Step::Holds { instance, prompt, blocks }),
        1 => (0usize..70).prop_map(|instance| Step::Snapshot { instance }),
        1 => (0usize..70).prop_map(|instance| Step::Gone { instance }),
        1 => Just(Step::Sweep),
    ]
}

/// A tree of prompts: each has a beginning of one of three, which have a beginning of all.
fn prompts() -> Vec<Vec<u64>> {
    let prompt = |n: u64| {
        let block = |block: u64| match block {
            0..5 => name(0, block),
            5..17 => name(100 + n % 3, block),
            _ => name(200 + n, block),
        };
        (0..40).map(block).collect()
    };
    (0..12).map(prompt).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Of chains that are held from their start on, depths are what naive sets say, whoever comes and goes: exactly, or up
    /// to the last block that is told.
    #[test]
    fn depths_of_nested_holders_are_exact(
        steps in prop::collection::vec(step(), 1..200),
        every_tokens in prop::sample::select(vec![16, 32, 64, 128]),
    ) {
        let sieve = Sieve::new(every_tokens, 16);
        let told_of = |keys: Vec<u64>| keys.into_iter().filter(|key| sieve.keeps(*key)).collect::<Vec<_>>();
        let (mut index, prompts, now) = (index(100_000), prompts(), Instant::now());
        let mut truth: HashMap<usize, (Slot, HashSet<u64>)> = HashMap::new();
        for step in steps {
            match step {
                Step::Holds { instance, prompt, blocks } => {
                    let (slot, held) =
                        truth.entry(instance).or_insert_with(|| (with(&mut index, &[]), HashSet::new()));
                    let prompt = &prompts[prompt];
                    // Its other prompts may need what this one has no longer: a tree is cut at its leaves.
                    let needed: HashSet<u64> = prompts.iter().filter(|other| *other != prompt)
                        .flat_map(|other| &other[..leading(held, other) as usize]).copied().collect();
                    let stored: Vec<u64> = prompt[..blocks].iter().filter(|key| !held.contains(key)).copied().collect();
                    let evicted: Vec<u64> = prompt[blocks..].iter()
                        .filter(|key| held.contains(key) && !needed.contains(key)).copied().collect();
                    index.change(*slot, &told_of(stored.clone()), &told_of(evicted.clone()));
                    held.extend(&stored);
                    evicted.iter().for_each(|key| _ = held.remove(key));
                }
                Step::Snapshot { instance } => if let Some((slot, held)) = truth.get_mut(&instance) {
                    let fresh = index.open();
                    index.change(fresh, &told_of(held.iter().copied().collect()), &[]);
                    index.publish(fresh, Some(*slot));
                    *slot = fresh;
                },
                Step::Gone { instance } => if let Some((slot, _)) = truth.remove(&instance) {
                    index.close(slot);
                },
                Step::Sweep => (0..SHARDS / 3).for_each(|_| _ = index.sweep()),
            }
        }
        let known = |held: &HashSet<u64>, prompt: &[u64]| {
            let last = prompt[..leading(held, prompt) as usize].iter().rposition(|key| sieve.keeps(*key));
            last.map_or(0, |last| last as u32 + 1)
        };
        for prompt in &prompts {
            let mut told = Depths::default();
            index.depths(&Arc::new(prompt.as_slice().into()), sieve, now, &mut told);
            for (instance, (slot, held)) in &truth {
                prop_assert_eq!(told.of(*slot), known(held, prompt), "instance {}", instance);
            }
            prop_assert_eq!(told.touched.len(), truth.values().filter(|(_, held)| known(held, prompt) > 0).count());
        }
        let all: HashSet<u64> = truth.values().flat_map(|(_, held)| held).copied().collect();
        while index.sweep() {}
        prop_assert_eq!(index.blocks(), told_of(all.into_iter().collect()).len());
    }

    /// Whatever is held, nobody is said to have a prompt whose first block it lacks, or an end that it lacks.
    #[test]
    fn depths_of_any_holders_are_within_reason(
        held in prop::collection::vec(prop::collection::hash_set(0usize..30, 0..30), 1..80),
        gone in prop::collection::hash_set(0usize..80, 0..40),
    ) {
        let (mut index, prompt, now) = (index(100_000), chain(1, 3, 30), Instant::now());
        let slots: Vec<Slot> = held.iter()
            .map(|held| with(&mut index, &held.iter().map(|at| prompt[*at]).collect::<Vec<_>>())).collect();
        gone.iter().filter_map(|at| slots.get(*at)).for_each(|slot| index.close(*slot));
        (0..SHARDS / 2).for_each(|_| _ = index.sweep());
        let told = depths(&mut index, &prompt, now);
        for (at, held) in held.iter().enumerate() {
            match told.of(slots[at]) as usize {
                0 => prop_assert!(gone.contains(&at) || !held.contains(&0)),
                depth => prop_assert!(!gone.contains(&at) && held.contains(&0) && held.contains(&(depth - 1))),
            }
        }
    }
}

#[test]
fn where_holders_end_everywhere_depths_are_rounded_down_in_measure() {
    let (mut index, prompt, now) = (index(1 << 20), chain(1, 0, 6000), Instant::now());
    let slots: Vec<Slot> = (0..600).map(|n| with(&mut index, &prompt[..n * 10 + 1])).collect();
    let told = depths(&mut index, &prompt, now);
    for (n, slot) in slots.iter().enumerate() {
        let (depth, truth) = (told.of(*slot) as usize, n * 10 + 1);
        assert!(depth <= truth && depth + 24 > truth, "{depth} for {truth}");
    }
}

/// What a prompt of 126,000 tokens costs where everybody has its first 30 blocks, every tenth a tenth of it and five all;
/// then where another tenth ends each somewhere else. Prints the times: run it with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "measures; it decides nothing"]
fn a_long_prompt_costs_little() {
    let prompt = chain(1, 30, 126_000 / 16);
    for (instances, others, ragged) in [
        (10, 1_000, false),
        (1_000, 5_000, false),
        (10_000, 500, false),
        (1_000, 500, true),
        (10_000, 500, true),
    ] {
        let mut index = index(usize::MAX >> 8);
        for n in 0..instances {
            let blocks = match n % 10 {
                _ if n % (instances / 5) == 3 % (instances / 5) => prompt.len(),
                4 => prompt.len() / 10,
                6 if ragged => 31 + n * 7 % (prompt.len() - 31),
                _ => 30,
            };
            let own = chain(2 + n as u64, 0, others);
            with(&mut index, &[&prompt[..blocks], &own].concat());
        }
        let (now, mut told) = (Instant::now(), Depths::default());
        let mut took: Vec<Duration> = (0..1000)
            .map(|_| {
                told.clear();
                let began = std::time::Instant::now();
                index.depths(&Arc::new(prompt.as_slice().into()), ALL, now, &mut told);
                began.elapsed()
            })
            .collect();
        took.sort_unstable();
        assert_eq!(told.touched.len(), instances);
        println!(
            "{instances} instances, {} blocks{}: p50 {:?}, p99 {:?}",
            index.blocks(),
            if ragged { ", ragged" } else { "" },
            took[took.len() / 2],
            took[took.len() * 99 / 100]
        );
    }
}
