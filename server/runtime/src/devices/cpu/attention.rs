//! The KV pool's slices as the CPU keeps them, and causal attention over them.
//!
//! A slice holds the K of every head as `[head_dim][16 tokens]`, then the V of every head as
//! `[head_dim / 16][16 tokens][16]`, `head_dim` filled up to a multiple of 16; then, where values have scales, those of
//! the tokens' K for every head and those of their V. So scores take tokens as lanes and sums of values take head
//! elements as lanes, and neither adds across lanes. For one query: scores in order of blocks, softmax over all it may
//! see, then values added up in order of tokens. None of this depends on other queries or on where a chunk began.

use half::bf16;

use super::{
    kernels::{Kernels, Scores, Weigh, tile_height},
    lanes::{LANES, nearest},
    memory::{Disjoint, grow},
};
use crate::{BlockId, KvDtype, KvPool, device::Heads};

/// Name of this arrangement of a slice.
pub(crate) const FORMAT: &str = "cpu-panel-16-columns";
/// Tokens of a block: one for each lane.
pub(crate) const BLOCK_TOKENS: usize = LANES;
/// Queries (tokens times heads that share a KV head) that one task aims at.
const TASK_QUERIES: usize = 24;

/// The rows of one sequence in a step.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    /// Row of the first token in the step.
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    /// Position of the first token.
    pub(crate) start: usize,
    pub(crate) blocks: Vec<BlockId>,
}

/// Consecutive tokens of one sequence whose attention one task computes, for one KV head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) sequence: usize,
    /// Among the sequence's rows of this step.
    pub(crate) first: usize,
    pub(crate) tokens: usize,
}

/// Tokens of one task, for one KV head.
pub(crate) fn task_tokens(heads: &Heads) -> usize {
    (TASK_QUERIES * heads.kv_heads / heads.heads).max(1)
}

/// Cuts a step into tiles of at most `most` tokens, those with most to look back at first.
pub(crate) fn tiles(sequences: &[Sequence], most: usize) -> Vec<Tile> {
    let cut = |(sequence, s): (usize, &Sequence)| {
        let rows = s.rows;
        (0..rows).step_by(most).map(move |first| Tile { sequence, first, tokens: most.min(rows - first) })
    };
    let mut tiles: Vec<Tile> = sequences.iter().enumerate().flat_map(cut).collect();
    tiles.sort_by_key(|tile| std::cmp::Reverse(sequences[tile.sequence].start + tile.first));
    tiles
}

/// Elements that a slice keeps of each token for one KV head: of its K, and of its V filled up.
pub(crate) fn stored_dim(head_dim: usize) -> usize {
    head_dim + head_dim.next_multiple_of(LANES)
}

/// One layer of the pool.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: u32,
    pub(crate) heads: Heads,
}

/// Where in a slice, in bytes, something of one KV head begins.
#[derive(Clone, Copy)]
struct Places {
    keys: usize,
    values: usize,
    key_scales: usize,
    value_scales: usize,
}

impl Layer<'_> {
    fn slice(&self, block: BlockId) -> *mut u8 {
        self.pool.base().as_ptr().wrapping_add(self.pool.slice_offset(self.layer, block))
    }

    fn places(&self, kv_head: usize) -> Places {
        let (dim, heads, bytes) =
            (self.heads.head_dim, self.heads.kv_heads, self.pool.layout().dtype.bytes() * BLOCK_TOKENS);
        let padded = dim.next_multiple_of(LANES);
        let (scales, row) = (heads * (dim + padded) * bytes, BLOCK_TOKENS * size_of::<f32>());
        Places {
            keys: kv_head * dim * bytes,
            values: (heads * dim + kv_head * padded) * bytes,
            key_scales: scales + kv_head * row,
            value_scales: scales + (heads + kv_head) * row,
        }
    }

    /// Writes the K and V of `tokens` rows of a sequence, from its row `first` on. `qkv` holds all rows of the step.
    ///
    /// # Safety
    /// Nobody else touches those tokens' places in the pool meanwhile.
    pub(crate) unsafe fn append(&self, sequence: &Sequence, first: usize, tokens: usize, qkv: &[f32]) {
        let (heads, dim) = (&self.heads, self.heads.head_dim);
        for row in first..first + tokens {
            let position = sequence.start + row;
            let (slice, slot) =
                (self.slice(sequence.blocks[position / BLOCK_TOKENS]), position % BLOCK_TOKENS);
            let values = &qkv[(sequence.first_row + row) * heads.width()..][..heads.width()];
            let (k, v) = values[heads.query_width()..].split_at(heads.kv_width());
            for (kv_head, (k, v)) in k.chunks_exact(dim).zip(v.chunks_exact(dim)).enumerate() {
                // SAFETY: the head's places lie within a slice of the pool and are aligned, because slices and their
                // parts are whole multiples of sixteen values; `slot < 16`; the caller keeps others away.
                unsafe { self.put(slice, self.places(kv_head), slot, k, v) };
            }
        }
    }

    /// Writes one token's K and V of one head.
    ///
    /// # Safety
    /// `slice` is a slice of this layer, `places` a head's in it, `slot < 16`, and nobody else touches that token's.
    unsafe fn put(&self, slice: *mut u8, places: Places, slot: usize, k: &[f32], v: &[f32]) {
        let (keys, values) = (slice.wrapping_add(places.keys), slice.wrapping_add(places.values));
        let key_at = |i: usize| i * BLOCK_TOKENS + slot;
        let value_at = |i: usize| (i / LANES * BLOCK_TOKENS + slot) * LANES + i % LANES;
        // SAFETY: the caller's promise; elements of a head of `head_dim`, in K's arrangement and in V's.
        unsafe {
            match self.pool.layout().dtype {
                KvDtype::F32 => {
                    write(keys.cast(), k, key_at, |x| x);
                    write(values.cast(), v, value_at, |x| x);
                }
                KvDtype::Bf16 => {
                    write(keys.cast(), k, key_at, bf16::from_f32);
                    write(values.cast(), v, value_at, bf16::from_f32);
                }
                KvDtype::Int8 => {
                    let (key, value) = (Int8::of(k), Int8::of(v));
                    write(keys.cast(), k, key_at, |x| key.quant(x));
                    write(values.cast(), v, value_at, |x| value.quant(x));
                    slice.wrapping_add(places.key_scales).cast::<f32>().add(slot).write(key.scale);
                    slice.wrapping_add(places.value_scales).cast::<f32>().add(slot).write(value.scale);
                }
            }
        }
    }
}

