//! How busy the engine is and what it has done: written by [`super::thread`] after each step, told to coordinators and
//! to the controller.

use std::time::Duration;

use baton_kvtransfer::Direction;
use baton_proto::{ApiError, ErrorCode};

use super::{
    scheduler::Occupancy,
    sequence::{FinishReason, LegEnd},
    step::StepStats,
};

/// How busy the engine is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    pub occupancy: Occupancy,
    /// Recent mean of steps that only prefill; 0 = none yet.
    pub prefill_tokens_per_second: f64,
    /// Recent mean of steps that only decode; zero = none yet.
    pub decode_step: Duration,
    pub done: Done,
}

/// What the engine has done since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Prompts computed to their end.
    pub prompts: u64,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    /// Steps that decoded.
    pub decode_steps: u64,
    /// Completions that came to their end.
    pub requests: u64,
    /// Tokens of these completions.
    pub completion_tokens: u64,
    /// Sequences that the model failed to compute.
    pub failed: u64,
    /// KV caches handed on, and received.
    pub outgoing: Transferred,
    pub incoming: Transferred,
    /// Layers and steps computed.
    pub progress: u64,
    pub timed: Timed,
}

/// Steps that did one kind of work alone and of which nothing failed, for whoever predicts how long such work takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timed {
    /// Computed prompts alone.
    pub prefill: Duration,
    pub prefill_steps: u64,
    pub prefill_tokens: u64,
    pub prefill_pairs: u64,
    /// Decoded alone.
    pub decode: Duration,
    pub decode_steps: u64,
    /// Sequences in these steps, summed over them, and the tokens that these sequences had.
    pub decode_sequences: u64,
    pub context_tokens: u64,
}

impl Timed {
    fn count(&mut self, stats: &StepStats) {
        if stats.failed_sequences > 0 {
            return;
        }
        match (stats.prefill_tokens, stats.decode_tokens) {
            (tokens, 0) => {
                self.prefill += stats.took;
                self.prefill_steps += 1;
                self.prefill_tokens += u64::from(tokens);
                self.prefill_pairs += stats.prefill_pairs;
            }
            (0, sequences) => {
                self.decode += stats.took;
                self.decode_steps += 1;
                self.decode_sequences += u64::from(sequences);
                self.context_tokens += stats.context_tokens;
            }
            _ => {}
        }
    }
}

/// What became of the transfers of one direction. Those that were ended here are not counted: their leg was cancelled,
/// failed or out of time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transferred {
    pub whole: u64,
    /// Something on the way broke.
    pub broken: u64,
}

impl Done {
    pub(super) fn count(&mut self, stats: &StepStats) {
        self.prompts += u64::from(stats.prompts);
        self.prefill_tokens += u64::from(stats.prefill_tokens);
        self.decode_tokens += u64::from(stats.decode_tokens);
        self.decode_steps += u64::from(stats.decode_tokens > 0);
        self.failed += u64::from(stats.failed_sequences);
        self.progress += 1;
        self.timed.count(stats);
    }

    /// A transfer is over that nobody here had ended before.
    pub(super) fn transferred(&mut self, direction: Option<Direction>, result: Result<(), &ApiError>) {
        let of = match direction {
            None => return,
            Some(Direction::Outgoing) => &mut self.outgoing,
            Some(Direction::Incoming) => &mut self.incoming,
        };
        match result {
            Ok(()) => of.whole += 1,
            Err(error) if is_breakage(error.code) => of.broken += 1,
            Err(_) => {}
        }
    }

    pub(super) fn ended(&mut self, end: Option<&LegEnd>) {
        if let Some(LegEnd::Finished { reason, completion_tokens, .. }) = end
            && *reason != FinishReason::HandedOff
        {
            self.requests += 1;
            self.completion_tokens += u64::from(*completion_tokens);
        }
    }
}

/// Whether a transfer that ended so shows that something is broken. Else the peer did not want it, or had no room for
/// it, or has been started again, or the request's time was up: what clients do and bargain for tells nothing of this
/// instance.
fn is_breakage(code: ErrorCode) -> bool {
    use ErrorCode::{HandoffFailed, InstanceLost, Internal, KvDamaged};
    matches!(code, InstanceLost | HandoffFailed | KvDamaged | Internal)
}

impl Load {
    /// How much a new step counts in the recent means.
    const WEIGHT: f64 = 0.1;

    /// Of a step of which something failed, and which may have ended before it was computed, nothing is learnt: an instance
    /// that fails at once is not fast.
    pub(super) fn learn(&mut self, stats: &StepStats) {
        if stats.failed_sequences > 0 {
            return;
        }
        let seconds = stats.took.as_secs_f64();
        let mean = |old: f64, new: f64| if old == 0.0 { new } else { old + Self::WEIGHT * (new - old) };
        if stats.decode_tokens == 0 && seconds > 0.0 {
            let rate = f64::from(stats.prefill_tokens) / seconds;
            self.prefill_tokens_per_second = mean(self.prefill_tokens_per_second, rate);
        } else if stats.prefill_tokens == 0 {
            self.decode_step = Duration::from_secs_f64(mean(self.decode_step.as_secs_f64(), seconds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_failed_at_once_is_no_sign_of_speed() {
        let step = |prefill_tokens, decode_tokens, millis, failed_sequences| StepStats {
            prefill_tokens,
            decode_tokens,
            took: Duration::from_millis(millis),
            failed_sequences,
            ..StepStats::default()
        };
        let mut load = Load::default();
        load.learn(&step(100, 0, 100, 0));
        load.learn(&step(0, 4, 20, 0));
        let learnt = (1000.0, Duration::from_millis(20));
        assert_eq!((load.prefill_tokens_per_second, load.decode_step), learnt);
        for failed in [step(4000, 0, 1, 1), step(0, 4, 1, 4), step(0, 4, 1, 1)] {
            load.learn(&failed);
            assert_eq!((load.prefill_tokens_per_second, load.decode_step), learnt, "{failed:?}");
        }
        load.learn(&step(200, 0, 100, 0));
        assert_eq!((load.prefill_tokens_per_second, load.decode_step), (1100.0, learnt.1));
    }
}
