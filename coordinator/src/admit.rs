//! Who may come in, who waits and who is turned away.
//!
//! A request takes a [`Ticket`] on arrival ([`crate::http`]), before its body is read, so that the memory of
//! all requests together is bounded; with it, once prepared, it waits in line for a [`Permit`]
//! ([`crate::serve`]). A body that is not prepared on the spot waits for a [`Turn`] at a core before. All are
//! given back by drop. Overflow policy: a full house is 429 at once, a wait beyond the queue's time is 429
//! too.

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError},
    time::{Instant, timeout_at},
};

use crate::{config::LimitsConfig, metrics::Metrics};

/// What clients are told to wait before they try again.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Bodies from this size on are long work.
const LONG_WORK_BYTES: usize = 256 << 10;

/// Keeps the house.
pub struct Gate {
    /// One for each request in the house: served, waiting, or being read.
    house: Arc<Semaphore>,
    /// One for each request being served, first come first served.
    seats: Arc<Semaphore>,
    /// One for each body that may be worked on at a time, first come first served.
    cores: Arc<Semaphore>,
    /// Those of them that long work may take: short work never waits for it alone.
    for_long_work: Arc<Semaphore>,
    queue_timeout: Duration,
    metrics: Arc<Metrics>,
}

impl Gate {
    /// `cores` is how many bodies are worked on at a time; at least two are.
    pub fn new(limits: &LimitsConfig, cores: usize, metrics: Arc<Metrics>) -> Self {
        let most = Semaphore::MAX_PERMITS;
        let house = limits.max_concurrent.saturating_add(limits.max_queued).min(most);
        Self {
            house: Arc::new(Semaphore::new(house)),
            seats: Arc::new(Semaphore::new(limits.max_concurrent.min(most))),
            cores: Arc::new(Semaphore::new(cores.clamp(2, most))),
            for_long_work: Arc::new(Semaphore::new((cores / 2).clamp(1, most))),
            queue_timeout: limits.queue_timeout,
            metrics,
        }
    }

    /// Lets a request into the house, or turns it away.
    pub fn enter(&self) -> Result<Ticket, ApiError> {
        match self.house.clone().try_acquire_owned() {
            Ok(place) => Ok(Ticket { _place: place }),
            Err(TryAcquireError::NoPermits | TryAcquireError::Closed) => {
                Err(full("too many requests are waiting; try again in a moment"))
            }
        }
    }

    /// Waits for a seat, in order of asking.
    pub async fn admit(&self, ticket: Ticket) -> Result<Permit, ApiError> {
        let seat = self.one_of(&self.seats, Instant::now() + self.queue_timeout).await?;
        Ok(Permit { _served: Counted::new(&self.metrics.in_flight), _seat: seat, _ticket: ticket })
    }

    /// Waits for a turn at a core, in order of asking, to work on a body of so many bytes.
    pub async fn turn(&self, ticket: Ticket, bytes: usize) -> Result<Turn, ApiError> {
        let by = Instant::now() + self.queue_timeout;
        let long = match bytes >= LONG_WORK_BYTES {
            true => Some(self.one_of(&self.for_long_work, by).await?),
            false => None,
        };
        Ok(Turn { ticket, _core: self.one_of(&self.cores, by).await?, _long: long })
    }

    async fn one_of(&self, places: &Arc<Semaphore>, by: Instant) -> Result<OwnedSemaphorePermit, ApiError> {
        if let Ok(place) = places.clone().try_acquire_owned() {
            return Ok(place);
        }
        let _waiting = Counted::new(&self.metrics.queued);
        match timeout_at(by, places.clone().acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => {
                Err(full("the request waited too long to be served; try again in a moment"))
            }
        }
    }
}

fn full(message: &str) -> ApiError {
    ApiError::new(ErrorCode::QueueFull, message)
}

/// A place in the house.
pub struct Ticket {
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
    _ticket: Ticket,
}

/// Counted in a gauge for as long as it lives.
struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    fn gate(max_concurrent: usize, max_queued: usize) -> Gate {
        let limits = LimitsConfig {
            max_concurrent,
            max_queued,
            queue_timeout: Duration::from_secs(5),
            ..LimitsConfig::default()
        };
        Gate::new(&limits, 2, Metrics::register(&mut Registry::default()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_house_turns_away_and_a_seat_given_back_lets_in() {
        let gate = gate(1, 1);
        let first = gate.admit(gate.enter().expect("room")).await.expect("a seat");
        let waiting = gate.enter().expect("room to wait");
        let Err(refused) = gate.enter() else { panic!("the house was full") };
        assert_eq!(refused.code, ErrorCode::QueueFull);
        let mut second = Box::pin(gate.admit(waiting));
        assert!(futures::poll!(&mut second).is_pending());
        assert_eq!((gate.metrics.in_flight.get(), gate.metrics.queued.get()), (1, 1));
        drop(first);
        let second = second.await.expect("the seat given back");
        assert_eq!((gate.metrics.in_flight.get(), gate.metrics.queued.get()), (1, 0));
        drop(second);
        assert!(gate.enter().is_ok());
        assert_eq!(gate.metrics.in_flight.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn long_work_leaves_a_core_to_short_work() {
        let gate = gate(8, 8);
        let turn = |bytes| gate.turn(gate.enter().expect("room"), bytes);
        let long = turn(LONG_WORK_BYTES).await.expect("a core");
        let mut next_long = Box::pin(turn(LONG_WORK_BYTES));
        assert!(futures::poll!(&mut next_long).is_pending());
        let short = turn(4 << 10).await.expect("the other core");
        let (mut first, mut second) = (Box::pin(turn(4 << 10)), Box::pin(turn(4 << 10)));
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        assert_eq!(gate.metrics.queued.get(), 3);
        // Who leaves the line loses nothing and takes nothing along.
        drop(first);
        drop(short.done());
        let second = second.await.expect("the core given back");
        assert!(futures::poll!(&mut next_long).is_pending());
        drop(long);
        let next_long = next_long.await.expect("the core given back");
        assert_eq!(gate.metrics.queued.get(), 0);
        let Err(error) = turn(4 << 10).await else { panic!("no core was free") };
        assert_eq!(error.code, ErrorCode::QueueFull);
        drop((second, next_long));
        turn(4 << 10).await.expect("a core");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_429_at_its_deadline() {
        let gate = gate(1, 1);
        let _held = gate.admit(gate.enter().expect("room")).await.expect("a seat");
        let Err(error) = gate.admit(gate.enter().expect("room")).await else { panic!("no seat was free") };
        assert_eq!(error.code, ErrorCode::QueueFull);
        assert_eq!(gate.metrics.queued.get(), 0);
        assert!(gate.enter().is_ok(), "the place in line was given back");
    }
}
