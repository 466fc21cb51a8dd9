//! What keeps failures from spreading while requests are carried on elsewhere: an instance that fails what it is given is
//! left out for a while ([`breaker`]), and of a model's requests only so many are placed again ([`budget`]).
//!
//! Fed by [`crate::stream`] and [`crate::place`] with what became of attempts, asked by [`crate::place`]. Only what is an
//! instance's own fault counts, see [`is_fault`].

pub mod breaker;
pub mod budget;

use std::collections::HashMap;

use baton_proto::{ApiError, ErrorCode, InstanceId};
use baton_schedule::{NoPlace, Placement, board::Booking};
use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::time::Instant;

use crate::metrics::Metrics;
use breaker::Breaker;

/// Instances that are left out at a time. Where more fail, it is not they that are at fault.
const LEFT_OUT_MOST: usize = 64;

/// Whether an attempt that ended so shows that something is wrong with its instance, or the way its caches take. A lost
/// instance is none: nobody places requests where no stream stands. Nor is one that refuses.
pub fn is_fault(error: &ApiError) -> bool {
    matches!(error.code, ErrorCode::Internal | ErrorCode::HandoffFailed | ErrorCode::KvDamaged)
}

/// The breakers of all instances that have failed lately.
#[derive(Debug)]
pub struct Breakers {
    known: Mutex<HashMap<InstanceId, Breaker>>,
    openings: Counter,
    open: Gauge,
}

impl Breakers {
    pub fn new(metrics: &Metrics) -> Self {
        let (openings, open) = (metrics.breaker_openings.clone(), metrics.open_breakers.clone());
        Self { known: Mutex::default(), openings, open }
    }

    /// An instance has failed an attempt by its own fault.
    pub fn fault(&self, instance: &InstanceId, now: Instant) {
        let mut known = self.known.lock();
        // Here, where it grows.
        known.retain(|_, breaker| !breaker.is_forgotten(now));
        let breaker = known.entry(instance.clone()).or_default();
        if breaker.fault(now) {
            tracing::warn!(%instance, "it fails what it is given, and is left out for a while");
            self.openings.inc();
        }
        self.count(&known);
    }

    /// An instance has brought a first token of an attempt.
    pub fn success(&self, instance: &InstanceId, now: Instant) {
        let mut known = self.known.lock();
        let Some(breaker) = known.get_mut(instance) else { return };
        if breaker.success(now) {
            tracing::info!(%instance, "it serves again");
        }
        self.count(&known);
    }

    fn count(&self, known: &HashMap<InstanceId, Breaker>) {
        let open = known.values().filter(|breaker| !breaker.is_closed()).count();
        self.open.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Places a request with `place`, which is told whom to avoid: those that have failed this very request first, then
    /// those whose breaker lets nobody through, the longest left out first. It may take them all the same where nobody else
    /// is there. Nobody else places meanwhile, so that a breaker that is half open lets one request through.
    pub fn place(
        &self,
        failed: &[InstanceId],
        now: Instant,
        place: impl FnOnce(&[InstanceId]) -> Result<Booking, NoPlace>,
    ) -> Result<Booking, NoPlace> {
        let mut known = self.known.lock();
        let before = known.len();
        known.retain(|_, breaker| !breaker.is_forgotten(now));
        if known.len() < before {
            self.count(&known);
        }
        let mut shut: Vec<_> = known.iter().filter(|(_, breaker)| !breaker.admits(now)).collect();
        if shut.is_empty() && known.values().all(Breaker::is_closed) {
            drop(known);
            return place(failed);
        }
        shut.sort_by_key(|(instance, breaker)| (std::cmp::Reverse(breaker.pause()), *instance));
        let shut = shut.into_iter().take(LEFT_OUT_MOST).map(|(instance, _)| instance);
        let mut avoid = failed.to_vec();
        avoid.extend(shut.filter(|instance| !failed.contains(instance)).cloned());
        let booking = place(&avoid)?;
        let (one, other) = match &booking.placement {
            Placement::Alone(seat) => (seat, None),
            Placement::Apart { prefill, decode } => (prefill, Some(decode)),
        };
        for seat in [Some(one), other].into_iter().flatten() {
            if let Some(breaker) = known.get_mut(&seat.instance) {
                breaker.placed(now);
            }
        }
        Ok(booking)
    }
}
