//! The KV pool's slices as the CPU keeps them, and causal attention over them.
//!
//! A slice holds the K of every head as `[head_dim][16 tokens]`, then the V of every head as `[16 tokens][head_dim]`.
//! So scores take tokens as lanes and sums of values take head elements as lanes, both with the kernel of the matrix
//! products, and neither adds across lanes. For one query: scores in order of blocks, softmax over all it may see, then
//! values added up in order of tokens. None of this depends on other queries or on where a chunk began.

use half::bf16;

use super::{
    kernels::{Kernels, Rows, Tiles},
    lanes::LANES,
    memory::Disjoint,
};
use crate::{BlockId, KvDtype, KvPool, device::Heads};

/// Name of this arrangement of a slice.
pub(crate) const FORMAT: &str = "cpu-panel-16";
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

/// One layer of the pool.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: u32,
    pub(crate) heads: Heads,
}

impl Layer<'_> {
    /// Where a head's K and V of a block begin, in values of the pool's type.
    fn parts<T>(&self, block: BlockId, kv_head: usize) -> (*mut T, *mut T) {
        let slice =
            self.pool.base().as_ptr().wrapping_add(self.pool.slice_offset(self.layer, block)).cast::<T>();
        let head = self.heads.head_dim * BLOCK_TOKENS;
        (slice.wrapping_add(kv_head * head), slice.wrapping_add((self.heads.kv_heads + kv_head) * head))
    }

    /// Writes the K and V of `tokens` rows of a sequence, from its row `first` on. `qkv` holds all rows of the step.
    ///
    /// # Safety
    /// Nobody else touches those tokens' places in the pool meanwhile.
    pub(crate) unsafe fn append(&self, sequence: &Sequence, first: usize, tokens: usize, qkv: &[f32]) {
        let (heads, dim) = (&self.heads, self.heads.head_dim);
        for row in first..first + tokens {
            let position = sequence.start + row;
            let (block, slot) = (sequence.blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            let values = &qkv[(sequence.first_row + row) * heads.width()..][..heads.width()];
            let (k, v) = values[heads.query_width()..].split_at(heads.kv_width());
            for (kv_head, (k, v)) in k.chunks_exact(dim).zip(v.chunks_exact(dim)).enumerate() {
                // SAFETY: `parts` are the head's `head_dim * 16` values of K and of V in a slice of the pool, aligned
                // because slices are whole multiples of their values' size; the caller keeps others away.
                unsafe {
                    match self.pool.layout().dtype {
                        KvDtype::F32 => put(self.parts::<f32>(block, kv_head), slot, k, v, |x| x),
                        KvDtype::Bf16 => put(self.parts::<bf16>(block, kv_head), slot, k, v, bf16::from_f32),
                    }
                }
            }
        }
    }
}

