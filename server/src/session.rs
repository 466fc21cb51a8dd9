//! The session with a controller: who this instance is, how it is, and what it is to be.
//!
//! One stream to the controller that leads, opened again after every break: all controllers are asked, and whom they
//! name, with growing, jittered pauses between the [`rounds`]. Role and epoch live in [`crate::duty`] and survive
//! breaks: without a controller nothing changes, and traffic goes on.
//!
//! What this process is called, its incarnation, is settled here, once, before it does any work: see
//! [`Session::settle`].

use std::time::Duration;

use baton_process::{one_line, tls::Dial};
use baton_proto::{Incarnation, InstanceSpec, LEADER_METADATA, RoleEpoch, v1};
use futures::StreamExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Endpoint};

use crate::{
    engine::{load::Load, sampler::uniform},
    role::{Assignment, Event, Phase, Role, RoleView},
};

mod patience;
mod rounds;

use patience::Patience;
use rounds::Rounds;

/// Reports that may wait for the stream. A full queue means that the controller does not read: the session is given up.
const REPORT_QUEUE: usize = 16;
/// For the controller to close its side after a goodbye.
pub const GOODBYE_WITHIN: Duration = Duration::from_secs(2);
/// What a beat's interval is kept to, whatever the controller asks for.
const BEAT_RANGE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// The first pause between rounds.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct Session {
    /// Does not change while the process lives, but for its incarnation until that is settled.
    pub spec: InstanceSpec,
    /// Told once by which incarnation this process is known. Until then, and as long as somebody waits for it, a
    /// controller that knows a later one has it raised: the clock that it comes from may have been set back. From then
    /// on a later one means that this process has been replaced.
    pub settle: Option<oneshot::Sender<Incarnation>>,
    /// host:port each.
    pub controllers: Vec<String>,
    /// The way to them.
    pub dial: Dial,
    pub role: watch::Receiver<RoleView>,
    pub load: watch::Receiver<Load>,
    pub events: mpsc::Sender<Event>,
    /// Says goodbye and ends.
    pub shutdown: CancellationToken,
}

/// Another process is known by this instance's id, and it was started later: no controller will take this one again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("replaced: incarnation {by} of this instance was started after this process, {own}")]
pub struct Replaced {
    pub own: Incarnation,
    pub by: Incarnation,
}

