//! How long work takes on each instance, learnt from what instances have measured. Pure.
//!
//! - Prefill takes so long for each token, for attention so long for each *pair* of a token and one before it, and so long for
//!   each step whatever is in it (the weights): a short rest of a prompt that is cached takes a step, too.
//! - A decode step takes so long whatever is in it (the weights), so long for each sequence, and so long for each token
//!   of context (the caches).
//!
//! Samples are differences of counters that each instance reports of steps which did one kind of work alone
//! (`InstanceLoad`, fields 27 to 34 and 36): exact means, however far apart reports are, and no clock of this process is in
//! them. Instances of one *kind*, which run one model in one layout of KV caches, are alike until they show otherwise: what
//! is not known of one is taken from its kind, and what was learnt of one, of prefill and of decode, fades towards its kind while
//! nothing new is heard of that ([`HALF_LIFE`]), so that an instance that was slow once is tried again. Nobody is believed to be
//! more than [`FACTOR_MOST`] times as fast or as slow as its kind.

mod fit;
mod lengths;

use std::{collections::HashMap, time::Duration};

use baton_proto::{Incarnation, InstanceId};
use tokio::time::Instant;

use crate::fleet::{Load, Spec, Timed};
use fit::{Fit, at};
pub use lengths::Lengths;

/// What was learnt of an instance has faded to a half after so long without news.
const HALF_LIFE: Duration = Duration::from_secs(30);
const FACTOR_MOST: f64 = 4.0;
/// A sample that is further than this from what was expected counts as if it were as far as this.
const SURPRISE_MOST: f64 = 5.0;
/// Of a kind of which nothing is known: microseconds for each token, each pair, and each step that computes prompts.
const UNKNOWN_PREFILL: [f64; 3] = [500.0, 0.0, 0.0];
/// What is taken for the tokens of a step where instances do not say: servers' own default.
const UNKNOWN_STEP_TOKENS: f64 = 512.0;
/// The same for each decode step, each sequence, and each token of context.
const UNKNOWN_DECODE: [f64; 3] = [15_000.0, 1_000.0, 0.0];
/// How many samples the speed of the kind counts for in an instance's own, and what the kind was taken for last in the kind's.
const KIND_SAMPLES: f64 = 1.0;
const LAST_SAMPLES: f64 = 0.05;
/// By these features of a step are divided, so that all are about 1: its tokens, their pairs, and itself; itself, its sequences,
/// and their tokens.
const PREFILL_SCALE: [f64; 3] = [512.0, 512.0 * 10_000.0, 1.0];
const DECODE_SCALE: [f64; 3] = [1.0, 10.0, 10_000.0];

/// How long work takes on an instance, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// For each token, each pair, and each step that computes prompts.
    prefill: [f64; 3],
    /// For each step, each sequence, and each token of context.
    decode: [f64; 3],
    /// Tokens of one step, at most.
    step_tokens: f64,
}

impl Default for Speed {
    fn default() -> Self {
        Self { prefill: UNKNOWN_PREFILL, decode: UNKNOWN_DECODE, step_tokens: UNKNOWN_STEP_TOKENS }
    }
}

impl Speed {
    /// For so many tokens of prompts, in which there are so many pairs, in as few steps as they fit into.
    pub fn prefill_micros(&self, tokens: f64, pairs: f64) -> f64 {
        self.prefill[0] * tokens + self.prefill[1] * pairs + self.prefill[2] * self.steps(tokens)
    }

    /// Tokens of prompts that can be computed in such a time, and in the step that it ends in.
    pub fn prefill_tokens_within(&self, micros: f64) -> u64 {
        let each = self.prefill[0] + self.prefill[2] / self.step_tokens;
        if each > 0.0 { (micros / each + self.step_tokens) as u64 } else { u64::MAX }
    }

    /// Steps that so many tokens of prompts take.
    pub fn steps(&self, tokens: f64) -> f64 {
        (tokens / self.step_tokens).ceil()
    }

    /// Of a decode step over so many sequences, which have so many tokens together.
    pub fn step_micros(&self, sequences: f64, context_tokens: f64) -> f64 {
        self.decode[0] + self.added_micros(sequences, context_tokens)
    }

    /// By how much so many sequences more make a step longer.
    pub fn added_micros(&self, sequences: f64, context_tokens: f64) -> f64 {
        self.decode[1] * sequences + self.decode[2] * context_tokens
    }

