//! Who may come in, who waits and who is turned away.
//!
//! A request takes a [`Ticket`] on arrival ([`crate::http`]), before its body is read. The memory of all bodies together is
//! bounded ([`body`]), and that of all prompts, echoes and log probabilities from when prompts are tokenised until they are
//! answered; tenants share it ([`budget`]). Once its model is known it takes a [`Spot`] in that model's [`Line`] and, once
//! prepared, waits there for a [`Permit`] and a place among
//! the instances ([`line`]): what waits for one model's instances holds up no other model's requests. A body that is not
//! prepared on the spot waits for a [`Turn`] at a core before ([`turns`]). All are given back by drop. Overflow policy: a full house or
//! line is 429 at once, unless another gives way, who then is told so; as is a wait that is predicted to be too long, and a
//! wait that becomes so is 429, too.

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, Band, ErrorCode};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use crate::{
    config::LimitsConfig,
    keys::Tenant,
    metrics::{Metrics, Refusals},
    prepare::Prepared,
};

pub mod body;
mod budget;
mod line;
mod refusal;
mod turns;

pub use body::Body;
use budget::{Budget, Held, SHARE};
pub use line::{Admission, Line, Permit, Spot, WaitTerms, Waits};
pub use refusal::{RETRY_AFTER, Refusal};
pub use turns::Turn;
use turns::Turns;

/// Requests in the house beyond those that the lines hold: one that may outrank who waits is read before that is known.
const OUTRANKING_MOST: usize = 64;

/// What a tenant is told of whose bodies come too slowly for more of them.
const STILL_SENT: &str = "too many requests are still being sent";

/// Keeps the house.
pub struct Gate {
    /// One for each request in the house: served, waiting, or being read.
    house: Arc<Semaphore>,
    /// Cores to work on bodies.
    turns: Arc<Turns>,
    /// Rooms of the house whose bodies are still being sent: who is slow leaves some to other tenants.
    reading: Arc<Budget>,
    /// What bodies may take, and what is kept of prompts.
    bodies: Arc<Budget>,
    prompts: Arc<Budget>,
    max_body_bytes: usize,
    max_held_prompt_bytes: usize,
    refusals: Refusals,
}

impl Gate {
    /// A house with room for as much as the lines of `models` models hold, and a little more for who may outrank them. `cores`
    /// is how many bodies are worked on at a time; at least two are.
    pub fn new(limits: &LimitsConfig, models: usize, cores: usize, metrics: &Metrics) -> Self {
        let most = Semaphore::MAX_PERMITS;
        let lines = line::length(limits).saturating_mul(models);
        let house = lines.saturating_add(OUTRANKING_MOST).min(most);
        let waiting = [metrics.queued.clone(), metrics.queued_of_any_model()];
        Self {
            house: Arc::new(Semaphore::new(house)),
            turns: Turns::new(cores, limits.queue_timeout, &metrics.refusals, waiting),
            reading: Budget::new(house, &Gauge::default(), &metrics.refusals, Refusal::House, STILL_SENT),
            bodies: body::budget(limits, metrics),
            prompts: Budget::new(
                limits.max_held_prompt_bytes,
                &metrics.prompt_reserved,
                &metrics.refusals,
                Refusal::Prompts,
                "the prompts and log probabilities of other requests take all memory that there is for them",
            ),
            max_body_bytes: limits.max_body_bytes,
            max_held_prompt_bytes: limits.max_held_prompt_bytes,
            refusals: metrics.refusals.clone(),
        }
    }

