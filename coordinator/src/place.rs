//! Finds a place for a request, waits a little for one, and finds another when the first fails.
//!
//! Called by [`crate::serve`] for the first place and by [`crate::stream`], through [`Attempts`], for the next. Leaves
//! the choice to [`baton_schedule`] and the sending to [`crate::dispatch`].

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode, InstanceId};
use baton_schedule::{
    NoPlace, Prompt,
    board::{Board, Booking},
    chains::Chains,
};
use futures::{FutureExt, future::BoxFuture};
use tokio::time::{Instant, timeout_at};

use crate::{
    carry::{Attempt, Breakers, is_fault},
    dispatch::{Assignment, Generation, NotSent},
    fleet::keeper::Links,
    handoffs::Handoffs,
    metrics::{Metrics, MigrationLabels, ModelLabel},
    models::Model,
    prepare::{PreparedPrompt, Sampling, Served},
    requests::Placing,
};

/// How many attempts in a row may fail without a token before the failure is told.
const FRUITLESS_MOST: u32 = 2;
/// How many may be lost with their instances without a token, counted by themselves: instances die one after the other, and
/// a coordinator that was cut off loses all of them.
const LOST_MOST: u32 = 4;
/// How many may fail in all: a request may be what kills the instances that it is placed on.
const FAILURES_MOST: u32 = 8;
/// Before a request is placed again: one instance may say that another is lost before this coordinator notices. Twice as
/// long after each that was lost in a row.
const PAUSE: Duration = Duration::from_millis(50);
/// Before one that was refused is placed again; twice as long each time.
const PAUSE_LEAST: Duration = Duration::from_millis(5);
const PAUSE_MOST: Duration = Duration::from_secs(1);

/// What is to be computed before the next token.
#[derive(Clone, Copy)]
struct Whole<'a> {
    prompt: &'a [u32],
    /// Of the prompt.
    chains: &'a Chains,
    /// Elsewhere.
    generated: &'a [u32],
}

impl<'a> Whole<'a> {
    fn of(prompt: &'a PreparedPrompt) -> Self {
        Self { prompt: &prompt.tokens, chains: &prompt.chains, generated: &[] }
    }

    fn of_assignment(assignment: &'a Assignment) -> Self {
        let Assignment { prompt, chains, generated, .. } = assignment;
        Self { prompt, chains, generated }
    }
}

/// Where a place is looked for.
#[derive(Clone, Copy)]
enum Among<'a> {
    /// Those that have room.
    Roomy,
    All,
    /// Those to which this one, which drains, can hand on what it has.
    PeersOf(&'a InstanceId),
}

/// What places are found with.
pub struct Placer {
    pub board: Arc<Board>,
    pub links: Arc<Links>,
    pub handoffs: Arc<Handoffs>,
    pub metrics: Arc<Metrics>,
    pub breakers: Arc<Breakers>,
    /// How long a new request waits for an instance that can take it.
    pub placement_timeout: Duration,
    /// How long one that has had a place before does.
    pub carry_patience: Duration,
    /// What takes longer on an instance that drains goes on elsewhere.
    pub move_after: Duration,
}

