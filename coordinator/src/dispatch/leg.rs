//! One leg of a request as the coordinator speaks of it, and the wire adapters to and from it.

use baton_proto::{ApiError, ErrorCode, v1};

/// Which part of the work a leg is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Prefill and decode on one instance.
    Whole,
    Prefill,
    Decode,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "mixed",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Why a sequence ended, as clients are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    Stop,
    Length,
}

/// How a leg ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LegEnd {
    /// The sequence is complete.
    Complete {
        reason: StopReason,
        cached_tokens: u32,
    },
    /// Prefill's part is done and decode has the cache.
    HandedOff {
        cached_tokens: u32,
    },
    /// The instance cancelled it.
    Cancelled,
    Failed(ApiError),
}

/// What one leg brought in one engine step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Index in the completion of `tokens[0]`.
    pub first_position: u32,
    pub tokens: Vec<u32>,
    pub end: Option<LegEnd>,
}

impl Output {
    /// The leg failed with nothing more to say.
    pub fn failed(error: ApiError) -> Self {
        Self { first_position: 0, tokens: Vec::new(), end: Some(LegEnd::Failed(error)) }
    }
}

impl From<v1::LegOutput> for Output {
    fn from(wire: v1::LegOutput) -> Self {
        use v1::leg_output::End;
        let end = wire.end.map(|end| match end {
            End::Finished(finished) => finished.into(),
            End::Failed(detail) => LegEnd::Failed(detail.into()),
        });
        Self { first_position: wire.first_position, tokens: wire.tokens, end }
    }
}

impl From<v1::Finished> for LegEnd {
    fn from(wire: v1::Finished) -> Self {
        let cached_tokens = wire.cached_tokens;
        match wire.reason() {
            v1::FinishReason::Stop => Self::Complete { reason: StopReason::Stop, cached_tokens },
            v1::FinishReason::Length => Self::Complete { reason: StopReason::Length, cached_tokens },
            v1::FinishReason::HandedOff => Self::HandedOff { cached_tokens },
            v1::FinishReason::Cancelled => Self::Cancelled,
            v1::FinishReason::Unspecified => Self::Failed(ApiError::new(
                ErrorCode::Internal,
                "the instance ended the request without saying why",
            )),
        }
    }
}
