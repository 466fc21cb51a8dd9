//! How long a step of one kind of work, prefill or decode, takes, learnt from samples. Pure.
//!
//! A step may be held up by anything, and nothing makes it faster than it is. So a sample that is far from what was expected
//! counts for little until the next is, too. An instance is taken for one of its kind until it has told of a few, and the first of
//! these are forgotten once another shows that they had been held up.

use std::{cmp::Ordering, time::Duration};

use tokio::time::Instant;

use super::fit::{Fit, predicted};

/// What was learnt of an instance has faded to a half after so long without news.
pub(super) const HALF_LIFE: Duration = Duration::from_secs(30);
/// How many samples the kind's line counts for in an instance's own, and what the kind's was last in the kind's.
const KIND_SAMPLES: f64 = 1.0;
const LAST_SAMPLES: f64 = 0.05;
/// Nobody is believed to be more than so many times as fast or as slow as its kind.
const FACTOR_MOST: f64 = 4.0;
/// A sample that is further than this from what was expected counts as if it were as far as this: an instance's first, and those
/// that follow on the same side.
const FIRST_SURPRISE_MOST: f64 = 2.0;
const NEXT_SURPRISE_MOST: f64 = 5.0;
/// What is expected is taken for so much at least, in microseconds: of nothing there is no multiple.
const EXPECTED_LEAST: f64 = 1.0;
/// So many samples say how fast somebody is; fewer may all have been held up.
const BELIEVED_FROM: u32 = 5;

/// A mean step: what was in it, and the microseconds that it took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) features: [f64; 3],
    pub(super) micros: f64,
}

impl Sample {
    /// What it took, but so many times as much or as little as a line says of it at most.
    fn within(self, most: f64, line: [f64; 3]) -> f64 {
        let expected = predicted(line, self.features).max(EXPECTED_LEAST);
        self.micros.clamp(expected / most, expected * most)
    }
}

/// What was learnt of all of a kind. See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepTime {
    /// By these features are divided, so that all are about 1.
    scale: [f64; 3],
    /// Microseconds for each of each feature.
    line: [f64; 3],
    fit: Fit<3>,
    /// The first samples have been forgotten: that happens once.
    forgot: bool,
}

impl StepTime {
    /// Of which nothing was learnt; `line` is taken until then.
    pub(super) fn unknown(line: [f64; 3], scale: [f64; 3]) -> Self {
        Self { scale, line, fit: Fit::default(), forgot: false }
    }

    pub(super) fn line(&self) -> [f64; 3] {
        self.line
    }

    /// One of the kind has done this; it counts as if it were so many times what is expected at most. What late samples say nothing
    /// of stays as it was: while nothing long comes, what long prompts take is not forgotten.
    fn learn(&mut self, sample: Sample, most: f64) {
        if self.is_told_otherwise(sample) && !self.forgot {
            (self.fit, self.forgot) = (Fit::default(), true);
        }
        let believed = match self.fit.samples() {
            0 => sample.micros,
            _ => sample.within(most, self.line),
        };
        self.fit.learn(self.scaled(sample), believed);
        self.line = self.over_scale(self.fit.solve(self.times_scale(self.line), LAST_SAMPLES));
    }

    /// There are few samples, and this one took less than half of what they say.
    fn is_told_otherwise(&self, sample: Sample) -> bool {
        let said = predicted(self.line, sample.features);
        (1..BELIEVED_FROM).contains(&self.fit.samples()) && sample.micros < said / FIRST_SURPRISE_MOST
    }

    fn scaled(&self, sample: Sample) -> [f64; 3] {
        std::array::from_fn(|i| sample.features[i] / self.scale[i])
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
pub(super) struct OwnStepTime {
    own: StepTime,
    /// On which side of what was expected of its kind the last sample was far from it.
    surprise: Option<Ordering>,
    /// When the last of that was.
    at: Instant,
}

impl OwnStepTime {
    /// Of which nothing was learnt.
    pub(super) fn unknown(kind: &StepTime, now: Instant) -> Self {
        Self { own: StepTime::unknown(kind.line, kind.scale), surprise: None, at: now }
    }

    /// The instance has done this: its kind learns of that, too.
    pub(super) fn learn(&mut self, sample: Sample, kind: &mut StepTime, now: Instant) {
        let (left, most) = (self.left(now), self.believed_most(sample, kind));
        kind.learn(sample, most);
        let Self { own, at, .. } = self;
        *at = now;
        own.fit.fade(left);
        // Who is faster than its kind has not been held up before.
        let of_kind = predicted(kind.line, sample.features);
        if own.is_told_otherwise(sample) && sample.micros >= of_kind / FIRST_SURPRISE_MOST {
            own.fit = Fit::default();
        }
        own.fit.learn(own.scaled(sample), sample.within(most, kind.line));
        let alike = own.times_scale(kind.line);
        let line = own.fit.solve(alike, KIND_SAMPLES);
        own.line = own.over_scale(own.fit.near(line, alike, FACTOR_MOST));
    }

    /// How many times as far from what is expected as that the sample counts.
    fn believed_most(&mut self, sample: Sample, kind: &StepTime) -> f64 {
        let before = self.surprise;
        self.surprise = match sample.micros.total_cmp(&sample.within(FIRST_SURPRISE_MOST, kind.line)) {
            Ordering::Equal => None,
            side => Some(side),
        };
        if self.surprise == before { NEXT_SURPRISE_MOST } else { FIRST_SURPRISE_MOST }
    }

    /// Its line, as far as it is known by now to be another than its kind's.
    pub(super) fn line(&self, kind: &StepTime, now: Instant) -> [f64; 3] {
        if self.own.fit.samples() < BELIEVED_FROM {
            return kind.line;
        }
        let left = self.left(now);
        std::array::from_fn(|i| kind.line[i] + left * (self.own.line[i] - kind.line[i]))
    }

    /// What is left of what was learnt, of 1.
    fn left(&self, now: Instant) -> f64 {
        let halves = now.saturating_duration_since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        0.5f64.powf(halves)
    }
}
