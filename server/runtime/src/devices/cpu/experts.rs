//! A mixture's experts: rows are sorted by expert, each expert multiplies its rows at once, and every row adds up what
//! its experts made of it in the order of their indices. However many experts there are, the threads get four jobs.

use super::{
    kernels::Kernels,
    linear::{Linear, Product, Workspace, multiply},
    memory::{Disjoint, grow},
    routing::Routes,
    threads::Pool,
};
use crate::device::Expert;

/// Rows of one task in what is done row by row.
const ROWS_PER_TASK: usize = 8;

/// Memory kept from layer to layer. A *place* is one row at one of its experts; places are sorted by expert, then row.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// First place of each expert, and one more.
    starts: Vec<usize>,
    /// The row of each place.
    rows: Vec<usize>,
    /// The places of each row, in the order of its routes.
    places: Vec<usize>,
    gathered: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    results: Vec<f32>,
}

/// What does the work.
pub(crate) struct Workers<'a> {
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: &'a mut Pool,
    pub(crate) workspace: &'a mut Workspace,
}

/// `out[row] = sum of weight * expert(x[row]) + shared[row]`; all are `[rows][hidden]`.
pub(crate) fn run(
    mut workers: Workers<'_>,
    room: &mut Room,
    (x, shared, out): (&[f32], Option<&[f32]>, &mut [f32]),
    routes: &Routes,
    experts: &[Expert<Linear>],
) {
    let (hidden, width) = (experts[0].gate_up.inputs, experts[0].down.inputs);
    room.sort(routes, experts.len());
    room.gather(workers.pool, x, hidden);
    let places = room.rows.len();
    let Room { starts, gathered, gate_up, gated, results, .. } = &mut *room;
    let gate_up = grow(gate_up, places * 2 * width);
    each_expert(&mut workers, starts, experts, |expert| &expert.gate_up, gathered, gate_up);
    let gated = grow(gated, places * width);
    gate(&mut workers, gate_up, gated, width);
    let results = grow(results, places * hidden);
    each_expert(&mut workers, starts, experts, |expert| &expert.down, gated, results);
    room.combine(workers.pool, routes, shared, out, hidden);
}

/// Multiplies the places of every expert with its matrix, all in one job.
fn each_expert(
    workers: &mut Workers<'_>,
    starts: &[usize],
    experts: &[Expert<Linear>],
    weight: fn(&Expert<Linear>) -> &Linear,
    x: &[f32],
    mut out: &mut [f32],
) {
    let mut products = Vec::new();
    for (expert, bounds) in experts.iter().zip(starts.windows(2)) {
        let (weight, places) = (weight(expert), bounds[0]..bounds[1]);
        let (mine, left) = out.split_at_mut(places.len() * weight.outputs);
        out = left;
        if !places.is_empty() {
            let x = &x[places.start * weight.inputs..places.end * weight.inputs];
            products.push(Product { weight, x, out: Disjoint::new(mine) });
        }
    }
    // SAFETY: the results are parts of `out` that do not overlap, each of its product's size, and `out` is borrowed.
    unsafe { multiply(&products, workers.kernels, workers.pool, workers.workspace) };
}

/// `gated = silu(gate) * up` for every place.
fn gate(workers: &mut Workers<'_>, gate_up: &[f32], gated: &mut [f32], width: usize) {
    let places = gated.len() / width;
    let to = Disjoint::new(gated);
    let kernels = workers.kernels;
    workers.pool.run(places.div_ceil(ROWS_PER_TASK), &|_, task| {
        let first = task * ROWS_PER_TASK;
        for place in first..places.min(first + ROWS_PER_TASK) {
            let (gate, up) = gate_up[place * 2 * width..][..2 * width].split_at(width);
            // SAFETY: `width` values of each; place `place` of `gated` is this task's only.
            unsafe {
                let to = to.slice(place * width, width);
                (kernels.silu_mul)(gate.as_ptr(), up.as_ptr(), to.as_mut_ptr(), width);
            }
        }
    });
}

impl Room {
    /// Sorts the routes of all rows into places.
    fn sort(&mut self, routes: &Routes, experts: usize) {
        self.starts.clear();
        self.starts.resize(experts + 1, 0);
        for &expert in &routes.experts {
            self.starts[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        self.rows.resize(routes.experts.len(), 0);
        self.places.resize(routes.experts.len(), 0);
        let mut next = self.starts.clone();
        for (route, &expert) in routes.experts.iter().enumerate() {
            let place = &mut next[expert as usize];
            (self.places[route], self.rows[*place]) = (*place, route / routes.per_row);
            *place += 1;
        }
    }

    fn gather(&mut self, pool: &mut Pool, x: &[f32], hidden: usize) {
        let (rows, places) = (&self.rows, self.rows.len());
        let to = Disjoint::new(grow(&mut self.gathered, places * hidden));
        pool.run(places.div_ceil(ROWS_PER_TASK), &|_, task| {
            let first = task * ROWS_PER_TASK;
            for (place, row) in (first..).zip(&rows[first..places.min(first + ROWS_PER_TASK)]) {
                // SAFETY: place `place` is this task's only.
                let to = unsafe { to.slice(place * hidden, hidden) };
                to.copy_from_slice(&x[row * hidden..][..hidden]);
            }
        });
    }

    fn combine(
        &self,
        pool: &mut Pool,
        routes: &Routes,
        shared: Option<&[f32]>,
        out: &mut [f32],
        hidden: usize,
    ) {
        let rows = out.len() / hidden;
        let to = Disjoint::new(out);
        pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
            let first = task * ROWS_PER_TASK;
            for row in first..rows.min(first + ROWS_PER_TASK) {
                // SAFETY: row `row` is this task's only.
                let to = unsafe { to.slice(row * hidden, hidden) };
                to.fill(0.0);
                let range = row * routes.per_row..(row + 1) * routes.per_row;
                for (&place, &weight) in self.places[range.clone()].iter().zip(&routes.weights[range]) {
                    let result = &self.results[place * hidden..][..hidden];
                    to.iter_mut().zip(result).for_each(|(sum, value)| *sum += weight * value);
                }
                if let Some(shared) = shared {
                    let shared = &shared[row * hidden..][..hidden];
                    to.iter_mut().zip(shared).for_each(|(sum, value)| *sum += value);
                }
            }
        });
    }
}
