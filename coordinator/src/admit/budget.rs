//! Memory that requests share within a bound. Overflow policy: what does not fit is 429 at once, so that nobody holds a
//! connection to wait for memory.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use baton_proto::ApiError;
use prometheus_client::metrics::gauge::Gauge;

use super::refuse;
use crate::metrics::Refusals;

/// See the module.
pub(super) struct Budget {
    left: AtomicUsize,
    reserved: Gauge,
    refusals: Refusals,
    /// By which the refusals are counted, and what clients are told.
    why: &'static str,
    message: &'static str,
}

impl Budget {
    pub(super) fn new(
        bytes: usize,
        reserved: &Gauge,
        refusals: &Refusals,
        why: &'static str,
        message: &'static str,
    ) -> Arc<Self> {
        let (left, reserved, refusals) = (AtomicUsize::new(bytes), reserved.clone(), refusals.clone());
        Arc::new(Self { left, reserved, refusals, why, message })
    }

    pub(super) fn take(&self, bytes: usize) -> Result<(), ApiError> {
        self.take_leaving(bytes, 0)
    }

    fn take_leaving(&self, bytes: usize, least: usize) -> Result<(), ApiError> {
        let rest = |left: usize| left.checked_sub(bytes).filter(|rest| *rest >= least);
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        if taken.is_err() {
            return Err(refuse(&self.refusals, self.why, self.message, None));
        }
        self.reserved.inc_by(gauged(bytes));
        Ok(())
    }

    pub(super) fn give_back(&self, bytes: usize) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
        self.reserved.dec_by(gauged(bytes));
    }

    /// As [`Self::take`], until what is returned is dropped; so much has to be left for others.
    pub(super) fn hold(self: &Arc<Self>, bytes: usize, left: usize) -> Result<Held, ApiError> {
        self.take_leaving(bytes, left)?;
        Ok(Held { bytes, budget: self.clone() })
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

/// A part of a budget. Given back by drop.
pub(super) struct Held {
    bytes: usize,
    budget: Arc<Budget>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// No machine has more memory than a gauge can say.
fn gauged(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
