//! What a model asks of the hardware: a small set of fused operations over the device's own types.
//!
//! Models are written once over [`Device`]. Calls come from one thread, in order; a device may queue them and need only
//! have finished where a call's result becomes visible to the host: in [`Device::read`], and in [`Device::append_kv`] and
//! [`Device::append_latents`], whose slices may be read by transports as soon as they return. Activations are matrices
//! `[rows][width]` of which only the device knows the element type (f32 on the CPU). Shapes are fixed when the model is
//! loaded and indices are checked in `batch`, so what an operation reports is a failure of the hardware or of its
//! runtime. A device is made for one kind of attention; a model calls the operations of its own kind.
//!
//! Each operation names the Ascend operator (aclnn) it was cut to fit.

use std::sync::Arc;

#[cfg(doc)]
use baton_checkpoint::Routing;
use baton_checkpoint::{Mixture, RopeOrder, TensorView};

use crate::{BlockId, KvPool, RuntimeError, batch::Step};

/// One stored matrix that becomes part of a [`Device::Linear`], its outputs following those of the part before.
pub(crate) struct LinearPart<'a> {
    /// For error messages.
    pub(crate) name: String,
    /// `[out, in]`.
    pub(crate) weight: TensorView<'a>,
    /// `[out]`, in the order of the stored rows.
    pub(crate) bias: Option<TensorView<'a>>,
    /// How stored rows become outputs.
    pub(crate) rows: RowOrder,
}

/// Which stored row is which output.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowOrder {
    AsStored,
    /// Heads of `head_dim` rows, each stored in the order its rotary pairs have in the file; outputs are in halves.
    Rotary {
        head_dim: usize,
        stored: RopeOrder,
    },
}

impl RowOrder {
    /// The stored row of an output.
    pub(crate) fn stored_row(self, output: usize) -> usize {
        match self {
            Self::AsStored => output,
            Self::Rotary { head_dim, stored } => {
                let row = output % head_dim;
                output - row + stored.stored_row(row, head_dim)
            }
        }
    }
}

/// Heads as the attention operations need them. A row of Q, K and V together is
/// `[heads + 2 * kv_heads][head_dim]`: queries, keys, values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Heads {
    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of Q, K and V together.
    pub(crate) fn width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }
}

/// Heads of latent attention as its operations need them. All heads share one key and value for each token, the latent
/// and the rotated part side by side: `[rank + rope]`, of which the value is the latent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LatentHeads {
    pub(crate) heads: usize,
    /// Width of the latent.
    pub(crate) rank: usize,
    /// Width of the rotated part.
    pub(crate) rope: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
}

impl LatentHeads {
    /// Width of what is kept of a token.
    pub(crate) fn kept(&self) -> usize {
        self.rank + self.rope
    }
}

/// One expert of a mixture.
pub(crate) struct Expert<L> {
    /// Gate and up stacked.
    pub(crate) gate_up: L,
    pub(crate) down: L,
}

/// Hardware that runs models.
pub(crate) trait Device: Send {
    /// Weight matrix, also usable as an embedding table.
    type Linear: Send;
    /// Weights of a norm.
    type Vector: Send;
    /// Activations, `[rows][width]`; rows change from step to step.
    type Tensor: Send;
    /// The experts of each row and their weights.
    type Routes: Send;
    /// A step's indices as the device wants them: positions, sines, slot mapping, block tables.
    type Plan;

    /// The pool that `append_kv` or `append_latents` writes and `attention` or `latent_attention` reads.
    fn kv_pool(&self) -> &Arc<KvPool>;

