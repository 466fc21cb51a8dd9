//! Who is left out for a while ([`breaker`]): an instance that fails what it is given, or does not get on with it.
//!
//! Told by [`crate::carry`] what became of attempts and by [`super::attachment`] who is stuck, asked by [`crate::place`] who is
//! left out. Only what is an instance's own fault counts, see [`cause`].

pub mod breaker;

use std::{borrow::Cow, cmp::Reverse, collections::HashMap, sync::Arc};

use baton_proto::{ApiError, InstanceId};
use baton_schedule::Pair;
use parking_lot::{Mutex, MutexGuard};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::time::Instant;

use crate::{cause, metrics::Metrics};
use breaker::Breaker;

/// Instances that are left out at a time. Where more fail, it is not they that are at fault.
const LEFT_OUT_MOST: usize = 64;

/// An attempt, as far as breakers are concerned.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    pub placed: Instant,
    pub pair: Pair<'a>,
}

#[derive(Debug, Default)]
struct Record {
    breaker: Breaker,
    /// With whom a handoff failed last, and when.
    failed_with: Option<(InstanceId, Instant)>,
}

impl Record {
    fn is_forgotten(&self, now: Instant) -> bool {
        let failed = self.failed_with.as_ref();
        self.breaker.is_forgotten(now)
            && failed.is_none_or(|(_, at)| now.saturating_duration_since(*at) > breaker::WITHIN)
    }
}

/// The breakers of all instances that have failed lately.
#[derive(Debug)]
pub struct Breakers {
    known: Mutex<HashMap<InstanceId, Record>>,
    openings: Counter,
    open: Gauge,
}

impl Breakers {
    pub fn new(metrics: &Metrics) -> Self {
        let (openings, open) = (metrics.breaker_openings.clone(), metrics.open_breakers.clone());
        Self { known: Mutex::default(), openings, open }
    }

    /// An attempt has failed by the fault of an instance, as `reporter` says or in its place is found. A handoff takes two:
    /// either may be at fault, and is only taken to be if another handoff of its failed lately with somebody else. What a
    /// handoff between these two costs is learnt by placement.
    pub fn fault(&self, attempt: Attempt<'_>, reporter: &InstanceId, error: &ApiError, now: Instant) {
        let mut known = self.known.lock();
        // Here, where it grows.
        known.retain(|_, of| !of.is_forgotten(now));
        match attempt.pair {
            Pair { prefill, decode: Some(decode) } if cause::is_of_a_handoff(error.code) => {
                for (one, other) in [(prefill, decode), (decode, prefill)] {
                    let of = known.entry(one.clone()).or_default();
                    let before = of.failed_with.replace((other.clone(), now));
                    let lately = |at: Instant| now.saturating_duration_since(at) <= breaker::WITHIN;
                    if before.is_some_and(|(with, at)| with != *other && lately(at)) {
                        self.charge(of, one, attempt.placed, now);
                    }
                }
            }
            _ => self.charge(known.entry(reporter.clone()).or_default(), reporter, attempt.placed, now),
        }
        self.count(&known);
    }

    fn charge(&self, of: &mut Record, instance: &InstanceId, placed: Instant, now: Instant) {
        if of.breaker.fault(placed, now) {
            tracing::warn!(%instance, "it fails what it is given, and is left out for a while");
            self.openings.inc();
        }
    }

    /// An instance does not get on, or still does not. Told often, and of all instances where it is the network that does not: the
    /// others are not looked at.
    pub fn stuck(&self, instance: &InstanceId, now: Instant) {
        let mut known = self.known.lock();
        let breaker = &mut known.entry(instance.clone()).or_default().breaker;
        let was_closed = breaker.is_closed();
        if breaker.stuck(now) {
            self.openings.inc();
            self.open.inc_by(i64::from(was_closed));
        }
    }

    /// An instance has brought a first token of an attempt that was placed at `placed`.
    pub fn success(&self, instance: &InstanceId, placed: Instant, now: Instant) {
        let mut known = self.known.lock();
        let Some(of) = known.get_mut(instance) else { return };
        if of.breaker.success(placed, now) {
            tracing::info!(%instance, "it serves again");
        }
        self.count(&known);
    }

    fn count(&self, known: &HashMap<InstanceId, Record>) {
        let open = known.values().filter(|of| !of.breaker.is_closed()).count();
        self.open.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Says whom a request had better not be given to that `failed` have failed already. Unless every breaker is closed
    /// nobody else is told before it is booked, so that one that is half open lets one request through.
    pub fn admitting<'a>(self: &'a Arc<Self>, failed: &'a [InstanceId], now: Instant) -> Admitting<'a> {
        let mut known = self.known.lock();
        let before = known.len();
        known.retain(|_, of| !of.is_forgotten(now));
        if known.len() < before {
            self.count(&known);
        }
        if known.values().all(|of| of.breaker.is_closed()) {
            return Admitting { breakers: self, avoid: failed.into(), known: None, now };
        }
        let mut shut: Vec<_> = known.iter().filter(|(_, of)| !of.breaker.admits(now)).collect();
        shut.sort_by_key(|(instance, of)| (Reverse(of.breaker.pause()), *instance));
        let shut = shut.into_iter().take(LEFT_OUT_MOST).map(|(instance, _)| instance);
        let mut avoid = failed.to_vec();
        avoid.extend(shut.filter(|instance| !failed.contains(instance)).cloned());
        Admitting { breakers: self, avoid: avoid.into(), known: Some(known), now }
    }
}

/// A request that is about to be booked, as far as breakers are concerned.
pub struct Admitting<'a> {
    breakers: &'a Arc<Breakers>,
    avoid: Cow<'a, [InstanceId]>,
    /// Locked unless every breaker is closed.
    known: Option<MutexGuard<'a, HashMap<InstanceId, Record>>>,
    now: Instant,
}

impl Admitting<'_> {
    /// Those that have failed this very request first, then those whose breaker lets nobody through, the longest left out
    /// first. They may be given it all the same where nobody else is there.
    pub fn avoid(&self) -> &[InstanceId] {
        &self.avoid
    }

    /// It is booked on these.
    pub fn booked(mut self, pair: Pair<'_>) -> Trials {
        let is_trial = |instance: &&InstanceId| {
            let of = self.known.as_mut().and_then(|known| known.get_mut(*instance));
            of.is_some_and(|of| of.breaker.booked(self.now))
        };
        let instances = pair.each().filter(is_trial).cloned().collect();
        Trials { breakers: self.breakers.clone(), instances, at: self.now }
    }
}

/// Of breakers that are half open, the one request that each lets through. It is given back by drop: the request was not
/// sent.
pub struct Trials {
    breakers: Arc<Breakers>,
    instances: Vec<InstanceId>,
    at: Instant,
}

impl Trials {
    /// It has been.
    pub fn sent(mut self) {
        self.instances.clear();
    }
}

impl Drop for Trials {
    fn drop(&mut self) {
        if self.instances.is_empty() {
            return;
        }
        let mut known = self.breakers.known.lock();
        for instance in &self.instances {
            if let Some(of) = known.get_mut(instance) {
                of.breaker.unsent(self.at);
            }
        }
    }
}

#[cfg(test)]
mod tests;
