//! The inner loops of attention: products with keys and values as they are stored in the KV pool, block by block.
//!
//! `scores` has tokens as lanes, `weigh` elements of values; neither adds across lanes. A score is one chain of fused
//! multiply-adds along the head's elements, a sum of values one along the tokens, whatever is computed beside it.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every function is that of the kernel table's field"
)]

#[cfg(test)]
mod tests;

use super::{
    super::lanes::{LANES, Lanes},
    Scores, Weigh,
};

/// How the pool stores a value.
///
/// # Safety
/// Sixteen values can be read, and the CPU has `V`'s features.
pub(crate) trait Stored {
    const BYTES: usize;
    /// Whether values are multiples of their token's scale.
    const SCALED: bool = false;

    unsafe fn load<V: Lanes>(from: *const u8) -> V;
}

macro_rules! stored {
    ($name:ident, $bytes:literal, $load:ident $(, $scaled:literal)?) => {
        pub(crate) struct $name;

        impl Stored for $name {
            const BYTES: usize = $bytes;
            $(const SCALED: bool = $scaled;)?

            #[inline(always)]
            unsafe fn load<V: Lanes>(from: *const u8) -> V {
                V::$load(from.cast())
            }
        }
    };
}

stored!(F32, 4, load);
stored!(Bf16, 2, load_bf16);
stored!(Int8, 1, load_i8, true);

/// `length` values, sixteen tokens of each element, as f32.
#[inline(always)]
pub(super) unsafe fn widen<V: Lanes, S: Stored>(
    from: *const u8,
    scales: *const f32,
    to: *mut f32,
    length: usize,
) {
    let scale = if S::SCALED { V::load(scales) } else { V::splat(1.0) };
    for at in (0..length).step_by(LANES) {
        let values = S::load::<V>(from.add(at * S::BYTES));
        if S::SCALED { values.mul(scale) } else { values }.store(to.add(at));
    }
}

/// Calls `$function::<V, S, rows, beside>($task, row, first)` for all tiles of rows and all `$runs` runs of lanes. Tiles of
/// few rows take several runs at once, so that there are enough chains of multiply-adds to hide each other's latency.
macro_rules! each_tile {
    ($function:ident, $task:expr, $runs:expr) => {{
        let beside = match $task.height {
            1 => 4,
            2 | 3 => 2,
            _ => 1,
        };
        let mut first = 0;
        while first < $runs {
            let beside = if $runs - first < beside { 1 } else { beside };
            for row in (0..$task.rows).step_by($task.height) {
                let rows = $task.height.min($task.rows - row);
                each_tile!(@ $function, $task, row, first, (rows, beside);
                    (1, 4) (1, 2) (2, 2) (3, 2)
                    (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1) (9, 1) (10, 1) (11, 1) (12, 1));
            }
            first += beside;
        }
    }};
    (@ $function:ident, $task:expr, $row:expr, $first:expr, $shape:expr; $(($rows:literal, $beside:literal))*) => {
        match $shape {
            $(($rows, $beside) if $rows <= V::TILE_ROWS => {
                $function::<V, S, $rows, $beside>($task, $row, $first);
            })*
            _ => unreachable!("tiles are at most TILE_ROWS high"),
        }
    };
}

#[inline(always)]
pub(super) unsafe fn scores<V: Lanes, S: Stored>(task: &Scores) {
    each_tile!(score, task, task.blocks);
}

/// `R` queries from `row` on with the keys of `N` blocks from `first` on.
#[inline(always)]
unsafe fn score<V: Lanes, S: Stored, const R: usize, const N: usize>(
    task: &Scores,
    row: usize,
    first: usize,
) {
    let slices = task.slices.add(first);
    let mut keys = [std::ptr::null(); N];
    for (i, keys) in keys.iter_mut().enumerate() {
        *keys = (*slices.add(i)).add(task.keys);
    }
    let queries = task.queries.add(row * task.dim);
    let mut sums = [[V::splat(0.0); R]; N];
    for at in 0..task.dim {
        for (keys, sums) in keys.iter().zip(&mut sums) {
            let keys = S::load::<V>(keys.add(at * LANES * S::BYTES));
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = V::splat(*queries.add(r * task.dim + at)).fma(keys, *sum);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        let scale = if S::SCALED { V::load((*slices.add(i)).add(task.scales).cast()) } else { V::splat(1.0) };
        for (r, sum) in sums.into_iter().enumerate() {
            let score = if S::SCALED { sum.mul(scale) } else { sum };
            score.store(task.out.add((row + r) * task.out_stride + (first + i) * LANES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn weigh<V: Lanes, S: Stored>(task: &Weigh) {
    each_tile!(weigh_tile, task, task.columns);
}

/// Sums of `R` queries from `row` on, of `N` times sixteen elements from the `first` sixteen on.
#[inline(always)]
unsafe fn weigh_tile<V: Lanes, S: Stored, const R: usize, const N: usize>(
    task: &Weigh,
    row: usize,
    first: usize,
) {
    let out = task.sums.add(row * task.sums_stride + first * LANES);
    let mut sums = [[V::splat(0.0); R]; N];
    if task.resume {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = V::load(out.add(r * task.sums_stride + i * LANES));
            }
        }
    }
    let scores = task.scores.add(row * task.scores_stride);
    for block in 0..task.tokens.div_ceil(LANES) {
        let values = (*task.slices.add(block)).add(task.values + first * LANES * LANES * S::BYTES);
        let scores = scores.add(block * LANES);
        for token in 0..LANES.min(task.tokens - block * LANES) {
            for (i, sums) in sums.iter_mut().enumerate() {
                let values = S::load::<V>(values.add((i * LANES + token) * LANES * S::BYTES));
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = V::splat(*scores.add(r * task.scores_stride + token)).fma(values, *sum);
                }
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (r, sum) in sums.into_iter().enumerate() {
            sum.store(out.add(r * task.sums_stride + i * LANES));
        }
    }
}
