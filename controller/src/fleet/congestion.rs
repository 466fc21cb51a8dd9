//! Whether a group has more prompts than it computes in time: raised and cleared with hysteresis. Pure.
//!
//! The *wait* is how long the prompt tokens that are queued at the instances that prefill would keep all of them busy, at
//! the speed that they measured. It is compared with a bound, the group's TTFT target unless one is configured: congestion
//! is raised once the wait has been above the bound for a while without a break, and cleared once it has been below half of
//! it for as long.

use std::{fmt, time::Duration};

use baton_proto::Role;
use tokio::time::Instant;

use super::Member;

/// What is queued in a group, and who computes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backlog {
    /// Prompt tokens that were accepted and are not computed.
    pub tokens: u64,
    /// That prefill.
    pub instances: usize,
    /// Of all of them together.
    pub tokens_per_second: f64,
}

impl Backlog {
    /// None while nobody prefills, or while nothing was measured. Who has yet to measure is taken to be as fast as the
    /// others.
    pub fn of<'a>(group: impl IntoIterator<Item = &'a Member>) -> Option<Self> {
        let prefills =
            |member: &&Member| member.is_serving() && matches!(member.beat.role, Role::Prefill | Role::Mixed);
        let (mut tokens, mut instances, mut measured, mut speed) = (0_u64, 0, 0, 0.0);
        for member in group.into_iter().filter(prefills) {
            let load = &member.beat.load;
            tokens = tokens.saturating_add(load.queued_prefill_tokens);
            instances += 1;
            measured += usize::from(load.prefill_tokens_per_second > 0);
            speed += load.prefill_tokens_per_second as f64;
        }
        let tokens_per_second = speed / measured as f64 * instances as f64;
        (measured > 0).then_some(Self { tokens, instances, tokens_per_second })
    }

    pub fn wait(&self) -> Duration {
        Duration::try_from_secs_f64(self.tokens as f64 / self.tokens_per_second).unwrap_or(Duration::MAX)
    }
}

impl fmt::Display for Backlog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens, instances, tokens_per_second } = self;
        let wait = self.wait().as_secs_f64();
        write!(
            f,
            "a wait of {wait:.1} s: {tokens} tokens queued at {instances} instances that compute \
             {tokens_per_second:.0} tokens/s"
        )
    }
}

/// Of one group.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Congestion {
    raised: bool,
    /// Since when the wait has been where the other state begins.
    since: Option<Instant>,
}

impl Congestion {
    pub fn is_raised(&self) -> bool {
        self.raised
    }

    /// Takes the present wait in. Says whether congestion was raised (true) or cleared (false) by it.
    pub fn observe(
        &mut self,
        now: Instant,
        wait: Duration,
        bound: Duration,
        after: Duration,
    ) -> Option<bool> {
        let turns = if self.raised { wait < bound / 2 } else { wait > bound };
        self.since = self.since.or(Some(now)).filter(|_| turns);
        if self.since.is_none_or(|since| now.saturating_duration_since(since) < after) {
            return None;
        }
        (self.raised, self.since) = (!self.raised, None);
        Some(self.raised)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_secs(1);
    const AFTER: Duration = Duration::from_secs(10);

    /// What is said in each second of waits in milliseconds, and when.
    fn play(waits: &[(u64, u64)]) -> Vec<(u64, bool)> {
        let (mut congestion, zero, mut second) = (Congestion::default(), Instant::now(), 0);
        let mut said = Vec::new();
        for (seconds, wait) in waits {
            for _ in 0..*seconds {
                let (now, wait) = (zero + Duration::from_secs(second), Duration::from_millis(*wait));
                said.extend(congestion.observe(now, wait, BOUND, AFTER).map(|raised| (second, raised)));
                second += 1;
            }
        }
        said
    }

    #[test]
    fn it_is_raised_and_cleared_once_and_after_a_while() {
        assert_eq!(play(&[(60, 1000)]), [], "as long as the bound is not above it");
        assert_eq!(play(&[(10, 1001), (60, 0)]), [], "not for long enough");
        assert_eq!(play(&[(11, 1001)]), [(10, true)]);
        assert_eq!(play(&[(60, 5000), (10, 499), (60, 5000)]), [(10, true)]);
        assert_eq!(play(&[(60, 5000), (600, 500)]), [(10, true)], "half of the bound is not below it");
        assert_eq!(play(&[(60, 5000), (11, 499), (60, 900)]), [(10, true), (70, false)]);
    }

    #[test]
    fn a_wait_that_goes_up_and_down_about_the_bound_raises_nothing() {
        let waits: Vec<_> = (0..100).map(|turn| (5, if turn % 2 == 0 { 3000 } else { 900 })).collect();
        assert_eq!(play(&waits), []);
    }
}
