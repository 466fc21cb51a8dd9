//! The CPU device: packed weights, kernels chosen for the CPU at hand, a few threads.
//!
//! `weights` are packed at load; `linear`, `heads` (with `attention` and `latent`) and `experts` (with `routing`) cut an
//! operation into tasks for `threads`, which call the `kernels`; those are written over `lanes`. Activations are f32 from
//! one operation to the next. `measure` times products alone. This file puts them together.

mod attention;
mod experts;
mod heads;
mod kernels;
mod lanes;
mod latent;
mod linear;
mod measure;
mod memory;
mod routing;
mod tensor;
mod threads;
mod weights;

use std::{
    num::NonZero,
    sync::{Arc, Mutex},
};

use baton_checkpoint::{Attention, Mixture, ModelConfig, RopeFrequencies, TensorView};

use self::{
    attention::{Sequence, Tile},
    heads::Kind,
    kernels::Kernels,
    lanes::LANES,
    linear::Linear,
    memory::Disjoint,
    routing::Routes,
    tensor::Tensor,
    threads::Pool,
};
use crate::{
    BlockId, KvContent, KvPool, KvPoolLayout, LoadOptions, RuntimeError,
    batch::Step,
    device::{Device, Expert, LinearPart},
};

pub use measure::product_rate;
pub(crate) use weights::{Found, Place, Store};

/// Rows of one task in operations that work row by row.
const ROWS_PER_TASK: usize = 16;
/// Most threads that can be asked for.
const THREADS_MOST: usize = 1024;

/// A step's indices.
pub(crate) struct Plan {
    tokens: Vec<u32>,
    sequences: Vec<Sequence>,
    tiles: Vec<Tile>,
    logits_rows: Vec<usize>,
    /// Cosines and sines of each row, `[rows][2][rotated elements / 2]`.
    rotations: Vec<f32>,
}

/// The CPU as a [`Device`].
pub(crate) struct CpuDevice {
    kernels: &'static Kernels,
    pool: Pool,
    kv: Arc<KvPool>,
    kind: Kind,
    frequencies: RopeFrequencies,
    exact_bf16: bool,
    store: Store,
    /// Whether `store` has written a packed copy.
    wrote_copy: bool,
    workspace: linear::Workspace,
    attention_scratch: Vec<Mutex<attention::Scratch>>,
    latent_scratch: Vec<Mutex<latent::Scratch>>,
    by_head: heads::Room,
    routing: routing::Room,
    experts: experts::Room,
}

/// The layout of the KV pool for a model on this device.
pub(crate) fn kv_layout(config: &ModelConfig, options: &LoadOptions) -> KvPoolLayout {
    let (format, content, kv_heads, head_dim, stored_dim) = match &config.attention {
        Attention::GroupedQuery(shape) => {
            let stored = attention::stored_dim(shape.head_dim as usize) as u32;
            (attention::FORMAT, KvContent::KeysAndValues, shape.kv_heads, shape.head_dim, stored)
        }
        Attention::Latent(shape) => {
            let content = KvContent::Latents { rope_dim: shape.rope_dim };
            (latent::FORMAT, content, 1, shape.kept_dim(), shape.kept_dim())
        }
    };
    KvPoolLayout {
        format,
        content,
        dtype: options.kv_dtype,
        block_tokens: attention::BLOCK_TOKENS as u32,
        layers: config.layers,
        kv_heads,
        head_dim,
        stored_dim,
        blocks: options.kv_blocks,
    }
}

/// The number of threads asked for.
pub(crate) fn threads_of(options: &LoadOptions) -> Result<usize, RuntimeError> {
    match options.threads {
        0 => Ok(std::thread::available_parallelism().map_or(1, NonZero::get)),
        1..=THREADS_MOST => Ok(options.threads),
        threads => {
            let wanted = "at most 1024, or 0 for one a core";
            Err(RuntimeError::Option { option: "threads", found: threads as u64, wanted })
        }
    }
}

