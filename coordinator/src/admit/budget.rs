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
const SHARE: usize = 8;

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
    left: usize,
    /// By tenant; those that hold nothing are not in it.
    held: HashMap<Arc<str>, usize>,
}

impl State {
    /// More for a part of it that has come to `own` bytes.
    fn take(&mut self, bytes: usize, own: usize, tenant: &Arc<str>, least: usize) -> Option<()> {
        let left = self.left.checked_sub(bytes).filter(|left| *left >= least)?;
        if !tenant.is_empty() {
            let held = self.held.get(tenant).copied().unwrap_or(0);
            if held > own && held + bytes > left.saturating_mul(SHARE) {
                return None;
            }
            self.held.insert(tenant.clone(), held + bytes);
        }
        self.left = left;
        Some(())
    }

    fn give_back(&mut self, bytes: usize, tenant: &Arc<str>) {
        self.left += bytes;
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
        let state = Mutex::new(State { left: bytes, held: HashMap::new() });
        Arc::new(Self { state, reserved: reserved.clone(), refusals: refusals.clone(), why, message })
    }

    /// A part of it, to begin with of no bytes. Those of whom no key is asked are one tenant, without a name, and share with
    /// nobody.
    pub(super) fn part(self: &Arc<Self>, tenant: &Arc<str>) -> Held {
        Held { bytes: 0, tenant: tenant.clone(), budget: self.clone() }
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
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
}

impl Drop for Held {
    fn drop(&mut self) {
        // To give back is never refused.
        let _ = self.resize(0, 0);
    }
}

/// No machine has more memory than a gauge can say.
fn gauged(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
