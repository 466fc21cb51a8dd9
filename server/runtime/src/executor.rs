//! The engine's view of a loaded model: one object-safe trait, whatever the device beneath.
//!
//! Called by the server's engine thread and by nobody else. Scheduling, block allocation and sampling are the
//! engine's; this trait computes.

use std::sync::Arc;

use crate::{KvPool, RuntimeError};

/// Index of a block in the KV pool; the same block index is used in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Shape of the loaded model, as far as an engine needs to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    pub layers: u32,
    pub vocabulary: u32,
    pub context_tokens: u32,
}

/// The part of one sequence that a forward pass computes: a chunk of its prompt, or its last token.
#[derive(Debug, Clone, Copy)]
pub struct SequenceChunk<'a> {
    /// Token ids to compute, at least one.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]` in the sequence; the KV of every earlier position is in `blocks` already.
    pub start: u32,
    /// The sequence's blocks in order; they must hold `start + tokens.len()` tokens.
    pub blocks: &'a [BlockId],
    /// Whether the logits after the last token are wanted.
    pub logits: bool,
}

/// Logits of the chunks that asked for them, in batch order.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    values: &'a [f32],
    vocabulary: usize,
}

impl<'a> Logits<'a> {
    /// `values` is row-major, `[rows][vocabulary]`.
    pub fn new(values: &'a [f32], vocabulary: usize) -> Self {
        debug_assert_eq!(values.len() % vocabulary, 0);
        Self { values, vocabulary }
    }

    pub fn rows(&self) -> impl ExactSizeIterator<Item = &'a [f32]> {
        self.values.chunks_exact(self.vocabulary)
    }
}

/// A model loaded on a device, with its KV pool.
///
/// Results are batch invariant: a sequence's logits are bit for bit the same whatever else is in the batch and however
/// its prompt was chunked. That is what makes output with prefill and decode apart equal to output on one instance.
pub trait Executor: Send {
    fn shape(&self) -> &ModelShape;

    /// The pool whose blocks `forward` reads and appends to.
    fn kv_pool(&self) -> &Arc<KvPool>;

    /// Most tokens one call may carry over all chunks.
    fn max_batch_tokens(&self) -> usize;

    /// Computes one batch: appends K and V of every chunk's tokens to the pool and returns the logits asked for.
    ///
    /// Values of a row may be no finite numbers: then that sequence cannot go on, while the others' rows are what they
    /// would be without it. Whoever chooses tokens looks at every value anyway and is to check.
    ///
    /// `on_layer(l)` is called once layer `l`'s K and V of all chunks are in the pool; the caller may then let them be
    /// read by others. It must return quickly.
    fn forward(
        &mut self,
        batch: &[SequenceChunk<'_>],
        on_layer: &mut dyn FnMut(u32),
    ) -> Result<Logits<'_>, RuntimeError>;

    /// Copies blocks of the pool, in every layer, each pair (from, to) after the one before it. Done when it returns.
    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), RuntimeError>;
}
