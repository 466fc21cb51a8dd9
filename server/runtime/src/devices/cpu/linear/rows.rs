//! The rows of activations that products multiply, made ready for the kernels: quantised where weights are, and where
//! rows are many, in tiles.

use std::sync::{Mutex, PoisonError};

use super::{Product, Scratch};
use crate::devices::cpu::{
    kernels::{Kernels, MOST_FEW, SUM_COLUMNS, X_BLOCK, tile_height, tile_rows},
    memory::{Disjoint, grow},
    threads::Pool,
};

/// Tiles of rows that one task makes, if they are of one height.
const TILES_PER_TASK: usize = 4;

/// Where the rows of all products of a job are made ready; kept from one job to the next.
#[derive(Default)]
pub(super) struct Room {
    /// Tiles of rows as f32.
    pub(super) dense: Vec<f32>,
    /// Rows, or tiles of them, as i16.
    pub(super) quants: Vec<i16>,
    /// `[row][blocks of X_BLOCK columns]`.
    pub(super) scales: Vec<f32>,
    /// `[row][runs of SUM_COLUMNS columns]`.
    pub(super) sums: Vec<f32>,
}

/// Where the rows of one product are in a [`Room`], and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ready {
    /// Of the first row among values, f32 or i16 alike.
    pub(super) values: usize,
    /// Of the first row's scales.
    pub(super) scales: usize,
    /// Of the first row's sums.
    pub(super) sums: usize,
    /// Rows of each tile but the last, of dense rows and of quantised; none where rows are few and stand by themselves.
    pub(super) heights: Option<Heights>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Heights {
    pub(super) dense: usize,
    pub(super) quantised: usize,
}

/// Scales of a row of `k` columns.
pub(super) fn scales_of(k: usize) -> usize {
    k.div_ceil(X_BLOCK)
}

/// Sums of a row of `k` columns.
pub(super) fn sums_of(k: usize) -> usize {
    k.div_ceil(SUM_COLUMNS)
}

/// Rows of one product that one task makes ready.
struct Run<'a> {
    product: &'a Product<'a>,
    ready: Ready,
    first: usize,
    rows: usize,
}

impl Room {
    /// Makes the rows of all products ready.
    pub(super) fn prepare(
        &mut self,
        products: &[Product<'_>],
        kernels: &Kernels,
        pool: &mut Pool,
        workers: &[Mutex<Scratch>],
    ) -> Vec<Ready> {
        let (mut end, mut all, mut runs) =
            (Ready { values: 0, scales: 0, sums: 0, heights: None }, Vec::new(), Vec::new());
        let (mut dense, mut quantised, mut many) = (false, false, false);
        for product in products {
            let (rows, k) = (product.rows(), product.weight.inputs);
            assert_eq!(product.x.len(), rows * k, "activations of another shape");
            let heights = (rows > MOST_FEW).then(|| Heights {
                dense: tile_height(rows, kernels.tile_rows),
                quantised: tile_height(rows, kernels.quantised_tile_rows),
            });
            let ready = Ready { heights, ..end };
            all.push(ready);
            // Whole tiles of both.
            let step = heights.map_or(rows.max(1), |Heights { dense, quantised }| {
                if dense == quantised { dense * TILES_PER_TASK } else { dense * quantised }
            });
            let starts = (0..rows).step_by(step);
            runs.extend(starts.map(|first| Run { product, ready, first, rows: step.min(rows - first) }));
            end.values += rows * k;
            end.scales += rows * scales_of(k);
            end.sums += rows * sums_of(k);
            dense |= heights.is_some() && product.weight.has_dense();
            quantised |= product.weight.has_quantised();
            many |= heights.is_some();
        }
        if dense {
            grow(&mut self.dense, end.values);
        }
        if quantised {
            grow(&mut self.quants, end.values);
            grow(&mut self.scales, end.scales);
            grow(&mut self.sums, end.sums);
        }
        let shared = Shared {
            dense: Disjoint::new(&mut self.dense),
            quants: Disjoint::new(&mut self.quants),
            scales: Disjoint::new(&mut self.scales),
            sums: Disjoint::new(&mut self.sums),
        };
        let make = |worker: usize, run: &Run<'_>| {
            // SAFETY: the room holds every product's rows; those of a run are one task's only.
            unsafe { shared.make(kernels, run, &workers[worker]) };
        };
        if many {
            pool.run(runs.len(), &|worker, task| make(worker, &runs[task]));
        } else if quantised {
            // A few rows take less time than handing out tasks does.
            runs.iter().for_each(|run| make(0, run));
        }
        all
    }
}

/// A room that tasks fill together.
struct Shared {
    dense: Disjoint<f32>,
    quants: Disjoint<i16>,
    scales: Disjoint<f32>,
    sums: Disjoint<f32>,
}

impl Shared {
    /// # Safety
    /// The room holds the run's rows, and they are this call's only.
    unsafe fn make(&self, kernels: &Kernels, run: &Run<'_>, worker: &Mutex<Scratch>) {
        let Run { product, ready, first, rows } = *run;
        let k = product.weight.inputs;
        let x = &product.x[first * k..][..rows * k];
        let values = ready.values + first * k;
        if let Some(Heights { dense: height, .. }) = ready.heights.filter(|_| product.weight.has_dense()) {
            // SAFETY: `rows` rows of `k` words, here and there.
            unsafe {
                let to = self.dense.slice(values, rows * k).as_mut_ptr();
                tile_rows(x.as_ptr().cast(), rows, k, height, to.cast());
            }
        }
        if !product.weight.has_quantised() {
            return;
        }
        // SAFETY: the caller's promise.
        let (to, scales, sums) = unsafe {
            (
                self.quants.slice(values, rows * k),
                self.scales.slice(ready.scales + first * scales_of(k), rows * scales_of(k)),
                self.sums.slice(ready.sums + first * sums_of(k), rows * sums_of(k)),
            )
        };
        let mut quantise = |to: &mut [i16]| {
            let places = to
                .chunks_exact_mut(k)
                .zip(scales.chunks_exact_mut(scales_of(k)))
                .zip(sums.chunks_exact_mut(sums_of(k)));
            for (x, ((to, scales), sums)) in x.chunks_exact(k).zip(places) {
                let (to, scales, sums) = (to.as_mut_ptr(), scales.as_mut_ptr(), sums.as_mut_ptr());
                // SAFETY: `k` values, a multiple of 32 as quantised weights want it, and room for what is made of them.
                unsafe { (kernels.quantise)(x.as_ptr(), k, to, scales, sums) };
            }
        };
        let Some(Heights { quantised: height, .. }) = ready.heights else { return quantise(to) };
        let mut scratch = worker.lock().unwrap_or_else(PoisonError::into_inner);
        let flat = grow(&mut scratch.rows, rows * k);
        quantise(flat);
        // SAFETY: `rows` rows of `k / 2` pairs, here and there.
        unsafe { tile_rows(flat.as_ptr().cast(), rows, k / 2, height, to.as_mut_ptr().cast()) };
    }
}
