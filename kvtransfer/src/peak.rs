//! The most there ever was of something that is bounded: what shows that the bound holds.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// The largest number seen.
#[derive(Debug, Default)]
pub(crate) struct Peak(AtomicU64);

impl Peak {
    pub(crate) fn saw(&self, number: u64) {
        self.0.fetch_max(number, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How much there is, and the most there was.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    now: AtomicU64,
    peak: Peak,
}

impl Gauge {
    /// So much more, until what this returns is dropped.
    pub(crate) fn hold(self: &Arc<Self>, amount: u64) -> Held {
        self.peak.saw(self.now.fetch_add(amount, Relaxed) + amount);
        Held { gauge: self.clone(), amount }
    }

    pub(crate) fn peak(&self) -> u64 {
        self.peak.get()
    }
}

/// A part of what a gauge shows.
#[derive(Debug)]
pub(crate) struct Held {
    gauge: Arc<Gauge>,
    amount: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gauge.now.fetch_sub(self.amount, Relaxed);
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_of_what_was_held_at_the_same_moment() {
        let gauge = Arc::new(Gauge::default());
        let first = gauge.hold(3);
        drop(gauge.hold(4));
        assert_eq!(gauge.peak(), 7);
        drop(first);
        let _later = gauge.hold(5);
        assert_eq!((gauge.peak(), gauge.now.load(Relaxed)), (7, 5));
    }
}
