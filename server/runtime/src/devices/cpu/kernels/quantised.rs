//! Matrix products with quantised weights, in integers.
//!
//! Rows of activations are turned into i16 first, [`X_BLOCK`] columns with one scale: 15 bits and a sign, where
//! llama.cpp keeps seven, so that what is lost is next to nothing beside what the weights have lost. Products of a
//! group of columns are added up in i32, exactly; groups are put together in f32, in one order:
//!
//! ```text
//! out = init; for each block of x columns { s = 0; for each group { s += dot * scale (+ sum(x) * minimum) }; out += s * scale of x }
//! ```
//!
//! every `+=` being one fused multiply-add. `few` does it from panels as they are stored, for up to eight rows; for more,
//! `unpack` turns a piece of a panel into i16 once and `tiles` multiplies it with all rows. The two agree bit for bit.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every function is that of the kernel table's field"
)]

use super::{
    super::lanes::{LANES, Lanes},
    FEW_TILE, QuantisedFew, QuantisedTiles, SUM_COLUMNS, X_BLOCK,
    format::Quantised,
    prefetch, tile_height,
};

/// Largest quant of an activation.
const LARGEST: f32 = 32_767.0;
/// Activations whose largest is smaller than this count as zero.
const TINY: f32 = 1e-30;

/// One row. A value that is no finite number makes the scale of its block NaN, and with it every output.
#[inline(always)]
pub(super) unsafe fn quantise<V: Lanes>(
    x: *const f32,
    k: usize,
    quants: *mut i16,
    scales: *mut f32,
    sums: *mut f32,
) {
    let zero = V::splat(0.0);
    for (block, start) in (0..k).step_by(X_BLOCK).enumerate() {
        let end = (start + X_BLOCK).min(k);
        let (mut most, mut faults) = (zero, zero);
        for at in (start..end).step_by(LANES) {
            let values = V::load(x.add(at));
            most = most.max(values.max(zero.sub(values)));
            faults = values.fma(zero, faults);
        }
        let (mut lanes, mut faulty) = ([0.0; LANES], [0.0; LANES]);
        most.store(lanes.as_mut_ptr());
        faults.store(faulty.as_mut_ptr());
        let most = lanes.iter().copied().fold(0.0, f32::max);
        let (scale, inverse) = if most < TINY { (0.0, 0.0) } else { (most / LARGEST, LARGEST / most) };
        *scales.add(block) = scale + faulty.iter().sum::<f32>();
        let inverse = V::splat(inverse);
        let ones = V::splat_pair([1, 1].as_ptr());
        for at in (start..end).step_by(SUM_COLUMNS) {
            for half in (at..at + SUM_COLUMNS).step_by(LANES) {
                V::load(x.add(half)).mul(inverse).store_i16(quants.add(half));
            }
            let sum = V::dot(V::ints(0), V::load_pairs(quants.add(at)), ones);
            *sums.add(at / SUM_COLUMNS) = V::total(sum) as f32;
        }
    }
}

/// `k` columns (whole blocks) of a panel as f32, `[k][16]`.
#[inline(always)]
pub(super) unsafe fn expand<V: Lanes, F: Quantised>(panel: *const u8, k: usize, out: *mut f32) {
    let mut to = out;
    each_group::<F>(panel, k, |block, group| {
        let (scale, minimum) = (F::scale::<V>(block, group), F::minimum::<V>(block, group));
        for eight in 0..F::GROUP / 8 {
            for pair in F::quants::<V>(group, eight) {
                let (first, second) = V::split(pair);
                first.fma(scale, minimum).store(to);
                second.fma(scale, minimum).store(to.add(LANES));
                to = to.add(2 * LANES);
            }
        }
    });
}

/// `k` columns (whole blocks) of a panel as i16, `[k / 2][16][2]`, with the groups' scales and minima, `[group][16]`.
#[inline(always)]
pub(super) unsafe fn unpack<V: Lanes, F: Quantised>(
    panel: *const u8,
    k: usize,
    quants: *mut i16,
    scales: *mut f32,
    minima: *mut f32,
) {
    let (mut to, mut index) = (quants, 0);
    each_group::<F>(panel, k, |block, group| {
        F::scale::<V>(block, group).store(scales.add(index));
        if F::MINIMA {
            F::minimum::<V>(block, group).store(minima.add(index));
        }
        index += LANES;
        prefetch::<V>(group, F::GROUP_BYTES);
        for eight in 0..F::GROUP / 8 {
            for pair in F::quants::<V>(group, eight) {
                V::store_pairs(pair, to);
                to = to.add(2 * LANES);
            }
        }
    });
}

