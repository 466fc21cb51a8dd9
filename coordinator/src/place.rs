//! Finds a place for a request, waits a little for one, and finds another when the first fails.
//!
//! Called by [`crate::serve`] for the first place and by [`crate::stream`], through [`Attempts`], for the next. Leaves
//! the choice to [`crate::schedule`] and the sending to [`crate::dispatch`].

use std::{sync::Arc, time::Duration};

use baton_proto::ApiError;
use futures::{FutureExt, future::BoxFuture};
use tokio::time::{Instant, timeout_at};

use crate::{
    dispatch::{Assignment, Generation},
    fleet::keeper::Links,
    prepare::{Sampling, Served},
    requests::Stage,
    schedule::{
        NoPlace,
        board::{Board, Booking},
    },
};

/// How often a request is placed before its failure is told.
const ATTEMPTS_MOST: u32 = 2;

/// What places are found with.
pub struct Placer {
    pub served: Arc<Served>,
    pub board: Arc<Board>,
    pub links: Arc<Links>,
    /// How long a request waits for an instance that can take it.
    pub patience: Duration,
}

impl Placer {
    /// Books as soon as an instance can take the request: one that is being started again is worth a short wait.
    pub async fn book(&self, prompt_tokens: u32, sampling: &Sampling) -> Result<Booking, NoPlace> {
        self.book_by(Instant::now() + self.patience, prompt_tokens, sampling).await
    }

    async fn book_by(
        &self,
        deadline: Instant,
        prompt_tokens: u32,
        sampling: &Sampling,
    ) -> Result<Booking, NoPlace> {
        let mut changes = self.board.changes();
        loop {
            changes.borrow_and_update();
            match self.book_now(prompt_tokens, sampling) {
                Err(reason) if reason.may_pass() => match timeout_at(deadline, changes.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(reason),
                },
                settled => return settled,
            }
        }
    }

    fn book_now(&self, prompt_tokens: u32, sampling: &Sampling) -> Result<Booking, NoPlace> {
        let asked = (sampling.max_tokens, sampling.choices);
        let booking = self.board.place(prompt_tokens, asked, &self.served.revision)?;
        tracing::debug!(placement = ?booking.placement, receipt = ?booking.receipt, "placed");
        Ok(booking)
    }
}

/// A request on its way to another place.
pub type Replacing = BoxFuture<'static, Result<(Generation, Stage), ApiError>>;

/// What it takes to place a request again.
pub struct Attempts {
    placer: Arc<Placer>,
    assignment: Assignment,
    made: u32,
}

impl Attempts {
    /// `assignment` has been given to a first place.
    pub fn new(placer: Arc<Placer>, assignment: Assignment) -> Self {
        Self { placer, assignment, made: 1 }
    }

    /// What is being placed.
    pub fn assignment(&self) -> &Assignment {
        &self.assignment
    }

    pub fn prompt_tokens(&self) -> u32 {
        self.assignment.prompt.len() as u32
    }

    /// Places the request once more after `error`, as soon as an instance can take it; `error` is the answer if none can
    /// within the time.
    pub fn again(&mut self, error: ApiError) -> Result<Replacing, ApiError> {
        if self.made >= ATTEMPTS_MOST {
            return Err(error);
        }
        self.made += 1;
        let (placer, assignment) = (self.placer.clone(), self.assignment.clone());
        let prompt_tokens = self.prompt_tokens();
        let replacing = async move {
            let deadline = (Instant::now() + placer.patience).min(assignment.deadline);
            let booked = placer.book_by(deadline, prompt_tokens, &assignment.sampling).await;
            let Ok(booking) = booked else { return Err(error) };
            tracing::info!(request = %assignment.request, %error, "placing the request again");
            let stage = Stage::placed(prompt_tokens, &booking.placement);
            Ok((Generation::start(&placer.links, booking, assignment)?, stage))
        };
        Ok(replacing.boxed())
    }
}
