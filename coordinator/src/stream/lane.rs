//! One prompt of a request on its way to its choices: the legs that work at it, and a reading for each choice.
//!
//! All choices set out together, as one [`Generation`]. When that fails, and another may do better, what has not
//! been begun is placed again as it was; else each choice that has not ended goes on by itself, from the tokens it
//! has, wherever it finds a place. Its reading stays, so that its client notices nothing but a pause.

use std::{
    mem,
    ops::Range,
    task::{Context, Poll, ready},
};

use baton_process::prefetch::prefetch;
use baton_proto::ApiError;
use smallvec::{SmallVec, smallvec};
use tokio::time::Instant;

use super::reading::{Piece, Reading};
use crate::{
    carry::{Attempts, Failure, Leave, Moved, Replacing},
    cause,
    dispatch::{Completed, Generation, NotSent, Progress},
    fleet::StopReason,
    requests::CardGuard,
};

/// Who works at the answer.
enum Work {
    Generating(Box<Generation>),
    /// The first instances could not be asked, or failed; others are being looked for.
    Replacing(Replacing),
}

/// Choices that are generated together.
struct Strand {
    // Dropped first: legs are cancelled.
    work: Work,
    attempts: Attempts,
    /// Which of the lane's they are.
    choices: Range<usize>,
}

/// How a strand ended.
enum Over {
    Done,
    /// By an attempt's failure.
    Failed(ApiError),
    /// Nobody was found in time who would make another attempt.
    NoPlace(ApiError),
    /// It had better go on elsewhere, if anybody can take it at once: for the sake of this choice of the lane's, which has
    /// outgrown the instance, or because that drains.
    Leaving(Option<usize>),
}

/// See the module. What nearly every request has one of lies in its place: each token is read through all of it.
pub struct Lane {
    /// Those with choices that have not ended.
    strands: SmallVec<[Strand; 1]>,
    /// By choice.
    readings: SmallVec<[Reading; 1]>,
    prompt_tokens: u32,
    deadline: Instant,
    cached_tokens: u32,
    /// An attempt that did not finish has said how many they are; what a later one finds in caches is the request's own.
    cached_settled: bool,
}

impl Lane {
    /// One reading for each choice. What could not even be started is placed once more, while the request's other
    /// prompts go on.
    pub fn new(
        started: Result<Generation, NotSent>,
        mut attempts: Attempts,
        readings: SmallVec<[Reading; 1]>,
    ) -> Result<Self, ApiError> {
        let assignment = attempts.assignment();
        let (prompt_tokens, deadline) = (assignment.prompt.prompt_tokens(), assignment.deadline);
        let work = match started {
            Ok(generation) => Work::Generating(Box::new(generation)),
            Err(not_sent) => Work::Replacing(attempts.again(not_sent.into())?),
        };
        let strands = smallvec![Strand { work, attempts, choices: 0..readings.len() }];
        Ok(Self { strands, readings, prompt_tokens, deadline, cached_tokens: 0, cached_settled: false })
    }

    /// Has the processor fetch what the next tokens touch; with `deeper`, what could be found once that had come.
    pub(super) fn prefetch(&self, deeper: bool) {
        for strand in &self.strands {
            let Work::Generating(generation) = &strand.work else { continue };
            let readings = &self.readings[strand.choices.clone()];
            if !deeper {
                prefetch(&**generation);
                readings.iter().for_each(Reading::prefetch);
            } else if let Some(token) = generation.prefetch()
                && let [reading] = readings
            {
                reading.prefetch_token(token);
            }
        }
    }

