//! Who may come in, who waits and who is turned away.
//!
//! A request takes a [`Ticket`] on arrival ([`crate::http`]), before its body is read, and the memory of all bodies together
//! is bounded ([`body`]). Once its model is known it takes a [`Place`] in that model's [`Line`] and, once prepared, waits
//! there for a [`Permit`] ([`crate::serve`]): what waits for one model's instances holds up no other model's requests. A
//! body that is not prepared on the spot waits for a [`Turn`] at a core before. All are given back by drop. Overflow
//! policy: a full house or line is 429 at once, a wait beyond the queue's time is 429 too.

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError},
    time::{Instant, timeout_at},
};

use crate::{
    config::LimitsConfig,
    metrics::{Metrics, ModelMetrics, Refusals, reason},
};

pub mod body;

pub use body::Body;
use body::Budget;

/// What clients are told to wait before they try again.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Bodies from this size on are long work.
const LONG_WORK_BYTES: usize = 256 << 10;

/// Keeps the house.
pub struct Gate {
    /// One for each request in the house: served, waiting, or being read.
    house: Arc<Semaphore>,
    /// One for each body that may be worked on at a time, first come first served.
    cores: Arc<Semaphore>,
    /// Those of them that long work may take: short work never waits for it alone.
    for_long_work: Arc<Semaphore>,
    /// What bodies may take.
    budget: Arc<Budget>,
    max_body_bytes: usize,
    queue_timeout: Duration,
    refusals: Refusals,
    /// Requests that wait for a core, among those of all models that wait.
    waiting: [Gauge; 2],
}

impl Gate {
    /// A house with room for as much as the lines of `models` models hold. `cores` is how many bodies are worked on at a
    /// time; at least two are.
    pub fn new(limits: &LimitsConfig, models: usize, cores: usize, metrics: &Metrics) -> Self {
        let most = Semaphore::MAX_PERMITS;
        let house = line_length(limits).saturating_mul(models).min(most);
        Self {
            house: Arc::new(Semaphore::new(house)),
            cores: Arc::new(Semaphore::new(cores.clamp(2, most))),
            for_long_work: Arc::new(Semaphore::new((cores / 2).clamp(1, most))),
            budget: Budget::new(limits.max_held_body_bytes, metrics),
            max_body_bytes: limits.max_body_bytes,
            queue_timeout: limits.queue_timeout,
            refusals: metrics.refusals.clone(),
            waiting: [metrics.queued.clone(), metrics.queued_of_any_model()],
        }
    }

    /// Lets a request into the house, or turns it away.
    pub fn enter(&self) -> Result<Ticket, ApiError> {
        Ok(Ticket { _room: at_once(&self.house, &self.refusals, "house")? })
    }

    /// Room for a body that announces its length, or grows as it comes; within `max_body_bytes` either way.
    pub fn body(&self, announced: Option<usize>) -> Result<Body, ApiError> {
        Body::new(&self.budget, announced, self.max_body_bytes)
    }

    /// The error of a body that does not come.
    pub fn late_body(&self, within: Duration) -> ApiError {
        self.refusals.get_or_create(&reason("body_time")).inc();
        let message = format!("the request body did not arrive within {} s", within.as_secs_f64());
        ApiError::new(ErrorCode::RequestTimeout, message)
    }

    /// Waits for a turn at a core, in order of asking, to work on a body of so many bytes.
    pub async fn turn(&self, ticket: Ticket, bytes: usize) -> Result<Turn, ApiError> {
        let by = Instant::now() + self.queue_timeout;
        let long = match bytes >= LONG_WORK_BYTES {
            true => Some(one_of(&self.for_long_work, by, &self.waiting, &self.refusals).await?),
            false => None,
        };
        let core = one_of(&self.cores, by, &self.waiting, &self.refusals).await?;
        Ok(Turn { ticket, _core: core, _long: long })
    }
}

/// Those who want one model: served, or waiting to be.
pub struct Line {
    /// One for each.
    places: Arc<Semaphore>,
    /// One for each that is served, first come first served.
    seats: Arc<Semaphore>,
    queue_timeout: Duration,
    counts: Arc<ModelMetrics>,
}

