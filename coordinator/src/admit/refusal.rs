//! Why requests are refused for want of room or time, and how that is told.

use std::time::Duration;

use baton_proto::{ApiError, ErrorCode};

use crate::metrics::{Refusals, reason};

/// What clients are told to wait before they try again, where nothing else is known, and at most.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_MOST: Duration = Duration::from_secs(60);

/// What there was none of, or what took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Room in the house.
    House,
    /// Room in the model's line.
    Line,
    /// Memory for the body.
    Bytes,
    /// Memory for the prompts and log probabilities.
    Prompts,
    /// The wait.
    Wait,
    /// What goes before it is sure to take too long.
    Backlog,
    /// Others took its place in the line.
    Outranked,
    /// The body came too slowly.
    BodyTime,
}

impl Refusal {
    pub const ALL: [Self; 8] = [
        Self::House,
        Self::Line,
        Self::Bytes,
        Self::Prompts,
        Self::Wait,
        Self::Backlog,
        Self::Outranked,
        Self::BodyTime,
    ];

    /// As metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::House => "house",
            Self::Line => "line",
            Self::Bytes => "bytes",
            Self::Prompts => "prompts",
            Self::Wait => "wait",
            Self::Backlog => "backlog",
            Self::Outranked => "outranked",
            Self::BodyTime => "body_time",
        }
    }

    /// The error of a body that did not come in time.
    pub(super) fn late_body(within: Duration, refusals: &Refusals) -> ApiError {
        Self::BodyTime.count(refusals);
        let message = format!("the request body did not arrive within {} s", within.as_secs_f64());
        ApiError::new(ErrorCode::RequestTimeout, message)
    }

    /// Counts it, and is the 429 that tells it. `wait`: what those before are predicted to take.
    pub(super) fn refuse(self, message: &str, wait: Option<Duration>, refusals: &Refusals) -> ApiError {
        self.count(refusals);
        let wait = wait.unwrap_or(RETRY_AFTER).clamp(RETRY_AFTER, RETRY_AFTER_MOST);
        let seconds = wait.as_secs_f64().ceil();
        ApiError::new(ErrorCode::QueueFull, format!("{message}; try again in {seconds} s")).retry_after(wait)
    }

    fn count(self, refusals: &Refusals) {
        refusals.get_or_create(&reason(self.name())).inc();
    }
}
