//! Latent attention on the CPU: one latent for each token, kept once, that all heads read as key and as value.
//!
//! A slice holds, for its sixteen tokens, latent and rotated part as `[rank + rope][16 tokens]`, and the scales of both
//! where values have some. Scores take tokens as lanes, as in `attention`. Sums of values take heads as lanes, so that
//! the same memory serves without being turned: its first `rank` rows are the values' rows of a matrix product whose
//! columns are the heads' scores. Neither adds across lanes, and each row of the step goes alone over the tokens it may
//! see, so nothing depends on the batch.

use half::bf16;

use super::{
    attention::{BLOCK_TOKENS, Int8, Sequence, Tile, write},
    kernels::{Kernels, Rows, Tiles},
    lanes::LANES,
    memory::{Disjoint, grow},
};
use crate::{BlockId, KvDtype, KvPool, device::LatentHeads};

/// Name of this arrangement of a slice.
pub(crate) const FORMAT: &str = "cpu-latent-16";
/// Tokens of one task, for at most sixteen heads.
pub(crate) const TASK_TOKENS: usize = 2;

/// One layer of the pool.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: u32,
    pub(crate) heads: LatentHeads,
}

impl Layer<'_> {
    /// Where a block's latents begin.
    fn start<T>(&self, block: BlockId) -> *mut T {
        self.pool.base().as_ptr().wrapping_add(self.pool.slice_offset(self.layer, block)).cast()
    }

    /// Writes what is kept of `tokens` rows of a sequence, from its row `first` on. `kept` holds all rows of the step.
    ///
    /// # Safety
    /// Nobody else touches those tokens' places in the pool meanwhile.
    pub(crate) unsafe fn append(&self, sequence: &Sequence, first: usize, tokens: usize, kept: &[f32]) {
        let width = self.heads.kept();
        for row in first..first + tokens {
            let position = sequence.start + row;
            let (block, slot) = (sequence.blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            let values = &kept[(sequence.first_row + row) * width..][..width];
            let at = |i: usize| i * BLOCK_TOKENS + slot;
            // SAFETY: a slice has `width * 16` values of the pool's type and their scales, aligned because slices and
            // their parts are whole multiples of sixteen values; `slot < 16`; the caller keeps others away.
            unsafe {
                match self.pool.layout().dtype {
                    KvDtype::F32 => write(self.start(block), values, at, |x| x),
                    KvDtype::Bf16 => write(self.start(block), values, at, bf16::from_f32),
                    KvDtype::Int8 => {
                        let (latent, rotated) = values.split_at(self.heads.rank);
                        for (part, first, scales) in [(latent, 0, 0), (rotated, latent.len(), BLOCK_TOKENS)] {
                            let int8 = Int8::of(part);
                            write(self.start(block), part, |i| at(first + i), |x| int8.quant(x));
                            self.scales(block).add(scales + slot).write(int8.scale);
                        }
                    }
                }
            }
        }
    }

    /// The scales of a block's tokens, where they have some: of the latents, then of the rotated parts.
    fn scales(&self, block: BlockId) -> *mut f32 {
        let values = self.heads.kept() * BLOCK_TOKENS * self.pool.layout().dtype.bytes();
        self.start::<u8>(block).wrapping_add(values).cast()
    }

    /// A block's first `length` rows as f32, `[length][16]`: in the pool itself, or widened into `room`.
    fn rows(&self, kernels: &Kernels, block: BlockId, length: usize, room: &mut [f32]) -> *const f32 {
        let dtype = self.pool.layout().dtype;
        if dtype == KvDtype::F32 {
            return self.start::<f32>(block);
        }
        let (widen, from, scales) =
            (kernels.widen[dtype as usize], self.start::<u8>(block), self.scales(block));
        let latent = length.min(self.heads.rank) * BLOCK_TOKENS;
        let (latent, rotated) = room[..length * BLOCK_TOKENS].split_at_mut(latent);
        // SAFETY: a slice has at least so many values, multiples of 16, and so has `room`; the scales are there if the
        // type has any.
        unsafe {
            widen(from, scales, latent.as_mut_ptr(), latent.len());
            let from = from.add(latent.len() * dtype.bytes());
            widen(from, scales.wrapping_add(BLOCK_TOKENS), rotated.as_mut_ptr(), rotated.len());
        }
        room.as_ptr()
    }
}

/// What sums start from.
static ZEROS: [f32; LANES] = [0.0; LANES];

/// A worker's own memory.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[tokens][heads of the group][rank + rope]`, scaled.
    queries: Vec<f32>,
    /// `[tokens][heads of the group][blocks * 16]`.
    scores: Vec<f32>,
    /// Reciprocal sums of the scores' powers, `[tokens][heads of the group]`.
    norms: Vec<f32>,
    /// `[tokens][rank][16 heads]`.
    sums: Vec<f32>,
    /// A block as f32.
    block: Vec<f32>,
}

/// The heads of one task: at most sixteen, a lane for each.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    pub(crate) first: usize,
    pub(crate) heads: usize,
}

