//! What a placed request holds beside its legs: its work on the ledger, and its handoff until it is known how that ended. It
//! lies apart from what every token goes through.

use std::time::Duration;

use baton_schedule::board::Credit;

use crate::handoffs::Handoff;

/// See the module.
pub(super) struct Hold {
    pub(super) credit: Credit,
    /// None if there is nothing to hand over, or it has ended.
    pub(super) handoff: Option<Handoff>,
}

impl Hold {
    /// Decode has the cache, so long after the first token if both came in that order.
    pub(super) fn taken_up(&mut self, took: Option<Duration>) {
        let Some(handoff) = self.handoff.take() else { return };
        handoff.done(took);
        if took.is_some() {
            self.credit.handoff_took(took);
        }
    }

    /// The link between the two has failed.
    pub(super) fn link_failed(&mut self) {
        let Some(handoff) = self.handoff.take() else { return };
        handoff.failed();
        self.credit.handoff_took(None);
    }
}
