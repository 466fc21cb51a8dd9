//! One step of the engine: run the planned batch through the model, sample, report back to the scheduler.
//!
//! Called by [`super::thread`] on the engine's thread. A failure ends the sequences it touches and nothing else: a
//! forward pass that fails or panics ends those of its batch; a batch that is refused for one sequence, and logits that
//! are not numbers, end that one. What a failed pass may have left half written is in blocks that are not sealed yet.

use std::{
    fmt::Display,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use baton_kvtransfer::Progress;
use baton_proto::{ApiError, ErrorCode, attention_pairs};
use baton_runtime::{BatchFault, BlockId, Executor, RuntimeError, SequenceChunk};

use super::{
    sampler::{BadLogits, Sampler, logprobs::logprobs},
    scheduler::{Chunk, Scheduler},
    sequence::{Sampled, SequenceId},
};

/// Runs batches on one model.
pub struct Stepper {
    executor: Box<dyn Executor>,
    sampler: Sampler,
    last_layer_at: Option<Instant>,
}

/// What a step did, for metrics. Of what failed or is to be planned again nothing is counted but the failures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepStats {
    /// Tokens of prompts, those computed again after a preemption included.
    pub prefill_tokens: u32,
    /// Pairs of one of these and a token before it.
    pub prefill_pairs: u64,
    /// Prompts of which the last token was computed.
    pub prompts: u32,
    /// Sequences that got one more token.
    pub decode_tokens: u32,
    /// The tokens of these sequences, together.
    pub context_tokens: u64,
    pub took: Duration,
    /// The model failed to compute any of it.
    pub failed: bool,
    /// Sequences that the model failed to compute: an error, a panic, or logits that are not numbers.
    pub failed_sequences: u32,
}

impl StepStats {
    /// Counts a chunk that has been computed.
    fn count(&mut self, chunk: &Chunk, decodes: bool) {
        if decodes {
            self.decode_tokens += 1;
            self.context_tokens += u64::from(chunk.start + chunk.tokens);
        } else {
            self.prefill_tokens += chunk.tokens;
            self.prefill_pairs += attention_pairs(chunk.tokens.into(), u64::from(chunk.start + chunk.tokens));
            self.prompts += u32::from(chunk.logits);
        }
    }
}

impl Stepper {
    pub fn new(executor: Box<dyn Executor>) -> Self {
        Self { executor, sampler: Sampler::default(), last_layer_at: None }
    }

    /// When the last step had the keys and values of its last layer.
    pub fn last_layer_at(&self) -> Option<Instant> {
        self.last_layer_at
    }

    /// Computes `plan`, which must not be empty. `progress` finds the transfer that a sequence's blocks go out by;
    /// `on_layer` hears of every layer, and must return quickly.
    pub fn run(
        &mut self,
        scheduler: &mut Scheduler,
        plan: &[Chunk],
        progress: impl Fn(SequenceId) -> Option<Progress>,
        on_layer: &mut dyn FnMut(),
    ) -> StepStats {
        let started = Instant::now();
        let copies = scheduler.take_copies();
        let sampled = match self.copy(&copies) {
            Ok(()) => self.forward(scheduler, plan, progress, on_layer),
            Err(failed) => vec![failed; plan.len()],
        };
        let failed = |sampled: &Computed| matches!(sampled, Computed::Failed(_));
        let mut stats = StepStats { failed: sampled.iter().all(failed), ..StepStats::default() };
        for (chunk, sampled) in plan.iter().zip(sampled) {
            match sampled {
                Computed::Yes(sampled) => {
                    stats.count(chunk, scheduler.is_decode(chunk));
                    scheduler.computed(chunk, sampled);
                }
                Computed::No => {}
                Computed::Failed(error) => {
                    stats.failed_sequences += 1;
                    scheduler.fail(chunk.id, error);
                }
                Computed::Damaged(error) => {
                    stats.failed_sequences += 1;
                    scheduler.fail_damaged(chunk.id, error);
                }
            }
        }
        stats.took = started.elapsed();
        stats
    }

