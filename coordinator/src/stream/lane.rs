//! One prompt of a request on its way to its choices: the legs that work at it, and a reading for each choice.
//!
//! All choices set out together, as one [`Generation`]. When that fails, and another may do better, what has not
//! been begun is placed again as it was; else each choice that has not ended goes on by itself, from the tokens it
//! has, wherever it finds a place. So do those of an instance that drains, if others can have them at once, and one that its
//! instance has no more room for. Its reading stays, so that its client notices nothing but a pause.

use std::{
    mem,
    ops::Range,
    task::{Context, Poll, ready},
};

use baton_process::prefetch::prefetch;
use baton_proto::ApiError;
use smallvec::{SmallVec, smallvec};
use tokio::time::Instant;

use super::reading::{Delta, Reading};
use crate::{
    carry::{Attempts, Failure, Leave, Moved, Replacing},
    cause,
    dispatch::{Completed, Generation, NotSent, Progress},
    fleet::{CancelReason, StopReason},
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
    attempts: Box<Attempts>,
    /// Which of the lane's they are.
    choices: Range<usize>,
    /// Those of them that have outgrown their instance, and gone on by themselves.
    away: SmallVec<[usize; 1]>,
    /// Such a choice alone.
    short: Option<Short>,
}

/// A choice that has outgrown its instance: complete as it is, if nobody brings more of it.
#[derive(Debug, Clone, Copy)]
struct Short {
    /// Which of the lane's it is.
    at: usize,
    tokens: usize,
}

impl Strand {
    fn new(work: Work, attempts: impl Into<Box<Attempts>>, choices: Range<usize>) -> Self {
        Self { work, attempts: attempts.into(), choices, away: SmallVec::new(), short: None }
    }

    /// Of choices that leave an instance and have been given to others.
    fn moved(
        leave: Leave<'_>,
        moved: Moved,
        mut attempts: Attempts,
        choices: Range<usize>,
        card: &CardGuard,
    ) -> Self {
        let Moved { generation, placing, handed_on } = moved;
        attempts.moved(leave, handed_on);
        card.placed(placing);
        Self::new(Work::Generating(Box::new(generation)), attempts, choices)
    }

    /// Those that have not ended: by their numbers here, and in the lane.
    fn open(&self, readings: &[Reading]) -> impl Iterator<Item = (u32, usize)> {
        let open = |(_, at): &(u32, usize)| !readings[*at].finished() && !self.away.contains(at);
        (0..).zip(self.choices.clone()).filter(open)
    }
}

/// What became of a strand.
enum Over {
    Done,
    /// One of its choices goes on by itself, behind it.
    Split,
    /// By an attempt's failure.
    Failed(ApiError),
    /// Nobody was found in time who would make another attempt.
    NoPlace(ApiError),
    /// It had better go on elsewhere, if anybody can take it at once; see [`Progress::Leaving`].
    Leaving {
        begun: bool,
    },
}

