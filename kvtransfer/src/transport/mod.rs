//! How slices travel: one small trait for every kind of transport, and the seams it sees of the transfers.
//!
//! A transport moves runs of slices and reports on each run exactly once; it decides nothing about a transfer. Fencing:
//! a transfer that is aborted cancels `revoked`, upon which the transport lets go of its blocks (within
//! `Limits::fence_grace`) and reports the runs it had; the session is over when all have been reported.

mod outbox;
#[cfg(all(feature = "rdma", target_os = "linux", target_pointer_width = "64"))]
#[cfg_attr(not(test), expect(dead_code, unused_imports, reason = "no transport reads a peer's region yet"))]
mod rdma;
#[cfg_attr(not(test), expect(dead_code, reason = "no transport reads a peer's region yet"))]
#[cfg_attr(test, allow(dead_code, reason = "without RDMA nothing implements it"))]
mod remote;
mod tcp;

use std::{
    fmt,
    io::{IoSlice, IoSliceMut},
    sync::{Arc, atomic::AtomicBool},
};

use baton_proto::TransferId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use outbox::{Outbox, Ticket};
pub(crate) use tcp::Tcp;

use crate::{
    TransferError,
    session::{Claim, SliceRun},
};

/// Shown by every frame of a transfer, given to the sender with `Accept`. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct DataKey([u8; 16]);

impl DataKey {
    pub(crate) fn generate() -> Self {
        Self(rand::random())
    }

    pub(crate) fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

/// One way for slices to travel between two nodes.
pub(crate) trait Transport: Send + Sync + 'static {
    /// Its name on the wire, e.g. `tcp`.
    fn kind(&self) -> &'static str;

    /// Where peers' senders reach this node.
    fn address(&self) -> String;

    /// Takes slices in for the transfers of `inbox` until `stop`.
    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken);

    /// Sends what comes out of `outbox` to the node at `address` until `stop`.
    fn send(&self, address: String, outbox: Arc<Outbox>, tasks: &TaskTracker, stop: CancellationToken);
}

/// The transfers that a node is receiving, as a transport sees them.
pub(crate) trait Inbox: Send + Sync + 'static {
    fn find(&self, id: &TransferId) -> Found;
}

/// What a transfer id in a frame stands for.
pub(crate) enum Found {
    Live(Arc<dyn Landing>),
    /// It was received or aborted a while ago: late frames are passed over.
    Ended,
    Unknown,
}

/// A transfer being received.
pub(crate) trait Landing: Send + Sync {
    fn data_key(&self) -> &DataKey;

    /// Asks to write these slices. After `Claim::Write` the run is reported with one of the next three.
    fn claim(&self, run: SliceRun, crcs: &[u32]) -> Claim;
    fn landed(&self, run: SliceRun);
    fn damaged(&self, run: SliceRun, block: u32);
    fn interrupted(&self, run: SliceRun, why: &str);

    /// Where a claimed slice goes, from byte `skip` on. `block` is an index into the transfer's block list.
    fn target(&self, layer: u32, block: u32, skip: usize) -> Result<IoSliceMut<'_>, TransferError>;
    /// CRC32C of a claimed slice as it now is in memory.
    fn crc(&self, layer: u32, block: u32) -> Result<u32, TransferError>;

    /// Cancelled when the transfer is over and its blocks must be let go of.
    fn revoked(&self) -> &CancellationToken;
}

/// A transfer being sent.
pub(crate) trait Departure: Send + Sync + 'static {
    fn id(&self) -> TransferId;
    /// Known once accepted, before any run can be taken.
    fn data_key(&self) -> Option<DataKey>;

    /// The next run of at most `most` slices, to be reported with `sent` or `failed`.
    fn take(&self, most: u32) -> Option<SliceRun>;
    /// Whether there is more to take.
    fn has_runs(&self) -> bool;
    fn sent(&self, run: SliceRun, crcs: &[u32]);
    fn failed(&self, run: SliceRun, why: &str);
    /// A connection that had carried some of this transfer's slices broke.
    fn path_lost(&self, why: &str);
    /// Neither released nor aborted.
    fn live(&self) -> bool;
    /// The outbox's mark: it is in line.
    fn queued(&self) -> &AtomicBool;

    /// A taken slice as part of a vectored write, from byte `skip` on.
    fn source(&self, layer: u32, block: u32, skip: usize) -> Result<IoSlice<'_>, TransferError>;
    fn crc(&self, layer: u32, block: u32) -> Result<u32, TransferError>;

    /// Cancelled when the transfer is over and its blocks must be let go of.
    fn revoked(&self) -> &CancellationToken;
}
