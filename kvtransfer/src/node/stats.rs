//! Counters of a node, for the server's metrics.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use baton_proto::ErrorCode;
use parking_lot::Mutex;

use super::transfer::Direction;
use crate::{peak::Peak, transport::TransportStats};

/// What a node has done since it started, and what it is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStats {
    /// Transfers expected or being received.
    pub incoming_active: u64,
    /// Transfers being sent, waiting ones included.
    pub outgoing_active: u64,
    /// Offers that nobody has expected yet.
    pub held_offers: u64,
    /// Transfers that a receiver has accepted, since the start.
    pub outgoing_accepted: u64,
    pub incoming_completed: u64,
    pub outgoing_completed: u64,
    /// How many transfers were aborted, by direction and the code of the reason. Codes never met are left out.
    pub aborted: Vec<(Direction, ErrorCode, u64)>,
    /// Slices that came in, by any transport; so the next three.
    pub slices_received: u64,
    pub bytes_received: u64,
    pub slices_sent: u64,
    pub bytes_sent: u64,
    /// Most transfers that were in line for the data path to one peer at a time; each is there once, so no more than
    /// [`Limits::outgoing_transfers`](super::Limits::outgoing_transfers).
    pub outbox_peak: u64,
    /// Most messages that waited on one control stream at a time, either way. A stream whose queue is full is given up.
    pub control_queue_peak: u64,
    /// Most bytes of staging memory at a time; see [`Limits::staging_bytes`](super::Limits::staging_bytes).
    pub staging_bytes_peak: u64,
    /// One for each kind that the node has, the best first.
    pub by_transport: Vec<TransportStats>,
}

/// Sorts by direction, then by the code's name.
type AbortKey = (bool, &'static str);

/// What a node is doing now.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Active {
    pub(super) incoming: u64,
    pub(super) outgoing: u64,
    pub(super) held_offers: u64,
}

/// Where the counts are kept.
#[derive(Debug, Default)]
pub(super) struct Counters {
    outgoing_accepted: AtomicU64,
    incoming_completed: AtomicU64,
    outgoing_completed: AtomicU64,
    aborted: Mutex<BTreeMap<AbortKey, (Direction, ErrorCode, u64)>>,
    /// Transfers in an outbox, and messages in the queue of a control stream.
    pub(super) outbox: Arc<Peak>,
    pub(super) control_queue: Arc<Peak>,
}

impl Counters {
    pub(super) fn outgoing_accepted(&self) {
        self.outgoing_accepted.fetch_add(1, Relaxed);
    }

    pub(super) fn incoming_completed(&self) {
        self.incoming_completed.fetch_add(1, Relaxed);
    }

    pub(super) fn outgoing_completed(&self) {
        self.outgoing_completed.fetch_add(1, Relaxed);
    }

    pub(super) fn aborted(&self, direction: Direction, code: ErrorCode) {
        let key = (direction == Direction::Outgoing, code.name());
        self.aborted.lock().entry(key).or_insert((direction, code, 0)).2 += 1;
    }

    pub(super) fn snapshot(
        &self,
        active: Active,
        staging_bytes_peak: u64,
        by_transport: Vec<TransportStats>,
    ) -> NodeStats {
        let sum = |of: fn(&TransportStats) -> u64| by_transport.iter().map(of).sum();
        NodeStats {
            incoming_active: active.incoming,
            outgoing_active: active.outgoing,
            held_offers: active.held_offers,
            outgoing_accepted: self.outgoing_accepted.load(Relaxed),
            incoming_completed: self.incoming_completed.load(Relaxed),
            outgoing_completed: self.outgoing_completed.load(Relaxed),
            aborted: self.aborted.lock().values().copied().collect(),
            slices_received: sum(|one| one.slices_received),
            bytes_received: sum(|one| one.bytes_received),
            slices_sent: sum(|one| one.slices_sent),
            bytes_sent: sum(|one| one.bytes_sent),
            outbox_peak: self.outbox.get(),
            control_queue_peak: self.control_queue.get(),
            staging_bytes_peak,
            by_transport,
        }
    }
}
