//! How slices travel: one small trait for every kind of transport, and the seams it sees of the transfers.
//!
//! A transport moves runs of slices and reports on each run exactly once; it decides nothing about a transfer. Bytes are
//! always written by the side whose memory they go to: `tcp` reads them from its connections, the kinds of `fetch` copy
//! them out of the sender's memory once it has announced them. So the receiver's fence is its own: a transfer that is
//! aborted cancels `revoked`, upon which the transport lets go of its blocks and reports the runs it had: within
//! `Limits::fence_grace`, or, where a card or an NPU reads, when that read has ended or failed, within
//! `Limits::data_stall` and what it takes to end its connection for good (`Waits::fence`). The session is over when all
//! have been reported.
//!
//! # Credits
//! What is on its way at a time does not grow with the transfers: each connection has a credit of so many frames
//! (`Limits::frame_bytes` each; one slice at least, however large), and takes a run out of the outbox only when it has one
//! left. A run that nobody has a credit for stays where it is, in its transfer, and its transfer in line once.
//!
//! | | frames of a connection | connections to a peer | the credit is back |
//! |---|---|---|---|
//! | `tcp`, sending | 1 | as configured | when the kernel has the frame's last byte |
//! | `tcp`, receiving | 1 | those of the peer, `DataPortConfig::connections` in all | when it is in place and matches its sums |
//! | `shm` | 4 announced, 1 of them being copied | 2 | when the receiver is done with it (`fetch`) |
//! | `rdma`, `hixl`, `hccl` | 4 announced, 1 of them being read | 1 | as `shm` |
//!
//! Over TCP frames are written from the pool and read into it: what waits besides is the kernel's, at most
//! `Limits::send_buffer` (or `net.ipv4.tcp_wmem`) at one end and `net.ipv4.tcp_rmem` at the other. The receiver reads on only
//! when a frame is in place, so that TCP's own window is the credit that it gives its sender. Slices to be mapped
//! take a frame of `Limits::staging_bytes` first; a connection that finds none waits, and with it its sender. The
//! most there was of each is told: [`TransportStats::sending_bytes_peak`], `receiving_bytes_peak`,
//! `NodeStats::staging_bytes_peak`, `outbox_peak`.

mod accept;
mod ascend;
mod claimed;
mod faulty;
mod fence;
pub(crate) mod fetch;
pub(crate) mod frame;
mod guests;
pub(crate) mod hello;
mod key;
mod meter;
mod observed;
mod outbox;
mod path;
mod port;
mod probe;
#[cfg(all(feature = "rdma", target_os = "linux", target_pointer_width = "64"))]
mod rdma;
mod shm;
mod splitmix;
mod strangers;
mod tcp;
mod waits;

use std::{
    fmt, io,
    io::{IoSlice, IoSliceMut},
    pin::Pin,
    ptr::NonNull,
    sync::Arc,
};

use baton_proto::TransferId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use ascend::AscendConfig;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use ascend::fuzz as fuzz_ascend;
pub(crate) use claimed::{Claimed, Live};
pub use faulty::Faults;
pub(crate) use faulty::Faulty;
pub(crate) use fetch::{Fetched, Medium};
pub(crate) use hello::{LinkId, LinkPass};
pub(crate) use key::DataKey;
pub use meter::TransportStats;
pub(crate) use observed::Observed;
pub(crate) use outbox::{Outbox, Ticket};
pub(crate) use path::{Path, PathEnd};
pub(crate) use port::DataPort;
pub use port::DataPortConfig;
pub use probe::{TransportProbe, probe};
#[cfg(all(feature = "rdma", target_os = "linux", target_pointer_width = "64"))]
pub(crate) use rdma::RdmaMedium;
#[cfg(all(
    any(test, feature = "fuzz"),
    feature = "rdma",
    target_os = "linux",
    target_pointer_width = "64"
))]
pub(crate) use rdma::fuzz as fuzz_rdma;
pub(crate) use shm::Shm;
pub(crate) use strangers::{Stranger, Strangers};
pub(crate) use tcp::Tcp;
pub(crate) use waits::Waits;

use crate::{
    TransferError,
    session::{Claim, SliceRun},
    sync::AtomicBool,
};

/// The ways that slices can travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TransportKind {
    /// Over connections of a network.
    Tcp,
    /// Copied from the memory of a process of the same host.
    Shm,
    /// Read by network cards (RoCE).
    Rdma,
    /// Read by Ascend NPUs (HIXL-CS).
    Hixl,
    /// Exchanged by Ascend NPUs (HCCL), where there is no HIXL.
    Hccl,
}

impl TransportKind {
    /// All of them, the best first.
    pub const ALL: [Self; 5] = [Self::Hixl, Self::Hccl, Self::Shm, Self::Rdma, Self::Tcp];

    /// Its name on the wire and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Shm => "shm",
            Self::Rdma => "rdma",
            Self::Hixl => "hixl",
            Self::Hccl => "hccl",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether it brings slices to a receiver that maps them to its own when they have come: it must be able to bring them
    /// into any memory, not only into the region.
    pub(crate) fn brings(self, mapped: bool) -> bool {
        !mapped || matches!(self, Self::Tcp | Self::Shm)
    }

    fn wire(self) -> u8 {
        self as u8
    }

    fn from_wire(wire: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.wire() == wire)
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What every transport of a node is run with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) slice_bytes: u32,
    /// Most slices in a frame.
    pub(crate) frame_slices: u32,
    pub(crate) waits: Waits,
    /// See [`crate::Limits::send_buffer`].
    pub(crate) send_buffer: Option<usize>,
}