/// How many may be served and wait, of one model.
fn line_length(limits: &LimitsConfig) -> usize {
    limits.max_concurrent.saturating_add(limits.max_queued).min(Semaphore::MAX_PERMITS)
}

impl Line {
    pub fn new(limits: &LimitsConfig, counts: Arc<ModelMetrics>) -> Self {
        Self {
            places: Arc::new(Semaphore::new(line_length(limits))),
            seats: Arc::new(Semaphore::new(limits.max_concurrent.min(Semaphore::MAX_PERMITS))),
            queue_timeout: limits.queue_timeout,
            counts,
        }
    }

    /// Lets a request stand in line, or turns it away.
    pub fn enter(&self) -> Result<Place, ApiError> {
        Ok(Place { _place: at_once(&self.places, &self.counts.all_refusals, "line")? })
    }

    /// Whether a request that came now would be turned away.
    pub fn is_full(&self) -> bool {
        self.places.available_permits() == 0
    }

    /// Waits for a seat, in order of asking.
    pub async fn admit(&self, ticket: Ticket, place: Place) -> Result<Permit, ApiError> {
        let waiting = [self.counts.all_queued.clone(), self.counts.queued.clone()];
        let by = Instant::now() + self.queue_timeout;
        let seat = one_of(&self.seats, by, &waiting, &self.counts.all_refusals).await?;
        let served = [self.counts.all_in_flight.clone(), self.counts.in_flight.clone()];
        Ok(Permit { _served: Counted::new(&served), _seat: seat, _place: place, _ticket: ticket })
    }
}

fn at_once(
    room: &Arc<Semaphore>,
    refusals: &Refusals,
    why: &'static str,
) -> Result<OwnedSemaphorePermit, ApiError> {
    room.clone().try_acquire_owned().map_err(|error| match error {
        TryAcquireError::NoPermits | TryAcquireError::Closed => {
            refuse(refusals, why, "too many requests are waiting; try again in a moment")
        }
    })
}

async fn one_of(
    places: &Arc<Semaphore>,
    by: Instant,
    waiting: &[Gauge; 2],
    refusals: &Refusals,
) -> Result<OwnedSemaphorePermit, ApiError> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Ok(place);
    }
    let _waiting = Counted::new(waiting);
    match timeout_at(by, places.clone().acquire_owned()).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(_)) | Err(_) => {
            let message = "the request waited too long to be served; try again in a moment";
            Err(refuse(refusals, "wait", message))
        }
    }
}

fn refuse(refusals: &Refusals, why: &'static str, message: &str) -> ApiError {
    refusals.get_or_create(&reason(why)).inc();
    ApiError::new(ErrorCode::QueueFull, message)
}

/// Room in the house.
pub struct Ticket {
    _room: OwnedSemaphorePermit,
}

/// A place in a model's line.
pub struct Place {
    _place: OwnedSemaphorePermit,
}

/// A turn at a core: the request's body may be worked on. Goes where the work goes, as that does not end with
/// its client.
pub struct Turn {
    ticket: Ticket,
    _core: OwnedSemaphorePermit,
    _long: Option<OwnedSemaphorePermit>,
}

impl Turn {
    /// Leaves the core to the next.
    pub fn done(self) -> Ticket {
        self.ticket
    }
}

/// A seat: the request may be served.
pub struct Permit {
    _served: Counted,
    _seat: OwnedSemaphorePermit,
    _place: Place,
    _ticket: Ticket,
}

/// Counted in gauges for as long as it lives.
struct Counted([Gauge; 2]);

