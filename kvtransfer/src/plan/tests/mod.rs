//! Plans carried out and compared with a naive gather (`naive`), byte for byte, for any two caches (`case`); and the
//! cases that can be told in advance.

mod case;
mod fixed;
mod naive;

use std::collections::BTreeMap;

use proptest::prelude::*;

use self::{case::Case, naive::Naive};
use super::*;

/// What untouched target memory holds.
const UNTOUCHED: u8 = 0xa5;

/// One rank's pool, with more blocks than the transfer has and these in no order.
struct Pool {
    bytes: Vec<u8>,
    blocks: u32,
    table: Vec<u32>,
    slice_bytes: usize,
}

impl Pool {
    fn new(layers: u32, needed: u32, slice_bytes: usize) -> Self {
        let blocks = needed + 3;
        let table = (0..needed).map(|block| (needed - block) % blocks + 1).collect();
        let bytes = vec![UNTOUCHED; layers as usize * blocks as usize * slice_bytes];
        Self { bytes, blocks, table, slice_bytes }
    }

    fn start(&self, layer: u32, block: u32) -> usize {
        (layer as usize * self.blocks as usize + self.table[block as usize] as usize) * self.slice_bytes
    }
}

/// The sending rank's pool as the naive side fills it.
fn source_pool(case: &Case, rank: u32) -> Pool {
    let side = case.source();
    let mut pool = Pool::new(case.layers, case.tokens.div_ceil(side.block_tokens), side.slice_bytes());
    side.each_byte(rank, case, side.dtype, |layer, block, offset, byte| {
        let start = pool.start(layer, block);
        pool.bytes[start + offset] = byte;
    });
    pool
}

/// Offset in the target, offset in the source, bytes.
type Run = (u64, u64, u64);

/// Counts writes to each byte of a receiver's pool, and checks that a pair's descriptors stay inside and are merged.
fn count_writes(case: &Case, pair: &PairPlan, target: &Pool, writes: &mut [u8]) {
    let (from, to) = (case.source(), case.target());
    let mut copies: BTreeMap<(u32, u32, u32), Vec<Run>> = BTreeMap::new();
    for Descriptor { layer, source_block, target_block, action } in pair.expand().all(case.tokens) {
        assert!(pair.layers().contains(&layer));
        assert!(source_block < case.tokens.div_ceil(from.block_tokens));
        assert!(target_block < case.tokens.div_ceil(to.block_tokens));
        let start = target.start(layer, target_block);
        let mut mark = |offset: usize, bytes: usize| {
            assert!(offset + bytes <= to.slice_bytes(), "in bounds of the target");
            writes[start + offset..start + offset + bytes].iter_mut().for_each(|count| *count += 1);
        };
        match action {
            Action::Copy { source_offset, target_offset, bytes } => {
                assert!(source_offset + bytes <= from.slice_bytes() as u64, "in bounds of the source");
                mark(target_offset as usize, bytes as usize);
                let slices = copies.entry((layer, source_block, target_block)).or_default();
                slices.push((target_offset, source_offset, bytes));
            }
            Action::Convert(run) => {
                let end = source_block * from.block_tokens + run.source_token + run.tokens;
                assert!(run.tokens > 0 && end <= case.tokens, "converts what is not there");
                for (head, token) in (0..run.heads).flat_map(|h| (0..run.tokens).map(move |t| (h, t))) {
                    let (head, token) = (run.target_head + head, run.target_token + token);
                    for dim in 0..case.content.dims()[run.part] {
                        mark(to.value_at(run.part, head, token, dim), to.dtype.bytes() as usize);
                    }
                    if to.dtype == KvDtype::Int8 {
                        mark(to.scale_at(run.part, head, token), 4);
                    }
                }
            }
        }
    }
    for mut runs in copies.into_values() {
        runs.sort_unstable();
        for two in runs.windows(2) {
            let ((target, source, bytes), next) = (two[0], two[1]);
            assert!((target + bytes, source + bytes) != (next.0, next.1), "left apart: {two:?}");
        }
    }
}

