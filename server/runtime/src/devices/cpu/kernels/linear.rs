//! The three inner loops of a matrix product with a packed panel.
//!
//! `few` multiplies one to four rows of activations with panels as they are stored. For more rows, `expand` turns a
//! piece of a panel into f32 once and `tiles` multiplies it with all rows. Either way each output is
//! `fma(x[k], w[k], ... fma(x[0], w[0], init))`, so the two agree bit for bit.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every function is that of the kernel table's field"
)]

use super::{
    super::lanes::{LANES, Lanes},
    Few, MOST_FEW, Tiles,
    format::Format,
};

/// Rows of activations that one pass over an expanded panel multiplies: with 6, accumulators and operands just fit the
/// sixteen registers of AVX2.
const TILE_ROWS: usize = 6;

const CACHE_LINE: usize = 64;
/// How far ahead of the weights in use the next ones are asked for, in bytes.
const PREFETCH: usize = 1536;

/// Asks for the weights a little after `block`: the hardware's own prefetching stops at the end of a page.
#[inline(always)]
unsafe fn prefetch<V: Lanes, F: Format>(block: *const u8) {
    for line in (0..F::BYTES).step_by(CACHE_LINE) {
        V::prefetch(block.wrapping_add(PREFETCH + line));
    }
}

#[inline(always)]
pub(super) unsafe fn expand<V: Lanes, F: Format>(panel: *const u8, k: usize, out: *mut f32) {
    for block in 0..k / F::GROUP {
        let from = panel.add(block * F::BYTES);
        let to = out.add(block * F::GROUP * LANES);
        let scales = F::scales::<V>(from);
        prefetch::<V, F>(from);
        for pair in 0..F::GROUP / 2 {
            let (first, second) = F::pair::<V>(from, scales, pair);
            first.store(to.add(2 * pair * LANES));
            second.store(to.add((2 * pair + 1) * LANES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn few<V: Lanes, F: Format>(task: &Few) {
    match task.rows {
        1 => pairs_of_panels::<V, F, 1>(task),
        2 => pairs_of_panels::<V, F, 2>(task),
        3 => (0..task.panels).for_each(|panel| panels::<V, F, 3, 1>(task, panel)),
        _ => (0..task.panels).for_each(|panel| panels::<V, F, MOST_FEW, 1>(task, panel)),
    }
}

#[inline(always)]
unsafe fn pairs_of_panels<V: Lanes, F: Format, const R: usize>(task: &Few) {
    let mut panel = 0;
    while panel + 2 <= task.panels {
        panels::<V, F, R, 2>(task, panel);
        panel += 2;
    }
    if panel < task.panels {
        panels::<V, F, R, 1>(task, panel);
    }
}

/// `R` rows by `N` panels, so many that their chains of multiply-adds hide each other's latency.
#[inline(always)]
unsafe fn panels<V: Lanes, F: Format, const R: usize, const N: usize>(task: &Few, first: usize) {
    let mut sums = [[V::splat(0.0); N]; R];
    for row in &mut sums {
        for (i, sum) in row.iter_mut().enumerate() {
            *sum = V::load(task.init.add((first + i) * LANES));
        }
    }
    let mut at = [task.panel.add(first * task.panel_bytes); N];
    for (i, at) in at.iter_mut().enumerate() {
        *at = at.add(i * task.panel_bytes);
    }
    let mut x = task.x;
    for _ in 0..task.k / F::GROUP {
        let mut scales = [F::scales::<V>(at[0]); N];
        for i in 0..N {
            scales[i] = F::scales::<V>(at[i]);
            prefetch::<V, F>(at[i]);
        }
        for pair in 0..F::GROUP / 2 {
            for i in 0..N {
                let (w0, w1) = F::pair::<V>(at[i], scales[i], pair);
                for (r, row) in sums.iter_mut().enumerate() {
                    let x = x.add(r * task.x_stride + 2 * pair);
                    row[i] = V::splat(*x.add(1)).fma(w1, V::splat(*x).fma(w0, row[i]));
                }
            }
        }
        for at in &mut at {
            *at = at.add(F::BYTES);
        }
        x = x.add(F::GROUP);
    }
    for (r, row) in sums.into_iter().enumerate() {
        for (i, sum) in row.into_iter().enumerate() {
            sum.store(task.out.add(r * task.out_stride + (first + i) * LANES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn tiles<V: Lanes>(task: &Tiles) {
    let mut row = 0;
    while row < task.rows {
        let left = task.rows - row;
        // Seven rows as 4 + 3, not 6 + 1: a tile of few rows waits for its own sums.
        let rows =
            if left > TILE_ROWS && left < 2 * TILE_ROWS { left.div_ceil(2) } else { left.min(TILE_ROWS) };
        match rows {
            1 => tile::<V, 1>(task, row),
            2 => tile::<V, 2>(task, row),
            3 => tile::<V, 3>(task, row),
            4 => tile::<V, 4>(task, row),
            5 => tile::<V, 5>(task, row),
            _ => tile::<V, TILE_ROWS>(task, row),
        }
        row += rows;
    }
}

#[inline(always)]
unsafe fn tile<V: Lanes, const R: usize>(task: &Tiles, row: usize) {
    let x = task.x.add(row * task.x_stride);
    let out = task.out.add(row * task.out_stride);
    let mut sums = [V::splat(0.0); R];
    for (i, sum) in sums.iter_mut().enumerate() {
        let from = if task.init.is_null() { out.add(i * task.out_stride).cast_const() } else { task.init };
        *sum = V::load(from);
    }
    let mut rows = [x; R];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = x.add(i * task.x_stride);
    }
    let mut panel = task.panel;
    for k in 0..task.k {
        let weights = V::load(panel);
        panel = panel.wrapping_add(task.panel_stride);
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = V::splat(*row.add(k)).fma(weights, *sum);
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        sum.store(out.add(i * task.out_stride));
    }
}