    /// This one so much of the way from another, in prefill and in decode.
    fn from(self, other: Self, [of_prefill, of_decode]: [f64; 2]) -> Self {
        let mix = |other: f64, own: f64, share: f64| other + share * (own - other);
        Self {
            prefill: std::array::from_fn(|i| mix(other.prefill[i], self.prefill[i], of_prefill)),
            decode: std::array::from_fn(|i| mix(other.decode[i], self.decode[i], of_decode)),
            step_tokens: other.step_tokens,
        }
    }
}

/// What was learnt of an instance, or of all of a kind.
#[derive(Debug, Clone, Copy, Default)]
struct Learnt {
    prefill: Fit<3>,
    decode: Fit<3>,
}

impl Learnt {
    /// Where `before` was known, as surely as from so many samples.
    fn speed(&self, before: Speed, samples: f64) -> Speed {
        Speed {
            prefill: over(self.prefill.solve(times(before.prefill, PREFILL_SCALE), samples), PREFILL_SCALE),
            decode: over(self.decode.solve(times(before.decode, DECODE_SCALE), samples), DECODE_SCALE),
            step_tokens: before.step_tokens,
        }
    }

    /// The same, within reason beside the kind's.
    fn beside(&self, kind: Speed) -> Speed {
        let own = self.speed(kind, KIND_SAMPLES);
        Speed {
            prefill: near(&self.prefill, own.prefill, kind.prefill, PREFILL_SCALE),
            decode: near(&self.decode, own.decode, kind.decode, DECODE_SCALE),
            step_tokens: own.step_tokens,
        }
    }
}

fn times<const N: usize>(line: [f64; N], scale: [f64; N]) -> [f64; N] {
    std::array::from_fn(|i| line[i] * scale[i])
}

fn over<const N: usize>(line: [f64; N], scale: [f64; N]) -> [f64; N] {
    std::array::from_fn(|i| line[i] / scale[i])
}

fn near<const N: usize>(fit: &Fit<N>, own: [f64; N], kind: [f64; N], scale: [f64; N]) -> [f64; N] {
    over(fit.near(times(own, scale), times(kind, scale), FACTOR_MOST), scale)
}

#[derive(Debug)]
struct Kind {
    revision: String,
    layout: String,
    learnt: Learnt,
    speed: Speed,
}

#[derive(Debug)]
struct Learner {
    incarnation: Incarnation,
    kind: usize,
    learnt: Learnt,
    /// What follows from it; `None`: nothing was learnt yet.
    speed: Option<Speed>,
    /// The counters as they were reported last, and what it said of its steps.
    counted: Timed,
    step_tokens: f64,
    /// Of each sequence of the steps that it has reported last, on average. `None`: of none yet.
    sequence_tokens: Option<f64>,
    /// When something was learnt last, of prefill and of decode.
    at: [Instant; 2],
}

/// How long work takes on each instance of a fleet. See the module.
#[derive(Debug, Default)]
pub struct Speeds {
    kinds: Vec<Kind>,
    instances: HashMap<InstanceId, Learner>,
}

impl Speeds {
    /// An instance has reported. Counters that went back are another process's: all is learnt anew.
    pub fn reported(&mut self, spec: &Spec, load: &Load, now: Instant) {
        let kind = self.kind(spec);
        let step_tokens = load.step_tokens.map_or(UNKNOWN_STEP_TOKENS, |tokens| tokens.get().into());
        let new = || Learner {
            incarnation: spec.incarnation,
            kind,
            learnt: Learnt::default(),
            speed: None,
            counted: load.timed,
            step_tokens,
            sequence_tokens: None,
            at: [now; 2],
        };
        let known = match self.instances.get_mut(&spec.id) {
            Some(known) => known,
            None => self.instances.entry(spec.id.clone()).or_insert_with(new),
        };
        if known.incarnation != spec.incarnation || known.kind != kind {
            *known = new();
        }
        let Some(since) = load.timed.since(&known.counted) else {
            *known = new();
            return;
        };
        (known.counted, known.step_tokens) = (load.timed, step_tokens);
        if since.decode_sequences > 0 {
            known.sequence_tokens = Some(since.context_tokens as f64 / since.decode_sequences as f64);
        }
        let kind = &mut self.kinds[kind];
        let prefill = prefill_sample(&since, load, step_tokens);
        let decode = decode_sample(&since, load);
        if let Some((x, y)) = prefill {
            let expected = at(kind.speed.prefill, times(x, PREFILL_SCALE));
            let y = believed(y, expected, kind.learnt.prefill.is_new());
            known.learnt.prefill.learn(x, y);
            kind.learnt.prefill.learn(x, y);
            known.at[0] = now;
        }
        if let Some((x, y)) = decode {
            let expected = at(kind.speed.decode, times(x, DECODE_SCALE));
            let y = believed(y, expected, kind.learnt.decode.is_new());
            known.learnt.decode.learn(x, y);
            kind.learnt.decode.learn(x, y);
            known.at[1] = now;
        }
        if prefill.is_some() || decode.is_some() {
            // What late samples say nothing of stays as it was: while nothing long comes, what long prompts take is not forgotten.
            kind.speed = kind.learnt.speed(Speed { step_tokens, ..kind.speed }, LAST_SAMPLES);
            known.speed = Some(known.learnt.beside(kind.speed));
        }
    }

