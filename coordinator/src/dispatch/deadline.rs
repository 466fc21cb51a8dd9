//! By when a request must have been answered, looked at with each of its tokens.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Waker},
};

use baton_proto::{ApiError, ErrorCode};
use tokio::{
    task::unconstrained,
    time::{Instant, Sleep, sleep_until},
};

/// What a request that is not complete by its deadline ends with.
pub fn deadline_passed() -> ApiError {
    let message = "the request did not finish within its time; ask for fewer tokens or try again later";
    ApiError::new(ErrorCode::DeadlineExceeded, message)
}

/// By when all of the answer must be there.
pub(super) struct Deadline {
    at: Instant,
    timer: Pin<Box<Sleep>>,
    /// By the timer.
    woken: Option<Waker>,
}

impl Deadline {
    pub(super) fn new(at: Instant) -> Self {
        Self { at, timer: Box::pin(sleep_until(at)), woken: None }
    }

    /// If not, `context` is woken when it has. The timer is left alone where it is to wake whom it was: a request looks with
    /// each of its tokens.
    pub(super) fn has_passed(&mut self, context: &mut Context<'_>) -> bool {
        let same = self.woken.as_ref().is_some_and(|woken| woken.will_wake(context.waker()));
        if same && Instant::now() < self.at {
            return false;
        }
        if !same {
            self.woken = Some(context.waker().clone());
        }
        // Whoever has had more than its turn would be sent away before the timer knows whom to wake.
        pin!(unconstrained(self.timer.as_mut())).poll(context).is_ready()
    }
}
