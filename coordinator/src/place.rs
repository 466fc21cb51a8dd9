//! Books a place for a request: at once if there is one, or as soon as there is.
//!
//! Called by [`crate::admit`] for its first place, and by [`crate::carry`] for the next. Leaves the
//! choice to [`baton_schedule`]; what is booked [`Placer::start`] gives to [`crate::dispatch`].

use std::{iter, sync::Arc};

use baton_proto::InstanceId;
use baton_schedule::{
    Among, NoPlace, Placement, Prompt, Receipt, Wanted,
    board::{Board, Booking},
    chains::Chain,
};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    dispatch::{Assignment, Generation, NotSent},
    fleet::{Breakers, Trials, keeper::Attachments},
    handoffs::Handoffs,
    metrics::{PlacementLabels, Placements},
    prepare::{PreparedPrompt, Served},
};

/// What places are found with.
pub struct Placer {
    pub board: Arc<Board>,
    pub attachments: Arc<Attachments>,
    pub handoffs: Arc<Handoffs>,
    pub breakers: Arc<Breakers>,
    pub placements: Placements,
    /// Cancelled when the process has no more time for requests: nobody waits for a place from then on.
    pub closed: CancellationToken,
}

/// What a place is looked for.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub prompt: &'a PreparedPrompt,
    /// Of its answer, what was generated elsewhere: it is computed as the prompt is.
    pub generated: &'a [u32],
    /// When the first token is wanted.
    pub first_token: Instant,
}

/// A place that is booked, and held for as long as this is.
pub struct Booked {
    pub booking: Booking,
    trials: Trials,
    labels: PlacementLabels,
}

impl Placer {
    /// A prompt of a request that came then, and has brought nothing yet.
    pub fn asked<'a>(&self, prompt: &'a PreparedPrompt, arrived: Instant) -> Asked<'a> {
        let first_token = arrived + self.board.ttft_target(prompt.prompt_tokens());
        Asked { prompt, generated: &[], first_token }
    }

    /// Books each prompt of a new request, the first among these: [`NoPlace::Busy`] if none of those that it is to have room on
    /// has.
    pub fn book_all(
        &self,
        served: &Served,
        prompts: &[PreparedPrompt],
        arrived: Instant,
        first: Among<'_>,
    ) -> Result<Vec<Booked>, NoPlace> {
        // Its other prompts are not to wait for its first.
        let among = iter::once(first).chain(iter::repeat(Among::All));
        let each = prompts.iter().zip(among);
        each.map(|(prompt, among)| self.book(served, self.asked(prompt, arrived), &[], among)).collect()
    }

    /// Books a place.
    pub fn book(
        &self,
        served: &Served,
        asked: Asked<'_>,
        avoid: &[InstanceId],
        among: Among<'_>,
    ) -> Result<Booked, NoPlace> {
        let chains = self.board.caches.name(&served.revision, &asked.prompt.chains, asked.generated);
        let admitting = self.breakers.admitting(avoid, Instant::now());
        let booking = self.board.book(&wanted(served, asked, &chains, admitting.avoid(), among))?;
        let trials = admitting.booked(booking.credit.pair());
        let labels = PlacementLabels { model: served.name.clone(), way: booking.way.name() };
        tracing::debug!(placement = ?booking.placement, receipt = ?booking.receipt, "booked");
        Ok(Booked { booking, trials, labels })
    }

    /// Where it would go, were it placed now.
    pub fn look(
        &self,
        served: &Served,
        asked: Asked<'_>,
        among: Among<'_>,
    ) -> Result<(Placement, Receipt), NoPlace> {
        let chains = self.board.caches.name(&served.revision, &asked.prompt.chains, asked.generated);
        let avoid = self.breakers.admitting(&[], Instant::now()).avoid().to_vec();
        self.board.look(&wanted(served, asked, &chains, &avoid, among))
    }

    /// What is left of requests is ended: their instances are lost to them, and they are given to nobody else.
    pub fn close(&self) {
        self.closed.cancel();
        self.attachments.stop_all();
    }

    /// Books a place as [`Self::book`] does, among all, as soon as an instance can take it.
    pub async fn book_by(
        &self,
        deadline: Instant,
        served: &Served,
        asked: Asked<'_>,
        avoid: &[InstanceId],
    ) -> Result<Booked, NoPlace> {
        let mut changes = self.board.changes();
        loop {
            changes.borrow_and_update();
            if self.closed.is_cancelled() {
                return Err(NoPlace::NoInstance);
            }
            match self.book(served, asked, avoid, Among::All) {
                Err(reason) if reason.may_pass() => {
                    let change = self.closed.run_until_cancelled(timeout_at(deadline, changes.changed()));
                    match change.await {
                        Some(Ok(Ok(()))) => {}
                        None | Some(Ok(Err(_)) | Err(_)) => return Err(reason),
                    }
                }
                settled => return settled,
            }
        }
    }

    /// Dispatches what has been booked.
    pub fn start(&self, booked: Booked, assignment: Assignment) -> Result<Generation, NotSent> {
        let Booked { booking, trials, labels } = booked;
        let generation = Generation::start(&self.attachments, &self.handoffs, booking, assignment)?;
        trials.sent();
        self.placements.get_or_create(&labels).inc();
        Ok(generation)
    }
}

/// The same, as the board knows it.
fn wanted<'a>(
    served: &'a Served,
    asked: Asked<'_>,
    chains: &'a [Chain],
    avoid: &'a [InstanceId],
    among: Among<'a>,
) -> Wanted<'a> {
    let Asked { prompt, generated, first_token } = asked;
    let (generated, sampling) = (generated.len() as u32, &prompt.sampling);
    Wanted {
        prompt: Prompt { tokens: prompt.prompt_tokens().saturating_add(generated), chains },
        max_tokens: sampling.max_tokens.saturating_sub(generated).max(1),
        choices: sampling.choices,
        revision: &served.revision,
        avoid,
        among,
        first_token: Some(first_token),
    }
}

#[cfg(test)]
pub(crate) mod tests;
