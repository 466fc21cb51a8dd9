//! Reshard planner: which bytes of which slices go where, when two instances keep the same KV cache in different ways.
//!
//! The two sides may differ in the number of ranks that share the heads, in tokens per block, in the arrangement within a
//! slice, and in the type of values (bf16 and int8). The planner is pure: it is told of both caches as data
//! ([`ShardedLayout`]) and says what to do ([`Descriptor`]); a session decides when, and over which transport. Called
//! once for each pair of instances, and then for each transfer to lay the plan out over its blocks.
//!
//! Nodes carry plans out from one rank to one rank, slice by slice as they come (`node::translate`); TP m to n is planned
//! here and left to whoever has all ranks' transfers in hand.
//!
//! # How a plan is made
//! - `sharded`: which ranks hold which heads, and which differences can be mapped at all.
//! - `shares`: who sends what to whom.
//! - `blocks`: how blocks of both sizes line up.
//! - `slice_map`, `strided`: where every value lies within a slice.
//! - `nest`: the copies between two slices, as nested loops, then as runs of bytes.
//! - `convert`: the arithmetic between bf16 and int8.
//! - `pair`: templates, and their descriptors for a sequence.
//! - `apply`: descriptors carried out on plain bytes.
//! - `known`: what a node says of its cache ([`KvLayout`](crate::KvLayout)), as a description that can be planned with.
//!
//! # Promises
//! - Every value and scale of every token that the target is to hold is written exactly once, and nothing outside the
//!   slices of the transfer's blocks.
//! - Copies of one slice are merged as far as bytes are contiguous; two caches that are kept alike move slice by slice.
//! - Ranks that hold the same heads send equally much, to within a layer.
//! - A plan's size depends on the slice's arrangement, not on tokens; listing descriptors takes time in proportion to
//!   how many there are.
//!
//! Arrangements that keep different coordinates next to each other (CPU panels and `[token][head][dim]`) leave runs of
//! one value. Such a plan is right but not one to send over a network piece by piece: slices travel as the sender keeps
//! them, and the receiver carries the plan out when they have come.
//!
//! # Example
//! Four ranks prefill with 16 tokens in a block, two decode with 32.
//! ```
//! use baton_kvtransfer::plan::{
//!     Action, Content, KvDtype, ReshardPlan, ShardedLayout, SliceMap, SliceShape, heads_per_rank,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layout = |tensor_parallel, block_tokens| -> Result<_, baton_kvtransfer::TransferError> {
//!     let (content, dtype) = (Content::KeysAndValues { head_dim: 128 }, KvDtype::Bf16);
//!     let heads = heads_per_rank(8, tensor_parallel)?;
//!     let slice = SliceMap::token_major(&SliceShape { content, dtype, heads, block_tokens });
//!     let model_revision = "0123abcd".to_owned();
//!     Ok(ShardedLayout { model_revision, content, dtype, layers: 30, kv_heads: 8, block_tokens, tensor_parallel, slice })
//! };
//! let plan = ReshardPlan::between(&layout(4, 16)?, &layout(2, 32)?)?;
//!
//! // The second rank takes the heads it needs from the two ranks that have them.
//! let senders: Vec<_> = plan.for_receiver(1).map(|pair| (pair.sender(), pair.heads())).collect();
//! assert_eq!(senders, [(2, 4..6), (3, 6..8)]);
//!
//! // Layer 5 of the second source block has been computed: its 16 tokens are the upper half of the first target block.
//! let pair = plan.for_receiver(1).next().ok_or("a sender")?;
//! let expansion = pair.expand();
//! let copies: Vec<_> = expansion.of_blocks(5, 1..2, 100).collect();
//! assert_eq!(copies.len(), 2 * 16); // a key and a value of each token, of two heads next to each other
//! assert_eq!((copies[0].layer, copies[0].source_block, copies[0].target_block), (5, 1, 0));
//! let first = Action::Copy { source_offset: 0, target_offset: 16 * 4 * 128 * 2, bytes: 2 * 128 * 2 };
//! assert_eq!(copies[0].action, first);
//! # Ok(()) }
//! ```

mod apply;
mod blocks;
mod convert;
mod known;
mod nest;
mod pair;
mod sharded;
mod shares;
mod slice_map;
mod strided;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use apply::PoolBytes;
pub use convert::{dequantise, quantise};
pub use pair::{Action, Descriptor, Expansion, PairPlan, VectorRun};
pub use sharded::{ShardedLayout, heads_per_rank};
pub use slice_map::{Content, KvDtype, PartMap, SliceMap, SliceShape};
pub use strided::{Axis, Coordinate, Strided};

use self::{pair::Template, shares::Share};
use crate::TransferError;

/// How one instance's KV cache becomes another's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReshardPlan {
    /// By receiver.
    pairs: Vec<PairPlan>,
}

impl ReshardPlan {
    /// Plans for every rank of `target`.
    ///
    /// # Errors
    /// [`TransferError::Invalid`] if a description does not hold together; [`TransferError::CannotReshard`], with the
    /// field, if the one cache cannot be mapped to the other.
    pub fn between(source: &ShardedLayout, target: &ShardedLayout) -> Result<Self, TransferError> {
        source.validate()?;
        target.validate()?;
        source.can_become(target)?;
        let mut templates: Vec<((u32, u32, u32), Arc<Template>)> = Vec::new();
        let mut plan = |share: Share| {
            let key = (share.places.0, share.places.1, share.heads.end - share.heads.start);
            let template = match templates.iter().find(|(of, _)| *of == key) {
                Some((_, template)) => Arc::clone(template),
                None => {
                    let template = Arc::new(Template::of(source, target, &share)?);
                    templates.push((key, Arc::clone(&template)));
                    template
                }
            };
            Ok(PairPlan::new(share, template))
        };
        let shares = shares::shares(source.ranks(), target.ranks(), source.layers);
        Ok(Self { pairs: shares.into_iter().map(&mut plan).collect::<Result<_, TransferError>>()? })
    }

    /// All pairs of ranks that have something to move, by receiver.
    pub fn pairs(&self) -> &[PairPlan] {
        &self.pairs
    }

    /// Pairs that a receiving rank takes part in: whom it takes from, and what.
    pub fn for_receiver(&self, receiver: u32) -> impl Iterator<Item = &PairPlan> {
        self.pairs.iter().filter(move |pair| pair.receiver() == receiver)
    }

    /// Pairs that a sending rank takes part in.
    pub fn for_sender(&self, sender: u32) -> impl Iterator<Item = &PairPlan> {
        self.pairs.iter().filter(move |pair| pair.sender() == sender)
    }
}