impl Terms {
    /// Slices of this size in a frame of so many bytes; one at least.
    pub(crate) fn frame_slices(frame_bytes: usize, slice_bytes: u32) -> u32 {
        let whole = u32::try_from(frame_bytes / slice_bytes.max(1) as usize).unwrap_or(u32::MAX);
        whole.clamp(1, frame::MAX_FRAME_SLICES)
    }
}

/// Where a peer takes slices in, and what entitles this node to bring them.
#[derive(Debug, Clone)]
pub(crate) struct Destination {
    pub(crate) address: String,
    pub(crate) pass: LinkPass,
}

pub(crate) type Opening = Pin<Box<dyn Future<Output = io::Result<Path>> + Send>>;

/// One way for slices to travel between two nodes.
pub(crate) trait Transport: Send + Sync + 'static {
    fn kind(&self) -> TransportKind;

    /// Where peers' senders reach this node.
    fn address(&self) -> String;

    /// Takes slices in for the transfers of `inbox` until `stop`. To be called once.
    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken);

    /// Connects to a peer; what comes out of `outbox` then goes to it until the path ends or `stop`. After an error
    /// nothing has been taken out: another transport may be tried.
    fn open(&self, to: Destination, outbox: Outbox, tasks: &TaskTracker, stop: &CancellationToken)
    -> Opening;
}

/// The links and transfers by which a node receives, as a transport sees them.
pub(crate) trait Inbox: Send + Sync + 'static {
    /// The control stream that a data connection says it belongs to.
    fn link(&self, id: &LinkId) -> Option<Admission>;
    fn find(&self, id: &TransferId) -> Found;
}

/// A control stream that stands.
pub(crate) struct Admission {
    pub(crate) key: DataKey,
    /// Of the sender's slices.
    pub(crate) slice_bytes: u32,
    /// Its slices are mapped to this side's when they have come: see [`TransportKind::brings`].
    pub(crate) mapped: bool,
    /// Cancelled when it ends, and its data connections with it.
    pub(crate) ended: CancellationToken,
}

/// Resolves once there is room for a run, or never will be.
pub(crate) type Room<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// What a transfer id in a frame stands for.
pub(crate) enum Found {
    Live(Live),
    /// It is over, or was never known: late frames are passed over.
    Over,
}

/// A transfer being received.
pub(crate) trait Landing: Send + Sync {
    fn data_key(&self) -> &DataKey;
    /// Of the sender's slices.
    fn slice_bytes(&self) -> u64;
    /// Where what happens to it is traced.
    fn span(&self) -> &tracing::Span;

    /// Room for this run on its way in, to be waited for before it is claimed; `None` = its blocks are room enough.
    fn room(&self, _run: SliceRun) -> Option<Room<'_>> {
        None
    }
    /// Asks to write these slices, whose checksums are to be `sums`. After `Claim::Write` the run is reported with one
    /// of `landed`, `damaged` and `interrupted`: [`Live::claim`] sees to that.
    fn claim(&self, run: SliceRun, sums: &[u32]) -> Claim;
    /// A slice of a claimed run has come whole and matches its sum; called once for each, before `landed`. After an
    /// error the run is to be reported as interrupted.
    fn arrived(&self, layer: u32, block: u32) -> Result<(), TransferError>;
    fn landed(&self, run: SliceRun);
    fn damaged(&self, run: SliceRun, block: u32);
    fn interrupted(&self, run: SliceRun, why: &str);

    /// Where a claimed slice goes, from byte `skip` on. `block` is an index into the transfer's block list.
    fn target(&self, layer: u32, block: u32, skip: usize) -> Result<IoSliceMut<'_>, TransferError>;
    /// Start of a claimed slice, for those that write it by other means.
    fn place(&self, layer: u32, block: u32) -> Result<NonNull<u8>, TransferError>;
    /// A claimed slice, from byte `skip` on, as it now is in memory that the CPU can read.
    fn content(&self, layer: u32, block: u32, skip: usize) -> Result<&[u8], TransferError>;
    /// A part of a claimed slice, wherever its memory is.
    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError>;

    /// Cancelled when the transfer is over and its blocks must be let go of.
    fn revoked(&self) -> &CancellationToken;
}

/// A transfer being sent.
pub(crate) trait Departure: Send + Sync + 'static {
    fn id(&self) -> TransferId;
    /// Where what happens to it is traced.
    fn span(&self) -> &tracing::Span;
    /// Lower goes first.
    fn priority(&self) -> i32;
    /// Known once accepted, before any run can be taken.
    fn data_key(&self) -> Option<DataKey>;

    /// The next run of at most `most` slices, to be reported with `sent` or `failed`.
    fn take(&self, most: u32) -> Option<SliceRun>;
    /// Whether there is more to take.
    fn has_runs(&self) -> bool;
    fn sent(&self, run: SliceRun, sums: &[u32]);
    fn failed(&self, run: SliceRun, why: &str);
    /// A connection that had carried some of this transfer's slices broke.
    fn path_lost(&self, why: &str);
    /// Neither released nor aborted.
    fn live(&self) -> bool;
    /// The outbox's mark: it is in line.
    fn queued(&self) -> &AtomicBool;

    /// A taken slice as part of a vectored write, from byte `skip` on.
    fn source(&self, layer: u32, block: u32, skip: usize) -> Result<IoSlice<'_>, TransferError>;
    /// Whether copying out waits for a device.
    fn is_on_device(&self) -> bool;
    /// A part of a taken slice, wherever its memory is.
    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError>;
    /// Where a taken slice starts in this node's region, in bytes.
    fn offset(&self, layer: u32, block: u32) -> Result<u64, TransferError>;

    /// Cancelled when the transfer is over and its blocks must be let go of.
    fn revoked(&self) -> &CancellationToken;
}
