//! The hold of a request on one of its legs: made by [`Attachment::dispatch`], kept by [`crate::dispatch`]. It cancels what has
//! not ended when it goes.

use std::sync::Arc;

use baton_proto::LegId;

use super::{attachment::Attachment, cancel::CancelReason};
use crate::config::CHOICES_MOST;

/// A set of choices.
pub(super) type Choices = u128;

pub(super) fn first_choices(count: u32) -> Choices {
    Choices::MAX >> (CHOICES_MOST - count.clamp(1, CHOICES_MOST))
}

pub(super) fn only(choice: u32) -> Choices {
    if choice < CHOICES_MOST { 1 << choice } else { 0 }
}

/// One leg on one stream. Dropped before all of its choices have ended, it cancels the rest at once.
pub struct LegGuard {
    attachment: Arc<Attachment>,
    leg: LegId,
    /// Choices that have neither ended nor been cancelled.
    open: Choices,
}

impl LegGuard {
    /// Of a leg that has just been sent.
    pub(super) fn new(attachment: Arc<Attachment>, leg: LegId, open: Choices) -> Self {
        Self { attachment, leg, open }
    }

    /// Whether the instance finishes what it has.
    pub fn drains(&self) -> bool {
        self.attachment.drains()
    }

    /// The instance has ended a choice.
    pub fn ended(&mut self, choice: u32) {
        self.open &= !only(choice);
    }

    /// Tells the instance to stop work on a choice, and why.
    pub fn cancel(&mut self, choice: u32, reason: CancelReason) {
        if self.open & only(choice) != 0 {
            self.open &= !only(choice);
            self.attachment.cancel(self.leg, only(choice), reason);
        }
    }

    /// Tells the instance to stop work on every choice.
    pub fn cancel_all(mut self, reason: CancelReason) {
        self.attachment.cancel(self.leg, std::mem::take(&mut self.open), reason);
    }
}

impl Drop for LegGuard {
    fn drop(&mut self) {
        if self.open != 0 {
            let bug = std::thread::panicking();
            let reason = if bug { CancelReason::Bug } else { CancelReason::ClientGone };
            self.attachment.cancel(self.leg, self.open, reason);
        }
    }
}
