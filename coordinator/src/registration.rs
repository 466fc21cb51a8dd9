//! Tells the leading controller that this coordinator is here and how it is, so that operators see it and its links.
//!
//! One task, spawned by [`crate::life`]. States: looking for the leader -> calling -> registered -> pausing -> looking.
//! Pauses grow to a bound and are jittered; the stream is left at once for a new leader. It reads what others count
//! ([`crate::metrics`], [`crate::handoffs`]) and nobody waits for it: requests are served whether there is a controller or not,
//! and so they are where a call meets a bug: that ends the call alone.
//! During a drain it says so, and when that is over it takes its leave. What it is told of in return, how many coordinators
//! there are, it hands on to those who share something by that ([`crate::keys`]).

use std::{
    future::pending,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use baton_process::{one_line, tls::Dial};
use baton_proto::{CoordinatorBeat, CoordinatorSpec, Incarnation, LeaderEpoch, v1};
use baton_registry::FleetSnapshot;
use futures::{FutureExt, StreamExt};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming, transport::Endpoint};
use v1::{control_client::ControlClient, coordinator_report::Report};

use crate::{handoffs::Handoffs, keys::Keys, metrics::Metrics};

/// Reports that may wait for the stream. A full queue means that the controller does not read: it is given up.
const REPORT_QUEUE: usize = 4;
/// For a connection and the order that answers the hello.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// A silent controller is pinged after this long, and given up after as long again without an answer.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// For the controller to close its side after a goodbye.
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);
/// Pauses between calls double from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// What a beat's interval is kept to, whatever the controller asks for.
const BEAT_RANGE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// Links that were not used for this long are not told.
const LINKS_RECENT: Duration = Duration::from_secs(300);
/// A controller that merges beats is told of all links so often, and of those used since otherwise.
const ALL_LINKS_EVERY: Duration = Duration::from_secs(60);
/// How long after its end a handoff may be entered. What is told twice is merged into the same.
const ENTERED_WITHIN: Duration = Duration::from_millis(100);

/// How the controller that leads is found.
#[derive(Debug, Clone)]
pub enum Controllers {
    /// There is one, at this host:port; it embeds the store. Its own record may name an address that others cannot
    /// reach, as it is not made for them.
    One(String),
    /// The leader's record in the store says.
    Leader(watch::Receiver<Arc<FleetSnapshot>>),
}

/// A controller to call.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    endpoint: String,
    /// 0 if it is the only one.
    epoch: LeaderEpoch,
}

fn leader(fleet: &FleetSnapshot) -> Option<Target> {
    let leader = fleet.leader.as_ref().filter(|leader| !leader.endpoint.is_empty())?;
    Some(Target { endpoint: leader.endpoint.clone(), epoch: leader.epoch })
}

impl Controllers {
    /// Waits until somebody leads.
    async fn find(&mut self) -> Target {
        match self {
            Self::One(endpoint) => Target { endpoint: endpoint.clone(), epoch: LeaderEpoch(0) },
            Self::Leader(fleet) => {
                let found = fleet.wait_for(|fleet| leader(fleet).is_some()).await;
                let found = found.ok().and_then(|fleet| leader(&fleet));
                match found {
                    Some(target) => target,
                    // The watch has ended with the process's shutdown, and nobody led.
                    None => pending().await,
                }
            }
        }
    }

