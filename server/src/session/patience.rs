//! How long the session waits for a controller. Follows from the lease: a leader that is silent has to be noticed, and its
//! successor found, before that ends this instance's registration.

use std::time::Duration;

/// Assumed until a controller tells its own: the default of `sessions.lease`. A shorter one cannot end sooner than
/// this notices the first controller's silence, as its successor does not lead before `leader.ttl`, 2 s at least.
const ASSUMED: Duration = Duration::from_secs(6);

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    lease: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { lease: ASSUMED }
    }
}

impl Patience {
    /// Under the lease that a controller told; 0 = it told none.
    pub(super) fn under(self, lease: Duration) -> Self {
        if lease.is_zero() { self } else { Self { lease } }
    }

    /// A ping is sent after so much silence, and its answer is awaited for as long.
    pub(super) fn keep_alive(self) -> Duration {
        (self.lease / 6).clamp(Duration::from_millis(50), Duration::from_secs(5))
    }

    /// For a call to be answered, and for a report to find room in the queue.
    pub(super) fn answer(self) -> Duration {
        (self.lease / 3).clamp(Duration::from_millis(250), Duration::from_secs(5))
    }

    pub(super) fn longest_pause(self) -> Duration {
        (self.lease / 6).clamp(Duration::from_millis(100), Duration::from_secs(3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_noticed_and_a_call_goes_unanswered_within_the_lease() {
        for millis in [700, 1_000, 6_000, 15_000, 60_000, 3_600_000] {
            let lease = Duration::from_millis(millis);
            let patience = Patience::default().under(lease);
            let whole = patience.keep_alive() * 2 + patience.answer() + patience.longest_pause();
            assert!(whole < lease, "{whole:?} of {lease:?}");
        }
        assert_eq!(Patience::default().under(Duration::ZERO).lease, ASSUMED);
    }
}
