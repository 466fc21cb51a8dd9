//! A transport with its counts: how many slices went over it each way, how often it failed.

use std::{
    io::IoSliceMut,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use baton_proto::TransferId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Admission, DataKey, Destination, Found, Inbox, Landing, LinkId, Opening, Outbox, Transport, TransportKind,
};
use crate::{
    TransferError,
    session::{Claim, SliceRun},
};

/// What went over one kind of transport since the node started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportStats {
    pub kind: TransportKind,
    pub slices_received: u64,
    pub bytes_received: u64,
    pub slices_sent: u64,
    pub bytes_sent: u64,
    /// Slices that arrived other than they were sent; each ended its transfer.
    pub damaged: u64,
    /// Runs of slices that were not sent, or did not arrive wholly.
    pub interrupted: u64,
    /// Data paths opened to peers.
    pub opened: u64,
    /// Attempts to open one that failed.
    pub failed: u64,
}

/// Where the counts are kept.
#[derive(Debug)]
pub(crate) struct Counts {
    kind: TransportKind,
    /// Of this node's slices.
    slice_bytes: u64,
    received: AtomicU64,
    bytes_received: AtomicU64,
    sent: AtomicU64,
    damaged: AtomicU64,
    interrupted: AtomicU64,
    opened: AtomicU64,
    failed: AtomicU64,
}

impl Counts {
    /// A ticket's run is on its way.
    pub(super) fn sent(&self, run: SliceRun) {
        self.sent.fetch_add(run.count.into(), Relaxed);
    }

    /// A ticket's run was not sent.
    pub(super) fn not_sent(&self) {
        self.interrupted.fetch_add(1, Relaxed);
    }
}

/// See the module.
pub(crate) struct Observed {
    transport: Box<dyn Transport>,
    counts: Arc<Counts>,
}

impl Observed {
    pub(crate) fn new(transport: Box<dyn Transport>, slice_bytes: u64) -> Self {
        let zero = || AtomicU64::new(0);
        let counts = Counts {
            kind: transport.kind(),
            slice_bytes,
            received: zero(),
            bytes_received: zero(),
            sent: zero(),
            damaged: zero(),
            interrupted: zero(),
            opened: zero(),
            failed: zero(),
        };
        Self { transport, counts: Arc::new(counts) }
    }

    pub(crate) fn stats(&self) -> TransportStats {
        let counts = &self.counts;
        let (received, sent) = (counts.received.load(Relaxed), counts.sent.load(Relaxed));
        TransportStats {
            kind: counts.kind,
            slices_received: received,
            bytes_received: counts.bytes_received.load(Relaxed),
            slices_sent: sent,
            bytes_sent: sent * counts.slice_bytes,
            damaged: counts.damaged.load(Relaxed),
            interrupted: counts.interrupted.load(Relaxed),
            opened: counts.opened.load(Relaxed),
            failed: counts.failed.load(Relaxed),
        }
    }
}

impl Transport for Observed {
    fn kind(&self) -> TransportKind {
        self.transport.kind()
    }

    fn address(&self) -> String {
        self.transport.address()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken) {
        self.transport.receive(Arc::new(Counted { inner: inbox, counts: self.counts.clone() }), tasks, stop);
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let opening = self.transport.open(to, outbox.counted_by(self.counts.clone()), tasks, stop);
        let counts = self.counts.clone();
        Box::pin(async move {
            let opened = opening.await;
            let count = if opened.is_ok() { &counts.opened } else { &counts.failed };
            count.fetch_add(1, Relaxed);
            opened
        })
    }
}

/// An inbox, or a transfer out of it, with the transport's counts.
struct Counted<T: ?Sized> {
    counts: Arc<Counts>,
    inner: Arc<T>,
}

impl Inbox for Counted<dyn Inbox> {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        self.inner.link(id)
    }

    fn find(&self, id: &TransferId) -> Found {
        match self.inner.find(id) {
            Found::Live(inner) => Found::Live(Arc::new(Counted { inner, counts: self.counts.clone() })),
            Found::Over => Found::Over,
        }
    }
}

impl Landing for Counted<dyn Landing> {
    fn data_key(&self) -> &DataKey {
        self.inner.data_key()
    }

    fn slice_bytes(&self) -> u64 {
        self.inner.slice_bytes()
    }

    fn claim(&self, run: SliceRun, sums: &[u32]) -> Claim {
        self.inner.claim(run, sums)
    }

    fn arrived(&self, layer: u32, block: u32) -> Result<(), TransferError> {
        self.inner.arrived(layer, block)
    }

    fn landed(&self, run: SliceRun) {
        self.counts.received.fetch_add(run.count.into(), Relaxed);
        self.counts.bytes_received.fetch_add(u64::from(run.count) * self.inner.slice_bytes(), Relaxed);
        self.inner.landed(run);
    }

    fn damaged(&self, run: SliceRun, block: u32) {
        self.counts.damaged.fetch_add(1, Relaxed);
        self.inner.damaged(run, block);
    }

    fn interrupted(&self, run: SliceRun, why: &str) {
        self.counts.interrupted.fetch_add(1, Relaxed);
        self.inner.interrupted(run, why);
    }

    fn target(&self, layer: u32, block: u32, skip: usize) -> Result<IoSliceMut<'_>, TransferError> {
        self.inner.target(layer, block, skip)
    }

    fn place(&self, layer: u32, block: u32) -> Result<NonNull<u8>, TransferError> {
        self.inner.place(layer, block)
    }

    fn content(&self, layer: u32, block: u32, skip: usize) -> Result<&[u8], TransferError> {
        self.inner.content(layer, block, skip)
    }

    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError> {
        self.inner.copy_out(layer, block, from, into)
    }

    fn revoked(&self) -> &CancellationToken {
        self.inner.revoked()
    }
}
