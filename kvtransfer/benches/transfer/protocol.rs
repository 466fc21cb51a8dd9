//! What the measuring process and its two peers say to each other: a line of JSON each.

use baton_kvtransfer::TransportKind;
use baton_proto::TransferId;
use serde::{Deserialize, Serialize};

/// How both nodes of a pair are set up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) name: String,
    /// A [`TransportKind`] by name: the only one that the node has, so that no other can be measured instead.
    pub(crate) transport: String,
    pub(crate) layers: u32,
    pub(crate) blocks: u32,
    pub(crate) slice_bytes: u64,
}

impl Setup {
    pub(crate) fn new(transport: TransportKind, layers: u32, blocks: u32, slice_bytes: u64) -> Self {
        Self { name: String::new(), transport: transport.name().into(), layers, blocks, slice_bytes }
    }

    pub(crate) fn pool_bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.blocks) * self.slice_bytes
    }
}

/// A transfer of consecutive blocks, the same on both sides.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Item {
    id: [u8; TransferId::LEN],
    pub(crate) first_block: u32,
    pub(crate) blocks: u32,
}

impl Item {
    pub(crate) fn new(first_block: u32, blocks: u32) -> Self {
        Self { id: *TransferId::generate().as_bytes(), first_block, blocks }
    }

    pub(crate) fn id(&self) -> TransferId {
        TransferId::from_bytes(self.id)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Order {
    /// `Expecting` answers once the first, or all of them `together`, are expected; then `Done`.
    Receive {
        items: Vec<Item>,
        together: bool,
    },
    /// All layers are ready at once. `Done` answers.
    Send {
        items: Vec<Item>,
        together: bool,
        to: String,
    },
    /// `Expecting`; `Landed` once all layers but the last are there; `Done`.
    ReceiveLate {
        item: Item,
    },
    /// Sends all layers but the last; that one, and the seal, upon `Seal`. `Done` answers.
    SendLate {
        item: Item,
        to: String,
    },
    Seal,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The node is up; its `Handoff` service listens there.
    Serving {
        address: String,
    },
    Expecting,
    Landed,
    Done {
        spans: Vec<Span>,
    },
    Failed {
        why: String,
    },
}

/// When a transfer began and ended on one side, by the machine's clock, in nanoseconds. The sender's begins with the
/// offer, or with the seal of `SendLate`, and ends when it may have its blocks back; the receiver's ends when it is sealed.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Span {
    pub(crate) from_ns: u64,
    pub(crate) to_ns: u64,
}
