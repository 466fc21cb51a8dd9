//! From tokens in order to text: detokenised as it comes, stopped at stop strings, counted.
//!
//! Made by [`crate::serve`], read by [`crate::http`] as fast as the client reads. Holds everything the request holds;
//! dropping it (the client has gone) cancels both legs, gives the seat back and takes the work off the ledger.

use std::task::{Context, Poll, ready};

use baton_proto::{ApiError, ErrorCode};
use tokio::time::Instant;

use crate::{
    admit::Permit,
    dispatch::{Completed, Generation, Progress, StopReason},
    prepare::{Shape, TextReader},
    requests::CardGuard,
    serve::{Attempts, Report},
};

/// Token counts as clients are told them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Of the prompt, taken from a prefix cache.
    pub cached_tokens: u32,
}

/// The end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finish {
    pub reason: StopReason,
    pub usage: Usage,
}

/// What reading brought, besides text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    More,
    End(Result<Finish, ApiError>),
}

/// An answer on its way.
pub struct Streaming {
    pub shape: Shape,
    // Dropped in this order: legs are cancelled first, the seat is given back last.
    generation: Generation,
    attempts: Attempts,
    reader: Box<dyn TextReader>,
    consumed: u32,
    report: Report,
    card: CardGuard,
    _permit: Permit,
}

impl Streaming {
    pub fn new(
        shape: Shape,
        generation: Generation,
        attempts: Attempts,
        reader: Box<dyn TextReader>,
        report: Report,
        card: CardGuard,
        permit: Permit,
    ) -> Self {
        Self { shape, generation, attempts, reader, consumed: 0, report, card, _permit: permit }
    }

    /// Waits for text that is certain, and appends it, or for the end. Must not be called after the end.
    pub fn poll_step(&mut self, context: &mut Context<'_>, text: &mut String) -> Poll<Step> {
        loop {
            let progress = ready!(self.generation.poll(context));
            if self.read_fresh(text) {
                let completed = self.generation.stop();
                return Poll::Ready(Step::End(Ok(self.finish(completed))));
            }
            match progress {
                Progress::Tokens if text.is_empty() => {}
                Progress::Tokens => return Poll::Ready(Step::More),
                Progress::End(Ok(completed)) => {
                    self.reader.finish(text);
                    return Poll::Ready(Step::End(Ok(self.finish(completed))));
                }
                Progress::End(Err(error)) => match self.again(error) {
                    Ok(()) => {}
                    Err(error) => {
                        self.report.failed(&error);
                        return Poll::Ready(Step::End(Err(error)));
                    }
                },
            }
        }
    }

    /// Waits for the next step.
    pub async fn step(&mut self, text: &mut String) -> Step {
        std::future::poll_fn(|context| self.poll_step(context, text)).await
    }

    /// True: a stop string has matched.
    fn read_fresh(&mut self, text: &mut String) -> bool {
        let fresh = self.generation.fresh();
        if fresh.is_empty() {
            return false;
        }
        let mut matched = false;
        for &token in fresh {
            self.consumed += 1;
            // A token that ends the sequence is counted and has no text.
            if !self.attempts.ends_sequence(token) && self.reader.push(token, text) {
                matched = true;
                break;
            }
        }
        self.report.tokens(self.consumed, Instant::now());
        self.card.set_completion_tokens(self.consumed);
        matched
    }

    /// Places the request once more if nothing of it has been answered yet and another instance may do better.
    fn again(&mut self, error: ApiError) -> Result<(), ApiError> {
        let worth_it = matches!(
            error.code,
            ErrorCode::InstanceLost
                | ErrorCode::StaleEpoch
                | ErrorCode::HandoffFailed
                | ErrorCode::Unavailable
        );
        if !worth_it || self.consumed > 0 {
            return Err(error);
        }
        self.generation = self.attempts.again(&self.card, error)?;
        Ok(())
    }

    fn finish(&mut self, completed: Completed) -> Finish {
        let usage = Usage {
            prompt_tokens: self.attempts.prompt_tokens(),
            completion_tokens: self.consumed,
            cached_tokens: completed.cached_tokens,
        };
        self.report.finished(&usage);
        Finish { reason: completed.reason, usage }
    }
}
