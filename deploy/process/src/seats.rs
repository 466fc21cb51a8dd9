//! The connections of a port: how they are accepted, how many there may be, and who gives way when there are as many.
//!
//! Who has connected can go on to say nothing, or a byte now and then; time limits close such connections, but in the meantime
//! they could keep everybody out. So a connection has its seat for good only once it has settled, which each port says of it:
//! it has asked for something, say. When no seat is free, the next one gets that of the stranger who came first: an honest
//! one settles within milliseconds, so that it is the likeliest to be nobody's.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::Metrics;

/// Nobody gives way before: so long an honest one may take to settle, however many come at once. It is also how long strangers keep
/// the next one waiting, where fewer come in that time than there are seats.
pub(crate) const SETTLES_WITHIN: Duration = Duration::from_secs(2);
/// After a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two times that the log tells of a full port.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The next connection, and who is at its other end, of IPv4 as such whatever the socket is. What goes wrong is told, and
/// tried again.
pub(crate) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                // What is small must leave at once; a socket that refuses is slow, not broken.
                let _ = stream.set_nodelay(true);
                return (stream, SocketAddr::new(from.ip().to_canonical(), from.port()));
            }
            Err(error) => {
                // Out of descriptors, most likely: accepting again at once would only spin.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Seats {
    port: &'static str,
    free: Arc<Semaphore>,
    most: usize,
    /// When they came; the first first. Those that have settled or left are dropped as they come to the front, or once there
    /// are twice as many as there are seats.
    strangers: VecDeque<(Instant, Weak<Held>)>,
    told: Option<Instant>,
}

/// A connection's seat, until it is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Seat(Arc<Held>);

#[derive(Debug)]
struct Held {
    state: Mutex<State>,
    /// The seat is somebody else's.
    given: CancellationToken,
}

#[derive(Debug)]
struct State {
    permit: Option<OwnedSemaphorePermit>,
    settled: bool,
}

impl Seats {
    /// Of the port that is called so in the log.
    pub(crate) fn new(port: &'static str, most: usize) -> Self {
        let most = most.min(Semaphore::MAX_PERMITS);
        Self { port, free: Arc::new(Semaphore::new(most)), most, strangers: VecDeque::new(), told: None }
    }

    /// A free seat, or that of a stranger. None: all have settled, or came just now.
    pub(crate) fn take(&mut self) -> Option<Seat> {
        let permit = match self.free.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                self.tell();
                self.stranger_gives()?
            }
        };
        Some(self.seat(permit))
    }

    /// Waits for one.
    pub(crate) async fn wait(&mut self) -> Seat {
        loop {
            if let Some(seat) = self.take() {
                return seat;
            }
            tokio::select! {
                // It is never closed.
                Ok(permit) = self.free.clone().acquire_owned() => return self.seat(permit),
                () = sleep(SETTLES_WITHIN) => {}
            }
        }
    }

    fn tell(&mut self) {
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.told = Some(Instant::now());
            let (port, seats) = (self.port, self.most);
            tracing::warn!(
                port,
                seats,
                "there are as many connections as may be: those of strangers give way"
            );
        }
    }

    fn seat(&mut self, permit: OwnedSemaphorePermit) -> Seat {
        if self.strangers.len() >= 2 * self.most {
            self.strangers.retain(|(_, held)| held.upgrade().is_some_and(|held| !held.state.lock().settled));
        }
        let state = Mutex::new(State { permit: Some(permit), settled: false });
        let held = Arc::new(Held { state, given: CancellationToken::new() });
        self.strangers.push_back((Instant::now(), Arc::downgrade(&held)));
        Seat(held)
    }

    fn stranger_gives(&mut self) -> Option<OwnedSemaphorePermit> {
        while self.strangers.front().is_some_and(|(came, _)| came.elapsed() >= SETTLES_WITHIN) {
            let (_, held) = self.strangers.pop_front()?;
            if let Some(permit) = held.upgrade().and_then(|held| held.give()) {
                return Some(permit);
            }
        }
        None
    }
}

impl Held {
    fn give(&self) -> Option<OwnedSemaphorePermit> {
        let mut state = self.state.lock();
        let permit = if state.settled { None } else { state.permit.take() };
        if permit.is_some() {
            self.given.cancel();
        }
        permit
    }
}

impl Seat {
    /// The seat is this connection's for good, if it still is.
    pub(crate) fn settle(&self) {
        self.0.state.lock().settled = true;
    }