impl CpuDevice {
    /// Starts the threads and allocates the KV pool. Weights will be kept in `store`.
    pub(crate) fn new(
        config: &ModelConfig,
        options: &LoadOptions,
        store: Store,
    ) -> Result<Self, RuntimeError> {
        let threads = threads_of(options)?;
        let kernels = kernels::best();
        tracing::debug!(instructions = kernels.name, threads, "the cpu device is up");
        Ok(Self {
            kernels,
            pool: Pool::start(threads).map_err(RuntimeError::Threads)?,
            kv: Arc::new(KvPool::allocate(kv_layout(config, options))?),
            kind: Kind::of(&config.attention),
            frequencies: config.rope.frequencies(config.rope_dim()),
            exact_bf16: options.exact_bf16,
            store,
            wrote_copy: false,
            workspace: linear::Workspace::new(threads),
            attention_scratch: (0..threads).map(|_| Mutex::default()).collect(),
            latent_scratch: (0..threads).map(|_| Mutex::default()).collect(),
            by_head: heads::Room::default(),
            routing: routing::Room::default(),
            experts: experts::Room::default(),
        })
    }

    /// Whether loading has written a packed copy of the weights, which is to be used instead of this.
    pub(crate) fn wrote_copy(&self) -> bool {
        self.wrote_copy
    }

    /// Calls `work(first, rows)` for runs of rows, on all threads if there are enough of them.
    fn by_rows(&mut self, rows: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        if rows <= ROWS_PER_TASK {
            return work(0, rows);
        }
        self.pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
            let first = task * ROWS_PER_TASK;
            work(first, ROWS_PER_TASK.min(rows - first));
        });
    }
}

impl Device for CpuDevice {
    type Linear = Linear;
    type Vector = Vec<f32>;
    type Tensor = Tensor;
    type Routes = Routes;
    type Plan = Plan;

    fn kv_pool(&self) -> &Arc<KvPool> {
        &self.kv
    }

    fn load_linear(
        &mut self,
        parts: &[LinearPart<'_>],
        loaded: &mut dyn FnMut(u64),
    ) -> Result<Linear, RuntimeError> {
        let inputs = parts.first().map_or(0, |part| part.weight.columns());
        let mut linear = Linear { parts: Vec::with_capacity(parts.len()), outputs: 0, inputs };
        for part in parts {
            if part.weight.columns() != inputs {
                let reason = format!("it has {} inputs, its neighbours {inputs}", part.weight.columns());
                return Err(RuntimeError::Tensor { tensor: part.name.clone(), reason });
            }
            let packed = weights::pack(part, self.exact_bf16, &mut self.store, &mut self.pool)?;
            linear.outputs += packed.rows;
            linear.parts.push(packed);
            loaded(part.weight.bytes.len() as u64);
        }
        Ok(linear)
    }

    fn load_vector(&mut self, values: &TensorView<'_>) -> Result<Vec<f32>, RuntimeError> {
        Ok(values.to_f32())
    }

    fn finish_loading(&mut self) {
        self.wrote_copy = self.store.finish();
    }

    fn tensor(&mut self, width: usize) -> Result<Tensor, RuntimeError> {
        Ok(Tensor::new(width))
    }

    fn routes(&mut self) -> Result<Routes, RuntimeError> {
        Ok(Routes::default())
    }

    fn plan(&mut self, step: &Step<'_>) -> Result<Plan, RuntimeError> {
        let sequence = |span: &crate::batch::Span<'_>| Sequence {
            first_row: span.rows.start,
            rows: span.rows.len(),
            start: span.start as usize,
            blocks: span.blocks.to_vec(),
        };
        let sequences: Vec<Sequence> = step.sequences.iter().map(sequence).collect();
        let RopeFrequencies { inverse, scale } = &self.frequencies;
        let mut rotations = Vec::with_capacity(step.positions.len() * inverse.len() * 2);
        for &position in &step.positions {
            // The angle is rounded to f32 as the reference implementation does, its sine is exact.
            let angle = |frequency: &f32| f64::from(frequency * position as f32);
            rotations.extend(inverse.iter().map(|f| angle(f).cos() as f32 * scale));
            rotations.extend(inverse.iter().map(|f| angle(f).sin() as f32 * scale));
        }
        Ok(Plan {
            tokens: step.tokens.clone(),
            tiles: attention::tiles(&sequences, self.kind.task_tokens()),
            sequences,
            logits_rows: step.logits_rows.clone(),
            rotations,
        })
    }