/// The group of that index.
pub(crate) fn group(heads: &LatentHeads, index: usize) -> Group {
    let first = index * LANES;
    Group { first, heads: LANES.min(heads.heads - first) }
}

/// Attention of one tile's tokens for one group of heads. Queries and `out` hold all rows of the step; of `out`, the
/// tile's tokens and the group's heads are written.
///
/// # Safety
/// The pool's latents of the sequence up to the tile's tokens are not written meanwhile, and no other task has the same
/// tile and group.
pub(crate) unsafe fn attend(
    kernels: &Kernels,
    layer: &Layer<'_>,
    (sequence, tile, group): (&Sequence, Tile, Group),
    queries: (&[f32], &[f32]),
    out: Disjoint<f32>,
    scratch: &mut Scratch,
) {
    let heads = &layer.heads;
    let (rank, width, count) = (heads.rank, heads.kept(), tile.tokens * group.heads);
    let start = sequence.start + tile.first;
    let blocks = (start + tile.tokens).div_ceil(BLOCK_TOKENS);
    let stride = blocks * BLOCK_TOKENS;
    grow(&mut scratch.queries, count * width);
    grow(&mut scratch.scores, count * stride);
    grow(&mut scratch.norms, count);
    grow(&mut scratch.sums, tile.tokens * rank * LANES);
    grow(&mut scratch.block, width * BLOCK_TOKENS);

    let first_row = sequence.first_row + tile.first;
    for (query, to) in scratch.queries.chunks_exact_mut(width).take(count).enumerate() {
        let head = (first_row + query / group.heads) * heads.heads + group.first + query % group.heads;
        let latent = &queries.0[head * rank..][..rank];
        let rotated = &queries.1[head * heads.rope..][..heads.rope];
        let from = latent.iter().chain(rotated);
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from * heads.scale);
    }
    for block in 0..blocks {
        let task = Tiles {
            x: scratch.queries.as_ptr(),
            layout: Rows::Apart(width),
            rows: count,
            k: width,
            panel: layer.rows(kernels, sequence.blocks[block], width, &mut scratch.block),
            panel_stride: BLOCK_TOKENS,
            init: ZEROS.as_ptr(),
            out: scratch.scores[block * BLOCK_TOKENS..].as_mut_ptr(),
            out_stride: stride,
        };
        // SAFETY: `count` rows of `width`, a block of `width` rows of 16, and 16 scores of each query for this block.
        unsafe { (kernels.tiles)(&task) };
    }
    for query in 0..count {
        let scores = &mut scratch.scores[query * stride..][..stride];
        // SAFETY: `stride` is a multiple of 16 that holds every position the query may see.
        let total = unsafe { (kernels.softmax)(scores.as_mut_ptr(), start + query / group.heads + 1) };
        scratch.norms[query] = 1.0 / total;
    }
    weigh(kernels, layer, (sequence, tile, group), stride, scratch);
    for query in 0..count {
        let (token, lane) = (query / group.heads, query % group.heads);
        let at = ((first_row + token) * heads.heads + group.first + lane) * rank;
        // SAFETY: the tile's rows and this group's columns of `out` are this task's only.
        let to = unsafe { out.slice(at, rank) };
        let sums = scratch.sums[token * rank * LANES + lane..].iter().step_by(LANES);
        to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * scratch.norms[query]);
    }
}

/// Adds up the latents, each times its scores, into `scratch.sums`: every token of the tile exactly as far as it may
/// see, so that what lies behind in a block never enters, whatever it is.
fn weigh(
    kernels: &Kernels,
    layer: &Layer<'_>,
    (sequence, tile, group): (&Sequence, Tile, Group),
    stride: usize,
    scratch: &mut Scratch,
) {
    let rank = layer.heads.rank;
    let start = sequence.start + tile.first;
    // A block's scores of one token, `[tokens][16 heads]`; lanes without a head stay 0.
    let mut turned = [0.0; BLOCK_TOKENS * LANES];
    for block in 0..stride / BLOCK_TOKENS {
        let latents = layer.rows(kernels, sequence.blocks[block], rank, &mut scratch.block);
        let from = block * BLOCK_TOKENS;
        for token in (0..tile.tokens).filter(|token| start + token >= from) {
            let visible = BLOCK_TOKENS.min(start + token + 1 - from);
            for head in 0..group.heads {
                let scores = &scratch.scores[(token * group.heads + head) * stride + from..][..visible];
                let lane = turned[head..].iter_mut().step_by(LANES);
                lane.zip(scores).for_each(|(to, score)| *to = *score);
            }
            let task = Tiles {
                x: latents,
                layout: Rows::Apart(BLOCK_TOKENS),
                rows: rank,
                k: visible,
                panel: turned.as_ptr(),
                panel_stride: LANES,
                init: if block == 0 { ZEROS.as_ptr() } else { std::ptr::null() },
                out: scratch.sums[token * rank * LANES..].as_mut_ptr(),
                out_stride: LANES,
            };
            // SAFETY: `rank` rows of 16 values of which `visible` are used, as many rows of 16 scores, and `rank` rows
            // of 16 sums of this token.
            unsafe { (kernels.tiles)(&task) };
        }
    }
}
