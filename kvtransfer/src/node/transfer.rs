//! What a node is asked to transfer, and what it says of a transfer that is over.

use std::time::{Duration, Instant};

use baton_proto::{Incarnation, InstanceId, PromptDigest, TransferId};

use crate::FirstTokens;

/// A transfer that this node is to receive.
#[derive(Debug, Clone)]
pub struct ExpectSpec {
    pub id: TransferId,
    /// Who may send it.
    pub sender: InstanceId,
    /// Which start of the sender; `None` = any.
    pub sender_incarnation: Option<Incarnation>,
    pub prompt_tokens: u32,
    /// Of the prompt whose cache is to come, and of whose cache the held blocks are. An offer of another is refused.
    pub prompt_digest: PromptDigest,
    /// Where the prompt's blocks go, in order: `layout.blocks_for(prompt_tokens)` pool indices, lent until they come
    /// back or the transfer is sealed.
    pub blocks: Vec<u32>,
    /// Indices into `blocks` of those already filled; the sender leaves them out.
    pub held: Vec<u32>,
    /// The transfer must be sealed by then.
    pub deadline: Instant,
}

/// A transfer that this node is to send.
#[derive(Debug, Clone)]
pub struct OfferSpec {
    pub id: TransferId,
    /// `host:port` of the receiver's `Handoff` service.
    pub peer: String,
    pub receiver: InstanceId,
    /// Which start of the receiver; `None` = any.
    pub receiver_incarnation: Option<Incarnation>,
    pub prompt_tokens: u32,
    /// Of the prompt whose cache this is.
    pub prompt_digest: PromptDigest,
    /// The prompt's blocks in order: `layout.blocks_for(prompt_tokens)` pool indices, lent until they come back. Other
    /// transfers may read them at the same time.
    pub blocks: Vec<u32>,
    /// Among the transfers to one peer: slices of a lower one go first, while the others get every eighth frame.
    pub priority: i32,
    /// The receiver must have released the transfer by then.
    pub deadline: Instant,
}

/// Which way a transfer goes, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    Incoming,
    Outgoing,
}

/// Blocks that are their owner's again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reclaimed {
    pub id: TransferId,
    pub direction: Direction,
    pub blocks: Vec<u32>,
}

/// A received transfer: every slice is in its block and matches its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Of every choice, sampled by the sender.
    pub first_tokens: FirstTokens,
    /// (layer, block) pairs that were sent; held ones are not among them.
    pub slices: u64,
    pub bytes: u64,
    /// From accept to seal.
    pub took: Duration,
    /// When its last slice had landed; the seal may have come later.
    pub last_slice_at: Instant,
    /// When it was complete.
    pub at: Instant,
}

/// A sent transfer that its receiver has taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferStats {
    pub slices: u64,
    pub bytes: u64,
    /// From offer to release.
    pub took: Duration,
    /// From the moment that the last slice was ready to release.
    pub ready_to_released: Duration,
}
