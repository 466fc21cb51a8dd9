//! One leg of a request as the coordinator speaks of it, and as it comes over the wire.

use baton_proto::{ApiError, ErrorCode, v1};
use smallvec::SmallVec;

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
    Complete { reason: StopReason, cached_tokens: u32 },
    /// Prefill's part is done and decode has the cache.
    HandedOff { cached_tokens: u32 },
    /// The instance cancelled it.
    Cancelled,
    /// By the instance's own word.
    Failed(Box<ApiError>),
    /// Taken from the instance here: its stream broke, or it did not get on.
    Lost(Box<ApiError>),
}

/// How likely the model held a token, by natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// The likeliest tokens, likeliest first; the chosen one may or may not be among them.
    pub top: Vec<(u32, f32)>,
}

/// What one leg brought in one engine step.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    pub choice: u32,
    /// Index in the completion of `tokens[0]`.
    pub first_position: u32,
    pub tokens: SmallVec<[u32; 4]>,
    /// One for each of `tokens` if they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Of the prompt, taken from a prefix cache, where that is said: with the first tokens, and not by decode.
    pub cached_tokens: Option<u32>,
    pub end: Option<LegEnd>,
}

impl Output {
    /// Whether it shows that the leg has what it takes to generate: a decode leg, the cache.
    pub fn generates(&self) -> bool {
        !self.tokens.is_empty() || matches!(self.end, Some(LegEnd::Complete { .. }))
    }

    /// The leg failed with nothing more to say.
    pub fn failed(error: ApiError) -> Self {
        Self::ended(LegEnd::Failed(error.into()))
    }

    /// The instance is lost to this coordinator.
    pub fn lost(error: ApiError) -> Self {
        Self::ended(LegEnd::Lost(error.into()))
    }

    fn ended(end: LegEnd) -> Self {
        let end = Some(end);
        let (tokens, logprobs) = (SmallVec::new(), Vec::new());
        Self { choice: 0, first_position: 0, tokens, logprobs, cached_tokens: None, end }
    }
}

impl From<v1::LegOutput> for Output {
    fn from(wire: v1::LegOutput) -> Self {
        use v1::leg_output::End;
        let end = wire.end.map(|end| match end {
            End::Finished(finished) => finished.into(),
            End::Failed(detail) => LegEnd::Failed(Box::new(detail.into())),
        });
        let logprobs = wire.logprobs.into_iter().map(TokenLogprobs::from).collect();
        let v1::LegOutput { choice, first_position, tokens, cached_tokens, .. } = wire;
        let tokens = SmallVec::from_slice(&tokens);
        Self { choice, first_position, tokens, logprobs, cached_tokens, end }
    }
}

impl From<v1::TokenLogprobs> for TokenLogprobs {
    fn from(wire: v1::TokenLogprobs) -> Self {
        Self { logprob: wire.logprob, top: wire.top_tokens.into_iter().zip(wire.top_logprobs).collect() }
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
            v1::FinishReason::Unspecified => Self::Failed(Box::new(ApiError::new(
                ErrorCode::Internal,
                "the instance ended the request without saying why",
            ))),
        }
    }
}
