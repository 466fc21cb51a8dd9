//! What the log says of a leg, within its span.

use std::time::Instant;

use baton_proto::ErrorCode;

use super::{LegEnd, Sequence};

/// What a handoff's time is made of; for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Stage {
    /// Prefill: the last keys and values of the prompt are in its blocks.
    LastLayer,
    /// Prefill: the first token is chosen.
    FirstToken,
    /// Decode: the last slice of the cache has landed.
    LastSlice,
    /// Decode: the first step on the cache that has come begins.
    FirstStep,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::LastLayer => "last_layer",
            Self::FirstToken => "first_token",
            Self::LastSlice => "last_slice",
            Self::FirstStep => "first_step",
        }
    }
}

impl Sequence {
    /// Says in the log how far the leg is, and how long ago it came there.
    pub(in crate::engine) fn log(&self, stage: Stage, at: Instant) {
        let _entered = self.span.enter();
        let micros_ago = at.elapsed().as_micros() as u64;
        tracing::debug!(request_id = %self.request, stage = stage.name(), micros_ago, "leg goes on");
    }

    /// Says in the log how the leg ended.
    pub(in crate::engine) fn log_end(&self, end: &LegEnd) {
        let _entered = self.span.enter();
        match end {
            LegEnd::Finished { reason, completion_tokens, .. } => {
                tracing::debug!(request_id = %self.request, ?reason, completion_tokens, "leg finished");
            }
            // The other side needs it no more: a completion of one token, say, leaves nothing to decode.
            LegEnd::Failed(error) if matches!(error.code, ErrorCode::Cancelled | ErrorCode::NotNeeded) => {
                tracing::debug!(request_id = %self.request, %error, "leg cancelled");
            }
            LegEnd::Failed(error) => {
                tracing::warn!(request_id = %self.request, code = error.code.name(), %error, "leg failed");
            }
        }
    }
}
