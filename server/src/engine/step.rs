//! One step of the engine: run the planned batch through the model, sample, report back to the scheduler.
//!
//! Called by [`super::thread`] on the engine's thread. A failure ends the sequences it touches and nothing else: a
//! forward pass that fails or panics ends those of its batch, logits that are not numbers end their own sequence.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use baton_kvtransfer::Progress;
use baton_proto::{ApiError, ErrorCode};
use baton_runtime::{Executor, SequenceChunk};

use super::{
    sampler::{BadLogits, Sampler},
    scheduler::{Chunk, Scheduler},
    sequence::SequenceId,
};

/// Runs batches on one model.
pub struct Stepper {
    executor: Box<dyn Executor>,
    sampler: Sampler,
}

/// What a step did, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepStats {
    /// Tokens of prompts, those computed again after a preemption included.
    pub prefill_tokens: u32,
    /// Sequences that got one more token.
    pub decode_tokens: u32,
    pub took: Duration,
}

impl Stepper {
    pub fn new(executor: Box<dyn Executor>) -> Self {
        Self { executor, sampler: Sampler::default() }
    }

    /// Computes `plan`, which must not be empty. `progress` finds the transfer that a sequence's blocks go out by.
    pub fn run(
        &mut self,
        scheduler: &mut Scheduler,
        plan: &[Chunk],
        progress: impl Fn(SequenceId) -> Option<Progress>,
    ) -> StepStats {
        let started = Instant::now();
        let sampled = self.forward(scheduler, plan, progress);
        let mut stats = StepStats::default();
        for (chunk, sampled) in plan.iter().zip(sampled) {
            if scheduler.is_decode(chunk) {
                stats.decode_tokens += 1;
            } else {
                stats.prefill_tokens += chunk.tokens;
            }
            match sampled {
                Ok(token) => scheduler.computed(chunk, token),
                Err(error) => scheduler.fail(chunk.id, error),
            }
        }
        stats.took = started.elapsed();
        stats
    }

    /// One result for each chunk: its next token if it wanted one.
    fn forward(
        &mut self,
        scheduler: &Scheduler,
        plan: &[Chunk],
        progress: impl Fn(SequenceId) -> Option<Progress>,
    ) -> Vec<Result<Option<u32>, ApiError>> {
        let batch: Vec<SequenceChunk<'_>> = plan
            .iter()
            .map(|chunk| {
                let (tokens, blocks) = scheduler.view(chunk);
                SequenceChunk { tokens, start: chunk.start, blocks, logits: chunk.logits }
            })
            .collect();
        let outgoing: Vec<(Progress, Range<u32>)> =
            plan.iter().filter_map(|chunk| Some((progress(chunk.id)?, scheduler.blocks_of(chunk)))).collect();
        let mut on_layer =
            |layer| outgoing.iter().for_each(|(progress, blocks)| progress.ready(layer, blocks.clone()));
        let Self { executor, sampler } = self;
        let (batch, on_layer) = (&batch[..], &mut on_layer);
        let computed = catch_panic(move || executor.forward(batch, on_layer));
        let failed = |message: String| {
            let error =
                ApiError::new(ErrorCode::Internal, format!("the model failed to compute a batch: {message}"));
            vec![Err(error); plan.len()]
        };
        let logits = match computed {
            Ok(Ok(logits)) => logits,
            Ok(Err(error)) => return failed(error.to_string()),
            Err(_) => return failed("it panicked; the server's log says where".into()),
        };
        let mut rows = logits.rows();
        let wanted = plan.iter().filter(|chunk| chunk.logits).count();
        if rows.len() != wanted {
            return failed(format!("{} rows of logits for {wanted} sequences", rows.len()));
        }
        plan.iter()
            .map(|chunk| {
                let row = if chunk.logits { rows.next() } else { None };
                row.map(|row| sample(sampler, scheduler, chunk, row)).transpose()
            })
            .collect()
    }
}

/// A panic of the model must not take the other sequences with it.
fn catch_panic<R>(of: impl FnOnce() -> R) -> std::thread::Result<R> {
    catch_unwind(AssertUnwindSafe(of))
}

fn sample(
    sampler: &mut Sampler,
    scheduler: &Scheduler,
    chunk: &Chunk,
    logits: &[f32],
) -> Result<u32, ApiError> {
    let sequence = scheduler.sequence(chunk.id);
    sampler
        .sample(logits, &sequence.sampling, sequence.counts.as_ref(), sequence.completion_tokens())
        .map_err(|error: BadLogits| ApiError::new(ErrorCode::Internal, error.to_string()))
}