/// Writes the elements of a vector, each where `at` says.
///
/// # Safety
/// `to` is valid for writes at all these places.
pub(crate) unsafe fn write<T>(
    to: *mut T,
    elements: &[f32],
    at: impl Fn(usize) -> usize,
    convert: impl Fn(f32) -> T,
) {
    for (i, &element) in elements.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(at(i)).write(convert(element)) };
    }
}

/// How a vector becomes bytes.
pub(crate) struct Int8 {
    /// NaN if any element is no finite number, so that whatever is computed with the vector is NaN, too.
    pub(crate) scale: f32,
    inverse: f32,
}

impl Int8 {
    pub(crate) fn of(vector: &[f32]) -> Self {
        let most = vector.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let faults: f32 = vector.iter().map(|x| x * 0.0).sum();
        let inverse = if most < f32::MIN_POSITIVE * 127.0 { 0.0 } else { 127.0 / most };
        Self { scale: most / 127.0 + faults, inverse }
    }

    pub(crate) fn quant(&self, element: f32) -> i8 {
        nearest(element * self.inverse) as i8
    }
}

/// A worker's own memory.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[queries][head_dim]`, scaled.
    queries: Vec<f32>,
    /// `[queries][blocks * 16]`.
    scores: Vec<f32>,
    /// Reciprocal sums of the scores' powers.
    norms: Vec<f32>,
    /// `[queries][padded head_dim]`.
    sums: Vec<f32>,
    /// The slices of the sequence's blocks.
    slices: Vec<*const u8>,
}

// SAFETY: the pointers are only kept for their memory; each task fills them in anew.
unsafe impl Send for Scratch {}

