//! What samples of one kind of work, prefill or decode, have taught. Pure.
//!
//! A step may be held up by anything, and nothing makes it faster than it is. So a sample that is far from what was expected
//! counts for little until the next is, too, and the first few are forgotten once one takes less than half of what they said.

use std::{cmp::Ordering, time::Duration};

use tokio::time::Instant;

use super::fit::{Fit, at};

/// What was learnt of an instance has faded to a half after so long without news.
pub(super) const HALF_LIFE: Duration = Duration::from_secs(30);
/// How many samples the kind's line counts for in an instance's own, and what the kind's was last in the kind's.
const KIND_SAMPLES: f64 = 1.0;
const LAST_SAMPLES: f64 = 0.05;
/// Nobody is believed to be more than so many times as fast or as slow as its kind.
const FACTOR_MOST: f64 = 4.0;
/// A sample that is further than this from what was expected counts as if it were as far as this: the first, and those that
/// follow on the same side.
const SURPRISE_MOST: [f64; 2] = [2.0, 5.0];
/// Fewer samples than this are a few: five, less what is forgotten of them meanwhile.
const FEW: f64 = 4.8;

/// A mean step: what was in it, and the microseconds that it took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) features: [f64; 3],
    pub(super) micros: f64,
}

/// What was learnt of all of a kind. See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    /// By these features are divided, so that all are about 1.
    scale: [f64; 3],
    /// Microseconds for each of each feature.
    line: [f64; 3],
    fit: Fit<3>,
    /// On which side of what was expected the last sample was far from it.
    surprise: Option<Ordering>,
}

impl Work {
    /// Of which nothing was learnt; `line` is taken until then.
    pub(super) fn unknown(line: [f64; 3], scale: [f64; 3]) -> Self {
        Self { scale, line, fit: Fit::default(), surprise: None }
    }

    pub(super) fn line(&self) -> [f64; 3] {
        self.line
    }

    /// One of the kind has done this. What late samples say nothing of stays as it was: while nothing long comes, what long prompts
    /// take is not forgotten.
    pub(super) fn learn(&mut self, sample: Sample) {
        self.forget_if_held_up(sample);
        let expected = (!self.fit.is_new()).then(|| at(self.line, sample.features));
        self.take(sample, expected);
        self.line = self.over_scale(self.fit.solve(self.times_scale(self.line), LAST_SAMPLES));
    }

    fn forget_if_held_up(&mut self, sample: Sample) {
        if self.fit.samples() < FEW && sample.micros < at(self.line, sample.features) / SURPRISE_MOST[0] {
            self.fit = Fit::default();
        }
    }

    /// Keeps what was measured within reason of what was expected.
    fn take(&mut self, Sample { features, micros }: Sample, expected: Option<f64>) {
        let within =
            |most: f64| expected.map_or(micros, |expected| micros.clamp(expected / most, expected * most));
        let [alone, again] = SURPRISE_MOST;
        let surprise = match micros.total_cmp(&within(alone)) {
            Ordering::Equal => None,
            side => Some(side),
        };
        let believed = within(if surprise == self.surprise { again } else { alone });
        self.surprise = surprise;
        self.fit.learn(std::array::from_fn(|i| features[i] / self.scale[i]), believed);
    }

    fn times_scale(&self, line: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|i| line[i] * self.scale[i])
    }

    fn over_scale(&self, line: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|i| line[i] / self.scale[i])
    }
}

/// What was learnt of an instance.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    work: Work,
    /// When the last of that was.
    at: Instant,
}

impl Own {
    /// Of which nothing was learnt.
    pub(super) fn unknown(kind: &Work, now: Instant) -> Self {
        Self { work: Work::unknown(kind.line, kind.scale), at: now }
    }

    /// The instance has done this, of which the kind has learnt already.
    pub(super) fn learn(&mut self, sample: Sample, kind: &Work, now: Instant) {
        let Self { work, at: last } = self;
        *last = now;
        work.forget_if_held_up(sample);
        work.take(sample, Some(at(kind.line, sample.features)));
        let alike = work.times_scale(kind.line);
        let own = work.fit.solve(alike, KIND_SAMPLES);
        work.line = work.over_scale(work.fit.near(own, alike, FACTOR_MOST));
    }

    /// Its line, as far as it is known by now to be another than its kind's.
    pub(super) fn line(&self, kind: &Work, now: Instant) -> [f64; 3] {
        if self.work.fit.samples() < FEW {
            return kind.line;
        }
        let halves = now.saturating_duration_since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        let share = 0.5f64.powf(halves);
        std::array::from_fn(|i| kind.line[i] + share * (self.work.line[i] - kind.line[i]))
    }
}
