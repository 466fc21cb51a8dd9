//! The three inner loops of a matrix product with a packed panel.
//!
//! `gemv` multiplies one row of activations with panels as they are stored. For more rows, `expand` turns a piece of a
//! panel into f32 once and `tiles` multiplies it with all rows. Either way each output is
//! `fma(x[k], w[k], ... fma(x[0], w[0], init))`, so the two agree bit for bit.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every function is that of the kernel table's field"
)]

use super::{
    super::lanes::{LANES, Lanes},
    Gemv, Tiles,
    format::Format,
};

/// Rows of activations that one pass over an expanded panel multiplies: with 6, accumulators and operands just fit the
/// sixteen registers of AVX2.
const TILE_ROWS: usize = 6;

#[inline(always)]
pub(super) unsafe fn expand<V: Lanes, F: Format>(panel: *const u8, k: usize, out: *mut f32) {
    for block in 0..k / F::GROUP {
        let from = panel.add(block * F::BYTES);
        let to = out.add(block * F::GROUP * LANES);
        let scales = F::scales::<V>(from);
        for pair in 0..F::GROUP / 2 {
            let (first, second) = F::pair::<V>(from, scales, pair);
            first.store(to.add(2 * pair * LANES));
            second.store(to.add((2 * pair + 1) * LANES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn gemv<V: Lanes, F: Format>(task: &Gemv) {
    let mut panel = 0;
    while panel + 2 <= task.panels {
        panels::<V, F, 2>(task, panel);
        panel += 2;
    }
    if panel < task.panels {
        panels::<V, F, 1>(task, panel);
    }
}

/// `N` panels side by side, so that their chains of multiply-adds hide each other's latency.
#[inline(always)]
unsafe fn panels<V: Lanes, F: Format, const N: usize>(task: &Gemv, first: usize) {
    let mut sums = [V::splat(0.0); N];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = V::load(task.init.add((first + i) * LANES));
    }
    for block in 0..task.k / F::GROUP {
        let x = task.x.add(block * F::GROUP);
        let at = |i: usize| task.panel.wrapping_add((first + i) * task.panel_bytes + block * F::BYTES);
        let mut scales = [F::scales::<V>(at(0)); N];
        for (i, scale) in scales.iter_mut().enumerate().skip(1) {
            *scale = F::scales::<V>(at(i));
        }
        for pair in 0..F::GROUP / 2 {
            let (x0, x1) = (V::splat(*x.add(2 * pair)), V::splat(*x.add(2 * pair + 1)));
            for i in 0..N {
                let (w0, w1) = F::pair::<V>(at(i), scales[i], pair);
                sums[i] = x1.fma(w1, x0.fma(w0, sums[i]));
            }
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        sum.store(task.out.add((first + i) * LANES));
    }
}

#[inline(always)]
pub(super) unsafe fn tiles<V: Lanes>(task: &Tiles) {
    let mut row = 0;
    while row < task.rows {
        let rows = (task.rows - row).min(TILE_ROWS);
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
    let mut panel = task.panel;
    for k in 0..task.k {
        let weights = V::load(panel);
        panel = panel.wrapping_add(task.panel_stride);
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = V::splat(*x.add(i * task.x_stride + k)).fma(weights, *sum);
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        sum.store(out.add(i * task.out_stride));
    }
}