    /// Gives sequences that share blocks and want to write into them copies of their own.
    fn copy(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Computed> {
        if copies.is_empty() {
            return Ok(());
        }
        let executor = &mut self.executor;
        match catch_panic(move || executor.copy_blocks(copies)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(failed(&"it panicked; the server's log says where")),
        }
    }

    /// One result for each chunk.
    fn forward(
        &mut self,
        scheduler: &Scheduler,
        plan: &[Chunk],
        progress: impl Fn(SequenceId) -> Option<Progress>,
        layer_done: &mut dyn FnMut(),
    ) -> Vec<Computed> {
        let batch: Vec<SequenceChunk<'_>> = plan
            .iter()
            .map(|chunk| {
                let (tokens, blocks) = scheduler.view(chunk);
                SequenceChunk { tokens, start: chunk.start, blocks, logits: chunk.logits }
            })
            .collect();
        let outgoing: Vec<Option<(Progress, Range<u32>)>> =
            plan.iter().map(|chunk| Some((progress(chunk.id)?, scheduler.blocks_of(chunk)))).collect();
        let Self { executor, sampler, last_layer_at } = self;
        let last_layer = executor.shape().layers - 1;
        let mut on_layer = |layer| {
            layer_done();
            outgoing.iter().flatten().for_each(|(progress, blocks)| progress.ready(layer, blocks.clone()));
            if layer == last_layer {
                *last_layer_at = Some(Instant::now());
            }
        };
        let forward = {
            let (batch, on_layer) = (&batch[..], &mut on_layer);
            catch_panic(move || executor.forward(batch, on_layer))
        };
        let logits = match forward {
            Ok(Ok(logits)) => logits,
            Ok(Err(RuntimeError::Sequence { sequence, fault })) => {
                return blame(plan.len(), sequence, &fault);
            }
            Ok(Err(error)) => return vec![failed(&error); plan.len()],
            Err(_) => return vec![failed(&"it panicked; the server's log says where"); plan.len()],
        };
        let mut rows = logits.rows();
        let wanted = plan.iter().filter(|chunk| chunk.logits).count();
        if rows.len() != wanted {
            let reason = format!("{} rows of logits for {wanted} sequences", rows.len());
            return vec![failed(&reason); plan.len()];
        }
        plan.iter()
            .map(|chunk| match if chunk.logits { rows.next() } else { None } {
                Some(row) => sample(sampler, scheduler, chunk, row),
                None => Computed::Yes(Vec::new()),
            })
            .collect()
    }
}

/// What became of a chunk.
#[derive(Debug, Clone)]
enum Computed {
    /// Its K and V are in the cache; the next token of each of its choices, if it wanted any.
    Yes(Vec<Sampled>),
    /// It was in a batch that was refused for another: it is planned again.
    No,
    Failed(ApiError),
    /// Its logits are not numbers, so its cache may not be either.
    Damaged(ApiError),
}

fn failed(reason: &dyn Display) -> Computed {
    let message = format!("the model failed to compute a batch: {reason}");
    Computed::Failed(ApiError::new(ErrorCode::Internal, message))
}

/// A batch was refused for one of its sequences, before anything was computed: the others are planned again.
fn blame(chunks: usize, culprit: usize, fault: &BatchFault) -> Vec<Computed> {
    // A culprit that does not exist would have everything planned again for ever.
    let known = culprit < chunks;
    (0..chunks).map(|index| if known && index != culprit { Computed::No } else { failed(fault) }).collect()
}

/// A panic of the model must not take the other sequences with it.
fn catch_panic<R>(of: impl FnOnce() -> R) -> std::thread::Result<R> {
    catch_unwind(AssertUnwindSafe(of))
}

fn sample(sampler: &mut Sampler, scheduler: &Scheduler, chunk: &Chunk, logits: &[f32]) -> Computed {
    let sequence = scheduler.sequence(chunk.id);
    let (counts, position) = (sequence.counts.as_ref(), sequence.completion_tokens());
    let of = |choice| {
        let token = sampler.sample(logits, &sequence.sampling_of(choice), counts, position)?;
        let logprobs = sequence.top_logprobs.map(|top| logprobs(logits, token, top));
        Ok(Sampled { choice, token, logprobs })
    };
    match sequence.sampled_choices().into_iter().map(of).collect::<Result<Vec<_>, BadLogits>>() {
        Ok(sampled) => Computed::Yes(sampled),
        Err(error) => Computed::Damaged(ApiError::new(ErrorCode::Internal, error.to_string())),
    }
}
