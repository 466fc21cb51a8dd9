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
    serve::{Attempts, Replacing, Report},
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

/// Who works at the answer.
enum Work {
    Generating(Box<Generation>),
    /// The first instances failed before they said anything; others are being looked for.
    Replacing(Replacing),
}

/// An answer on its way.
pub struct Streaming {
    pub shape: Shape,
    // Dropped in this order: legs are cancelled first, the seat is given back last.
    work: Work,
    attempts: Attempts,
    reading: Reading,
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
        let work = Work::Generating(Box::new(generation));
        let reading = Reading { reader, ends_sequence: attempts.ends_sequence(), consumed: 0 };
        Self { shape, work, attempts, reading, report, card, _permit: permit }
    }

    /// Waits for text that is certain, and appends it, or for the end. Must not be called after the end.
    pub fn poll_step(&mut self, context: &mut Context<'_>, text: &mut String) -> Poll<Step> {
        loop {
            let generation = match &mut self.work {
                Work::Generating(generation) => generation,
                Work::Replacing(replacing) => match ready!(replacing.as_mut().poll(context)) {
                    Ok((generation, stage)) => {
                        self.card.set(stage);
                        self.work = Work::Generating(Box::new(generation));
                        continue;
                    }
                    Err(error) => return Poll::Ready(self.fail(error)),
                },
            };
            let progress = ready!(generation.poll(context));
            let read = self.reading.take(generation.fresh(), text);
            if read.tokens > 0 {
                self.report.tokens(self.reading.consumed, Instant::now());
                self.card.set_completion_tokens(self.reading.consumed);
            }
            if read.stopped {
                let completed = generation.stop();
                return Poll::Ready(self.finish(completed));
            }
            match progress {
                Progress::Tokens if text.is_empty() => {}
                Progress::Tokens => return Poll::Ready(Step::More),
                Progress::End(Ok(completed)) => {
                    self.reading.reader.finish(text);
                    return Poll::Ready(self.finish(completed));
                }
                Progress::End(Err(error)) => match self.again(error) {
                    Ok(replacing) => self.work = Work::Replacing(replacing),
                    Err(error) => return Poll::Ready(self.fail(error)),
                },
            }
        }
    }

    /// Waits for the next step.
    pub async fn step(&mut self, text: &mut String) -> Step {
        std::future::poll_fn(|context| self.poll_step(context, text)).await
    }

    /// Places the request once more if nothing of it has been answered yet and another attempt may do better.
    fn again(&mut self, error: ApiError) -> Result<Replacing, ApiError> {
        let worth_it = matches!(
            error.code,
            ErrorCode::InstanceLost
                | ErrorCode::StaleEpoch
                | ErrorCode::HandoffFailed
                | ErrorCode::Unavailable
        );
        if worth_it && self.reading.consumed == 0 { self.attempts.again(error) } else { Err(error) }
    }

    fn fail(&mut self, error: ApiError) -> Step {
        self.report.failed(&error);
        Step::End(Err(error))
    }

    fn finish(&mut self, completed: Completed) -> Step {
        let usage = Usage {
            prompt_tokens: self.attempts.prompt_tokens(),
            completion_tokens: self.reading.consumed,
            cached_tokens: completed.cached_tokens,
        };
        self.report.finished(&usage);
        Step::End(Ok(Finish { reason: completed.reason, usage }))
    }
}

/// Tokens into text.
struct Reading {
    reader: Box<dyn TextReader>,
    /// Ascending.
    ends_sequence: Vec<u32>,
    /// Tokens of the answer so far.
    consumed: u32,
}

/// What reading some tokens brought.
struct Read {
    tokens: u32,
    /// A stop string has matched: the answer ends before it.
    stopped: bool,
}

impl Reading {
    fn take(&mut self, fresh: &[u32], text: &mut String) -> Read {
        let before = self.consumed;
        let mut stopped = false;
        for &token in fresh {
            self.consumed += 1;
            // A token that ends the sequence is counted and has no text.
            if self.ends_sequence.binary_search(&token).is_err() && self.reader.push(token, text) {
                stopped = true;
                break;
            }
        }
        Read { tokens: self.consumed - before, stopped }
    }
}