    /// Its choices.
    pub(super) fn choices(&self) -> usize {
        self.readings.len()
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
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
        let mut index = 0;
        while index < self.strands.len() {
            match self.poll_strand(index, context, card, pieces) {
                Poll::Ready(Over::Done) => drop(self.strands.remove(index)),
                Poll::Ready(Over::Failed(error)) => {
                    let strand = self.strands.remove(index);
                    let next = self.again(strand, error, pieces)?;
                    self.strands.insert_many(index, next);
                }
                Poll::Ready(Over::NoPlace(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Over::Leaving(outgrown)) => {
                    let strand = self.strands.remove(index);
                    let next = self.move_away(strand, outgrown, card, pieces);
                    self.strands.insert_many(index, next);
                }
                Poll::Pending => index += 1,
            }
        }
        if self.strands.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_strand(
        &mut self,
        index: usize,
        context: &mut Context<'_>,
        card: &CardGuard,
        pieces: &mut [Piece],
    ) -> Poll<Over> {
        let strand = &mut self.strands[index];
        let readings = &mut self.readings[strand.choices.clone()];
        let pieces = &mut pieces[strand.choices.clone()];
        let mut received = false;
        while !readings.iter().all(Reading::finished) {
            let generation = match &mut strand.work {
                Work::Generating(generation) => generation,
                Work::Replacing(replacing) => match ready!(replacing.as_mut().poll(context)) {
                    Ok((generation, placing)) => {
                        card.placed(placing);
                        strand.work = Work::Generating(Box::new(generation));
                        continue;
                    }
                    Err(error) => return Poll::Ready(Over::NoPlace(error)),
                },
            };
            if !mem::replace(&mut received, true) {
                generation.receive(context);
            }
            let Some(progress) = generation.news() else { return Poll::Pending };
            strand.attempts.served(generation);
            let (choice, end) = match progress {
                Progress::Choice { choice, end } => (choice, end),
                Progress::Failed(error) => return Poll::Ready(Over::Failed(error)),
                Progress::Leaving => return Poll::Ready(Over::Leaving(None)),
            };
            let at = choice as usize;
            let (Some(reading), Some(piece)) = (readings.get_mut(at), pieces.get_mut(at)) else { continue };
            if let Some(completed) = take(generation, choice, reading, piece).or(end) {
                if completed.outgrown && !reading.finished() {
                    return Poll::Ready(Over::Leaving(Some(strand.choices.start + at)));
                }
                if !self.cached_settled {
                    self.cached_tokens = self.cached_tokens.max(completed.cached_tokens);
                }
                if !reading.finished() {
                    reading.finish(completed.reason, false, piece);
                }
            }
        }
        Poll::Ready(Over::Done)
    }

    /// Takes in what has come of choices whose attempt ends.
    fn take_rest(&mut self, generation: &mut Generation, choices: Range<usize>, pieces: &mut [Piece]) {
        for (choice, at) in (0..).zip(choices) {
            let (reading, piece) = (&mut self.readings[at], &mut pieces[at]);
            take(generation, choice, reading, piece);
            // Its last token has come, and only the word that it is the last was lost.
            if let Some(reason) = reading.complete().filter(|_| !reading.finished()) {
                reading.finish(reason, false, piece);
            }
        }
        if let Some(said) = generation.cached_tokens().filter(|_| !self.cached_settled) {
            (self.cached_tokens, self.cached_settled) = (said.max(self.cached_tokens), true);
        }
    }

    /// What takes the place of a strand whose instance drains, or has no room for more of a choice: those that others have
    /// been given, where they can have all of it at once; else it stays, and what has outgrown its instance ends there.
    ///
    /// The new legs go out before the old one is cancelled. They come to the instance that drains in this order, too, and so
    /// the old leg holds its blocks until the one that hands them on is there, and the drain, which waits for legs, does not
    /// end between the two. No token is lost or told twice: the new legs go on from those that have been read, and what the
    /// old one says beyond them reaches nobody any more; it comes again, as each follows from those before it.
    fn move_away(
        &mut self,
        strand: Strand,
        outgrown: Option<usize>,
        card: &CardGuard,
        pieces: &mut [Piece],
    ) -> Vec<Strand> {
        let left = strand.choices.clone().filter(|at| !self.readings[*at].finished());
        let consumed = left.map(|at| self.readings[at].consumed()).min();
        let Strand { work: Work::Generating(mut generation), attempts, choices } = strand else {
            return vec![strand];
        };
        let stays = |generation, attempts, choices| {
            vec![Strand { work: Work::Generating(generation), attempts, choices }]
        };
        let worth = |tokens| attempts.is_worth_moving(generation.generates(), tokens);
        if outgrown.is_none() && !consumed.is_some_and(worth) {
            return stays(generation, attempts, choices);
        }
        let leave = if outgrown.is_some() { Leave::Outgrown } else { Leave::Drains };
        self.take_rest(&mut generation, choices.clone(), pieces);
        let readings = &self.readings;
        let next: Option<Vec<_>> = if readings[choices.clone()].iter().all(|of| of.tokens().is_empty()) {
            let moved = attempts.elsewhere(leave, None);
            moved.map(|moved| vec![(moved, attempts.clone(), choices.clone())])
        } else {
            let left = (0..).zip(choices.clone()).filter(|(_, at)| !readings[*at].finished());
            let alone = |(choice, at): (u32, usize)| {
                let attempts = attempts.of_choice(choice, readings[at].tokens());
                // Choices that have not outgrown it may go on where they were.
                let from = match outgrown {
                    None => generation.has_cache(),
                    Some(outgrown) => (at == outgrown).then(|| generation.generates()),
                };
                Some((attempts.elsewhere(leave, from)?, attempts, at..at + 1))
            };
            left.map(alone).collect()
        };
        let Some(next) = next else {
            if let Some(at) = outgrown.filter(|at| !self.readings[*at].finished()) {
                self.readings[at].finish(StopReason::Length, false, &mut pieces[at]);
            }
            return stays(generation, attempts, choices);
        };
        generation.give_up();
        let strand = |(moved, mut attempts, choices): (Moved, Attempts, _)| {
            let Moved { generation, placing, handed_on } = moved;
            attempts.moved(leave, handed_on);
            card.placed(placing);
            Strand { work: Work::Generating(Box::new(generation)), attempts, choices }
        };
        next.into_iter().map(strand).collect()
    }

    /// What takes the place of a strand that has failed, if another attempt may do better.
    fn again(
        &mut self,
        strand: Strand,
        error: ApiError,
        pieces: &mut [Piece],
    ) -> Result<Vec<Strand>, ApiError> {
        let Strand { work, mut attempts, choices } = strand;
        let Work::Generating(mut generation) = work else { return Err(error) };
        attempts.failed(&error, &generation);
        if !cause::may_pass(error.code) {
            return Err(error);
        }
        self.take_rest(&mut generation, choices.clone(), pieces);
        let readings = &self.readings[choices.clone()];
        let carried = attempts.assignment().generated.len();
        let begun = readings.iter().any(|reading| reading.tokens().len() > carried);
        let failure = Failure { error, culprit: generation.culprit().cloned(), begun };
        generation.give_up();
        if readings.iter().all(|reading| reading.tokens().is_empty()) {
            let work = Work::Replacing(attempts.again(failure)?);
            return Ok(vec![Strand { work, attempts, choices }]);
        }
        let left = (0..).zip(choices).filter(|(_, at)| !self.readings[*at].finished());
        let alone = |(choice, at): (u32, usize)| {
            let mut attempts = attempts.of_choice(choice, self.readings[at].tokens());
            let work = Work::Replacing(attempts.again(failure.clone())?);
            Ok(Strand { work, attempts, choices: at..at + 1 })
        };
        left.map(alone).collect()
    }
}

/// Takes in what has come of a choice. If a stop string has matched, the choice has ended.
fn take(
    generation: &mut Generation,
    choice: u32,
    reading: &mut Reading,
    piece: &mut Piece,
) -> Option<Completed> {
    if reading.finished() || !reading.take(generation.fresh(choice)?, piece) {
        return None;
    }
    let completed = generation.stop(choice);
    reading.finish(completed.reason, true, piece);
    Some(completed)
}