/// See the module. Nearly every request has one strand and one reading, and every token passes through both: they are stored
/// inline.
pub struct Lane {
    /// Those with choices that have not ended.
    strands: SmallVec<[Strand; 1]>,
    /// By choice.
    readings: SmallVec<[Reading; 1]>,
    prompt_tokens: u32,
    deadline: Instant,
    /// No more than the prompt has, whatever instances say.
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
            Err(not_sent) => {
                let again = attempts.again(not_sent.into())?;
                Work::Replacing(attempts.replacing(again))
            }
        };
        let strands = smallvec![Strand::new(work, attempts, 0..readings.len())];
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

    /// Ends what is left of it, and tells the instances why.
    pub fn give_up(self, why: CancelReason) {
        let generating = self.strands.into_iter().filter_map(|strand| match strand.work {
            Work::Generating(generation) => Some(generation),
            Work::Replacing(_) => None,
        });
        generating.for_each(|generation| generation.give_up(why));
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

    /// Takes in all that has come, into the choices' deltas. `Pending`: more is to come and `context` will be woken.
    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        card: &CardGuard,
        deltas: &mut [Delta],
    ) -> Poll<Result<(), ApiError>> {
        let mut index = 0;
        while index < self.strands.len() {
            match self.poll_strand(index, context, card, deltas) {
                Poll::Ready(Over::Done) => drop(self.strands.remove(index)),
                Poll::Ready(Over::Split) => {}
                Poll::Ready(Over::Failed(error)) => {
                    let strand = self.strands.remove(index);
                    let short = strand.short;
                    match self.again(strand, error, deltas) {
                        Ok(next) => self.strands.insert_many(index, next),
                        Err(error) => self.end_short(short, error, deltas)?,
                    }
                }
                Poll::Ready(Over::NoPlace(error)) => {
                    let short = self.strands.remove(index).short;
                    self.end_short(short, error, deltas)?;
                }
                Poll::Ready(Over::Leaving { begun }) => {
                    let strand = self.strands.remove(index);
                    let next = self.move_away(strand, begun, card, deltas);
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
        deltas: &mut [Delta],
    ) -> Poll<Over> {
        let strand = &mut self.strands[index];
        let mut received = false;
        while strand.open(&self.readings).next().is_some() {
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
                Progress::Leaving { begun } => return Poll::Ready(Over::Leaving { begun }),
            };
            let at = strand.choices.start + choice as usize;
            let (Some(reading), Some(delta)) = (self.readings.get_mut(at), deltas.get_mut(at)) else {
                continue;
            };
            let Some(completed) = take(generation, choice, reading, delta).or(end) else { continue };
            if !self.cached_settled {
                let said = completed.cached_tokens.min(self.prompt_tokens);
                self.cached_tokens = self.cached_tokens.max(said);
            }
            if reading.finished() {
                continue;
            }
            if let Some(side) = completed.outgrown {
                let leave = Leave::Outgrown { by: generation.instance(side) };
                let attempts = strand.attempts.of_choice(choice, reading.tokens());
                if let Some(moved) = attempts.elsewhere(leave) {
                    let short = Some(Short { at, tokens: reading.tokens().len() });
                    let next = Strand { short, ..Strand::moved(leave, moved, attempts, at..at + 1, card) };
                    strand.away.push(at);
                    self.cached_settled = true;
                    self.strands.insert(index + 1, next);
                    return Poll::Ready(Over::Split);
                }
                generation.ended_here(choice);
            }
            reading.finish(completed.reason, false, delta);
        }
        Poll::Ready(Over::Done)
    }

    /// Takes in what has come of choices whose attempt ends.
    fn take_rest(&mut self, generation: &mut Generation, open: &[(u32, usize)], deltas: &mut [Delta]) {
        for &(choice, at) in open {
            let (reading, delta) = (&mut self.readings[at], &mut deltas[at]);
            take(generation, choice, reading, delta);
            // Its last token has come, and only the word that it is the last was lost.
            if let Some(reason) = reading.complete().filter(|_| !reading.finished()) {
                reading.finish(reason, false, delta);
            }
        }
        if let Some(said) = generation.cached_tokens().filter(|_| !self.cached_settled) {
            let said = said.min(self.prompt_tokens);
            (self.cached_tokens, self.cached_settled) = (said.max(self.cached_tokens), true);
        }
    }

    /// Nobody goes on with a choice. If it has outgrown its instance, and come no further since, it is complete as it is.
    fn end_short(
        &mut self,
        ends: Option<Short>,
        error: ApiError,
        deltas: &mut [Delta],
    ) -> Result<(), ApiError> {
        let short = ends.filter(|short| self.readings[short.at].tokens().len() == short.tokens);
        let Some(Short { at, .. }) = short else { return Err(error) };
        self.readings[at].finish(StopReason::Length, false, &mut deltas[at]);
        Ok(())
    }

    /// What takes the place of a strand whose instance drains: those that others have been given, where they can have all of
    /// it at once; else it stays.
    ///
    /// The new legs go out before the old one is cancelled. They come to the instance that drains in this order, too, and so
    /// the old leg holds its blocks until the one that hands them on is there, and the drain, which waits for legs, does not
    /// end between the two. No token is lost or told twice: the new legs go on from those that have been read, and what the
    /// old one says beyond them reaches nobody any more; it comes again, as each follows from those before it.
    fn move_away(
        &mut self,
        mut strand: Strand,
        begun: bool,
        card: &CardGuard,
        deltas: &mut [Delta],
    ) -> Vec<Strand> {
        let open: Vec<_> = strand.open(&self.readings).collect();
        let consumed = open.iter().map(|(_, at)| self.readings[*at].consumed()).min();
        let Work::Generating(generation) = &mut strand.work else { return vec![strand] };
        let worth = |tokens| strand.attempts.is_worth_moving(generation, begun, tokens);
        if !consumed.is_some_and(worth) {
            return vec![strand];
        }
        self.take_rest(generation, &open, deltas);
        if open.iter().all(|(_, at)| self.readings[*at].finished()) {
            if let Work::Generating(generation) = strand.work {
                generation.give_up(CancelReason::AnswerComplete);
            }
            return Vec::new();
        }
        let (readings, attempts, short) = (&self.readings, &strand.attempts, strand.short);
        let (from, has_cache) = (generation.pair().generates(), generation.has_cache());
        let leave = match begun {
            true => Leave::Drains { from, has_cache },
            false => Leave::Waits { on: generation.pair().prefill },
        };
        let mut next = Vec::new();
        if readings[strand.choices.clone()].iter().all(Reading::is_empty) {
            let Some(moved) = attempts.elsewhere(leave) else {
                return vec![strand];
            };
            next.push((moved, (**attempts).clone(), strand.choices.clone()));
        } else {
            for &(choice, at) in open.iter().filter(|(_, at)| !readings[*at].finished()) {
                let attempts = attempts.of_choice(choice, readings[at].tokens());
                let Some(moved) = attempts.elsewhere(leave) else {
                    next.into_iter().for_each(|(moved, ..)| moved.generation.give_up(CancelReason::NotMoved));
                    return vec![strand];
                };
                next.push((moved, attempts, at..at + 1));
            }
        }
        let next = next.into_iter().map(|(moved, attempts, choices)| Strand {
            short,
            ..Strand::moved(leave, moved, attempts, choices, card)
        });
        let next = next.collect();
        if let Work::Generating(generation) = strand.work {
            generation.give_up(CancelReason::PlacedAgain);
        }
        next
    }

    /// What takes the place of a strand that has failed, if another attempt may do better.
    fn again(
        &mut self,
        strand: Strand,
        error: ApiError,
        deltas: &mut [Delta],
    ) -> Result<Vec<Strand>, ApiError> {
        let open: Vec<_> = strand.open(&self.readings).collect();
        let Strand { work: Work::Generating(mut generation), mut attempts, choices, short, .. } = strand
        else {
            return Err(error);
        };
        attempts.failed(&error, &generation);
        self.take_rest(&mut generation, &open, deltas);
        if !cause::may_pass(error.code) && open.iter().any(|(_, at)| !self.readings[*at].finished()) {
            generation.give_up(CancelReason::RequestFailed);
            return Err(error);
        }
        let carried = attempts.assignment().generated.len();
        let readings = &self.readings[choices.clone()];
        let begun = readings.iter().any(|reading| reading.tokens().len() > carried);
        let lasted = generation.placed().elapsed();
        let failure = Failure { error, culprit: generation.culprit().cloned(), begun, lasted };
        let mut left = open.iter().filter(|(_, at)| !self.readings[*at].finished()).peekable();
        if left.peek().is_none() {
            generation.give_up(CancelReason::AnswerComplete);
            return Ok(Vec::new());
        }
        let again = attempts.again(failure);
        let goes_on = again.is_ok();
        generation.give_up(if goes_on { CancelReason::PlacedAgain } else { CancelReason::RequestFailed });
        let again = again?;
        let replaced = |mut attempts: Attempts, choices| {
            let work = Work::Replacing(attempts.replacing(again.clone()));
            Strand { short, ..Strand::new(work, attempts, choices) }
        };
        if readings.iter().all(Reading::is_empty) {
            return Ok(vec![replaced(*attempts, choices)]);
        }
        let alone = |&(choice, at): &(u32, usize)| {
            replaced(attempts.of_choice(choice, self.readings[at].tokens()), at..at + 1)
        };
        Ok(left.map(alone).collect())
    }
}

/// Takes in what has come of a choice. If a stop string has matched, the choice has ended.
fn take(
    generation: &mut Generation,
    choice: u32,
    reading: &mut Reading,
    delta: &mut Delta,
) -> Option<Completed> {
    if reading.finished() || !reading.take(generation.fresh(choice)?, delta) {
        return None;
    }
    let completed = generation.stop(choice);
    reading.finish(completed.reason, true, delta);
    Some(completed)
}