    /// Rooms that are free.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn rooms(&self) -> usize {
        self.house.available_permits()
    }

    /// Lets a request into the house, or turns it away; `drain` is how long it may take until there is room, and `outranks`
    /// whether it may be that another gives it its place.
    pub fn enter(
        &self,
        drain: impl FnOnce() -> Option<Duration>,
        outranks: impl FnOnce() -> bool,
    ) -> Result<Ticket, ApiError> {
        let has_room = self.house.available_permits() > OUTRANKING_MOST || outranks();
        let room = has_room.then(|| at_once(&self.house).ok()).flatten();
        let full = || Refusal::House.refuse("too many requests are waiting", drain(), &self.refusals);
        let room = room.ok_or_else(full)?;
        Ok(Ticket { held: None, _room: room })
    }

    /// Reserves what is kept of a request, beyond what its room in the house is good for, until it is answered. Keys of a later
    /// band leave a part of it to those of earlier ones.
    pub fn hold(&self, ticket: &mut Ticket, prepared: &Prepared, tenant: &Tenant) -> Result<(), ApiError> {
        // A prompt alone is never more than one may have.
        let echoes = || prepared.prompts.iter().any(|prompt| !prompt.echo.is_empty());
        let field = match prepared.shape.logprobs {
            true => "logprobs",
            false if echoes() => "echo",
            false => "stop",
        };
        self.hold_bytes(ticket, prepared.held_bytes(), tenant, field)
    }

    fn hold_bytes(
        &self,
        ticket: &mut Ticket,
        bytes: usize,
        tenant: &Tenant,
        field: &'static str,
    ) -> Result<(), ApiError> {
        let beyond = bytes.saturating_sub(body::FREE_BYTES);
        let left = match tenant.band {
            _ if tenant.name.is_empty() => 0,
            Band::Interactive => 0,
            Band::Standard => self.max_held_prompt_bytes / 8,
            Band::Batch => self.max_held_prompt_bytes / 4,
        };
        if beyond > self.max_held_prompt_bytes - left {
            let message = format!(
                "{field}: {bytes} bytes of this request would have to be kept, more than one may have; leave it out, or ask for \
                 fewer tokens or choices"
            );
            return Err(ApiError::new(ErrorCode::InvalidArgument, message).param(field));
        }
        if beyond > 0 {
            let mut held = self.prompts.part(&tenant.name);
            held.resize(beyond, left)?;
            ticket.held = Some(held);
        }
        Ok(())
    }

    /// What an answer takes that was written and is not read yet, in place of what was kept of its prompt. It is there, and is not
    /// refused: others are, if it is more than there was.
    pub fn unread(&self, ticket: Ticket, tenant: &Tenant, bytes: usize) -> UnreadBytes {
        let mut held = ticket.held.unwrap_or_else(|| self.prompts.part(&tenant.name));
        held.set(bytes);
        UnreadBytes(held)
    }

    /// Room for a body that announces its length, or grows as it comes; within `max_body_bytes` either way. Where there is none
    /// the request leaves the house. `outranks` as for [`Gate::enter`].
    pub fn body(
        &self,
        ticket: Ticket,
        announced: Option<usize>,
        tenant: &Tenant,
        outranks: impl FnOnce() -> bool,
    ) -> Result<Body, ApiError> {
        // Rooms that are served, or wait in line, are in nobody's part of those that are free.
        let (free, held) = (self.house.available_permits(), self.reading.held(&tenant.name));
        let within_share = |free: usize| held <= SHARE.saturating_mul(free);
        let for_everybody = free.saturating_sub(OUTRANKING_MOST);
        if !(within_share(for_everybody) || (within_share(free) && outranks())) {
            return Err(Refusal::House.refuse(STILL_SENT, None, &self.refusals));
        }
        let mut reading = self.reading.part(&tenant.name);
        reading.resize(1, 0)?;
        Body::new(ticket, reading, self.bodies.part(&tenant.name), announced, self.max_body_bytes)
    }

    /// The error of a body that does not come.
    pub fn late_body(&self, within: Duration) -> ApiError {
        Refusal::late_body(within, &self.refusals)
    }

    /// Waits for a turn at a core, to work on a body of so many bytes.
    pub async fn turn(&self, bytes: usize, tenant: &Tenant) -> Result<Turn, ApiError> {
        self.turns.turn(bytes, tenant.rank(0)).await
    }
}