/// Calls `with` with the block and the group of each group of `k` columns.
#[inline(always)]
unsafe fn each_group<F: Quantised>(panel: *const u8, k: usize, mut with: impl FnMut(*const u8, *const u8)) {
    for block in 0..k / F::BLOCK {
        let block = panel.add(block * F::BYTES);
        for group in 0..F::BLOCK / F::GROUP {
            with(block, block.add(F::HEADER_BYTES + group * F::GROUP_BYTES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn few<V: Lanes, F: Quantised>(task: &QuantisedFew) {
    few_at_once!(panels, task);
}

/// `R` rows by `N` panels.
#[inline(always)]
unsafe fn panels<V: Lanes, F: Quantised, const R: usize, const N: usize>(
    task: &QuantisedFew,
    first_row: usize,
    first: usize,
) {
    let mut outs = [[V::splat(0.0); N]; R];
    for row in &mut outs {
        for (i, out) in row.iter_mut().enumerate() {
            *out = V::load(task.init.add((first + i) * LANES));
        }
    }
    let panel = task.panel.add(first * task.panel_bytes);
    let x = task.x.add(first_row * task.k);
    let scale_stride = task.k.div_ceil(X_BLOCK);
    let (scales, sums) =
        (task.scales.add(first_row * scale_stride), task.sums.add(first_row * (task.k / SUM_COLUMNS)));
    for (x_block, start) in (0..task.k).step_by(X_BLOCK).enumerate() {
        let end = (start + X_BLOCK).min(task.k);
        let mut parts = [[V::splat(0.0); N]; R];
        for block_start in (start..end).step_by(F::BLOCK) {
            for group in 0..F::BLOCK / F::GROUP {
                let column = block_start + group * F::GROUP;
                for i in 0..N {
                    let block = panel.add(i * task.panel_bytes + block_start / F::BLOCK * F::BYTES);
                    let group = block.add(F::HEADER_BYTES + group * F::GROUP_BYTES);
                    prefetch::<V>(group, F::GROUP_BYTES);
                    let mut dots = [V::ints(0); R];
                    for eight in 0..F::GROUP / 8 {
                        let x = x.add(column + 8 * eight);
                        for (pair, weights) in F::quants::<V>(group, eight).into_iter().enumerate() {
                            for (r, dot) in dots.iter_mut().enumerate() {
                                *dot = V::dot(*dot, weights, V::splat_pair(x.add(r * task.k + 2 * pair)));
                            }
                        }
                    }
                    let scale = F::scale::<V>(block, group);
                    for (r, dot) in dots.into_iter().enumerate() {
                        parts[r][i] = V::from_ints(dot).fma(scale, parts[r][i]);
                    }
                    if F::MINIMA {
                        let minimum = F::minimum::<V>(block, group);
                        for (r, part) in parts.iter_mut().enumerate() {
                            let sum = *sums.add(r * (task.k / SUM_COLUMNS) + column / SUM_COLUMNS);
                            part[i] = V::splat(sum).fma(minimum, part[i]);
                        }
                    }
                }
            }
        }
        for (r, row) in outs.iter_mut().enumerate() {
            let scale = V::splat(*scales.add(r * scale_stride + x_block));
            for (out, part) in row.iter_mut().zip(parts[r]) {
                *out = part.fma(scale, *out);
            }
        }
    }
    for (r, row) in outs.into_iter().enumerate() {
        for (i, out) in row.into_iter().enumerate() {
            out.store(task.out.add((first_row + r) * task.out_stride + (first + i) * LANES));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn tiles<V: Lanes>(task: &QuantisedTiles) {
    macro_rules! heights {
        ($row:expr, $rows:expr; $($height:literal)*) => {
            match $rows {
                $($height if $height <= V::INT_TILE_ROWS => tile::<V, $height>(task, $row),)*
                _ => unreachable!("tiles are at most INT_TILE_ROWS high"),
            }
        };
    }
    for row in (0..task.rows).step_by(task.height) {
        heights!(row, task.height.min(task.rows - row); 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// `R` rows from `row` on by sixteen columns.
#[inline(always)]
unsafe fn tile<V: Lanes, const R: usize>(task: &QuantisedTiles, row: usize) {
    let mut x = task.x.add(row * task.row_columns + task.start * R);
    let mut panel = task.panel;
    let mut parts = [V::splat(0.0); R];
    let out = task.out.add(row * task.out_stride);
    // Rows of the result lie far apart; they arrive while their sums are computed.
    for r in 0..R {
        V::prefetch(out.add(r * task.out_stride).cast());
    }
    for group in 0..task.k / task.group {
        let mut dots = [V::ints(0); R];
        for _ in 0..task.group / 8 {
            for pair in 0..4 {
                let weights = V::load_pairs(panel.add(pair * 2 * LANES));
                for (r, dot) in dots.iter_mut().enumerate() {
                    *dot = V::dot(*dot, weights, V::splat_pair(x.add((pair * R + r) * 2)));
                }
            }
            panel = panel.add(8 * LANES);
            x = x.add(8 * R);
        }
        let scale = V::load(task.panel_scales.add(group * LANES));
        for (part, dot) in parts.iter_mut().zip(dots) {
            *part = V::from_ints(dot).fma(scale, *part);
        }
        if !task.panel_minima.is_null() {
            let minimum = V::load(task.panel_minima.add(group * LANES));
            let sums = task.sums.add(row * task.sums_stride + group);
            for (r, part) in parts.iter_mut().enumerate() {
                *part = V::splat(*sums.add(r * task.sums_stride)).fma(minimum, *part);
            }
        }
    }
    for (r, part) in parts.into_iter().enumerate() {
        let out = out.add(r * task.out_stride);
        let from = if task.init.is_null() { out.cast_const() } else { task.init };
        let scale = V::splat(*task.scales.add((row + r) * task.scales_stride));
        part.fma(scale, V::load(from)).store(out);
    }
}
