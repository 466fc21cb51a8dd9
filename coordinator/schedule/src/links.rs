//! How long decode waits for a cache after the first token, by the pair of instances that it went between. Pure.
//!
//! Told once for each handoff. A pair of which nothing is known is taken for one like all others.

use std::{collections::HashMap, time::Duration};

/// Weight of a handoff in the means.
const FRESH: f64 = 0.125;
/// Taken for all pairs before there was a handoff.
const UNKNOWN_MICROS: f64 = 2_000.0;
/// What a handoff that failed counts as: the prompt is computed again.
const FAILED_MICROS: f64 = 1e6;
/// Pairs that are remembered; with one more all are forgotten and learnt anew.
const PAIRS_MOST: usize = 1 << 16;

/// By the numbers of prefill and decode. See the module.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    pairs: HashMap<(u32, u32), f64>,
    all: f64,
}

impl Default for Links {
    fn default() -> Self {
        Self { pairs: HashMap::new(), all: UNKNOWN_MICROS }
    }
}

impl Links {
    /// Decode has gone on so long after the first token; `None`: the handoff failed.
    pub(crate) fn learn(&mut self, pair: (u32, u32), took: Option<Duration>) {
        let micros = took.map_or(FAILED_MICROS, |took| (took.as_secs_f64() * 1e6).min(FAILED_MICROS));
        self.all += FRESH * (micros - self.all);
        if self.pairs.len() >= PAIRS_MOST && !self.pairs.contains_key(&pair) {
            self.pairs.clear();
        }
        let mean = self.pairs.entry(pair).or_insert(micros);
        *mean += FRESH * (micros - *mean);
    }

    /// What a handoff between them is expected to take, in microseconds.
    pub(crate) fn micros(&self, prefill: u32, decode: u32) -> f64 {
        self.pairs.get(&(prefill, decode)).copied().unwrap_or(self.all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_taken_for_one_like_others_until_it_shows_what_it_is() {
        let mut links = Links::default();
        assert_eq!(links.micros(1, 2), UNKNOWN_MICROS);
        (0..100).for_each(|_| links.learn((1, 2), Some(Duration::from_millis(10))));
        assert_eq!(links.micros(1, 2), 10_000.0);
        assert!((links.micros(1, 3) - 10_000.0).abs() < 1.0);
        links.learn((1, 3), None);
        assert_eq!(links.micros(1, 3), FAILED_MICROS);
        (0..100).for_each(|_| links.learn((1, 3), Some(Duration::from_millis(1))));
        assert!(links.micros(1, 3) < 1_100.0, "it is forgiven");
    }

    #[test]
    fn no_more_pairs_are_remembered_than_there_may_be() {
        let mut links = Links::default();
        (0..PAIRS_MOST as u32 + 1).for_each(|decode| links.learn((0, decode), Some(Duration::ZERO)));
        assert_eq!(links.pairs.len(), 1);
    }
}