    fn embed(&mut self, plan: &Plan, table: &Linear, out: &mut Tensor) -> Result<(), RuntimeError> {
        let (kernels, width) = (self.kernels, out.width);
        assert_eq!(width, table.inputs, "activations of another width");
        let mut panel = vec![0.0; width * LANES];
        for (&token, row) in plan.tokens.iter().zip(out.reset(plan.tokens.len())?.chunks_exact_mut(width)) {
            let (part, index) = table.locate(token as usize);
            let bytes = &part.bytes.as_slice()[index / LANES * part.panel_bytes..][..part.panel_bytes];
            // SAFETY: a whole panel of `width` columns, and room for sixteen of each.
            unsafe { kernels.expand(part.format)(bytes.as_ptr(), width, panel.as_mut_ptr()) };
            let lane = panel[index % LANES..].iter().step_by(LANES);
            row.iter_mut().zip(lane).for_each(|(to, value)| *to = *value);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Tensor,
        weight: &Vec<f32>,
        epsilon: f32,
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let (kernels, width) = (self.kernels, x.width);
        assert!(width == weight.len() && width == out.width, "activations of another width");
        let (from, to) = (x.values(), Disjoint::new(out.reset(x.rows)?));
        self.by_rows(x.rows, &|first, rows| {
            for row in first..first + rows {
                let from = &from[row * width..][..width];
                // SAFETY: rows of `width` values; row `row` of `out` is this call's only.
                unsafe {
                    let to = to.slice(row * width, width);
                    (kernels.rms_norm)(from.as_ptr(), weight.as_ptr(), epsilon, to.as_mut_ptr(), width);
                }
            }
        });
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        x: &mut Tensor,
        delta: &Tensor,
        weight: &Vec<f32>,
        epsilon: f32,
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let (kernels, width) = (self.kernels, x.width);
        assert!(width == delta.width && x.rows == delta.rows, "activations of another shape");
        let (sums, deltas) = (Disjoint::new(&mut x.values), delta.values());
        self.by_rows(x.rows, &|first, rows| {
            let deltas = &deltas[first * width..][..rows * width];
            // SAFETY: `rows` rows from `first` on of both; those of `x` are this call's only.
            unsafe {
                let sums = sums.slice(first * width, rows * width);
                (kernels.add)(sums.as_mut_ptr(), deltas.as_ptr(), rows * width);
            }
        });
        self.rms_norm(x, weight, epsilon, out)
    }

    fn linear(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<(), RuntimeError> {
        assert!(x.width == weight.inputs && out.width == weight.outputs, "activations of another width");
        weight.apply(self.kernels, &mut self.pool, &mut self.workspace, x.values(), out.reset(x.rows)?);
        Ok(())
    }

    fn head_norm(
        &mut self,
        qkv: &mut Tensor,
        query: &Vec<f32>,
        key: &Vec<f32>,
        epsilon: f32,
    ) -> Result<(), RuntimeError> {
        self.norm_heads(qkv, query, key, epsilon);
        Ok(())
    }

    fn rope(&mut self, plan: &Plan, qkv: &mut Tensor) -> Result<(), RuntimeError> {
        let heads = self.kind.grouped();
        assert_eq!(qkv.width, heads.width(), "activations of another width");
        self.rotate(plan, qkv, 0, heads.query_width() + heads.kv_width());
        Ok(())
    }

    fn append_kv(&mut self, plan: &Plan, layer: u32, qkv: &Tensor) -> Result<(), RuntimeError> {
        self.append_keys_and_values(plan, layer, qkv);
        Ok(())
    }

    fn attention(
        &mut self,
        plan: &Plan,
        layer: u32,
        qkv: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        self.attend_grouped(plan, layer, qkv, out)
    }

    fn linear_by_head(
        &mut self,
        x: &Tensor,
        weights: &[Linear],
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        self.multiply_by_head(x, weights, out)
    }

    fn rope_latent_queries(&mut self, plan: &Plan, x: &mut Tensor) -> Result<(), RuntimeError> {
        self.rotate(plan, x, 0, x.width);
        Ok(())
    }

    fn append_latents(
        &mut self,
        plan: &Plan,
        layer: u32,
        kept: &mut Tensor,
        norm: &Vec<f32>,
        epsilon: f32,
    ) -> Result<(), RuntimeError> {
        self.norm_latents(kept, norm, epsilon);
        self.rotate(plan, kept, norm.len(), kept.width);
        self.append_kept(plan, layer, kept);
        Ok(())
    }

    fn latent_attention(
        &mut self,
        plan: &Plan,
        layer: u32,
        queries: (&Tensor, &Tensor),
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        self.attend_latents(plan, layer, queries, out)
    }

    fn silu_mul(&mut self, x: &Tensor, out: &mut Tensor) -> Result<(), RuntimeError> {
        let (kernels, width) = (self.kernels, out.width);
        assert_eq!(x.width, 2 * width, "activations of another width");
        let (from, to) = (x.values(), Disjoint::new(out.reset(x.rows)?));
        self.by_rows(x.rows, &|first, rows| {
            for row in first..first + rows {
                let (gate, up) = from[row * 2 * width..][..2 * width].split_at(width);
                // SAFETY: `width` values of each; row `row` of `out` is this call's only.
                unsafe {
                    let to = to.slice(row * width, width);
                    (kernels.silu_mul)(gate.as_ptr(), up.as_ptr(), to.as_mut_ptr(), width);
                }
            }
        });
        Ok(())
    }

    fn route(
        &mut self,
        scores: &Tensor,
        bias: Option<&Vec<f32>>,
        mixture: &Mixture,
        out: &mut Routes,
    ) -> Result<(), RuntimeError> {
        assert_eq!(scores.width, mixture.experts as usize, "activations of another width");
        out.fill(scores.values(), bias.map(Vec::as_slice), mixture, &mut self.routing);
        Ok(())
    }

    fn experts(
        &mut self,
        x: &Tensor,
        routes: &Routes,
        experts: &[Expert<Linear>],
        shared: Option<&Tensor>,
        out: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let same = |other: &Tensor| other.width == x.width && other.rows == x.rows;
        assert!(x.width == out.width && shared.is_none_or(same), "activations of another shape");
        let workspace = &mut self.workspace;
        let workers = experts::Workers { kernels: self.kernels, pool: &mut self.pool, workspace };
        let tensors = (x.values(), shared.map(Tensor::values), out.reset(x.rows)?);
        experts::run(workers, &mut self.experts, tensors, routes, experts);
        Ok(())
    }

    fn select_logits_rows(&mut self, plan: &Plan, x: &Tensor, out: &mut Tensor) -> Result<(), RuntimeError> {
        let width = x.width;
        assert_eq!(width, out.width, "activations of another width");
        let selected = out.reset(plan.logits_rows.len())?.chunks_exact_mut(width);
        for (to, &row) in selected.zip(&plan.logits_rows) {
            to.copy_from_slice(&x.values()[row * width..][..width]);
        }
        Ok(())
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), RuntimeError> {
        for &(from, to) in copies {
            // SAFETY: the engine, whose accounting says who may touch which block, has asked for it, and no other
            // operation of this device is running.
            unsafe { self.kv.copy_block(from, to) };
        }
        Ok(())
    }

    fn read<'a>(&mut self, x: &'a Tensor) -> Result<&'a [f32], RuntimeError> {
        Ok(x.values())
    }
}