/// Why a session ended, for the log.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot connect: {}", one_line(.0))]
    Connect(#[source] tonic::transport::Error),
    #[error("{}", one_line(.0))]
    Status(#[from] tonic::Status),
    #[error("no answer in time")]
    Silent,
    #[error("the controller closed the session")]
    Closed,
    #[error("the controller refused this instance: {0}")]
    Refused(String),
    #[error(transparent)]
    Replaced(#[from] Replaced),
    #[error("the controller did not say welcome first")]
    NoWelcome,
}

impl Broken {
    /// The leader that a standby names.
    fn leader(&self) -> Option<String> {
        let Self::Status(status) = self else { return None };
        status.metadata().get(LEADER_METADATA)?.to_str().ok().map(str::to_owned)
    }
}

impl Session {
    /// Runs until `shutdown`, or until this process is replaced.
    pub async fn run(mut self) -> Result<(), Replaced> {
        let mut rounds = Rounds::new(self.controllers.clone());
        let mut patience = Patience::default();
        let mut calls = 0u32;
        while !self.shutdown.is_cancelled() {
            let controller = rounds.call();
            let mut welcomed = None;
            let Err(error) = self.once(&controller, patience, &mut welcomed).await else { return Ok(()) };
            if self.shutdown.is_cancelled() {
                return Ok(());
            }
            if let Broken::Replaced(replaced) = error {
                return Err(replaced);
            }
            let over = if let Some(told) = welcomed {
                patience = told;
                rounds.broke();
                Some(0)
            } else {
                rounds.failed(error.leader())
            };
            // Many starts are simultaneous: the controller is often a moment later.
            if welcomed.is_some() || over.is_some_and(|before| before >= 4 && before.is_power_of_two()) {
                tracing::warn!(%controller, %error, "no session with a controller; trying again");
            } else {
                tracing::debug!(%controller, %error, "no session with this controller");
            }
            calls = calls.wrapping_add(1);
            let Some(before) = over else { continue };
            // All have been asked; whoever waits need not wait for one to answer.
            self.settle();
            let pause = pause(before, patience.longest_pause(), uniform(self.spec.incarnation.0, calls));
            tokio::select! {
                () = self.shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
        Ok(())
    }

    /// One stream, from hello to its end. `Ok` after a goodbye. `welcomed` is what the controller's lease allows for.
    async fn once(
        &mut self,
        controller: &str,
        patience: Patience,
        welcomed: &mut Option<Patience>,
    ) -> Result<(), Broken> {
        let (queue, outgoing) = mpsc::channel(REPORT_QUEUE);
        let reports = Reports { queue, within: patience.answer() };
        let hello = v1::InstanceHello { spec: Some(self.spec.clone().into()), beat: Some(self.beat()) };
        reports.send(v1::instance_report::Report::Hello(hello)).await?;
        let open = async {
            let mut orders = connect(&self.dial, controller, patience, outgoing).await?;
            let first = orders.message().await?.and_then(|order| order.order);
            Ok::<_, Broken>((orders, first))
        };
        let (orders, first) = tokio::select! {
            () = self.shutdown.cancelled() => return Ok(()),
            opened = tokio::time::timeout(patience.answer(), open) => opened.map_err(|_| Broken::Silent)??,
        };
        let welcome = match first {
            Some(v1::controller_order::Order::Welcome(welcome)) => welcome,
            Some(v1::controller_order::Order::Refuse(refuse)) => {
                return Err(self.refused(refuse));
            }
            Some(v1::controller_order::Order::Assign(_)) | None => return Err(Broken::NoWelcome),
        };
        self.settle();
        *welcomed = Some(patience.under(Duration::from_millis(welcome.lease_millis.into())));
        tracing::info!(
            controller = welcome.controller_id,
            epoch = welcome.leader_epoch,
            "session with the controller"
        );
        let interval = Duration::from_millis(welcome.beat_millis.into()).clamp(BEAT_RANGE.0, BEAT_RANGE.1);
        self.converse(reports, orders, interval).await
    }

    /// From here on the incarnation stays as it is.
    fn settle(&mut self) {
        if let Some(settle) = self.settle.take() {
            // Whoever waited may have done without.
            let _ = settle.send(self.spec.incarnation);
        }
    }

    /// Takes a later incarnation than the one that a controller knows, if that is later than this one's and nobody
    /// knows this one yet. Otherwise that one has replaced this process.
    fn refused(&mut self, refuse: v1::Refuse) -> Broken {
        let (own, held) = (self.spec.incarnation, Incarnation(refuse.held_incarnation));
        if held <= own {
            let reason = refuse.reason.map_or_else(|| "without a reason".into(), |reason| reason.message);
            return Broken::Refused(reason);
        }
        let above = Incarnation(held.0.saturating_add(1));
        let settled = self.settle.take().is_some_and(|settle| settle.send(above).is_ok());
        if !settled {
            return Replaced { own, by: held }.into();
        }
        tracing::warn!(
            %own,
            %held,
            "the clock is behind that of an earlier start of this instance: going on above its incarnation"
        );
        self.spec.incarnation = above;
        Broken::Refused("its incarnation is behind that of an earlier start".into())
    }

    async fn converse(
        &mut self,
        reports: Reports,
        mut orders: Streaming<v1::ControllerOrder>,
        interval: Duration,
    ) -> Result<(), Broken> {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = None;
        loop {
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => {
                    let bye = v1::InstanceBye { reason: "the instance is shutting down".into() };
                    reports.send(v1::instance_report::Report::Bye(bye)).await?;
                    // The controller closes its side once it has read the goodbye.
                    drop(reports);
                    let _ = tokio::time::timeout(GOODBYE_WITHIN, orders.by_ref().for_each(|_| async {})).await;
                    return Ok(());
                }
                // Progress of loading is no news: it goes with the regular beats.
                Ok(()) = self.role.changed() => if told == Some(news(&self.role.borrow_and_update())) { continue },
                order = orders.message() => {
                    self.obey(order?.ok_or(Broken::Closed)?).await?;
                    continue;
                }
                _ = ticks.tick() => {}
            }
            let beat = self.beat();
            told = Some(news(&self.role.borrow()));
            reports.send(v1::instance_report::Report::Beat(beat)).await?;
        }
    }

    async fn obey(&mut self, order: v1::ControllerOrder) -> Result<(), Broken> {
        match order.order {
            Some(v1::controller_order::Order::Assign(assign)) => {
                // A role that this build does not know is not taken on.
                let known = assign.role() != v1::Role::Unspecified;
                let Some(role) = Role::from_wire(assign.role).ok().filter(|_| known) else { return Ok(()) };
                tracing::debug!(?role, epoch = assign.epoch, reason = assign.reason, "role assigned");
                let drain = Duration::from_millis(assign.drain_millis.into());
                let (epoch, cordoned) = (RoleEpoch(assign.epoch), assign.cordoned);
                let assignment = Assignment { role, epoch, drain, cordoned };
                // Fails only while the process ends.
                let _ = self.events.send(Event::Assigned(assignment)).await;
                Ok(())
            }
            Some(v1::controller_order::Order::Refuse(refuse)) => Err(self.refused(refuse)),
            // A newer controller may say what this build does not know.
            Some(v1::controller_order::Order::Welcome(_)) | None => Ok(()),
        }
    }

    fn beat(&mut self) -> v1::InstanceBeat {
        let role = *self.role.borrow_and_update();
        v1::InstanceBeat {
            role: role.role.to_wire().into(),
            role_epoch: role.epoch.0,
            phase: role.phase.to_wire().into(),
            load_permille: role.load_permille,
            load: Some((&*self.load.borrow()).into()),
        }
    }
}

/// What the controller is told at once.
fn news(view: &RoleView) -> (Role, RoleEpoch, Phase) {
    (view.role, view.epoch, view.phase)
}

async fn connect(
    dial: &Dial,
    controller: &str,
    patience: Patience,
    reports: mpsc::Receiver<v1::InstanceReport>,
) -> Result<Streaming<v1::ControllerOrder>, Broken> {
    let endpoint = Endpoint::from_shared(format!("http://{controller}"))
        .map_err(Broken::Connect)?
        .http2_keep_alive_interval(patience.keep_alive())
        .keep_alive_timeout(patience.keep_alive())
        .keep_alive_while_idle(true);
    let channel = dial.connect(endpoint).await.map_err(Broken::Connect)?;
    let mut client = v1::control_client::ControlClient::new(channel);
    Ok(client.session(ReceiverStream::new(reports)).await?.into_inner())
}

/// The way to the controller.
struct Reports {
    queue: mpsc::Sender<v1::InstanceReport>,
    /// For a report to find room in the queue.
    within: Duration,
}

impl Reports {
    async fn send(&self, report: v1::instance_report::Report) -> Result<(), Broken> {
        let sent = self.queue.send_timeout(v1::InstanceReport { report: Some(report) }, self.within).await;
        sent.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Timeout(_) => Broken::Silent,
            mpsc::error::SendTimeoutError::Closed(_) => Broken::Closed,
        })
    }
}

/// Doubles with each fruitless round up to the longest; `jitter` in [0, 1) spreads it over its upper half.
fn pause(rounds: u32, longest: Duration, jitter: f64) -> Duration {
    let full = FIRST_PAUSE.saturating_mul(1 << rounds.min(16)).min(longest);
    full.mul_f64(0.5 + 0.5 * jitter)
}

#[cfg(test)]
mod tests;
