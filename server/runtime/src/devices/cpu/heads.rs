//! The CPU device's operations on heads: norms, rotation, appending to the cache, attention of both kinds. They cut the
//! work into tasks and leave a task's arithmetic to `attention` and `latent`.

use std::sync::{Arc, PoisonError};

use baton_checkpoint::Attention;

use super::{
    CpuDevice, Plan, ROWS_PER_TASK, attention,
    attention::Sequence,
    lanes::LANES,
    latent,
    linear::{Linear, Product, multiply},
    memory::{Disjoint, grow},
    tensor::Tensor,
};
use crate::{
    RuntimeError,
    device::{Heads, LatentHeads},
};

/// The kind of attention that the device was made for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Grouped(Heads),
    Latent(LatentHeads),
}

impl Kind {
    pub(crate) fn of(attention: &Attention) -> Self {
        match attention {
            Attention::GroupedQuery(shape) => Self::Grouped(Heads {
                heads: shape.heads as usize,
                kv_heads: shape.kv_heads as usize,
                head_dim: shape.head_dim as usize,
            }),
            Attention::Latent(shape) => Self::Latent(LatentHeads {
                heads: shape.heads as usize,
                rank: shape.kv_rank as usize,
                rope: shape.rope_dim as usize,
                scale: shape.scale,
            }),
        }
    }

    /// Tokens of one task of attention.
    pub(crate) fn task_tokens(&self) -> usize {
        match self {
            Self::Grouped(heads) => attention::task_tokens(heads),
            Self::Latent(_) => latent::TASK_TOKENS,
        }
    }

    pub(crate) fn grouped(&self) -> Heads {
        match self {
            Self::Grouped(heads) => *heads,
            Self::Latent(_) => panic!("a model calls the operations of its own kind of attention"),
        }
    }

    fn latent(&self) -> LatentHeads {
        match self {
            Self::Latent(heads) => *heads,
            Self::Grouped(_) => panic!("a model calls the operations of its own kind of attention"),
        }
    }
}

/// Memory for products by head: rows head by head, `[heads][rows][width]`.
#[derive(Debug, Default)]
pub(crate) struct Room {
    from: Vec<f32>,
    to: Vec<f32>,
}

impl CpuDevice {
    pub(super) fn norm_heads(&mut self, qkv: &mut Tensor, query: &[f32], key: &[f32], epsilon: f32) {
        let (kernels, heads) = (self.kernels, self.kind.grouped());
        let (width, dim) = (heads.width(), heads.head_dim);
        assert!(qkv.width == width && query.len() == dim && key.len() == dim, "activations of another width");
        let values = Disjoint::new(&mut qkv.values);
        self.by_rows(qkv.rows, &|first, rows| {
            for row in first..first + rows {
                // SAFETY: row `row` is this call's only.
                let row = unsafe { values.slice(row * width, heads.query_width() + heads.kv_width()) };
                for (head, values) in row.chunks_exact_mut(dim).enumerate() {
                    let weight = if head < heads.heads { query } else { key };
                    let values = values.as_mut_ptr();
                    // SAFETY: `dim` values of each; the kernel reads a value before it writes its place.
                    unsafe { (kernels.rms_norm)(values, weight.as_ptr(), epsilon, values, dim) };
                }
            }
        });
    }

    /// Norms the first `norm.len()` values of every row.
    pub(super) fn norm_latents(&mut self, kept: &mut Tensor, norm: &[f32], epsilon: f32) {
        let (kernels, heads, width) = (self.kernels, self.kind.latent(), kept.width);
        assert!(width == heads.kept() && norm.len() == heads.rank, "activations of another width");
        let values = Disjoint::new(&mut kept.values);
        self.by_rows(kept.rows, &|first, rows| {
            for row in first..first + rows {
                // SAFETY: `rank` values of each, of a row that is this call's only; the kernel reads a value before it
                // writes its place.
                unsafe {
                    let values = values.slice(row * width, norm.len()).as_mut_ptr();
                    (kernels.rms_norm)(values, norm.as_ptr(), epsilon, values, norm.len());
                }
            }
        });
    }