    /// Ends when the seat has been given to another: this connection is to end at once.
    pub(crate) async fn given_away(&self) {
        self.0.given.cancelled().await;
    }
}

/// Why a port closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// There was no seat for it.
    Crowded,
    /// It had not settled when another needed its seat.
    Stranger,
    /// It asked for nothing in time.
    Late,
    /// It has asked for nothing for long.
    Idle,
}

impl Why {
    fn name(self) -> &'static str {
        match self {
            Self::Crowded => "crowded",
            Self::Stranger => "stranger",
            Self::Late => "late",
            Self::Idle => "idle",
        }
    }
}

/// Counts the connections that a port closed, by reason. Cheap to clone; all clones count together.
#[derive(Debug, Clone, Default)]
pub struct Closed(Family<Reason, Counter>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    why: &'static str,
}

impl Closed {
    /// Those of a process's gRPC port, once, at its start.
    pub fn of_grpc(metrics: &Metrics) -> Self {
        Self::register(metrics, "baton_grpc_closed", &[Why::Crowded, Why::Stranger, Why::Late, Why::Idle])
    }

    /// Those of its port for clients, where one more waits until there is a seat.
    pub fn of_http(metrics: &Metrics) -> Self {
        Self::register(metrics, "baton_http_closed", &[Why::Stranger, Why::Late, Why::Idle])
    }

    fn register(metrics: &Metrics, name: &str, reasons: &[Why]) -> Self {
        let closed = Self::default();
        // Shown as 0 from the start: the first of them would be no increase otherwise.
        for why in reasons {
            drop(closed.0.get_or_create(&Reason { why: why.name() }));
        }
        let help = "Connections that the port closed: as there was no seat for them (crowded), as others needed theirs and \
                    nobody knew whose they were (stranger), as they asked for nothing in time (late) or for long (idle)";
        metrics.register(|registry| registry.register(name, help, closed.0.clone()));
        closed
    }

    pub(crate) fn count(&self, why: Why) {
        self.0.get_or_create(&Reason { why: why.name() }).inc();
    }

    #[cfg(test)]
    pub(crate) fn of(&self, why: Why) -> u64 {
        self.0.get_or_create(&Reason { why: why.name() }).get()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    fn leaves(seat: &Seat) -> bool {
        seat.0.given.is_cancelled()
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_stranger_gives_way_once_it_had_its_time() {
        let mut seats = Seats::new("test", 3);
        let settled = seats.take().expect("free");
        settled.settle();
        let first = seats.take().expect("free");
        advance(SETTLES_WITHIN / 2).await;
        let second = seats.take().expect("free");
        assert!(seats.take().is_none(), "all have come just now");
        advance(SETTLES_WITHIN / 2).await;
        let next = seats.take().expect("the first's");
        assert_eq!([&settled, &first, &second, &next].map(leaves), [false, true, false, false]);
        // Its seat is another's already: that it ends frees none.
        drop(first);
        assert!(seats.take().is_none());
        drop(settled);
        assert!(seats.take().is_some(), "that of one who had settled is free when it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_settled_stays_and_the_next_one_waits() {
        let mut seats = Seats::new("test", 2);
        let held = [seats.take().expect("free"), seats.take().expect("free")];
        held.iter().for_each(Seat::settle);
        assert!(timeout(SETTLES_WITHIN * 100, seats.wait()).await.is_err());
        let [one, _other] = held;
        tokio::spawn(async move {
            sleep(SETTLES_WITHIN).await;
            drop(one);
        });
        let stranger = seats.wait().await;
        assert!(!leaves(&stranger));
        // One that has just come is waited for, too.
        let begun = Instant::now();
        seats.wait().await;
        assert!(leaves(&stranger) && begun.elapsed() == SETTLES_WITHIN, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_of_strangers_is_bounded() {
        let mut seats = Seats::new("test", 4);
        let first = seats.take().expect("free");
        for _ in 0..1_000 {
            drop(seats.take().expect("free"));
        }
        assert!(seats.strangers.len() <= 2 * 4, "{}", seats.strangers.len());
        advance(SETTLES_WITHIN).await;
        let others: Vec<_> = (0..4).map(|_| seats.take().expect("three are free, one is given")).collect();
        assert!(leaves(&first) && !others.iter().any(leaves));
    }
}
