//! Slices of a transfer that a connection is about to write.

use super::Landing;
use crate::session::SliceRun;

/// An open claim. Reported exactly once: dropping it counts as interrupted.
pub(crate) struct Claimed<'a> {
    landing: &'a dyn Landing,
    run: SliceRun,
    open: bool,
}

impl<'a> Claimed<'a> {
    /// After `Claim::Write`.
    pub(crate) fn new(landing: &'a dyn Landing, run: SliceRun) -> Self {
        Self { landing, run, open: true }
    }

    pub(crate) fn landing(&self) -> &'a dyn Landing {
        self.landing
    }

    /// All of it is in place and matches its sums.
    pub(crate) fn landed(mut self) {
        self.open = false;
        self.landing.landed(self.run);
    }

    /// A slice does not match its sum.
    pub(crate) fn damaged(&mut self, block: u32) {
        self.open = false;
        self.landing.damaged(self.run, block);
    }

    /// It will not be written further.
    pub(crate) fn interrupted(&mut self, why: &str) {
        if std::mem::take(&mut self.open) {
            self.landing.interrupted(self.run, why);
        }
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.interrupted("the data connection was given up");
    }
}