/// Attention of one tile's tokens for the query heads of one KV head. `qkv` and `out` hold all rows of the step;
/// of `out`, the tile's tokens and heads are written.
///
/// # Safety
/// The pool's K and V of the sequence up to the tile's tokens are not written meanwhile, and no other task has the
/// same tile and KV head.
pub(crate) unsafe fn attend(
    kernels: &Kernels,
    layer: &Layer<'_>,
    (sequence, tile, kv_head): (&Sequence, Tile, usize),
    qkv: &[f32],
    out: Disjoint<f32>,
    scratch: &mut Scratch,
) {
    let heads = &layer.heads;
    let (dim, group) = (heads.head_dim, heads.heads / heads.kv_heads);
    let (padded, queries) = (dim.next_multiple_of(LANES), tile.tokens * group);
    let start = sequence.start + tile.first;
    let blocks = (start + tile.tokens).div_ceil(BLOCK_TOKENS);
    let stride = blocks * BLOCK_TOKENS;
    grow(&mut scratch.queries, queries * dim);
    grow(&mut scratch.scores, queries * stride);
    grow(&mut scratch.norms, queries);
    grow(&mut scratch.sums, queries * padded);
    scratch.slices.clear();
    scratch.slices.extend(sequence.blocks[..blocks].iter().map(|&block| layer.slice(block).cast_const()));

    let dtype = layer.pool.layout().dtype;
    let places = layer.places(kv_head);
    let first_row = sequence.first_row + tile.first;
    let scale = 1.0 / (dim as f32).sqrt();
    for (query, to) in scratch.queries.chunks_exact_mut(dim).take(queries).enumerate() {
        let at = (first_row + query / group) * heads.width() + (kv_head * group + query % group) * dim;
        to.iter_mut().zip(&qkv[at..][..dim]).for_each(|(to, from)| *to = from * scale);
    }
    let task = Scores {
        queries: scratch.queries.as_ptr(),
        rows: queries,
        height: tile_height(queries, kernels.tile_rows),
        dim,
        slices: scratch.slices.as_ptr(),
        blocks,
        keys: places.keys,
        scales: places.key_scales,
        out: scratch.scores.as_mut_ptr(),
        out_stride: stride,
    };
    // SAFETY: `queries` rows of `dim`, slices of the pool with the head's K, and `stride` scores of each query.
    unsafe { (kernels.scores[dtype as usize])(&task) };
    for query in 0..queries {
        let (scores, visible) = (&mut scratch.scores[query * stride..][..stride], start + query / group + 1);
        // SAFETY: `stride` is a multiple of 16 that holds every position the query may see.
        let total = unsafe { (kernels.softmax)(scores.as_mut_ptr(), visible) };
        scratch.norms[query] = 1.0 / total;
        if dtype.scale_bytes() > 0 {
            for (scores, slice) in scores.chunks_exact_mut(BLOCK_TOKENS).zip(&scratch.slices) {
                // SAFETY: sixteen scores, and the scales of the block's V for this head.
                unsafe { (kernels.scale)(scores.as_mut_ptr(), slice.add(places.value_scales).cast()) };
            }
        }
    }
    weigh(kernels, layer, (tile, kv_head), start, scratch);
    for query in 0..queries {
        let (sums, norm) = (&scratch.sums[query * padded..][..dim], scratch.norms[query]);
        let at = (first_row + query / group) * heads.query_width() + (kv_head * group + query % group) * dim;
        // SAFETY: the tile's rows and this KV head's columns of `out` are this task's only.
        let to = unsafe { out.slice(at, dim) };
        to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * norm);
    }
}

/// Adds up the values, each times its score, into `scratch.sums`.
///
/// All queries of the tile go together over the blocks that even the first of them sees whole. After that those of each
/// token go alone, exactly as far as they may see, so that what lies behind in a block never enters, whatever it is.
fn weigh(
    kernels: &Kernels,
    layer: &Layer<'_>,
    (tile, kv_head): (Tile, usize),
    start: usize,
    scratch: &mut Scratch,
) {
    let (dim, group) = (layer.heads.head_dim, layer.heads.heads / layer.heads.kv_heads);
    let columns = dim.div_ceil(LANES);
    let (values, dtype) = (layer.places(kv_head).values, layer.pool.layout().dtype);
    let (slices, stride) = (&scratch.slices, scratch.slices.len() * BLOCK_TOKENS);
    let (scores, sums) = (&scratch.scores, &mut scratch.sums);
    let mut add = |query: usize, rows: usize, from: usize, tokens: usize| {
        let task = Weigh {
            scores: scores[query * stride + from..].as_ptr(),
            scores_stride: stride,
            rows,
            height: tile_height(rows, kernels.tile_rows),
            slices: slices[from / BLOCK_TOKENS..].as_ptr(),
            tokens,
            values,
            columns,
            sums: sums[query * columns * LANES..].as_mut_ptr(),
            sums_stride: columns * LANES,
            resume: from > 0,
        };
        // SAFETY: `rows` rows of `tokens` scores, slices of the pool with as many tokens of the head's V, and padded sums
        // of each query.
        unsafe { (kernels.weigh[dtype as usize])(&task) };
    };
    let whole = (start + 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    if whole > 0 {
        add(0, tile.tokens * group, 0, whole);
    }
    for token in 0..tile.tokens {
        let rest = start + token + 1 - whole;
        if rest > 0 {
            add(token * group, group, whole, rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_become_bytes_and_what_is_no_number_stays_none() {
        let back = |vector: &[f32]| -> Vec<f32> {
            let int8 = Int8::of(vector);
            vector.iter().map(|&x| f32::from(int8.quant(x)) * int8.scale).collect()
        };
        assert_eq!(back(&[0.0, -0.0]), [0.0, 0.0]);
        assert_eq!(back(&[127.0, -127.0, 1.0, 0.4, -63.6]), [127.0, -127.0, 1.0, 0.0, -64.0]);
        // Far below what matters, and near the end of what there is.
        assert!(back(&[1e-40, -1e-39]).iter().all(|x| x.abs() <= 1e-39));
        let largest = back(&[f32::MAX, -f32::MAX, 0.0]);
        assert!(largest[0] > 3.4e38 && largest[1] < -3.4e38 && largest[2] == 0.0, "{largest:?}");
        for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(back(&[1.0, fault, 0.0]).iter().all(|x| x.is_nan()), "{fault}");
        }
    }
}
