//! How long work takes on each instance, learnt from what instances have measured. Pure.
//!
//! - Prefill takes so long for each token, for attention so long for each *pair* of a token and one before it, and so long for
//!   each step whatever is in it (the weights): a short rest of a prompt that is cached takes a step, too.
//! - A decode step takes so long whatever is in it (the weights), so long for each sequence, and so long for each token
//!   of context (the caches).
//!
//! Samples are differences of counters that each instance reports of steps which did one kind of work alone
//! (`InstanceLoad`, fields 27 to 34 and 36): exact means, however far apart reports are, and no clock of this process is in
//! them. Instances of one *kind*, which run one model on like devices in one layout of KV caches, are alike until they show
//! otherwise: what is not known of one is taken from its kind, and what was learnt of one, of prefill and of decode, fades
//! towards its kind while nothing new is heard of that ([`step_time::HALF_LIFE`]), so that an instance that was slow once is
//! tried again. What is believed of one is kept within reason of its kind ([`step_time`]), and its first few samples are of
//! its kind alone.

mod fit;
mod lengths;
mod step_time;

use std::collections::HashMap;

use baton_proto::{Incarnation, InstanceId};
use tokio::time::Instant;

use crate::fleet::{Load, Spec, Timed};
pub use lengths::Lengths;
use step_time::{OwnStepTime, Sample, StepTime};

/// Of a kind of which nothing is known: microseconds for each token, each pair, and each step that computes prompts.
const UNKNOWN_PREFILL: [f64; 3] = [500.0, 0.0, 0.0];
/// What is taken for the tokens of a step where instances do not say: servers' own default.
const UNKNOWN_STEP_TOKENS: f64 = 512.0;
/// The same for each decode step, each sequence, and each token of context.
const UNKNOWN_DECODE: [f64; 3] = [15_000.0, 1_000.0, 0.0];
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
}

#[derive(Debug)]
struct Kind {
    revision: String,
    layout: String,
    hardware: String,
    prefill: StepTime,
    decode: StepTime,
    step_tokens: f64,
}

#[derive(Debug)]
struct Learner {
    incarnation: Incarnation,
    kind: usize,
    prefill: OwnStepTime,
    decode: OwnStepTime,
    /// The counters as they were reported last, and what it said of its steps.
    counted: Timed,
    step_tokens: f64,
    /// Of each sequence of the steps that it has reported last, on average. `None`: of none yet.
    sequence_tokens: Option<f64>,
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
        let number = self.kind(spec);
        let kind = &mut self.kinds[number];
        let step_tokens = load.step_tokens.map_or(UNKNOWN_STEP_TOKENS, |tokens| tokens.get().into());
        let new = || Learner {
            incarnation: spec.incarnation,
            kind: number,
            prefill: OwnStepTime::unknown(&kind.prefill, now),
            decode: OwnStepTime::unknown(&kind.decode, now),
            counted: load.timed,
            step_tokens,
            sequence_tokens: None,
        };
        let known = match self.instances.get_mut(&spec.id) {
            Some(known) => known,
            None => self.instances.entry(spec.id.clone()).or_insert_with(new),
        };
        if known.incarnation != spec.incarnation || known.kind != number {
            *known = new();
        }
        let Some(since) = load.timed.since(&known.counted) else {
            *known = new();
            return;
        };
        (known.counted, known.step_tokens, kind.step_tokens) = (load.timed, step_tokens, step_tokens);
        if since.decode_sequences > 0 {
            known.sequence_tokens = Some(since.context_tokens as f64 / since.decode_sequences as f64);
        }
        if let Some(sample) = prefill_sample(&since) {
            known.prefill.learn(sample, &mut kind.prefill, now);
        }
        if let Some(sample) = decode_sample(&since) {
            known.decode.learn(sample, &mut kind.decode, now);
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
            return alike.map_or_else(Speed::default, Kind::speed);
        };
        let kind = &self.kinds[known.kind];
        Speed {
            prefill: known.prefill.line(&kind.prefill, now),
            decode: known.decode.line(&kind.decode, now),
            step_tokens: known.step_tokens,
        }
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
                hardware: spec.hardware.clone(),
                prefill: StepTime::unknown(UNKNOWN_PREFILL, PREFILL_SCALE),
                decode: StepTime::unknown(UNKNOWN_DECODE, DECODE_SCALE),
                step_tokens: UNKNOWN_STEP_TOKENS,
            });
            self.kinds.len() - 1
        })
    }
}

impl Kind {
    fn is(&self, spec: &Spec) -> bool {
        self.revision == spec.revision && self.layout == spec.layout && self.hardware == spec.hardware
    }

    fn speed(&self) -> Speed {
        Speed { prefill: self.prefill.line(), decode: self.decode.line(), step_tokens: self.step_tokens }
    }
}

/// The mean step that computed prompts: its tokens, their pairs, and itself.
fn prefill_sample(since: &Timed) -> Option<Sample> {
    let mean = |sum: u64| sum as f64 / since.prefill_steps as f64;
    (since.prefill_steps > 0 && since.prefill_micros > 0).then(|| Sample {
        features: [mean(since.prefill_tokens), mean(since.prefill_pairs), 1.0],
        micros: mean(since.prefill_micros),
    })
}

/// The mean step that decoded: itself, its sequences, and their tokens.
fn decode_sample(since: &Timed) -> Option<Sample> {
    let mean = |sum: u64| sum as f64 / since.decode_steps as f64;
    (since.decode_steps > 0 && since.decode_micros > 0).then(|| Sample {
        features: [1.0, mean(since.decode_sequences), mean(since.context_tokens)],
        micros: mean(since.decode_micros),
    })
}

#[cfg(test)]
mod tests;
