//! Counters of a node, for the server's metrics.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use baton_proto::ErrorCode;
use parking_lot::Mutex;

use super::config::Direction;

/// Upper bounds, in microseconds, of the buckets of [`NodeStats::seal_to_released`]; the last bucket has none.
pub const SEAL_BUCKETS_MICROS: [u64; 12] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000, 10_000_000];

/// What a node has done since it started, and what it is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStats {
    /// Transfers expected or being received.
    pub incoming_active: u64,
    /// Transfers being sent, waiting ones included.
    pub outgoing_active: u64,
    /// Offers that nobody has expected yet.
    pub held_offers: u64,
    /// Transfers that both sides have agreed on, since the start.
    pub incoming_accepted: u64,
    pub outgoing_accepted: u64,
    pub incoming_completed: u64,
    pub outgoing_completed: u64,
    /// How many transfers were aborted, by direction and the code of the reason. Codes never met are left out.
    pub aborted: Vec<(Direction, ErrorCode, u64)>,
    pub slices_received: u64,
    pub bytes_received: u64,
    pub slices_sent: u64,
    pub bytes_sent: u64,
    /// Time from seal to release as the sender sees it.
    pub seal_to_released: SealLatency,
}

/// A histogram. `buckets[i]` counts what was at most `SEAL_BUCKETS_MICROS[i]` and over the bound before; the last one
/// counts the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SealLatency {
    pub count: u64,
    pub sum_micros: u64,
    pub buckets: [u64; SEAL_BUCKETS_MICROS.len() + 1],
}

/// Sorts by direction, then by the code's name.
type AbortKey = (bool, &'static str);

/// Where the counts are kept.
#[derive(Debug, Default)]
pub(super) struct Counters {
    incoming_accepted: AtomicU64,
    outgoing_accepted: AtomicU64,
    incoming_completed: AtomicU64,
    outgoing_completed: AtomicU64,
    slices_received: AtomicU64,
    bytes_received: AtomicU64,
    slices_sent: AtomicU64,
    bytes_sent: AtomicU64,
    aborted: Mutex<BTreeMap<AbortKey, (Direction, ErrorCode, u64)>>,
    seal: Mutex<SealLatency>,
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

    pub(super) fn accepted(&self, direction: Direction) {
        let counter = match direction {
            Direction::Incoming => &self.incoming_accepted,
            Direction::Outgoing => &self.outgoing_accepted,
        };
        counter.fetch_add(1, Relaxed);
    }

    pub(super) fn incoming_completed(&self) {
        self.incoming_completed.fetch_add(1, Relaxed);
    }

    pub(super) fn outgoing_completed(&self, seal_to_released: Duration) {
        self.outgoing_completed.fetch_add(1, Relaxed);
        let micros = u64::try_from(seal_to_released.as_micros()).unwrap_or(u64::MAX);
        let bucket = SEAL_BUCKETS_MICROS.partition_point(|&bound| bound < micros);
        let mut seal = self.seal.lock();
        seal.count += 1;
        seal.sum_micros = seal.sum_micros.saturating_add(micros);
        seal.buckets[bucket] += 1;
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
            incoming_accepted: self.incoming_accepted.load(Relaxed),
            outgoing_accepted: self.outgoing_accepted.load(Relaxed),
            incoming_completed: self.incoming_completed.load(Relaxed),
            outgoing_completed: self.outgoing_completed.load(Relaxed),
            aborted: self.aborted.lock().values().copied().collect(),
            slices_received: self.slices_received.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            slices_sent: self.slices_sent.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
            seal_to_released: *self.seal.lock(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_the_bucket_that_bounds_them() {
        let counters = Counters::default();
        for micros in [1, 100, 101, 10_000_000, 10_000_001] {
            counters.outgoing_completed(Duration::from_micros(micros));
        }
        let seal = counters.snapshot(0, 0, 0).seal_to_released;
        assert_eq!((seal.buckets[0], seal.buckets[1], seal.buckets[11], seal.buckets[12]), (2, 1, 1, 1));
        assert_eq!((seal.count, seal.buckets.iter().sum::<u64>()), (5, 5));
    }
}
