//! What a request is, as far as instances are told, and how they are told it.

use std::sync::Arc;

use baton_process::telemetry::TraceContext;
use baton_proto::{RequestId, v1};
use baton_schedule::Seat;
use bytes::Bytes;
use tokio::time::Instant;
use v1::dispatch::Work;

use crate::{fleet::BATCH_TOKENS, prepare::PreparedPrompt};

/// What a request is, as far as instances are told.
#[derive(Debug, Clone)]
pub struct Assignment {
    pub request: RequestId,
    pub trace: TraceContext,
    pub prompt: PreparedPrompt,
    /// Tokens of the completion that an earlier attempt brought; none of several choices.
    pub generated: Arc<[u32]>,
    /// Lower is served first and preempted last.
    pub priority: i32,
    /// When the first token is wanted.
    pub wanted: Instant,
    pub deadline: Instant,
    /// Its reader takes tokens many at a time: nobody sees them before the answer is complete. Counts of tokens, for
    /// metrics and limits, lag by as many.
    pub in_batches: bool,
}

/// A leg of it for one instance, as it goes over the wire. `prompt` is the assignment's, written once for all legs.
pub(super) fn dispatch(seat: &Seat, assignment: &Assignment, prompt: Bytes, work: Work) -> v1::Dispatch {
    let now = Instant::now();
    let millis =
        |until: Instant| u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX);
    v1::Dispatch {
        leg: 0, // the attachment's to choose
        request_id: assignment.request.to_string(),
        traceparent: assignment.trace.parent().to_owned(),
        tracestate: assignment.trace.state().to_owned(),
        incarnation: seat.incarnation.0,
        role_epoch: seat.role_epoch.0,
        model: seat.model.clone(),
        prompt_tokens: prompt,
        generated_tokens: assignment.generated.to_vec(),
        sampling: Some((&assignment.prompt.sampling).into()),
        timeout_millis: millis(assignment.deadline).max(1),
        work: Some(work),
        priority: assignment.priority,
        first_token_within_millis: millis(assignment.wanted),
        tokens_at_a_time: if assignment.in_batches { BATCH_TOKENS } else { 0 },
    }
}
