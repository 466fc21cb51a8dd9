//! The inner loops of a matrix product with a packed panel of dense weights, in f32.
//!
//! `few` multiplies up to eight rows of activations with panels as they are stored. For more rows, `expand` turns a
//! piece of a panel into f32 once and `tiles` multiplies it with all rows. Either way each output is
//! `fma(x[k], w[k], ... fma(x[0], w[0], init))`, so the two agree bit for bit.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every function is that of the kernel table's field"
)]

use super::{
    super::lanes::{LANES, Lanes},
    FEW_TILE, Few, Rows, Tiles,
    format::Dense,
    prefetch, tile_height,
};

/// `k` columns (whole blocks) of a panel as f32, `[k][16]`.
#[inline(always)]
pub(super) unsafe fn expand<V: Lanes, F: Dense>(panel: *const u8, k: usize, out: *mut f32) {
    for block in 0..k / F::BLOCK {
        let (first, second) = F::pair::<V>(panel.add(block * F::BYTES));
        prefetch::<V>(panel.add(block * F::BYTES), F::BYTES);
        first.store(out.add(2 * block * LANES));
        second.store(out.add((2 * block + 1) * LANES));
    }
}

#[inline(always)]
pub(super) unsafe fn few<V: Lanes, F: Dense>(task: &Few) {
    few_at_once!(panels, task);
}

/// `R` rows by `N` panels, so many that their chains of multiply-adds hide each other's latency.
#[inline(always)]
unsafe fn panels<V: Lanes, F: Dense, const R: usize, const N: usize>(
    task: &Few,
    first_row: usize,
    first: usize,
) {
    let mut sums = [[V::splat(0.0); N]; R];
    for row in &mut sums {
        for (i, sum) in row.iter_mut().enumerate() {
            *sum = V::load(task.init.add((first + i) * LANES));
        }
    }
    let mut blocks = [task.panel.add(first * task.panel_bytes); N];
    for (i, block) in blocks.iter_mut().enumerate() {
        *block = block.add(i * task.panel_bytes);
    }
    let mut x = task.x.add(first_row * task.x_stride);
    for _ in 0..task.k / F::BLOCK {
        for (i, block) in blocks.iter_mut().enumerate() {
            let (w0, w1) = F::pair::<V>(*block);
            prefetch::<V>(*block, F::BYTES);
            for (r, row) in sums.iter_mut().enumerate() {
                let x = x.add(r * task.x_stride);
                row[i] = V::splat(*x.add(1)).fma(w1, V::splat(*x).fma(w0, row[i]));
            }
            *block = block.add(F::BYTES);
        }
        x = x.add(F::BLOCK);
    }
    for (r, row) in sums.into_iter().enumerate() {
        for (i, sum) in row.into_iter().enumerate() {
            sum.store(task.out.add((first_row + r) * task.out_stride + (first + i) * LANES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn tiles<V: Lanes>(task: &Tiles) {
    let (height, tiled) = match task.layout {
        Rows::Tiled { height, .. } => (height, true),
        // Seven rows as 4 + 3, not 6 + 1: a tile of few rows waits for its own sums.
        Rows::Apart(_) => (tile_height(task.rows, V::TILE_ROWS), false),
    };
    for row in (0..task.rows).step_by(height) {
        let rows = height.min(task.rows - row);
        if tiled { tile_of::<V, true>(task, row, rows) } else { tile_of::<V, false>(task, row, rows) }
    }
}

#[inline(always)]
unsafe fn tile_of<V: Lanes, const TILED: bool>(task: &Tiles, row: usize, rows: usize) {
    macro_rules! heights {
        ($($rows:literal)*) => {
            match rows {
                $($rows if $rows <= V::TILE_ROWS => tile::<V, $rows, TILED>(task, row),)*
                _ => unreachable!("tiles are at most TILE_ROWS high"),
            }
        };
    }
    heights!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// `R` rows from `row` on by sixteen columns, all sums in registers.
#[inline(always)]
unsafe fn tile<V: Lanes, const R: usize, const TILED: bool>(task: &Tiles, row: usize) {
    let out = task.out.add(row * task.out_stride);
    let mut sums = [V::splat(0.0); R];
    // Rows of the result lie far apart; the next tile's arrive while this one's sums are computed.
    for r in R..2 * R {
        V::prefetch(out.wrapping_add(r * task.out_stride).cast());
    }
    for (i, sum) in sums.iter_mut().enumerate() {
        let from = if task.init.is_null() { out.add(i * task.out_stride).cast_const() } else { task.init };
        *sum = V::load(from);
    }
    let (mut x, stride) = match task.layout {
        Rows::Tiled { k, start, .. } => (task.x.add(row * k + start * R), 0),
        Rows::Apart(stride) => (task.x.add(row * stride), stride),
    };
    let mut panel = task.panel;
    let mut k = 0;
    while k + V::UNROLL <= task.k {
        for step in 0..V::UNROLL {
            let weights = V::load(panel);
            panel = panel.wrapping_add(task.panel_stride);
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = if TILED { x.add(step * R + i) } else { x.add(i * stride + step) };
                *sum = V::splat(*at).fma(weights, *sum);
            }
        }
        x = x.add(if TILED { V::UNROLL * R } else { V::UNROLL });
        k += V::UNROLL;
    }
    while k < task.k {
        let weights = V::load(panel);
        panel = panel.wrapping_add(task.panel_stride);
        for (i, sum) in sums.iter_mut().enumerate() {
            let at = if TILED { x.add(i) } else { x.add(i * stride) };
            *sum = V::splat(*at).fma(weights, *sum);
        }
        x = x.add(if TILED { R } else { 1 });
        k += 1;
    }
    for (i, sum) in sums.into_iter().enumerate() {
        sum.store(out.add(i * task.out_stride));
    }
}