    /// Loads matrices, stacked by output. `loaded(bytes)` is called as bytes of the checkpoint have been taken in.
    fn load_linear(
        &mut self,
        parts: &[LinearPart<'_>],
        loaded: &mut dyn FnMut(u64),
    ) -> Result<Self::Linear, RuntimeError>;

    fn load_vector(&mut self, values: &TensorView<'_>) -> Result<Self::Vector, RuntimeError>;

    /// Called once, when all weights are loaded.
    fn finish_loading(&mut self);

    /// Activations of `width`, without rows as yet.
    fn tensor(&mut self, width: usize) -> Result<Self::Tensor, RuntimeError>;

    /// Room for routes, without rows as yet.
    fn routes(&mut self) -> Result<Self::Routes, RuntimeError>;

    fn plan(&mut self, step: &Step<'_>) -> Result<Self::Plan, RuntimeError>;

    /// `out[row] = table[token of row]` (Embedding).
    fn embed(
        &mut self,
        plan: &Self::Plan,
        table: &Self::Linear,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// `out = x / rms(x) * weight` (RmsNorm).
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// `x += delta; out = x / rms(x) * weight` (AddRmsNorm).
    fn add_rms_norm(
        &mut self,
        x: &mut Self::Tensor,
        delta: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// `out = x weight^T + bias` (Matmul, WeightQuantBatchMatmulV2).
    fn linear(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Linear,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// Each head of Q becomes `head / rms(head) * query`, each of K likewise with `key`, in place (RmsNorm).
    fn head_norm(
        &mut self,
        qkv: &mut Self::Tensor,
        query: &Self::Vector,
        key: &Self::Vector,
        epsilon: f32,
    ) -> Result<(), RuntimeError>;

    /// Rotates the queries and keys in rows of Q, K and V by their positions, in halves (ApplyRotaryPosEmbV2).
    fn rope(&mut self, plan: &Self::Plan, qkv: &mut Self::Tensor) -> Result<(), RuntimeError>;

    /// Writes keys and values of all rows to their slots of `layer` (ScatterPaKvCache).
    fn append_kv(&mut self, plan: &Self::Plan, layer: u32, qkv: &Self::Tensor) -> Result<(), RuntimeError>;

    /// Causal attention of every row over its sequence's blocks of `layer`; `out` is `[rows][heads * head_dim]`
    /// (FusedInferAttentionScoreV3 with a block table).
    fn attention(
        &mut self,
        plan: &Self::Plan,
        layer: u32,
        qkv: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// Each head's columns of `x` times a matrix of its own, `weights[head]`, into the head's columns of `out`
    /// (BatchMatMul).
    fn linear_by_head(
        &mut self,
        x: &Self::Tensor,
        weights: &[Self::Linear],
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// Rotates all of `x`, heads as wide as the rotated part, by the rows' positions, in halves (ApplyRotaryPosEmbV2).
    fn rope_latent_queries(&mut self, plan: &Self::Plan, x: &mut Self::Tensor) -> Result<(), RuntimeError>;

    /// `kept` is latent and rotated part of every row, `[rows][rank + rope]`: norms the one, rotates the other, and
    /// writes both to their slots of `layer` (KvRmsNormRopeCache).
    fn append_latents(
        &mut self,
        plan: &Self::Plan,
        layer: u32,
        kept: &mut Self::Tensor,
        norm: &Self::Vector,
        epsilon: f32,
    ) -> Result<(), RuntimeError>;

    /// Causal attention of every row over the latents of its sequence's blocks of `layer`. `latent` and `rotated` are
    /// the two parts of queries, `[rows][heads][rank]` and `[rows][heads][rope]`; `out` is `[rows][heads][rank]`
    /// (FusedInferAttentionScoreV3 with `queryRope` and `keyRope`, one KV head and a block table).
    fn latent_attention(
        &mut self,
        plan: &Self::Plan,
        layer: u32,
        queries: (&Self::Tensor, &Self::Tensor),
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// `x` is gate and up side by side; `out = silu(gate) * up`, half as wide (SwiGlu).
    fn silu_mul(&mut self, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<(), RuntimeError>;

    /// Chooses and weighs each row's experts by `scores`, the router's outputs `[rows][experts]`; `bias` is the
    /// correction that [`Routing::correction_bias`] speaks of (MoeGatingTopKSoftmaxV2, MoeGatingTopK).
    fn route(
        &mut self,
        scores: &Self::Tensor,
        bias: Option<&Self::Vector>,
        mixture: &Mixture,
        out: &mut Self::Routes,
    ) -> Result<(), RuntimeError>;

    /// `out = the weighted sum of what each row's experts make of it + shared`. Rows go to their experts together
    /// (MoeInitRoutingV2, GroupedMatmulV4, SwiGlu, GroupedMatmulV4, MoeFinalizeRoutingV2, whose `x1` is `shared`); a
    /// row's sum is in the order of its experts' indices.
    fn experts(
        &mut self,
        x: &Self::Tensor,
        routes: &Self::Routes,
        experts: &[Expert<Self::Linear>],
        shared: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// The rows whose logits are wanted (GatherV2).
    fn select_logits_rows(
        &mut self,
        plan: &Self::Plan,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), RuntimeError>;

    /// Copies blocks of the pool, in every layer and in order (InplaceIndexCopy); the blocks exist. Done when it returns.
    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), RuntimeError>;

    /// The values, row-major, once everything that writes them is done.
    fn read<'a>(&mut self, x: &'a Self::Tensor) -> Result<&'a [f32], RuntimeError>;
}
