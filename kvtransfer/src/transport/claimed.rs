//! A transfer as a connection brings slices to it, and the slices that it is about to write.

use std::{sync::Arc, time::Instant};

use super::{Landing, meter::Meter};
use crate::{
    peak::Held,
    session::{Claim, SliceRun},
};

/// A transfer that is being received, for one run of its slices.
pub(crate) struct Live {
    landing: Arc<dyn Landing>,
    meter: Option<Arc<Meter>>,
}

impl Live {
    pub(crate) fn new(landing: Arc<dyn Landing>) -> Self {
        Self { landing, meter: None }
    }

    /// The same, with what is claimed by it told to `meter`.
    pub(super) fn observed_by(self, meter: Arc<Meter>) -> Self {
        Self { meter: Some(meter), ..self }
    }

    /// The same, with another landing before its own.
    pub(super) fn behind(self, front: impl FnOnce(Arc<dyn Landing>) -> Arc<dyn Landing>) -> Self {
        Self { landing: front(self.landing), ..self }
    }

    pub(crate) fn landing(&self) -> &dyn Landing {
        &*self.landing
    }

    /// Waits until there is room for a run that comes next, no longer than its transfer lives.
    pub(crate) async fn room(&self, run: SliceRun) {
        if let Some(room) = self.landing.room(run) {
            self.landing.revoked().run_until_cancelled(room).await;
        }
    }

    /// Asks to write these slices, whose checksums are to be `sums`; `None` = they are not to be written.
    pub(crate) fn claim(&self, run: SliceRun, sums: &[u32]) -> Option<Claimed<'_>> {
        match self.landing.claim(run, sums) {
            Claim::Write => {
                let receiving = |meter: &Arc<Meter>| meter.receiving(run, self.landing.slice_bytes());
                let held = self.meter.as_ref().map(receiving);
                Some(Claimed { live: self, run, since: Instant::now(), open: true, _held: held })
            }
            Claim::Skip | Claim::Refused => None, // nothing to report
        }
    }
}

/// An open claim. Reported exactly once: dropping it counts as interrupted.
pub(crate) struct Claimed<'a> {
    live: &'a Live,
    run: SliceRun,
    since: Instant,
    open: bool,
    /// Counts it among what is on its way in.
    _held: Option<Held>,
}

impl<'a> Claimed<'a> {
    pub(crate) fn landing(&self) -> &'a dyn Landing {
        self.live.landing()
    }

    /// All of it is in place and matches its sums.
    pub(crate) fn landed(mut self) {
        self.open = false;
        if let Some(meter) = &self.live.meter {
            let landing = self.landing();
            meter.received(landing.span(), self.run, landing.slice_bytes(), self.since);
        }
        self.landing().landed(self.run);
    }

    /// A slice does not match its sum.
    pub(crate) fn damaged(&mut self, block: u32) {
        self.open = false;
        if let Some(meter) = &self.live.meter {
            meter.damaged(self.landing().span(), self.run, self.since);
        }
        self.landing().damaged(self.run, block);
    }

    /// It will not be written further.
    pub(crate) fn interrupted(&mut self, why: &str) {
        if std::mem::take(&mut self.open) {
            if let Some(meter) = &self.live.meter {
                meter.interrupted(self.landing().span(), self.run, self.since);
            }
            self.landing().interrupted(self.run, why);
        }
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.interrupted("the data connection was given up");
    }
}
