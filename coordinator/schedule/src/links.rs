//! How long decode waits for a cache after the first token, by the pair of instances that it went between. Pure.
//!
//! Told once for each handoff, but for those where decode had no room at once: they wait for others' answers, and would make
//! the way to a busy instance look slow. A pair of which nothing is known is taken for one like all others, and what was learnt of one
//! fades towards that while nothing new is heard, so that a pair that failed is tried again.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

/// Weight of a handoff in the means.
const FRESH: f64 = 0.125;
/// Taken for all pairs before there was a handoff.
const UNKNOWN_MICROS: f64 = 2_000.0;
/// What a handoff that failed counts as: the prompt is computed again.
const FAILED_MICROS: f64 = 1e6;
/// What was learnt of a pair has faded to a half after so long without a handoff between them.
const HALF_LIFE: Duration = Duration::from_secs(30);
/// Pairs that are remembered; with one more all are forgotten and learnt anew.
const PAIRS_MOST: usize = 1 << 16;

#[derive(Debug, Clone, Copy)]
struct Pair {
    mean: f64,
    /// When the last handoff between them ended.
    at: Instant,
}

/// By the numbers of prefill and decode. See the module.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    pairs: HashMap<(u32, u32), Pair>,
    all: f64,
}

impl Default for Links {
    fn default() -> Self {
        Self { pairs: HashMap::new(), all: UNKNOWN_MICROS }
    }
}

impl Links {
    /// Decode has gone on so long after the first token; `None`: the handoff failed.
    pub(crate) fn learn(&mut self, prefill: u32, decode: u32, took: Option<Duration>, now: Instant) {
        let pair = (prefill, decode);
        let micros = took.map_or(FAILED_MICROS, |took| (took.as_secs_f64() * 1e6).min(FAILED_MICROS));
        self.all += FRESH * (micros - self.all);
        if self.pairs.len() >= PAIRS_MOST && !self.pairs.contains_key(&pair) {
            self.pairs.clear();
        }
        let before = if self.pairs.contains_key(&pair) { self.micros(prefill, decode, now) } else { micros };
        self.pairs.insert(pair, Pair { mean: before + FRESH * (micros - before), at: now });
    }

    /// What a handoff between them is expected to take, in microseconds.
    pub(crate) fn micros(&self, prefill: u32, decode: u32, now: Instant) -> f64 {
        let Some(pair) = self.pairs.get(&(prefill, decode)) else { return self.all };
        let halves = now.saturating_duration_since(pair.at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.all + 0.5f64.powf(halves) * (pair.mean - self.all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_taken_for_one_like_others_until_it_shows_what_it_is() {
        let (mut links, now) = (Links::default(), Instant::now());
        assert_eq!(links.micros(1, 2, now), UNKNOWN_MICROS);
        (0..100).for_each(|_| links.learn(1, 2, Some(Duration::from_millis(10)), now));
        assert_eq!(links.micros(1, 2, now), 10_000.0);
        assert!((links.micros(1, 3, now) - 10_000.0).abs() < 1.0);
        links.learn(1, 3, None, now);
        assert_eq!(links.micros(1, 3, now), FAILED_MICROS);
        let others = links.micros(7, 7, now);
        let half = links.micros(1, 3, now + HALF_LIFE);
        assert!((half - (FAILED_MICROS + others) / 2.0).abs() < 1.0, "{half}");
        assert!((links.micros(1, 3, now + HALF_LIFE * 30) - others).abs() < 1.0, "it is tried again");
        (0..100).for_each(|_| links.learn(1, 3, Some(Duration::from_millis(1)), now));
        assert!(links.micros(1, 3, now) < 1_100.0, "it is forgiven");
    }

    #[test]
    fn no_more_pairs_are_remembered_than_there_may_be() {
        let (mut links, now) = (Links::default(), Instant::now());
        (0..PAIRS_MOST as u32 + 1).for_each(|decode| links.learn(0, decode, Some(Duration::ZERO), now));
        assert_eq!(links.pairs.len(), 1);
    }
}