/// Writes one token's K and V of one head.
///
/// # Safety
/// `k_part` and `v_part` are valid for writes of `16 * k.len()` values, and `slot < 16`.
unsafe fn put<T>(
    (k_part, v_part): (*mut T, *mut T),
    slot: usize,
    k: &[f32],
    v: &[f32],
    convert: impl Fn(f32) -> T,
) {
    for (i, (&k_value, &v_value)) in k.iter().zip(v).enumerate() {
        // SAFETY: `i < k.len()` and `slot < 16` keep both within their parts.
        unsafe {
            k_part.add(i * BLOCK_TOKENS + slot).write(convert(k_value));
            v_part.add(slot * k.len() + i).write(convert(v_value));
        }
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
    /// A head's K or V of one block as f32, head elements of V padded to a multiple of 16.
    block: Vec<f32>,
}

/// Makes room for `length` values.
pub(crate) fn grow(values: &mut Vec<f32>, length: usize) {
    if values.len() < length {
        values.resize(length, 0.0);
    }
}

pub(crate) static ZEROS: [f32; LANES] = [0.0; LANES];

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
    grow(&mut scratch.block, padded * BLOCK_TOKENS);

    let scale = 1.0 / (dim as f32).sqrt();
    let first_row = sequence.first_row + tile.first;
    for (token, to) in scratch.queries.chunks_exact_mut(group * dim).take(tile.tokens).enumerate() {
        let from = &qkv[(first_row + token) * heads.width() + kv_head * group * dim..][..group * dim];
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
    }
    for block in 0..blocks {
        let task = Tiles {
            x: scratch.queries.as_ptr(),
            layout: Rows::Apart(dim),
            rows: queries,
            k: dim,
            panel: keys(kernels, layer, sequence.blocks[block], kv_head, &mut scratch.block),
            panel_stride: LANES,
            init: ZEROS.as_ptr(),
            out: scratch.scores[block * BLOCK_TOKENS..].as_mut_ptr(),
            out_stride: stride,
        };
        // SAFETY: `queries` rows of `dim`, K of `dim` rows of 16, and 16 scores of each query for this block.
        unsafe { (kernels.tiles)(&task) };
    }
    for query in 0..queries {
        let scores = &mut scratch.scores[query * stride..][..stride];
        // SAFETY: `stride` is a multiple of 16 that holds every position the query may see.
        let total = unsafe { (kernels.softmax)(scores.as_mut_ptr(), start + query / group + 1) };
        scratch.norms[query] = 1.0 / total;
    }
    weigh(kernels, layer, (sequence, tile, kv_head), stride, scratch);
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
    (sequence, tile, kv_head): (&Sequence, Tile, usize),
    stride: usize,
    scratch: &mut Scratch,
) {
    let (dim, group) = (layer.heads.head_dim, layer.heads.heads / layer.heads.kv_heads);
    let padded = dim.next_multiple_of(LANES);
    let start = sequence.start + tile.first;
    let whole = (start + 1) / BLOCK_TOKENS;
    for block in 0..stride / BLOCK_TOKENS {
        let (values, value_stride) =
            values(kernels, layer, sequence.blocks[block], kv_head, &mut scratch.block);
        let from = block * BLOCK_TOKENS;
        let (scores, sums) = (&scratch.scores, &mut scratch.sums);
        let mut add = |query: usize, rows: usize, tokens: usize| {
            for column in (0..padded).step_by(LANES) {
                let task = Tiles {
                    x: scores[query * stride + from..].as_ptr(),
                    layout: Rows::Apart(stride),
                    rows,
                    k: tokens,
                    panel: values.wrapping_add(column),
                    panel_stride: value_stride,
                    init: if block == 0 { ZEROS.as_ptr() } else { std::ptr::null() },
                    out: sums[query * padded + column..].as_mut_ptr(),
                    out_stride: padded,
                };
                // SAFETY: `rows` rows of `tokens` scores, V of as many rows, and `padded` sums of each query.
                unsafe { (kernels.tiles)(&task) };
            }
        };
        if block < whole {
            add(0, tile.tokens * group, BLOCK_TOKENS);
            continue;
        }
        for token in (0..tile.tokens).filter(|token| start + token >= from) {
            let tokens = BLOCK_TOKENS.min(start + token + 1 - from);
            add(token * group, group, tokens);
        }
    }
}

/// A head's K of a block as f32, `[head_dim][16]`: in the pool itself, or widened into `room`.
fn keys(
    kernels: &Kernels,
    layer: &Layer<'_>,
    block: BlockId,
    kv_head: usize,
    room: &mut [f32],
) -> *const f32 {
    match layer.pool.layout().dtype {
        KvDtype::F32 => layer.parts::<f32>(block, kv_head).0,
        KvDtype::Bf16 => {
            let from = layer.parts::<u16>(block, kv_head).0;
            let length = layer.heads.head_dim * BLOCK_TOKENS;
            // SAFETY: the head's K has `length` values, a multiple of 16, and `room` at least as many.
            unsafe { (kernels.widen_bf16)(from, room[..length].as_mut_ptr(), length) };
            room.as_ptr()
        }
    }
}

/// A head's V of a block as f32 and the distance between its tokens; readable up to the next multiple of 16 elements.
fn values(
    kernels: &Kernels,
    layer: &Layer<'_>,
    block: BlockId,
    kv_head: usize,
    room: &mut [f32],
) -> (*const f32, usize) {
    let dim = layer.heads.head_dim;
    let (padded, length) = (dim.next_multiple_of(LANES), dim * BLOCK_TOKENS);
    match layer.pool.layout().dtype {
        KvDtype::F32 if padded == dim => return (layer.parts::<f32>(block, kv_head).1, dim),
        KvDtype::Bf16 if padded == dim => {
            let from = layer.parts::<u16>(block, kv_head).1;
            // SAFETY: the head's V has `length` values, a multiple of 16, and `room` at least as many.
            unsafe { (kernels.widen_bf16)(from, room[..length].as_mut_ptr(), length) };
        }
        dtype => {
            for token in 0..BLOCK_TOKENS {
                for (i, to) in room[token * padded..][..dim].iter_mut().enumerate() {
                    let at = token * dim + i;
                    // SAFETY: the head's V has `16 * dim` values.
                    *to = unsafe {
                        match dtype {
                            KvDtype::F32 => layer.parts::<f32>(block, kv_head).1.add(at).read(),
                            KvDtype::Bf16 => layer.parts::<bf16>(block, kv_head).1.add(at).read().to_f32(),
                        }
                    };
                }
            }
        }
    }
    (room.as_ptr(), padded)
}
