//! Memory that requests share within a bound. Overflow policy: what does not fit is 429 at once, so that nobody holds a
//! connection to wait for memory.
//!
//! A tenant may have whatever is left for one request; with several it may come to [`SHARE`] times as much as is left then,
//! so that many of one leave some to others: the more of them there are, the less each may have (dynamic thresholds, as
//! switches share their buffers: Choudhury and Hahne, 1998).

use std::{collections::HashMap, sync::Arc};

use baton_proto::ApiError;
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;

use super::Refusal;
use crate::metrics::Refusals;

/// See the module: many requests of one tenant alone may have eight ninths, of each of two eight seventeenths.
pub(super) const SHARE: usize = 8;

/// See the module.
pub(super) struct Budget {
    state: Mutex<State>,
    reserved: Gauge,
    refusals: Refusals,
    /// By which the refusals are counted, and what clients are told.
    why: Refusal,
    message: &'static str,
}

struct State {
    /// Less than nothing: what could not be refused has taken more than there was.
    left: isize,
    /// By tenant; those that hold nothing are not in it.
    held: HashMap<Arc<str>, usize>,
}

impl State {
    /// More for a part of it that has come to `own` bytes.
    fn take(&mut self, bytes: usize, own: usize, tenant: &Arc<str>, least: usize) -> Option<()> {
        let left = usize::try_from(self.left).ok()?.checked_sub(bytes).filter(|left| *left >= least)?;
        if !tenant.is_empty() {
            let held = self.held.get(tenant).copied().unwrap_or(0);
            if held > own && held + bytes > left.saturating_mul(SHARE) {
                return None;
            }
            self.held.insert(tenant.clone(), held + bytes);
        }
        self.left = signed(left);
        Some(())
    }

    /// The same, whatever is left.
    fn force(&mut self, bytes: usize, tenant: &Arc<str>) {
        if !tenant.is_empty() {
            *self.held.entry(tenant.clone()).or_default() += bytes;
        }
        self.left = self.left.saturating_sub(signed(bytes));
    }

    fn give_back(&mut self, bytes: usize, tenant: &Arc<str>) {
        self.left = self.left.saturating_add(signed(bytes));
        if let Some(held) = self.held.get_mut(tenant) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.held.remove(tenant);
            }
        }
    }
}

impl Budget {
    pub(super) fn new(
        bytes: usize,
        reserved: &Gauge,
        refusals: &Refusals,
        why: Refusal,
        message: &'static str,
    ) -> Arc<Self> {
        let state = Mutex::new(State { left: signed(bytes), held: HashMap::new() });
        Arc::new(Self { state, reserved: reserved.clone(), refusals: refusals.clone(), why, message })
    }

    /// A part of it, to begin with of no bytes. Those of whom no key is asked are one tenant, without a name, and share with
    /// nobody.
    pub(super) fn part(self: &Arc<Self>, tenant: &Arc<str>) -> Held {
        Held { bytes: 0, tenant: tenant.clone(), budget: self.clone() }
    }

    /// What a tenant has of it.
    pub(super) fn held(&self, tenant: &Arc<str>) -> usize {
        self.state.lock().held.get(tenant).copied().unwrap_or(0)
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> isize {
        self.state.lock().left
    }
}

/// A part of a budget. Given back by drop.
pub(super) struct Held {
    bytes: usize,
    tenant: Arc<str>,
    budget: Arc<Budget>,
}

impl Held {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Comes to be of so many bytes, if that leaves so much for others; less is given back.
    pub(super) fn resize(&mut self, bytes: usize, least: usize) -> Result<(), ApiError> {
        let budget = &self.budget;
        if bytes == self.bytes {
            return Ok(());
        }
        if let Some(less) = self.bytes.checked_sub(bytes) {
            budget.state.lock().give_back(less, &self.tenant);
            budget.reserved.dec_by(gauged(less));
        } else {
            let more = bytes - self.bytes;
            let taken = budget.state.lock().take(more, self.bytes, &self.tenant, least);
            taken.ok_or_else(|| budget.why.refuse(budget.message, None, &budget.refusals))?;
            budget.reserved.inc_by(gauged(more));
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Comes to be of so many bytes that are there already.
    pub(super) fn set(&mut self, bytes: usize) {
        if let Some(more) = bytes.checked_sub(self.bytes) {
            self.budget.state.lock().force(more, &self.tenant);
            self.budget.reserved.inc_by(gauged(more));
            self.bytes = bytes;
        } else {
            // To give back is never refused.
            let _ = self.resize(bytes, 0);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // To give back is never refused.
        let _ = self.resize(0, 0);
    }
}

/// No machine has more memory than half of what its addresses can say.
fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

/// No machine has more memory than a gauge can say.
fn gauged(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
