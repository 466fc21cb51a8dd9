//! What a request is, as far as instances are told.

use std::sync::Arc;

use baton_process::telemetry::TraceContext;
use baton_proto::RequestId;
use tokio::time::Instant;

use crate::{place::Asked, prepare::PreparedPrompt};

/// See the module.
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

impl Assignment {
    /// As a place is looked for.
    pub fn asked(&self) -> Asked<'_> {
        Asked { prompt: &self.prompt, generated: &self.generated, first_token: self.wanted }
    }
}