fn check(case: &Case) {
    let (from, to) = (case.source(), case.target());
    let plan = ReshardPlan::between(&case.layout(&from), &case.layout(&to)).expect("can be mapped");
    let sources: Vec<Pool> = (0..from.ranks).map(|rank| source_pool(case, rank)).collect();
    for receiver in 0..to.ranks {
        let mut target = Pool::new(case.layers, case.tokens.div_ceil(to.block_tokens), to.slice_bytes());
        let mut writes = vec![0; target.bytes.len()];
        for pair in plan.for_receiver(receiver) {
            count_writes(case, pair, &target, &mut writes);
            let source = &sources[pair.sender() as usize];
            let source = PoolBytes { bytes: &source.bytes[..], blocks: source.blocks, table: &source.table };
            let bytes = &mut target.bytes[..];
            let mut target = PoolBytes { bytes, blocks: target.blocks, table: &target.table };
            pair.apply(pair.expand().all(case.tokens), &source, &mut target).expect("in bounds");
        }
        assert!(writes.iter().all(|&count| count <= 1), "a byte is written twice");
        to.each_byte(receiver, case, from.dtype, |layer, block, offset, expected| {
            let at = target.start(layer, block) + offset;
            assert_eq!(writes[at], 1, "missing: layer {layer}, block {block}, byte {offset}");
            assert_eq!(target.bytes[at], expected, "wrong: layer {layer}, block {block}, byte {offset}");
        });
        let untouched =
            target.bytes.iter().zip(&writes).all(|(&byte, &count)| count == 1 || byte == UNTOUCHED);
        assert!(untouched, "bytes were written that no descriptor names");
        let own = |at: usize| target.table.contains(&((at / target.slice_bytes) as u32 % target.blocks));
        assert!(writes.iter().enumerate().all(|(at, &count)| count == 0 || own(at)), "another's block");
    }
    load_is_shared(case, &plan);
}

/// Ranks that hold the same heads send as many slices of heads as each other, to within a layer.
fn load_is_shared(case: &Case, plan: &ReshardPlan) {
    let from = case.source();
    let load =
        |rank: u32| plan.for_sender(rank).map(|pair| pair.layers().len() * pair.heads().len()).sum::<usize>();
    for rank in 1..from.ranks {
        if from.heads_of(rank, case.kv_heads) == from.heads_of(rank - 1, case.kv_heads) {
            let (a, b) = (load(rank - 1), load(rank));
            assert!(a.abs_diff(b) <= 1, "ranks {} and {rank} send {a} and {b}", rank - 1);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_byte_arrives_once_and_right(case in case::any()) {
        check(&case);
    }

    #[test]
    fn parts_of_a_sequence_make_the_whole(case in case::any(), cut in 0_u32..40) {
        let plan = ReshardPlan::between(&case.layout(&case.source()), &case.layout(&case.target())).expect("maps");
        for pair in plan.pairs() {
            let expansion = pair.expand();
            let parts = (0..case.layers).flat_map(|layer| {
                let first = expansion.of_blocks(layer, 0..cut, case.tokens);
                first.chain(expansion.of_blocks(layer, cut..u32::MAX, case.tokens))
            });
            prop_assert!(parts.eq(expansion.all(case.tokens)));
        }
    }

    #[test]
    fn strided_maps_say_what_the_arrangements_are(case in case::any()) {
        let side = case.source();
        let map = case.layout(&side).slice;
        prop_assert_eq!(map.bytes, side.slice_bytes() as u64);
        for part in 0..2 {
            let dims = case.content.dims()[part];
            for (head, token) in (0..side.heads).flat_map(|h| (0..side.block_tokens).map(move |t| (h, t))) {
                for dim in 0..dims {
                    let offset = map.parts[part].values.offset(head, token, dim);
                    prop_assert_eq!(offset, side.value_at(part, head, token, dim) as u64);
                }
                if let Some(scales) = &map.parts[part].scales {
                    prop_assert_eq!(scales.offset(head, token, 0), side.scale_at(part, head, token) as u64);
                }
            }
        }
    }
}

#[test]
fn quantising_and_back_is_off_by_half_a_step_at_most() {
    for token in 0..200 {
        let vector: Vec<f32> = (0..48).map(|dim| naive::number(1, token, 0, 3, dim)).collect();
        let (mut quants, mut back) = ([0; 48], [0.0; 48]);
        let scale = quantise(&vector, &mut quants);
        dequantise(&quants, scale, &mut back);
        for (before, after) in vector.iter().zip(back) {
            assert!((before - after).abs() <= 0.5001 * scale, "{before} became {after}, scale {scale}");
        }
    }
}

#[test]
fn vectors_with_faults_stay_faulty() {
    for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(quantise(&[1.0, fault, 2.0], &mut [0; 3]).is_nan());
    }
    let mut quants = [7; 2];
    assert_eq!((quantise(&[0.0, 1e-40], &mut quants) < 1e-40, quants), (true, [0, 0]));
}