impl Placer {
    /// Books each prompt of a request for this model as soon as an instance can take it: one that is being started again
    /// is worth a short wait. However many prompts there are, all of them together wait no longer than one would, nor past
    /// `deadline`.
    pub async fn book(
        &self,
        served: &Served,
        prompts: &[PreparedPrompt],
        deadline: Instant,
    ) -> Result<Vec<Booking>, NoPlace> {
        let deadline = deadline.min(Instant::now() + self.placement_timeout);
        let mut bookings = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let (whole, sampling) = (Whole::of(prompt), &prompt.sampling);
            bookings.push(self.book_by(deadline, served, whole, sampling, &[]).await?);
        }
        Ok(bookings)
    }

    /// Books each prompt of a new request if one of the instances has room for the first; [`NoPlace::Busy`]: none has.
    pub fn book_within(&self, served: &Served, prompts: &[PreparedPrompt]) -> Result<Vec<Booking>, NoPlace> {
        let mut bookings = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            // Its other prompts are not to wait for its first.
            let among = if bookings.is_empty() { Among::Roomy } else { Among::All };
            bookings.push(self.book_now(served, Whole::of(prompt), &prompt.sampling, &[], among)?);
        }
        Ok(bookings)
    }

    /// Dispatches what has been booked.
    pub fn start(&self, booking: Booking, assignment: Assignment) -> Result<Generation, NotSent> {
        Generation::start(&self.links, &self.handoffs, booking, assignment)
    }

    async fn book_by(
        &self,
        deadline: Instant,
        served: &Served,
        whole: Whole<'_>,
        sampling: &Sampling,
        avoid: &[InstanceId],
    ) -> Result<Booking, NoPlace> {
        let mut changes = self.board.changes();
        loop {
            changes.borrow_and_update();
            match self.book_now(served, whole, sampling, avoid, Among::All) {
                Err(reason) if reason.may_pass() => match timeout_at(deadline, changes.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(reason),
                },
                settled => return settled,
            }
        }
    }

    /// Tokens that were generated elsewhere are computed as the prompt's are.
    fn book_now(
        &self,
        served: &Served,
        whole: Whole<'_>,
        sampling: &Sampling,
        avoid: &[InstanceId],
        among: Among<'_>,
    ) -> Result<Booking, NoPlace> {
        let generated = whole.generated.len() as u32;
        let asked = (sampling.max_tokens.saturating_sub(generated).max(1), sampling.choices);
        let tokens = (whole.prompt.len() as u32).saturating_add(generated);
        let chains = whole.chains.say(&self.board.caches.dialects(&served.revision), whole.generated);
        let prompt = Prompt { tokens, chains: &chains };
        let (board, revision) = (&self.board, &served.revision);
        let place = |avoid: &[InstanceId]| match among {
            Among::Roomy => board.place_within(prompt, asked, revision, avoid),
            Among::All => board.place(prompt, asked, revision, avoid),
            Among::PeersOf(from) => board.place_handed_on(from, prompt, asked, revision, avoid),
        };
        let booking = self.breakers.place(avoid, Instant::now(), place)?;
        tracing::debug!(placement = ?booking.placement, receipt = ?booking.receipt, "placed");
        Ok(booking)
    }

    fn count_migration(&self, reason: ErrorCode, served: &Served) {
        let (reason, model) = (reason.name(), served.name.clone());
        self.metrics.migrations.get_or_create(&MigrationLabels { reason, model }).inc();
    }

    /// Places a request again, after a pause or the next change of the fleet.
    async fn place_again(
        self: Arc<Self>,
        model: Arc<Model>,
        assignment: Assignment,
        failure: Failure,
        mut pause: Duration,
    ) -> Result<(Generation, Placing), ApiError> {
        let Failure { mut error, culprit, .. } = failure;
        // Who failed it, and then who could not be asked.
        let mut avoid: Vec<InstanceId> = culprit.into_iter().collect();
        let deadline = (Instant::now() + self.carry_patience + pause).min(assignment.deadline);
        let mut changes = self.board.changes();
        loop {
            let _ = timeout_at(deadline.min(Instant::now() + pause), changes.changed()).await;
            let (served, sampling) = (&model.served, &assignment.sampling);
            let whole = Whole::of_assignment(&assignment);
            let booked = self.book_by(deadline, served, whole, sampling, &avoid).await;
            let Ok(booking) = booked else { return Err(error) };
            let placing = Placing::new(&booking, Some(error.clone()), Duration::ZERO);
            match self.start(booking, assignment.clone()) {
                Ok(generation) => {
                    let (request, generated) = (&assignment.request, assignment.generated.len());
                    tracing::info!(%request, generated, %error, "the request goes on elsewhere");
                    if generated > 0 {
                        self.count_migration(error.code, served);
                    }
                    return Ok((generation, placing));
                }
                // It has just left, or takes nothing in at the moment.
                Err(NotSent { instance, error: refused }) if Instant::now() < deadline => {
                    if !avoid.contains(&instance) {
                        avoid.push(instance);
                    }
                    (error, pause) = (refused, PAUSE_LEAST * 2);
                }
                Err(NotSent { error: refused, .. }) => return Err(refused),
            }
        }
    }
}

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
}

impl From<NotSent> for Failure {
    /// It was never begun there.
    fn from(NotSent { instance, error }: NotSent) -> Self {
        Self { error, culprit: Some(instance), begun: false }
    }
}

impl Failure {
    /// Whether nothing was tried: an instance that drains, say, or has another role by now, does not take the request.
    fn is_refusal(&self) -> bool {
        let refused =
            matches!(self.error.code, ErrorCode::Unavailable | ErrorCode::StaleEpoch | ErrorCode::QueueFull);
        refused && !self.begun
    }
}

/// A request that others have been given.
pub struct Moved {
    pub generation: Generation,
    pub placing: Placing,
    /// Whoever had it is asked for its cache.
    pub handed_on: bool,
}

/// What it takes to place a request again, and where it is told how its attempts go.
#[derive(Clone)]
pub struct Attempts {
    placer: Arc<Placer>,
    model: Arc<Model>,
    assignment: Assignment,
    /// Attempts that failed, and those since the last that brought a token: by a fault, or with an instance.
    failed: u32,
    fruitless: u32,
    lost: u32,
    /// Refusals since the last attempt.
    refused: u32,
}

impl Attempts {
    /// `assignment` has been given to a first place.
    pub fn new(placer: Arc<Placer>, model: Arc<Model>, assignment: Assignment) -> Self {
        model.budget.lock().request();
        Self { placer, model, assignment, failed: 0, fruitless: 0, lost: 0, refused: 0 }
    }

