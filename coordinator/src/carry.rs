//! How a request goes on elsewhere when the instance that has it fails, is lost, refuses it, drains or has no more room.
//!
//! Each prompt of a request has [`Attempts`], and so has each of its choices that goes on alone; [`crate::stream`] says what
//! became of one and is given the next, or nothing if there have been too many. Another attempt goes on from the tokens
//! that are there. Who is left out meanwhile [`crate::fleet::breakers`] says, and how often instances may fail a model's
//! requests [`crate::retry_budget`].

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode, InstanceId};
use baton_schedule::{Among, board::Way};
use futures::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::{
    cause,
    config::CarryConfig,
    dispatch::{Assignment, Generation, NotSent, deadline_passed},
    fleet::Attempt,
    models::Model,
    place::Placer,
    requests::Placing,
    retry_budget::{Grant, Share},
};

/// How many attempts in a row may fail without a token before the failure is told.
const FRUITLESS_MOST: u32 = 2;
/// How many may be lost with their instances without a token, counted by themselves: instances die one after the other, and
/// a coordinator that was cut off loses all of them.
const LOST_MOST: u32 = 4;
/// How many may fail in all, or be outgrown: a request may be what kills the instances that it is placed on.
const FAILURES_MOST: u32 = 8;
/// How many instances are asked to take on what another has no room for, where they cannot be sent anything.
const OUTGROWN_TRIES: u32 = 3;
/// Before a request is given to others: one instance may say that another is lost before this coordinator notices. Twice as
/// long after each that was lost in a row.
const PAUSE: Duration = Duration::from_millis(50);
/// Before one that was refused, or could not be sent, is; twice as long each time.
const PAUSE_LEAST: Duration = Duration::from_millis(5);
const PAUSE_MOST: Duration = Duration::from_secs(1);

/// A request on its way to another place.
pub type Replacing = BoxFuture<'static, Result<(Generation, Placing), ApiError>>;

/// Why a request leaves the place it has.
#[derive(Debug, Clone)]
pub struct Failure {
    pub error: ApiError,
    /// Who failed it, if that is known: others are asked first.
    pub culprit: Option<InstanceId>,
    /// That attempt has brought a token.
    pub begun: bool,
    /// How long after it was placed that was noticed.
    pub lasted: Duration,
}

impl From<NotSent> for Failure {
    /// It was never begun there.
    fn from(NotSent { instance, error }: NotSent) -> Self {
        Self { error, culprit: Some(instance), begun: false, lasted: Duration::ZERO }
    }
}

/// Leave to give a request to others after a failure.
#[derive(Debug, Clone)]
pub struct Again {
    failure: Failure,
    /// Before that.
    pause: Duration,
}

