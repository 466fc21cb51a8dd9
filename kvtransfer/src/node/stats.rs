//! Counters of a node, for the server's metrics.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use baton_proto::ErrorCode;
use parking_lot::Mutex;

use super::config::Direction;

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
    pub slices_received: u64,
    pub bytes_received: u64,
    pub slices_sent: u64,
    pub bytes_sent: u64,
}

/// Sorts by direction, then by the code's name.
type AbortKey = (bool, &'static str);

/// Where the counts are kept.
#[derive(Debug, Default)]
pub(super) struct Counters {
    outgoing_accepted: AtomicU64,
    incoming_completed: AtomicU64,
    outgoing_completed: AtomicU64,
    slices_received: AtomicU64,
    bytes_received: AtomicU64,
    slices_sent: AtomicU64,
    bytes_sent: AtomicU64,
    aborted: Mutex<BTreeMap<AbortKey, (Direction, ErrorCode, u64)>>,
}

impl Counters {
    pub(super) fn received(&self, slices: u64, slice_bytes: u64) {
        self.slices_received.fetch_add(slices, Relaxed);
        self.bytes_received.fetch_add(slices * slice_bytes, Relaxed);
    }

    pub(super) fn sent(&self, slices: u64, slice_bytes: u64) {
        self.slices_sent.fetch_add(slices, Relaxed);
        self.bytes_sent.fetch_add(slices * slice_bytes, Relaxed);
    }

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

    pub(super) fn snapshot(&self, incoming_active: u64, outgoing_active: u64, held_offers: u64) -> NodeStats {
        NodeStats {
            incoming_active,
            outgoing_active,
            held_offers,
            outgoing_accepted: self.outgoing_accepted.load(Relaxed),
            incoming_completed: self.incoming_completed.load(Relaxed),
            outgoing_completed: self.outgoing_completed.load(Relaxed),
            aborted: self.aborted.lock().values().copied().collect(),
            slices_received: self.slices_received.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            slices_sent: self.slices_sent.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
        }
    }
}