    /// Waits until somebody else leads. A record that is gone names nobody: whoever was found may be leading still.
    async fn moved(&mut self, from: &Target) {
        let Self::Leader(fleet) = self else { return pending().await };
        let another = |fleet: &Arc<FleetSnapshot>| leader(fleet).is_some_and(|target| target != *from);
        if fleet.wait_for(another).await.is_err() {
            pending().await
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Registration {
    pub spec: CoordinatorSpec,
    pub controllers: Controllers,
    /// The way to them.
    pub dial: Dial,
    pub metrics: Arc<Metrics>,
    pub handoffs: Arc<Handoffs>,
    pub keys: Arc<Keys>,
    /// The process drains.
    pub shutdown: CancellationToken,
    /// It has drained: says goodbye and ends.
    pub stop: CancellationToken,
}

/// Why a stream ended, for the log.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot connect: {}", one_line(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", one_line(.0))]
    Status(#[from] tonic::Status),
    #[error("no answer in time")]
    Silent,
    #[error("the controller closed the stream")]
    Closed,
    #[error("another controller leads")]
    Moved,
    #[error("it met a bug, of which the log says where")]
    Bug,
}

impl Broken {
    /// Whether people have to see to it: it will not pass by itself.
    fn is_refusal(&self) -> bool {
        let Self::Status(status) = self else { return false };
        matches!(
            status.code(),
            Code::AlreadyExists
                | Code::InvalidArgument
                | Code::ResourceExhausted
                | Code::PermissionDenied
                | Code::Unauthenticated
        )
    }
}

/// A bug costs the call that it meets, and not the coordinator: without a controller traffic goes on.
async fn survived(call: impl Future<Output = Result<(), Broken>>) -> Result<(), Broken> {
    AssertUnwindSafe(call).catch_unwind().await.unwrap_or(Err(Broken::Bug))
}

impl Registration {
    /// Runs until `stop`.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
        let (mut pause, mut calls) = (FIRST_PAUSE, 0u32);
        loop {
            let target = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                target = self.controllers.find() => target,
            };
            let began = Instant::now();
            let Err(broken) = survived(self.once(&target)).await else { return };
            calls = calls.saturating_add(1);
            if began.elapsed() > LONGEST_PAUSE || matches!(broken, Broken::Moved) {
                (pause, calls) = (FIRST_PAUSE, 0);
            }
            if matches!(broken, Broken::Bug) {
                tracing::error!(controller = target.endpoint, %broken, "the call to the controller is made anew");
                pause = LONGEST_PAUSE;
            } else if broken.is_refusal() && calls.is_power_of_two() {
                tracing::warn!(controller = target.endpoint, %broken, "this coordinator is not listed");
            } else {
                tracing::debug!(controller = target.endpoint, %broken, "not registered with the controller");
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.controllers.moved(&target) => pause = FIRST_PAUSE,
                () = sleep(pause.mul_f64(rand::random_range(0.5..1.0))) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// One stream, from hello to its end. `Ok` after a goodbye.
    async fn once(&mut self, target: &Target) -> Result<(), Broken> {
        let (reports, outgoing) = mpsc::channel(REPORT_QUEUE);
        let (mut told, mut told_all) = (Instant::now(), Instant::now());
        let hello =
            v1::CoordinatorHello { spec: Some(self.spec.clone().into()), beat: Some(self.beat(None)) };
        say(&reports, Report::Hello(hello))?;
        let open = async {
            let mut orders = connect(&self.dial, &target.endpoint, outgoing).await?;
            let first = orders.message().await?.ok_or(Broken::Closed)?;
            Ok::<_, Broken>((orders, first))
        };
        let (mut orders, mut order) = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Ok(()),
            opened = timeout(ANSWER_WITHIN, open) => opened.map_err(|_| Broken::Silent)??,
        };
        tracing::info!(controller = target.endpoint, epoch = %target.epoch, "registered with the controller");
        self.keys.share_among(order.coordinators);
        let mut beats = ticks(&order);
        let mut drain_told = false;
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => {
                    drop(reports);
                    let rest = orders.by_ref().for_each(|_| async {});
                    let _ = timeout(GOODBYE_WITHIN, rest).await;
                    return Ok(());
                }
                () = self.controllers.moved(target) => return Err(Broken::Moved),
                () = self.shutdown.cancelled(), if !drain_told => drain_told = true,
                next = orders.message() => {
                    let next = next?.ok_or(Broken::Closed)?;
                    self.keys.share_among(next.coordinators);
                    if next.beat_millis != order.beat_millis {
                        beats = ticks(&next);
                    }
                    order = next;
                    continue;
                }
                _ = beats.tick() => {}
            }
            let now = Instant::now();
            let since = told.checked_sub(ENTERED_WITHIN);
            let since = since.filter(|_| order.merges_links && now < told_all + ALL_LINKS_EVERY);
            say(&reports, Report::Beat(self.beat(since)))?;
            (told, told_all) = (now, if since.is_some() { told_all } else { now });
        }
    }

    /// With the links that were used since; with all of late if there is no such time.
    fn beat(&self, since: Option<Instant>) -> v1::CoordinatorBeat {
        let now = Instant::now();
        let count = |gauge: i64| u32::try_from(gauge).unwrap_or(0);
        let beat = CoordinatorBeat {
            requests: self.metrics.ended.get(),
            failures: self.metrics.failed.get(),
            running: count(self.metrics.in_flight.get()),
            queued: count(self.metrics.queued.get()),
            draining: self.shutdown.is_cancelled(),
            links: self.handoffs.used_since(since.unwrap_or(now.checked_sub(LINKS_RECENT).unwrap_or(now))),
            all_links: since.is_none(),
        };
        beat.into()
    }
}

/// When to beat from now on.
fn ticks(order: &v1::CoordinatorOrder) -> Interval {
    let every = Duration::from_millis(order.beat_millis.into()).clamp(BEAT_RANGE.0, BEAT_RANGE.1);
    let mut ticks = interval_at(Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn say(reports: &mpsc::Sender<v1::CoordinatorReport>, report: Report) -> Result<(), Broken> {
    reports.try_send(v1::CoordinatorReport { report: Some(report) }).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => Broken::Silent,
        mpsc::error::TrySendError::Closed(_) => Broken::Closed,
    })
}

async fn connect(
    dial: &Dial,
    endpoint: &str,
    reports: mpsc::Receiver<v1::CoordinatorReport>,
) -> Result<Streaming<v1::CoordinatorOrder>, Broken> {
    let endpoint = Endpoint::from_shared(format!("http://{endpoint}"))?
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    let channel = dial.connect(endpoint).await?;
    Ok(ControlClient::new(channel).coordinate(ReceiverStream::new(reports)).await?.into_inner())
}

/// Milliseconds from 1970: grows from start to start. A clock that was set back costs a lease, for which the earlier
/// start is listed still.
pub fn incarnation(now: SystemTime) -> Incarnation {
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    Incarnation(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX).max(1))
}

#[cfg(test)]
mod tests;