/// Why a request leaves an instance that has not failed it.
#[derive(Debug, Clone, Copy)]
pub enum Leave<'a> {
    /// The instance that generates drains. It hands on the cache of all of it, if it has that.
    Drains { from: &'a InstanceId, has_cache: bool },
    /// The instance drains where its prompt waits.
    Waits { on: &'a InstanceId },
    /// The instance has no room for more of the answer: its KV cache, or the context that it was started with, is full.
    Outgrown { by: &'a InstanceId },
}

impl Leave<'_> {
    /// As receipts and metrics have it.
    fn error(self) -> ApiError {
        match self {
            Self::Drains { .. } | Self::Waits { .. } => {
                ApiError::new(ErrorCode::Unavailable, "the instance drains")
            }
            Self::Outgrown { .. } => {
                ApiError::new(ErrorCode::KvExhausted, "the instance has no room for more of the answer")
            }
        }
    }
}

/// A request that others have been given.
pub struct Moved {
    pub generation: Generation,
    pub placing: Placing,
    /// Whoever had it is asked for its cache.
    pub handed_on: bool,
}

/// What it takes to give a request to others, and where it is told how its attempts go.
#[derive(Clone)]
pub struct Attempts {
    placer: Arc<Placer>,
    carry: CarryConfig,
    model: Arc<Model>,
    /// Of the request: its other prompts and choices may fail by the same fault.
    share: Arc<Mutex<Share>>,
    assignment: Assignment,
    /// Attempts that failed.
    failed: u32,
    /// Failed by a fault since the last attempt that brought a token.
    fruitless: u32,
    /// Lost with their instances since then.
    lost: u32,
    /// Refusals since the last attempt, and when the first of them was.
    refused: u32,
    refused_since: Option<Instant>,
    /// How often it has outgrown an instance.
    outgrown: u32,
    /// Since when the answer, which had begun, waits for its next token.
    paused: Option<Instant>,
}

impl Attempts {
    /// `assignment` has been given to a first place. `share` is what the request has of the model's retry budget.
    pub fn new(
        placer: Arc<Placer>,
        carry: CarryConfig,
        model: Arc<Model>,
        share: Arc<Mutex<Share>>,
        assignment: Assignment,
    ) -> Self {
        Self {
            placer,
            carry,
            model,
            share,
            assignment,
            failed: 0,
            fruitless: 0,
            lost: 0,
            refused: 0,
            refused_since: None,
            outgrown: 0,
            paused: None,
        }
    }

    /// What they are to do.
    pub fn assignment(&self) -> &Assignment {
        &self.assignment
    }

    /// Takes note of who has brought the first token of an attempt.
    pub fn served(&mut self, generation: &mut Generation) {
        let placed = generation.placed();
        for instance in generation.take_served() {
            let now = Instant::now();
            // Who refuses it later, when it has to leave, is waited for anew.
            (self.refused, self.refused_since) = (0, None);
            self.placer.breakers.success(instance, placed, now);
            if let Some(since) = self.paused.take() {
                self.model.counts.migration_pause.observe((now - since).as_secs_f64());
            }
        }
    }

    /// An attempt has failed.
    pub fn failed(&self, error: &ApiError, generation: &Generation) {
        if let Some(culprit) = generation.culprit().filter(|_| cause::is_fault(error.code)) {
            let attempt = Attempt { placed: generation.placed(), pair: generation.pair() };
            self.placer.breakers.fault(attempt, culprit, error, Instant::now());
        }
    }

    /// Whether an answer that has so many tokens is expected to take so long yet on an instance which drains that it had
    /// better go on elsewhere; of one that is not `begun`, whether the queue takes so long that its prompt is in.
    pub fn is_worth_moving(&self, generation: &Generation, begun: bool, tokens: u32) -> bool {
        let (board, most) = (&self.placer.board, self.assignment.prompt.sampling.max_tokens);
        let expected = match begun {
            true => board.left(generation.pair().generates(), tokens, most),
            false => board.queue(generation.pair().prefill),
        };
        expected > self.carry.move_after
    }

    /// Gives it to others, if any can take it at once.
    ///
    /// What an instance that drains hands on others would compute again, but for what they have of the prompt. It may refuse,
    /// and by then nobody works at it; so it is asked only where there are others. What it refuses goes on like what anybody
    /// does.
    pub fn elsewhere(&self, leave: Leave<'_>) -> Option<Moved> {
        match leave {
            Leave::Drains { from, has_cache } => {
                let can_serve = || self.placer.board.can_serve(&self.model.served.revision).is_ok();
                let hand_on = || self.begin(leave, &[], Among::PeersOf(from))?.ok();
                let handed_on = if has_cache && can_serve() { hand_on() } else { None };
                handed_on.or_else(|| self.begin(leave, std::slice::from_ref(from), Among::All)?.ok())
            }
            Leave::Waits { on } => self.begin(leave, std::slice::from_ref(on), Among::All)?.ok(),
            Leave::Outgrown { by } => {
                let mut avoid = vec![by.clone()];
                for _ in 0..OUTGROWN_TRIES.min(FAILURES_MOST.saturating_sub(self.outgrown)) {
                    match self.begin(leave, &avoid, Among::All)? {
                        Ok(moved) => return Some(moved),
                        Err(NotSent { instance, .. }) => avoid.push(instance),
                    }
                }
                None
            }
        }
    }

    /// Begins with whoever is best; `None`: with nobody but those to avoid.
    fn begin(
        &self,
        leave: Leave<'_>,
        avoid: &[InstanceId],
        among: Among<'_>,
    ) -> Option<Result<Moved, NotSent>> {
        let Self { placer, model, assignment, .. } = self;
        let booked = placer.book(&model.served, assignment.asked(), avoid, among).ok()?;
        let pair = booked.booking.credit.pair();
        // The board takes them where there is nobody else.
        if pair.each().any(|id| avoid.contains(id)) {
            return None;
        }
        // Its prompt is in both queues now.
        let is_later = |on| placer.board.queue(pair.prefill) > placer.board.queue(on);
        if matches!(leave, Leave::Waits { on } if is_later(on)) {
            return None;
        }
        let placing = Placing::new(&booked.booking, Some(leave.error()), Duration::ZERO);
        let handed_on = booked.booking.way == Way::HandedOn;
        let started = placer.start(booked, assignment.clone());
        Some(started.map(|generation| Moved { generation, placing, handed_on }))
    }

    /// Takes note that it goes on elsewhere.
    pub fn moved(&mut self, leave: Leave<'_>, handed_on: bool) {
        self.pauses();
        self.outgrown += u32::from(matches!(leave, Leave::Outgrown { .. }));
        let Self { model, assignment, .. } = &*self;
        let (request, generated, why) = (&assignment.request, assignment.generated.len(), leave.error());
        tracing::info!(%request, generated, handed_on, %why, "the request leaves an instance");
        self.count_migration(why.code);
        if handed_on && generated > 0 {
            model.counts.hand_ons.inc();
        }
    }

    /// For one of the choices alone, which goes on from these tokens.
    #[must_use]
    pub fn of_choice(&self, choice: u32, generated: &[u32]) -> Self {
        let mut own = self.clone();
        let sampling = &mut own.assignment.prompt.sampling;
        (sampling.seed, sampling.choices) = (sampling.seed.wrapping_add(choice.into()), 1);
        own.assignment.generated = generated.into();
        own
    }

    /// Takes note of a failure, of however many choices: may the request be given to others? Its error is the answer if there
    /// have been too many, or if the model's budget for instances' faults is spent.
    pub fn again(&mut self, failure: Failure) -> Result<Again, ApiError> {
        let code = failure.error.code;
        let is_refusal = cause::is_refusal(code) && !failure.begun;
        if is_refusal && self.refused_since.is_some() && failure.lasted > PAUSE_MOST {
            // Whoever kept it for so long did not refuse it; that may happen so often.
            (self.refused, self.refused_since) = (0, None);
            self.failed += 1;
        }
        let pause = if is_refusal && self.failed < FAILURES_MOST {
            self.refused += 1;
            let since = *self.refused_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= self.carry.patience {
                return Err(failure.error);
            }
            PAUSE_LEAST.saturating_mul(1 << self.refused.min(16)).min(PAUSE_MOST)
        } else {
            (self.refused, self.refused_since) = (0, None);
            self.failed += 1;
            match (failure.begun, cause::is_loss(code)) {
                (true, _) => (self.fruitless, self.lost) = (0, 0),
                (false, true) => self.lost += 1,
                (false, false) => self.fruitless += 1,
            }
            let too_many = self.fruitless >= FRUITLESS_MOST || self.lost >= LOST_MOST;
            if self.failed >= FAILURES_MOST || too_many {
                return Err(failure.error);
            }
            PAUSE * (1 << self.lost.saturating_sub(1))
        };
        if self.is_late() {
            return Err(deadline_passed());
        }
        if cause::is_fault(code) && !self.is_granted(failure.lasted) {
            return Err(failure.error);
        }
        Ok(Again { failure, pause })
    }

    /// Whether the budget has one for the fault by which an attempt failed that lasted so long.
    fn is_granted(&self, lasted: Duration) -> bool {
        let now = Instant::now();
        let placed = now.checked_sub(lasted).unwrap_or(now);
        match self.share.lock().take(&mut self.model.retry_budget.lock(), placed, now) {
            Grant::Granted => true,
            Grant::Refused { first } => {
                self.model.counts.not_placed_again.inc_by(first.into());
                false
            }
        }
    }

    /// Gives it to others, as soon as an instance can take it; the error is the answer if none can within the time. A pause
    /// comes first, which ends when the fleet changes; a refusal costs no more than that.
    pub fn replacing(&mut self, again: Again) -> Replacing {
        self.pauses();
        self.clone().go_on(again).boxed()
    }

    /// The next token is waited for longer than for any other, if there have been any.
    fn pauses(&mut self) {
        if !self.assignment.generated.is_empty() {
            self.paused.get_or_insert_with(Instant::now);
        }
    }

    /// Whether it must have been answered by now.
    fn is_late(&self) -> bool {
        self.assignment.deadline <= Instant::now()
    }

    fn unless_late(&self, error: ApiError) -> ApiError {
        if self.is_late() { deadline_passed() } else { error }
    }

    /// Gives it to others, after a pause or the next change of the fleet.
    async fn go_on(self, again: Again) -> Result<(Generation, Placing), ApiError> {
        let Self { placer, model, assignment, .. } = &self;
        let Again { failure: Failure { mut error, culprit, .. }, mut pause } = again;
        // Who failed it, and then who could not be asked.
        let mut avoid: Vec<InstanceId> = culprit.into_iter().collect();
        let mut longer = PAUSE_LEAST;
        let deadline = (Instant::now() + self.carry.patience + pause).min(assignment.deadline);
        let mut changes = placer.board.changes();
        loop {
            let _ = timeout_at(deadline.min(Instant::now() + pause), changes.changed()).await;
            let booked = placer.book_by(deadline, &model.served, assignment.asked(), &avoid).await;
            let Ok(booked) = booked else { return Err(self.unless_late(error)) };
            let placing = Placing::new(&booked.booking, Some(error.clone()), Duration::ZERO);
            match placer.start(booked, assignment.clone()) {
                Ok(generation) => {
                    let (request, generated) = (&assignment.request, assignment.generated.len());
                    tracing::info!(%request, generated, %error, "the request goes on elsewhere");
                    self.count_migration(error.code);
                    return Ok((generation, placing));
                }
                // It has just left, or takes nothing in at the moment.
                Err(NotSent { instance, error: refused }) if Instant::now() < deadline => {
                    if !avoid.contains(&instance) {
                        avoid.push(instance);
                    }
                    longer = (longer * 2).min(PAUSE_MOST);
                    // All requests of an instance that has left come here at once.
                    (error, pause) = (refused, longer.mul_f64(rand::random_range(0.5..1.0)));
                }
                Err(NotSent { error: refused, .. }) => return Err(self.unless_late(refused)),
            }
        }
    }

    /// An answer goes on elsewhere, if it has begun.
    fn count_migration(&self, reason: ErrorCode) {
        if !self.assignment.generated.is_empty() {
            self.model.counts.migrated(reason.name());
        }
    }
}

#[cfg(test)]
mod tests;
