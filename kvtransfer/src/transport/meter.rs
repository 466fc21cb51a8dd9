//! How many slices went over one kind of transport each way, how often it failed, and a trace of each run. Told where runs
//! are reported, each once ([`super::Ticket`], [`super::Claimed`]), and by [`super::Observed`].
//!
//! Traces are events of level `TRACE`, in the span of the transfer that the run is of: what went when, over what, how
//! long that took. They cost nothing while nobody asks for them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use tracing::Span;

use super::TransportKind;
use crate::{
    peak::{Gauge, Held},
    session::SliceRun,
};

/// What went over one kind of transport since the node started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportStats {
    pub kind: TransportKind,
    pub slices_received: u64,
    pub bytes_received: u64,
    pub slices_sent: u64,
    pub bytes_sent: u64,
    /// Most bytes of slices at a time that were claimed by a connection and not in place yet; so the next one for those that
    /// were taken to be sent and not reported yet. What bounds them is each connection's credit: one frame
    /// ([`Limits::frame_bytes`](crate::Limits::frame_bytes)) over TCP, and over the others four announced and one
    /// fetched.
    pub receiving_bytes_peak: u64,
    pub sending_bytes_peak: u64,
    /// Slices that arrived other than they were sent; each ended its transfer.
    pub damaged: u64,
    /// Runs of slices that were not sent, or did not arrive wholly.
    pub interrupted: u64,
    /// Data paths opened to peers.
    pub opened: u64,
    /// Attempts to open one that failed.
    pub failed: u64,
}

/// What is kept of one kind of transport.
#[derive(Debug)]
pub(super) struct Meter {
    kind: TransportKind,
    /// Of this node's slices.
    slice_bytes: u64,
    received: AtomicU64,
    bytes_received: AtomicU64,
    receiving: Arc<Gauge>,
    sending: Arc<Gauge>,
    sent: AtomicU64,
    damaged: AtomicU64,
    interrupted: AtomicU64,
    opened: AtomicU64,
    failed: AtomicU64,
}

impl Meter {
    pub(super) fn new(kind: TransportKind, slice_bytes: u64) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            kind,
            slice_bytes,
            received: zero(),
            bytes_received: zero(),
            receiving: Arc::default(),
            sending: Arc::default(),
            sent: zero(),
            damaged: zero(),
            interrupted: zero(),
            opened: zero(),
            failed: zero(),
        }
    }

    /// A run is taken to be sent; until this is dropped.
    pub(super) fn sending(&self, run: SliceRun) -> Held {
        self.sending.hold(u64::from(run.count) * self.slice_bytes)
    }

    /// A run is claimed, in slices of the sender's; until this is dropped.
    pub(super) fn receiving(&self, run: SliceRun, slice_bytes: u64) -> Held {
        self.receiving.hold(u64::from(run.count) * slice_bytes)
    }

    /// A run that was taken at `since` is on its way.
    pub(super) fn sent(&self, transfer: &Span, run: SliceRun, since: Instant) {
        self.sent.fetch_add(run.count.into(), Relaxed);
        self.trace(transfer, run, since, "slices sent");
    }

    /// A run that was claimed at `since` is in place, in slices of the sender's.
    pub(super) fn received(&self, transfer: &Span, run: SliceRun, slice_bytes: u64, since: Instant) {
        self.received.fetch_add(run.count.into(), Relaxed);
        self.bytes_received.fetch_add(u64::from(run.count) * slice_bytes, Relaxed);
        self.trace(transfer, run, since, "slices received");
    }

    /// A slice of a run arrived other than it was sent.
    pub(super) fn damaged(&self, transfer: &Span, run: SliceRun, since: Instant) {
        self.damaged.fetch_add(1, Relaxed);
        self.trace(transfer, run, since, "slices damaged");
    }

    /// A run was not sent, or did not arrive wholly.
    pub(super) fn interrupted(&self, transfer: &Span, run: SliceRun, since: Instant) {
        self.interrupted.fetch_add(1, Relaxed);
        self.trace(transfer, run, since, "slices interrupted");
    }

    fn trace(&self, transfer: &Span, run: SliceRun, since: Instant, what: &str) {
        if tracing::enabled!(tracing::Level::TRACE) {
            let (transport, micros) = (self.kind.name(), since.elapsed().as_micros() as u64);
            let SliceRun { layer, first, count } = run;
            transfer.in_scope(|| tracing::trace!(transport, layer, first, count, micros, "{what}"));
        }
    }

    /// An attempt to open a data path, and whether it succeeded.
    pub(super) fn tried(&self, opened: bool) {
        let count = if opened { &self.opened } else { &self.failed };
        count.fetch_add(1, Relaxed);
    }

    pub(super) fn stats(&self) -> TransportStats {
        let (received, sent) = (self.received.load(Relaxed), self.sent.load(Relaxed));
        TransportStats {
            kind: self.kind,
            slices_received: received,
            bytes_received: self.bytes_received.load(Relaxed),
            slices_sent: sent,
            bytes_sent: sent * self.slice_bytes,
            receiving_bytes_peak: self.receiving.peak(),
            sending_bytes_peak: self.sending.peak(),
            damaged: self.damaged.load(Relaxed),
            interrupted: self.interrupted.load(Relaxed),
            opened: self.opened.load(Relaxed),
            failed: self.failed.load(Relaxed),
        }
    }
}