fn at_once(room: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, TryAcquireError> {
    room.clone().try_acquire_owned()
}

/// Room in the house, and for what it holds.
pub struct Ticket {
    held: Option<Held>,
    _room: OwnedSemaphorePermit,
}

/// The memory of an answer that its client has not read yet. Given back by drop.
pub struct UnreadBytes(#[expect(dead_code, reason = "held for its drop")] Held);

/// Counted in gauges for as long as it lives.
struct Counted<const N: usize>([Gauge; N]);

impl<const N: usize> Counted<N> {
    fn new(gauges: &[Gauge; N]) -> Self {
        gauges.iter().for_each(|gauge| _ = gauge.inc());
        Self(gauges.clone())
    }
}

impl<const N: usize> Drop for Counted<N> {
    fn drop(&mut self) {
        self.0.iter().for_each(|gauge| _ = gauge.dec());
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::prepare::{
        Endpoint, parse, prepare,
        tests::{LIMITS, served},
    };

    #[test]
    fn what_takes_more_than_one_may_have_is_told_by_its_field() {
        let limits = LimitsConfig { max_held_prompt_bytes: 1 << 10, ..LimitsConfig::default() };
        let gate = Gate::new(&limits, 1, 2, &Metrics::register(&mut Registry::default()));
        let stops = format!(r#""stop": {:?}"#, vec!["s".repeat(1024); 16]);
        let cases = [
            ("stop", format!(r#""prompt": "x", {stops}"#)),
            ("echo", format!(r#""prompt": "x", "echo": true, {stops}"#)),
            ("logprobs", format!(r#""prompt": "x", "logprobs": 5, {stops}"#)),
        ];
        for (field, body) in cases {
            let request = parse(format!(r#"{{"model": "tiny", {body}}}"#).as_bytes()).expect("is JSON");
            let prepared = prepare(&served(), Endpoint::Text, &request, LIMITS, 1).expect("is taken");
            let mut ticket = gate.enter(|| None, || false).expect("room");
            let error = gate.hold(&mut ticket, &prepared, &Tenant::default()).expect_err("too much");
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidArgument, Some(field)));
        }
    }

    #[test]
    fn a_tenant_whose_bodies_come_slowly_leaves_rooms_to_others() {
        let limits = LimitsConfig { max_concurrent: 10, max_queued: 7, ..LimitsConfig::default() };
        let metrics = Metrics::register(&mut Registry::default());
        let gate = Gate::new(&limits, 1, 2, &metrics);
        let of = |name: &str| Tenant { name: name.into(), ..Tenant::default() };
        // Some are served, or wait in line.
        let others: Vec<_> = (0..8).map(|_| gate.enter(|| None, || true).expect("room")).collect();
        let begun = |name: &str, outranks: bool| {
            let ticket = gate.enter(|| None, || outranks)?;
            gate.body(ticket, Some(100), &of(name), || outranks)
        };
        let fill =
            |name: &str, outranks| std::iter::from_fn(|| begun(name, outranks).ok()).collect::<Vec<_>>();
        let mut slow = fill("slow", false);
        assert_eq!(slow.len(), 8, "eight ninths of what is left of 17");
        let other = begun("other", false).expect("the last room that is for everybody");
        assert!(begun("slow", false).is_err() && begun("another", false).is_err());
        // Who may outrank those that wait shares the rooms that are left for that in the same way.
        let first = fill("first", true);
        assert_eq!(first.len(), 57, "eight ninths of 64");
        assert!(begun("second", true).is_ok());
        drop(first);
        // They are those of who may have them also while a room for everybody is free.
        drop(other);
        assert_eq!(fill("first", true).len(), 57, "eight ninths of 65");
        assert_eq!(fill("first", false).len(), 1, "of one");
        drop(others);
        // What has come is in nobody's way.
        slow.iter_mut().for_each(Body::complete);
        assert!(begun("slow", false).is_ok());
    }

    #[test]
    fn keys_of_later_bands_leave_memory_for_prompts_to_earlier_ones() {
        let limits = LimitsConfig { max_held_prompt_bytes: 800 << 10, ..LimitsConfig::default() };
        let metrics = Metrics::register(&mut Registry::default());
        let gate = Gate::new(&limits, 1, 2, &metrics);
        let of = |name: &str, band| Tenant { name: name.into(), band, ..Tenant::default() };
        let held = |tenant: &Tenant| {
            // Of as many tenants, since one alone may not have all.
            let holds = |n: &usize| {
                let name = if tenant.name.is_empty() { String::new() } else { n.to_string() };
                let tenant = &Tenant { name: name.into(), ..tenant.clone() };
                let mut ticket = gate.enter(|| None, || false).expect("room");
                let held = gate.hold_bytes(&mut ticket, body::FREE_BYTES + (50 << 10), tenant, "echo");
                held.map(|()| ticket).ok()
            };
            (0..32).map_while(|n| holds(&n)).collect::<Vec<_>>()
        };
        for (tenant, most) in [
            (of("a", Band::Batch), 12),
            (of("a", Band::Standard), 14),
            (of("a", Band::Interactive), 16),
            (of("", Band::Standard), 16),
        ] {
            assert_eq!(held(&tenant).len(), most, "{tenant:?}");
            assert_eq!(metrics.prompt_reserved.get(), 0);
        }
    }
}