    /// How many tokens each sequence had, on average, in the decode steps that an instance has told of last. `None`: it has told of
    /// none.
    pub fn sequence_tokens(&self, spec: &Spec) -> Option<f64> {
        self.known(spec)?.sequence_tokens
    }

    fn known(&self, spec: &Spec) -> Option<&Learner> {
        self.instances.get(&spec.id).filter(|known| known.incarnation == spec.incarnation)
    }

    /// How fast an instance is taken to be.
    pub fn of(&self, spec: &Spec, now: Instant) -> Speed {
        let Some(known) = self.known(spec) else {
            let alike = self.kinds.iter().find(|kind| kind.is(spec));
            return alike.map_or_else(Speed::default, |kind| kind.speed);
        };
        let kind = Speed { step_tokens: known.step_tokens, ..self.kinds[known.kind].speed };
        let Some(own) = known.speed else { return kind };
        let halves = |at| now.saturating_duration_since(at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        own.from(kind, known.at.map(|at| 0.5f64.powf(halves(at))))
    }

    /// An instance is gone.
    pub fn forget(&mut self, instance: &InstanceId) {
        self.instances.remove(instance);
    }

    fn kind(&mut self, spec: &Spec) -> usize {
        self.kinds.iter().position(|kind| kind.is(spec)).unwrap_or_else(|| {
            self.kinds.push(Kind {
                revision: spec.revision.clone(),
                layout: spec.layout.clone(),
                learnt: Learnt::default(),
                speed: Speed::default(),
            });
            self.kinds.len() - 1
        })
    }
}

impl Kind {
    fn is(&self, spec: &Spec) -> bool {
        self.revision == spec.revision && self.layout == spec.layout
    }
}

type Sample = Option<([f64; 3], f64)>;

/// The mean step that computed prompts since the last report: its features, scaled, and its time.
fn prefill_sample(since: &Timed, load: &Load, step_tokens: f64) -> Sample {
    if load.timed == Timed::default() {
        // An instance of an earlier version counts no steps, and says recent means alone.
        let rate = load.prefill_tokens_per_second;
        return (rate > 0).then(|| ([1.0, 0.0, 0.0], PREFILL_SCALE[0] * 1e6 / rate as f64));
    }
    let steps = match since.prefill_steps {
        // One of a version between does not count these.
        0 => (since.prefill_tokens as f64 / step_tokens).ceil(),
        steps => steps as f64,
    };
    let mean = |sum: u64| sum as f64 / steps;
    let (tokens, pairs) = (mean(since.prefill_tokens), mean(since.prefill_pairs));
    let features = [tokens / PREFILL_SCALE[0], pairs / PREFILL_SCALE[1], 1.0];
    (since.prefill_tokens > 0).then(|| (features, mean(since.prefill_micros)))
}

/// The same of those that decoded.
fn decode_sample(since: &Timed, load: &Load) -> Sample {
    if load.timed == Timed::default() {
        let (step, sequences) = (load.decode_step_micros, f64::from(load.batch()));
        return (step > 0).then(|| ([1.0, sequences / DECODE_SCALE[1], 0.0], step as f64));
    }
    let mean = |sum: u64| sum as f64 / since.decode_steps as f64;
    let (sequences, context) = (mean(since.decode_sequences), mean(since.context_tokens));
    let features = [1.0, sequences / DECODE_SCALE[1], context / DECODE_SCALE[2]];
    (since.decode_steps > 0).then(|| (features, mean(since.decode_micros)))
}

/// A measurement, kept within reason of what was expected, unless nothing was.
fn believed(measured: f64, expected: f64, new: bool) -> f64 {
    if new { measured } else { measured.clamp(expected / SURPRISE_MOST, expected * SURPRISE_MOST) }
}

#[cfg(test)]
mod tests;
