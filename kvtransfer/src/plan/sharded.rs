//! A model's KV cache over the ranks of one instance, and which pairs of such caches can be mapped.
//!
//! Every rank has a cache of the same shape; what differs is which KV heads it is of. Up to as many ranks as heads, the
//! heads are split evenly; with more, each head is held by several ranks that stand next to each other, as Megatron and
//! vLLM place them. A latent counts as one head and so is on every rank.

use std::ops::Range;

use super::slice_map::{Content, KvDtype, SliceMap, SliceShape};
use crate::TransferError;

/// A KV cache that is spread over the ranks of a tensor-parallel instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardedLayout {
    /// Digest over the model's configuration and weights.
    pub model_revision: String,
    pub content: Content,
    pub dtype: KvDtype,
    pub layers: u32,
    /// Of the whole model; 1 for latents.
    pub kv_heads: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Number of ranks.
    pub tensor_parallel: u32,
    /// The arrangement of a slice on each rank.
    pub slice: SliceMap,
}

/// KV heads that one rank holds, so that slices can be described; refused unless they can be split evenly, or each be
/// held by equally many ranks.
pub fn heads_per_rank(kv_heads: u32, tensor_parallel: u32) -> Result<u32, TransferError> {
    let (heads, ranks) = (kv_heads, tensor_parallel);
    if heads == 0 || ranks == 0 || !(heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads)) {
        return Err(TransferError::Invalid(format!(
            "tensor_parallel {ranks} neither divides kv_heads {heads} nor is a multiple of it"
        )));
    }
    Ok((heads / ranks).max(1))
}

impl ShardedLayout {
    const MAX_LAYERS: u32 = 4096;
    const MAX_RANKS: u32 = 1024;

    /// Checks that the description holds together: heads can be placed on the ranks and a slice has room for all it is
    /// said to hold, each in a place of its own.
    pub fn validate(&self) -> Result<(), TransferError> {
        let bad = |what: &str| Err(TransferError::Invalid(format!("sharded KV layout: {what}")));
        if self.layers == 0 || self.layers > Self::MAX_LAYERS {
            return bad("layers must be 1 to 4096");
        }
        if self.tensor_parallel > Self::MAX_RANKS {
            return bad("tensor_parallel must be 1 to 1024");
        }
        if self.block_tokens == 0 {
            return bad("block_tokens must be at least 1");
        }
        if self.content.dims().contains(&0) {
            return bad("vectors must have at least one element");
        }
        if matches!(self.content, Content::Latents { .. }) && self.kv_heads != 1 {
            return bad("kv_heads must be 1 for latents, which all heads share");
        }
        self.slice.validate(&SliceShape {
            content: self.content,
            dtype: self.dtype,
            heads: heads_per_rank(self.kv_heads, self.tensor_parallel)?,
            block_tokens: self.block_tokens,
        })
    }

    pub(super) fn ranks(&self) -> Ranks {
        Ranks { kv_heads: self.kv_heads.max(1), tensor_parallel: self.tensor_parallel.max(1) }
    }

    /// Refuses a target that this cache cannot be mapped to, with the field that stands against it.
    pub(super) fn can_become(&self, target: &Self) -> Result<(), TransferError> {
        let same = |field, from: String, to: String, why| match from == to {
            true => Ok(()),
            false => Err(TransferError::CannotReshard { field, from, to, why }),
        };
        let (ours, theirs) = (self.model_revision.clone(), target.model_revision.clone());
        same(
            "model_revision",
            ours,
            theirs,
            "keys and values mean something to the model that made them only",
        )?;
        let number = |field, from: u32, to: u32, why| same(field, from.to_string(), to.to_string(), why);
        number("layers", self.layers, target.layers, "both sides must run all layers of the same model")?;
        let kind = |content| match content {
            Content::KeysAndValues { .. } => "keys and values",
            Content::Latents { .. } => "latents",
        };
        let (ours, theirs) = (kind(self.content).to_owned(), kind(target.content).to_owned());
        same(
            "content",
            ours,
            theirs,
            "keys and values cannot be had from latents without the model, nor the reverse",
        )?;
        let names = match self.content {
            Content::KeysAndValues { .. } => ["head_dim", "head_dim"],
            Content::Latents { .. } => ["rank", "rope"],
        };
        for (name, (from, to)) in
            names.into_iter().zip(self.content.dims().into_iter().zip(target.content.dims()))
        {
            number(name, from, to, "vectors keep their length")?;
        }
        number("kv_heads", self.kv_heads, target.kv_heads, "kv_heads is the whole model's, on both sides")?;
        let against = match (self.dtype, target.dtype) {
            (from, to) if from == to => return Ok(()),
            (KvDtype::Bf16, KvDtype::Int8) | (KvDtype::Int8, KvDtype::Bf16) => return Ok(()),
            (KvDtype::F32, _) => "f32 is chosen for exact results, which narrowing would silently give up",
            (_, _) => "values that were rounded before do not become exact by being widened to f32",
        };
        same("dtype", self.dtype.name().to_owned(), target.dtype.name().to_owned(), against)
    }
}

/// Which ranks hold which heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranks {
    kv_heads: u32,
    tensor_parallel: u32,
}

impl Ranks {
    /// Ranks that hold the same heads.
    pub(super) fn replicas(self) -> u32 {
        (self.tensor_parallel / self.kv_heads).max(1)
    }

    /// Sets of ranks that hold the same heads; set `i` has the ranks from `i * replicas` on.
    pub(super) fn groups(self) -> u32 {
        self.tensor_parallel / self.replicas()
    }

    /// The heads of a group.
    pub(super) fn heads(self, group: u32) -> Range<u32> {
        let each = self.kv_heads / self.groups();
        group * each..(group + 1) * each
    }
}