impl Counted {
    fn new(gauges: &[Gauge; 2]) -> Self {
        gauges.iter().for_each(|gauge| _ = gauge.inc());
        Self(gauges.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.iter().for_each(|gauge| _ = gauge.dec());
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    /// A house for two models, and their lines.
    fn house(max_concurrent: usize, max_queued: usize) -> (Gate, [Line; 2], Arc<Metrics>) {
        let limits = LimitsConfig {
            max_concurrent,
            max_queued,
            queue_timeout: Duration::from_secs(5),
            ..LimitsConfig::default()
        };
        let metrics = Metrics::register(&mut Registry::default());
        let line = |name: &str| Line::new(&limits, Arc::new(metrics.of_model(name.into())));
        (Gate::new(&limits, 2, 2, &metrics), [line("a"), line("b")], metrics)
    }

    /// Room in the house and a place in the line.
    fn enter(gate: &Gate, line: &Line) -> (Ticket, Place) {
        (gate.enter().expect("room"), line.enter().expect("a place"))
    }

    async fn seat(line: &Line, (ticket, place): (Ticket, Place)) -> Result<Permit, ApiError> {
        line.admit(ticket, place).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_line_turns_away_and_a_seat_given_back_lets_in() {
        let (gate, [line, _], metrics) = house(1, 1);
        let first = seat(&line, enter(&gate, &line)).await.expect("a seat");
        let waiting = enter(&gate, &line);
        let Err(refused) = line.enter() else { panic!("the line was full") };
        assert_eq!(refused.code, ErrorCode::QueueFull);
        let mut second = Box::pin(seat(&line, waiting));
        assert!(futures::poll!(&mut second).is_pending());
        assert_eq!((metrics.in_flight.get(), metrics.queued.get()), (1, 1));
        drop(first);
        let second = second.await.expect("the seat given back");
        assert_eq!((metrics.in_flight.get(), metrics.queued.get()), (1, 0));
        drop(second);
        assert!(line.enter().is_ok());
        assert_eq!(metrics.in_flight.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_line_leaves_another_models_room_and_seats_alone() {
        let (gate, [one, other], metrics) = house(1, 1);
        let _served = seat(&one, enter(&gate, &one)).await.expect("a seat");
        let mut waits = Box::pin(seat(&one, enter(&gate, &one)));
        assert!(futures::poll!(&mut waits).is_pending());
        assert!(one.enter().is_err());
        let served = seat(&other, enter(&gate, &other)).await.expect("a seat of its own");
        assert_eq!((one.counts.in_flight.get(), other.counts.in_flight.get()), (1, 1));
        assert_eq!((one.counts.queued.get(), other.counts.queued.get()), (1, 0));
        assert_eq!((metrics.in_flight.get(), metrics.queued.get()), (2, 1));
        let _last = enter(&gate, &other);
        let Err(refused) = gate.enter() else { panic!("the house was full") };
        assert_eq!(refused.code, ErrorCode::QueueFull);
        drop(served);
        assert!(gate.enter().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn long_work_leaves_a_core_to_short_work() {
        let (gate, _, metrics) = house(8, 8);
        let turn = |bytes| gate.turn(gate.enter().expect("room"), bytes);
        let long = turn(LONG_WORK_BYTES).await.expect("a core");
        let mut next_long = Box::pin(turn(LONG_WORK_BYTES));
        assert!(futures::poll!(&mut next_long).is_pending());
        let short = turn(4 << 10).await.expect("the other core");
        let (mut first, mut second) = (Box::pin(turn(4 << 10)), Box::pin(turn(4 << 10)));
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        assert_eq!(metrics.queued.get(), 3);
        // Who leaves the line loses nothing and takes nothing along.
        drop(first);
        drop(short.done());
        let second = second.await.expect("the core given back");
        assert!(futures::poll!(&mut next_long).is_pending());
        drop(long);
        let next_long = next_long.await.expect("the core given back");
        assert_eq!(metrics.queued.get(), 0);
        let Err(error) = turn(4 << 10).await else { panic!("no core was free") };
        assert_eq!(error.code, ErrorCode::QueueFull);
        drop((second, next_long));
        turn(4 << 10).await.expect("a core");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_429_at_its_deadline() {
        let (gate, [line, _], metrics) = house(1, 1);
        let _held = seat(&line, enter(&gate, &line)).await.expect("a seat");
        let Err(error) = seat(&line, enter(&gate, &line)).await else { panic!("no seat was free") };
        assert_eq!(error.code, ErrorCode::QueueFull);
        assert_eq!(metrics.queued.get(), 0);
        assert!(line.enter().is_ok(), "the place in line was given back");
    }
}