    /// Rotates the columns from `start` to `end`, whole heads, of every row by its position.
    pub(super) fn rotate(&mut self, plan: &Plan, x: &mut Tensor, start: usize, end: usize) {
        let (rows, width, dim) = (x.rows, x.width, 2 * self.frequencies.inverse.len());
        let whole = end <= width && (end - start).is_multiple_of(dim);
        assert!(whole && plan.rotations.len() == rows * dim, "activations of another shape");
        let values = Disjoint::new(&mut x.values);
        self.by_rows(rows, &|first, rows| {
            for row in first..first + rows {
                let (cosines, sines) = plan.rotations[row * dim..][..dim].split_at(dim / 2);
                // SAFETY: row `row` is this call's only.
                let row = unsafe { values.slice(row * width + start, end - start) };
                for head in row.chunks_exact_mut(dim) {
                    let (low, high) = head.split_at_mut(dim / 2);
                    let pairs = low.iter_mut().zip(high).zip(cosines.iter().zip(sines));
                    pairs.for_each(|((a, b), (cos, sin))| {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin)
                    });
                }
            }
        });
    }

    pub(super) fn append_keys_and_values(&mut self, plan: &Plan, layer: u32, qkv: &Tensor) {
        let (kv, heads) = (Arc::clone(&self.kv), self.kind.grouped());
        let layer = attention::Layer { pool: &kv, layer, heads };
        assert_eq!(qkv.width, heads.width(), "activations of another width");
        self.by_runs(plan, qkv.rows, &|sequence, first, tokens| {
            // SAFETY: as `by_runs` says.
            unsafe { layer.append(sequence, first, tokens, qkv.values()) };
        });
    }

    pub(super) fn append_kept(&mut self, plan: &Plan, layer: u32, kept: &Tensor) {
        let (kv, heads) = (Arc::clone(&self.kv), self.kind.latent());
        let layer = latent::Layer { pool: &kv, layer, heads };
        assert_eq!(kept.width, heads.kept(), "activations of another width");
        self.by_runs(plan, kept.rows, &|sequence, first, tokens| {
            // SAFETY: as `by_runs` says.
            unsafe { layer.append(sequence, first, tokens, kept.values()) };
        });
    }

    /// Calls `append(sequence, first, tokens)` for runs of rows of every sequence. No two runs share a token's place in
    /// the pool: written blocks are one sequence's only (checked in `batch`), and others read a block's places only
    /// after this call.
    fn by_runs(&mut self, plan: &Plan, rows: usize, append: &(dyn Fn(&Sequence, usize, usize) + Sync)) {
        let mut runs: Vec<(&Sequence, usize, usize)> = Vec::with_capacity(plan.sequences.len());
        for sequence in &plan.sequences {
            let starts = (0..sequence.rows).step_by(ROWS_PER_TASK);
            runs.extend(starts.map(|first| (sequence, first, ROWS_PER_TASK.min(sequence.rows - first))));
        }
        if rows <= ROWS_PER_TASK {
            runs.into_iter().for_each(|(sequence, first, tokens)| append(sequence, first, tokens));
            return;
        }
        self.pool.run(runs.len(), &|_, task| {
            let (sequence, first, tokens) = runs[task];
            append(sequence, first, tokens);
        });
    }

    pub(super) fn attend_grouped(
        &mut self,
        plan: &Plan,
        layer: u32,
        qkv: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let (kernels, heads, kv) = (self.kernels, self.kind.grouped(), Arc::clone(&self.kv));
        let layer = attention::Layer { pool: &kv, layer, heads };
        let fits = qkv.width == heads.width() && out.width == heads.query_width();
        assert!(fits, "activations of another width");
        let (from, to) = (qkv.values(), Disjoint::new(out.reset(qkv.rows)?));
        let scratch = &self.attention_scratch;
        self.pool.run(plan.tiles.len() * heads.kv_heads, &|worker, task| {
            let (tile, kv_head) = (plan.tiles[task / heads.kv_heads], task % heads.kv_heads);
            let sequence = &plan.sequences[tile.sequence];
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: appending to this layer is over, and tile and KV head are this task's only.
            unsafe { attention::attend(kernels, &layer, (sequence, tile, kv_head), from, to, &mut scratch) };
        });
        Ok(())
    }

    pub(super) fn attend_latents(
        &mut self,
        plan: &Plan,
        layer: u32,
        (latents, rotated): (&Tensor, &Tensor),
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let (kernels, heads, kv) = (self.kernels, self.kind.latent(), Arc::clone(&self.kv));
        let layer = latent::Layer { pool: &kv, layer, heads };
        let width = heads.heads * heads.rank;
        let fits = latents.width == width && rotated.width == heads.heads * heads.rope && out.width == width;
        assert!(fits && latents.rows == rotated.rows, "activations of another shape");
        let (from, to) = ((latents.values(), rotated.values()), Disjoint::new(out.reset(latents.rows)?));
        let (scratch, groups) = (&self.latent_scratch, heads.heads.div_ceil(LANES));
        self.pool.run(plan.tiles.len() * groups, &|worker, task| {
            let (tile, group) = (plan.tiles[task / groups], latent::group(&heads, task % groups));
            let sequence = &plan.sequences[tile.sequence];
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: appending to this layer is over, and tile and group are this task's only.
            unsafe { latent::attend(kernels, &layer, (sequence, tile, group), from, to, &mut scratch) };
        });
        Ok(())
    }

    /// Rows are brought together head by head, so that each head's product is one of contiguous rows.
    pub(super) fn multiply_by_head(
        &mut self,
        x: &Tensor,
        weights: &[Linear],
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let (rows, heads) = (x.rows, weights.len());
        let (inputs, outputs) = (x.width / heads, out.width / heads);
        let fits = |weight: &Linear| weight.inputs == inputs && weight.outputs == outputs;
        assert!(weights.iter().all(fits), "activations of another width");
        let Room { from, to } = &mut self.by_head;
        grow(from, rows * x.width);
        grow(to, rows * out.width);
        let (from, to) = (&mut from[..rows * x.width], &mut to[..rows * out.width]);
        let (gathered, values) = (Disjoint::new(from), x.values());
        self.pool.run(heads, &|_, head| {
            // SAFETY: head `head` is this task's only.
            let gathered = unsafe { gathered.slice(head * rows * inputs, rows * inputs) };
            for (row, to) in gathered.chunks_exact_mut(inputs).enumerate() {
                to.copy_from_slice(&values[row * x.width + head * inputs..][..inputs]);
            }
        });
        let parts = from.chunks_exact(rows * inputs).zip(to.chunks_exact_mut(rows * outputs));
        let product = |(weight, (x, to))| Product { weight, x, out: Disjoint::new(to) };
        let products: Vec<Product<'_>> = weights.iter().zip(parts).map(product).collect();
        // SAFETY: every product has a part of `to` of its own, of its size, and `to` is borrowed.
        unsafe { multiply(&products, self.kernels, &mut self.pool, &mut self.workspace) };
        let (width, out) = (out.width, Disjoint::new(out.reset(rows)?));
        self.pool.run(heads, &|_, head| {
            for (row, from) in to[head * rows * outputs..][..rows * outputs].chunks_exact(outputs).enumerate()
            {
                // SAFETY: the columns of head `head` are this task's only.
                let to = unsafe { out.slice(row * width + head * outputs, outputs) };
                to.copy_from_slice(from);
            }
        });
        Ok(())
    }
}
