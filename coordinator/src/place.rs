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
    handoffs::Handoffs,
    prepare::{PreparedPrompt, Sampling, Served},
    schedule::{
        NoPlace, Placement,
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
    pub handoffs: Arc<Handoffs>,
    /// How long a request waits for an instance that can take it.
    pub patience: Duration,
}

impl Placer {
    /// Books each prompt of a request as soon as an instance can take it: one that is being started again is worth a
    /// short wait. However many prompts there are, all of them together wait no longer than one would, nor past
    /// `deadline`.
    pub async fn book(&self, prompts: &[PreparedPrompt], deadline: Instant) -> Result<Vec<Booking>, NoPlace> {
        let deadline = deadline.min(Instant::now() + self.patience);
        let mut bookings = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            bookings.push(self.book_by(deadline, prompt.prompt_tokens(), &prompt.sampling).await?);
        }
        Ok(bookings)
    }

    /// Dispatches what has been booked.
    pub fn start(&self, booking: Booking, assignment: Assignment) -> Result<Generation, ApiError> {
        Generation::start(&self.links, &self.handoffs, booking, assignment)
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
pub type Replacing = BoxFuture<'static, Result<(Generation, Placement), ApiError>>;

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

    /// Places the request once more after `error`, as soon as an instance can take it; `error` is the answer
    /// if none can within the time.
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
            let placement = booking.placement.clone();
            Ok((placer.start(booking, assignment)?, placement))
        };
        Ok(replacing.boxed())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        fleet::{
            Role, Spec,
            tests::{ready, spec},
        },
        prepare::{
            Endpoint, prepare,
            tests::{LIMITS, served},
        },
    };

    #[tokio::test(start_paused = true)]
    async fn all_prompts_together_wait_no_longer_than_one() {
        let patience = Duration::from_secs(5);
        let board = Board::new(Duration::from_secs(60));
        let (small, large) = (Spec { context_tokens: 8, ..spec("a") }, spec("b"));
        board.list(&[small.clone(), large.clone()], Instant::now());
        let links = Arc::default();
        let (served, handoffs) = (Arc::new(served()), Arc::default());
        let placer = Placer { served, board: board.clone(), links, handoffs, patience };
        let body = r#"{"model": "tiny", "prompt": ["short", "one that only the large one holds"]}"#;
        let prepared = prepare(&placer.served, Endpoint::Text, body.as_bytes(), LIMITS, 1).expect("is good");
        // The first prompt waits for most of the time, the second for what is left.
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(3)).await;
            board.up(&small.id, small.incarnation, ready(Role::Mixed));
        });
        let began = Instant::now();
        let hour = began + Duration::from_secs(3600);
        assert!(matches!(placer.book(&prepared.prompts, hour).await, Err(NoPlace::NoInstance)));
        assert_eq!(began.elapsed(), patience);
        let soon = Instant::now() + Duration::from_secs(1);
        assert!(placer.book(&prepared.prompts, soon).await.is_err());
        assert_eq!(began.elapsed(), patience + Duration::from_secs(1), "nor past the request's own deadline");
    }
}
