//! One prompt of a request on its way to its choices: the legs that work at it, and a reading for each choice.

use std::task::{Context, Poll, ready};

use baton_proto::{ApiError, ErrorCode};
use tokio::time::Instant;

use super::reading::{Piece, Reading};
use crate::{
    dispatch::{Generation, Progress},
    place::{Attempts, Replacing},
    requests::CardGuard,
};

/// Who works at the answer.
enum Work {
    Generating(Box<Generation>),
    /// The first instances could not be asked, or failed before they said anything; others are being looked for.
    Replacing(Replacing),
}

/// See the module.
pub struct Lane {
    // Dropped first: legs are cancelled.
    work: Work,
    attempts: Attempts,
    /// By choice.
    readings: Vec<Reading>,
    cached_tokens: u32,
}

impl Lane {
    /// One reading for each choice. What could not even be started is placed once more, while the request's other
    /// prompts go on.
    pub fn new(
        started: Result<Generation, ApiError>,
        mut attempts: Attempts,
        readings: Vec<Reading>,
    ) -> Result<Self, ApiError> {
        let work = match started {
            Ok(generation) => Work::Generating(Box::new(generation)),
            Err(error) => Work::Replacing(attempts.again(error)?),
        };
        Ok(Self { work, attempts, readings, cached_tokens: 0 })
    }

    /// Its choices.
    pub(super) fn choices(&self) -> usize {
        self.readings.len()
    }

    /// Every choice has ended.
    pub(super) fn done(&self) -> bool {
        self.readings.iter().all(Reading::finished)
    }

    pub(super) fn deadline(&self) -> Instant {
        self.attempts.assignment().deadline
    }

    pub(super) fn prompt_tokens(&self) -> u32 {
        self.attempts.prompt_tokens()
    }

    pub(super) fn cached_tokens(&self) -> u32 {
        self.cached_tokens
    }

    /// Tokens of each choice so far.
    pub(super) fn consumed(&self) -> impl Iterator<Item = u32> {
        self.readings.iter().map(Reading::consumed)
    }

    /// Takes in all that has come, into the choices' pieces. `Pending`: more is to come and `context` will be woken.
    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        card: &CardGuard,
        pieces: &mut [Piece],
    ) -> Poll<Result<(), ApiError>> {
        while !self.done() {
            match &mut self.work {
                Work::Generating(generation) => {
                    let progress = ready!(generation.poll(context));
                    if let Err(error) = self.take(progress, pieces) {
                        return Poll::Ready(Err(error));
                    }
                }
                Work::Replacing(replacing) => {
                    let (generation, placement) = match ready!(replacing.as_mut().poll(context)) {
                        Ok(placed) => placed,
                        Err(error) => return Poll::Ready(Err(error)),
                    };
                    card.placed(&placement);
                    self.work = Work::Generating(Box::new(generation));
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, progress: Progress, pieces: &mut [Piece]) -> Result<(), ApiError> {
        let Work::Generating(generation) = &mut self.work else { return Ok(()) };
        let (choice, end) = match progress {
            Progress::Choice { choice, end } => (choice, end),
            Progress::Failed(error) => {
                self.work = Work::Replacing(self.again(error)?);
                return Ok(());
            }
        };
        let at = choice as usize;
        let (Some(reading), Some(piece)) = (self.readings.get_mut(at), pieces.get_mut(at)) else {
            return Ok(());
        };
        if reading.finished() {
            return Ok(());
        }
        let Some(fresh) = generation.fresh(choice) else { return Ok(()) };
        let stopped = reading.take(fresh, piece);
        let end = if stopped { Some(generation.stop(choice)) } else { end };
        if let Some(completed) = end {
            self.cached_tokens = self.cached_tokens.max(completed.cached_tokens);
            reading.finish(completed.reason, stopped, piece);
        }
        Ok(())
    }

    /// Places the request once more if nothing of it has been answered yet and another attempt may do better.
    fn again(&mut self, error: ApiError) -> Result<Replacing, ApiError> {
        let worth_it = matches!(
            error.code,
            ErrorCode::InstanceLost
                | ErrorCode::StaleEpoch
                | ErrorCode::HandoffFailed
                | ErrorCode::KvDamaged
                | ErrorCode::Unavailable
        );
        if worth_it && self.consumed().all(|tokens| tokens == 0) {
            self.attempts.again(error)
        } else {
            Err(error)
        }
    }
}