    /// What is being placed.
    pub fn assignment(&self) -> &Assignment {
        &self.assignment
    }

    /// Takes note of who has brought the first token of an attempt.
    pub fn served(&self, generation: &mut Generation) {
        let (placed, now) = (generation.placed(), Instant::now());
        let instances = generation.take_served();
        instances.for_each(|instance| self.placer.breakers.success(instance, placed, now));
    }

    /// An attempt has failed.
    pub fn failed(&self, error: &ApiError, generation: &Generation) {
        if let Some(culprit) = generation.culprit().filter(|_| is_fault(error)) {
            let attempt = Attempt { placed: generation.placed(), pair: generation.pair() };
            self.placer.breakers.fault(attempt, culprit, error, Instant::now());
        }
    }

    /// Whether an answer that has so many tokens is expected to take so long yet on an instance which drains that it had
    /// better go on elsewhere.
    pub fn is_worth_moving(&self, instance: &InstanceId, tokens: u32) -> bool {
        let most = self.assignment.sampling.max_tokens;
        self.placer.board.left(instance, tokens, most) > self.placer.move_after
    }

    /// Gives it to others, if any can take it at once. `from`, if it has the cache of all of it, is to hand that on: others
    /// would compute it again, but for what they have of the prompt. It may refuse, and by then nobody works at it; so it is
    /// asked only where there are others. What it refuses is placed again like what anybody does.
    pub fn elsewhere(&self, from: Option<&InstanceId>) -> Option<Moved> {
        let Self { placer, model, assignment, .. } = self;
        let served = &model.served;
        let book = |among| {
            placer.book_now(served, Whole::of_assignment(assignment), &assignment.sampling, &[], among)
        };
        let begin = |among| {
            let booking = book(among).ok()?;
            let drains = ApiError::new(ErrorCode::Unavailable, "the instance that generates drains");
            let placing = Placing::new(&booking, Some(drains), Duration::ZERO);
            let handed_on = booking.handed_on;
            let generation = placer.start(booking, assignment.clone()).ok()?;
            Some(Moved { generation, placing, handed_on })
        };
        let from = from.filter(|_| placer.board.can_serve(&served.revision).is_ok());
        let begun = from.and_then(|from| begin(Among::PeersOf(from)));
        begun.or_else(|| begin(Among::All))
    }

    /// Takes note that it goes on elsewhere.
    pub fn moved(&self, handed_on: bool) {
        let Self { placer, model, assignment, .. } = self;
        let (request, generated) = (&assignment.request, assignment.generated.len());
        tracing::info!(%request, generated, handed_on, "the request leaves an instance that drains");
        if generated == 0 {
            return;
        }
        placer.count_migration(ErrorCode::Unavailable, &model.served);
        if handed_on {
            placer.metrics.hand_ons.get_or_create(&ModelLabel { model: model.served.name.clone() }).inc();
        }
    }

    /// For one of the choices alone, which goes on from these tokens.
    #[must_use]
    pub fn of_choice(&self, choice: u32, generated: &[u32]) -> Self {
        let mut own = self.clone();
        let sampling = &mut own.assignment.sampling;
        (sampling.seed, sampling.choices) = (sampling.seed.wrapping_add(choice.into()), 1);
        own.assignment.generated = generated.into();
        own
    }

    /// Places the request once more after a failure, as soon as an instance can take it; the error is the answer if none
    /// can within the time, or if the model's budget for instances' faults is spent. A pause comes first, which ends when
    /// the fleet changes; a refusal costs no more than that.
    pub fn again(&mut self, failure: Failure) -> Result<Replacing, ApiError> {
        let pause = if failure.is_refusal() {
            self.refused += 1;
            PAUSE_LEAST.saturating_mul(1 << self.refused.min(16)).min(PAUSE_MOST)
        } else {
            self.refused = 0;
            self.failed += 1;
            match (failure.begun, failure.error.code) {
                (true, _) => (self.fruitless, self.lost) = (0, 0),
                (false, ErrorCode::InstanceLost) => self.lost += 1,
                (false, _) => self.fruitless += 1,
            }
            let too_many = self.fruitless >= FRUITLESS_MOST || self.lost >= LOST_MOST;
            if self.failed >= FAILURES_MOST || too_many {
                return Err(failure.error);
            }
            PAUSE * (1 << self.lost.saturating_sub(1))
        };
        if self.assignment.deadline <= Instant::now() {
            return Err(failure.error);
        }
        if is_fault(&failure.error) && !self.model.budget.lock().take(Instant::now()) {
            let of = self.model.counts.label.clone();
            self.placer.metrics.not_placed_again.get_or_create(&of).inc();
            return Err(failure.error);
        }
        let (placer, model) = (self.placer.clone(), self.model.clone());
        Ok(placer.place_again(model, self.assignment.clone(), failure, pause).boxed())
    }
}

#[cfg(test)]
mod tests;
