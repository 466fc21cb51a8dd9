//! One Attach stream to one instance: its task, and the handle through which requests use it.
//!
//! Started and stopped by [`crate::fleet::keeper`]. States: *down* -> connecting -> *up* (Welcome has come) -> down, with
//! a growing pause between attempts. While it is up, legs are dispatched over it and every message of the instance is
//! handed to the mailboxes of the legs in it, or to the board. When it breaks, every leg on it fails with
//! `instance_lost`; the instance cancels them on its side.
//!
//! The outbound queue holds [`OUTBOUND_FRAMES`]. Overflow policy: a dispatch is refused; a cancel that finds no room cuts
//! the stream, which cancels everything on it: an instance that reads nothing is as good as lost.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use baton_process::{one_line, tls::Dial};
use baton_proto::{ApiError, CoordinatorId, ErrorCode, Incarnation, InstanceId, LegId, v1};
use baton_registry::ObservedStatus;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Streaming, transport::Endpoint};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer, inference_client::InferenceClient};

use super::{leg::Output, mailbox::Mailbox};
use crate::{
    config::{CHOICES_MOST, FleetConfig},
    fleet::{Duty, cache::CacheReader},
    metrics::Metrics,
    schedule::{Side, board::Board},
};

/// Frames queued towards one instance.
const OUTBOUND_FRAMES: usize = 1024;
/// Largest message an instance may send: a step's tokens of all legs.
const INBOUND_BYTES_MOST: usize = 16 << 20;

/// Where the instance is now. A change ends any pause before the next attempt to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `host:port` of its Inference service.
    pub endpoint: String,
    pub incarnation: Incarnation,
    /// What it last told the controller: an instance that has just become ready is called at once.
    pub status: Option<ObservedStatus>,
}

impl Target {
    fn same_process(&self, other: &Self) -> bool {
        self.endpoint == other.endpoint && self.incarnation == other.incarnation
    }
}

/// A set of choices.
type Choices = u128;

fn first_choices(count: u32) -> Choices {
    Choices::MAX >> (CHOICES_MOST - count.clamp(1, CHOICES_MOST))
}

fn only(choice: u32) -> Choices {
    if choice < CHOICES_MOST { 1 << choice } else { 0 }
}

/// A leg waiting for output.
struct Slot {
    side: Side,
    mailbox: Arc<Mailbox>,
    /// Choices that have not ended.
    open: Choices,
}

struct Channel {
    outbound: mpsc::Sender<v1::AttachRequest>,
    legs: HashMap<LegId, Slot>,
    /// Ends the stream.
    cut: CancellationToken,
}

/// Handle to the stream of one instance.
pub struct Link {
    instance: InstanceId,
    next_leg: AtomicU64,
    /// `None` while down.
    channel: Mutex<Option<Channel>>,
    metrics: Arc<Metrics>,
}

impl Link {
    pub fn new(instance: InstanceId, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { instance, next_leg: AtomicU64::new(1), channel: Mutex::new(None), metrics })
    }

    /// Sends one leg; its output goes to `mailbox` until the guard is dropped.
    pub fn dispatch(
        self: &Arc<Self>,
        side: Side,
        mailbox: &Arc<Mailbox>,
        mut dispatch: v1::Dispatch,
    ) -> Result<LegGuard, ApiError> {
        let mut channel = self.channel.lock();
        let Some(up) = channel.as_mut() else {
            return Err(lost(&self.instance));
        };
        let leg = LegId(self.next_leg.fetch_add(1, Ordering::Relaxed));
        dispatch.leg = leg.0;
        let choices = dispatch.sampling.as_ref().map_or(1, |sampling| sampling.choices);
        let open = first_choices(choices);
        let frame = v1::AttachRequest { frame: Some(Ask::Dispatch(dispatch)) };
        if up.outbound.try_send(frame).is_err() {
            let message = format!("instance {} takes no requests now; try again in a moment", self.instance);
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
        up.legs.insert(leg, Slot { side, mailbox: mailbox.clone(), open });
        Ok(LegGuard { link: self.clone(), leg, open })
    }

    /// Cancels choices of a leg; those that have ended are let be.
    fn cancel(&self, leg: LegId, choices: Choices, reason: &'static str, damaged: bool) {
        let mut channel = self.channel.lock();
        let Some(up) = channel.as_mut() else { return };
        let Some(slot) = up.legs.get_mut(&leg) else { return };
        let choices = choices & slot.open;
        slot.open &= !choices;
        let choice = match (choices, slot.open) {
            (0, _) => return,
            (_, 0) => None,
            (choices, _) => Some(choices.trailing_zeros()),
        };
        tracing::debug!(instance = %self.instance, %leg, side = slot.side.name(), ?choice, reason, "cancelling");
        if choice.is_none() {
            up.legs.remove(&leg);
            self.metrics.cancels.get_or_create(&crate::metrics::reason(reason)).inc();
        }
        let cancel = v1::Cancel { leg: leg.0, reason: reason.into(), choice, damaged };
        if up.outbound.try_send(v1::AttachRequest { frame: Some(Ask::Cancel(cancel)) }).is_err() {
            tracing::warn!(instance = %self.instance, "cutting the stream: the instance does not read");
            up.cut.cancel();
        }
    }

    /// Whether the stream stands.
    pub fn is_up(&self) -> bool {
        self.channel.lock().is_some()
    }

    fn deliver(&self, step: v1::StepOutput) {
        let mut channel = self.channel.lock();
        let Some(up) = channel.as_mut() else { return };
        for output in step.legs {
            let leg = LegId(output.leg);
            // What is not there was cancelled, and the instance had not read that yet.
            let Some(slot) = up.legs.get_mut(&leg).filter(|slot| slot.open & only(output.choice) != 0) else {
                continue;
            };
            if output.end.is_some() {
                slot.open &= !only(output.choice);
            }
            let over = slot.open == 0;
            slot.mailbox.deliver(slot.side, Output::from(output));
            if over {
                up.legs.remove(&leg);
            }
        }
    }

    /// The stream is gone: every leg on it fails. False: there was none.
    fn break_off(&self) -> bool {
        let Some(up) = self.channel.lock().take() else { return false };
        if !up.legs.is_empty() {
            self.metrics.legs_lost.inc_by(up.legs.len() as u64);
        }
        for slot in up.legs.into_values() {
            for choice in (0..CHOICES_MOST).filter(|&choice| slot.open & only(choice) != 0) {
                slot.mailbox.deliver(slot.side, Output { choice, ..Output::failed(lost(&self.instance)) });
            }
        }
        true
    }
}

fn lost(instance: &InstanceId) -> ApiError {
    let message = format!("the connection to instance {instance} was lost; send the request again");
    ApiError::new(ErrorCode::InstanceLost, message)
}

/// One leg on one stream. Dropped before all of its choices have ended, it cancels the rest at once.
pub struct LegGuard {
    link: Arc<Link>,
    leg: LegId,
    /// Choices that have neither ended nor been cancelled.
    open: Choices,
}

impl LegGuard {
    /// Whether the stream to the instance stands.
    pub fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// The instance has ended a choice. True: that was the last.
    pub fn ended(&mut self, choice: u32) -> bool {
        let before = self.open;
        self.open &= !only(choice);
        before != 0 && self.open == 0
    }

    /// Tells the instance to stop work on a choice, and why (for its log).
    pub fn cancel(&mut self, choice: u32, reason: &'static str) {
        if self.open & only(choice) != 0 {
            self.open &= !only(choice);
            self.link.cancel(self.leg, only(choice), reason, false);
        }
    }

    /// The same, and that what it handed on arrived damaged.
    pub fn cancel_damaged(&mut self, choice: u32) {
        if self.open & only(choice) != 0 {
            self.open &= !only(choice);
            self.link.cancel(self.leg, only(choice), "kv_damaged", true);
        }
    }

    /// Tells the instance to stop work on every choice.
    pub fn cancel_all(mut self, reason: &'static str) {
        self.link.cancel(self.leg, std::mem::take(&mut self.open), reason, false);
    }
}

impl Drop for LegGuard {
    fn drop(&mut self) {
        if self.open != 0 {
            self.link.cancel(self.leg, self.open, "client_gone", false);
        }
    }
}

/// Why a stream ended or was not opened; for the log only.
#[derive(Debug, thiserror::Error)]
enum BreakReason {
    #[error("cannot connect to {endpoint}: {}", one_line(.source))]
    Connect { endpoint: String, source: tonic::transport::Error },
    #[error("no stream: {}", one_line(.0.as_ref()))]
    Attach(#[from] Box<tonic::Status>),
    #[error("no welcome within the time")]
    NoWelcome,
    #[error("the peer did not greet, or is not {expected}: {got}")]
    WrongPeer { expected: InstanceId, got: String },
    #[error("the instance ended the stream")]
    Ended,
    #[error("cut")]
    Cut,
    #[error("the instance was restarted or moved")]
    Moved,
}

/// A stream that stands.
struct Attached {
    inbound: Streaming<v1::AttachResponse>,
    cut: CancellationToken,
    /// Who answered, and where.
    target: Target,
    /// What the instance has cached is read for as long.
    _cache: AbortOnDropHandle<()>,
}

/// Keeps the stream up until `stop`.
pub struct LinkTask {
    pub link: Arc<Link>,
    pub board: Arc<Board>,
    pub coordinator: CoordinatorId,
    pub config: FleetConfig,
    /// The way to this instance.
    pub dial: Dial,
    pub target: watch::Receiver<Target>,
    pub stop: CancellationToken,
}

impl LinkTask {
    /// Runs until stopped; reconnects with a growing pause.
    pub async fn run(mut self) {
        let mut pause = self.config.reconnect_min;
        loop {
            let began = Instant::now();
            let stop = self.stop.clone();
            let reason = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                reason = self.connect_and_serve() => Some(reason),
            };
            // First the board: a leg that fails now may be placed again at once, and not here.
            self.board.down(&self.link.instance, Instant::now());
            let was_up = self.link.break_off();
            let Some(reason) = reason else { return };
            if was_up {
                tracing::info!(instance = %self.link.instance, %reason, "stream is down");
            } else {
                tracing::debug!(instance = %self.link.instance, %reason, "cannot connect yet");
            }
            if matches!(reason, BreakReason::Moved) || began.elapsed() > self.config.reconnect_max {
                pause = self.config.reconnect_min;
            }
            let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                moved = self.target.changed() => {
                    if moved.is_err() {
                        return;
                    }
                    pause = self.config.reconnect_min;
                }
                () = sleep(jittered) => pause = (pause * 2).min(self.config.reconnect_max),
            }
        }
    }

    async fn connect_and_serve(&mut self) -> BreakReason {
        match self.attach().await {
            Ok(attached) => self.serve(attached).await,
            Err(reason) => reason,
        }
    }

    async fn attach(&mut self) -> Result<Attached, BreakReason> {
        let target = self.target.borrow_and_update().clone();
        let failed = |source| BreakReason::Connect { endpoint: target.endpoint.clone(), source };
        let endpoint = Endpoint::from_shared(format!("http://{}", target.endpoint))
            .map_err(failed)?
            .connect_timeout(self.config.connect_timeout)
            .http2_keep_alive_interval(self.config.keep_alive)
            .keep_alive_timeout(self.config.keep_alive)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let channel = self.dial.connect(endpoint).await.map_err(failed)?;
        let mut client = InferenceClient::new(channel.clone()).max_decoding_message_size(INBOUND_BYTES_MOST);
        let (outbound, frames) = mpsc::channel(OUTBOUND_FRAMES);
        let hello = v1::attach_request::Hello { coordinator_id: self.coordinator.to_string() };
        let hello = v1::AttachRequest { frame: Some(Ask::Hello(hello)) };
        if outbound.try_send(hello).is_err() {
            return Err(BreakReason::Ended);
        }
        let greeted = async {
            let mut inbound =
                client.attach(ReceiverStream::new(frames)).await.map_err(Box::new)?.into_inner();
            let first = inbound.message().await.map_err(Box::new)?;
            Ok::<_, BreakReason>((inbound, first))
        };
        let greeted = timeout(self.config.connect_timeout, greeted).await;
        let (inbound, first) = greeted.map_err(|_| BreakReason::NoWelcome)??;
        let expected = self.link.instance.clone();
        let (incarnation, duty) = match first.and_then(|first| first.frame) {
            Some(Answer::Welcome(v1::attach_response::Welcome { instance_id, incarnation, role }))
                if instance_id == expected.as_str() =>
            {
                (Incarnation(incarnation), Duty::from(&role.unwrap_or_default()))
            }
            other => {
                let got = format!("{other:.80?}");
                return Err(BreakReason::WrongPeer { expected, got });
            }
        };
        let cut = CancellationToken::new();
        let up = Channel { outbound, legs: HashMap::new(), cut: cut.clone() };
        *self.link.channel.lock() = Some(up);
        self.board.up(&self.link.instance, incarnation, duty);
        tracing::info!(instance = %self.link.instance, endpoint = %target.endpoint, ?duty, "stream is up");
        let cache = CacheReader {
            feed: self.board.feed(&expected),
            instance: expected,
            incarnation,
            coordinator: self.coordinator.clone(),
            channel,
            config: self.config.clone(),
            metrics: self.link.metrics.clone(),
        };
        Ok(Attached { inbound, cut, target: Target { incarnation, ..target }, _cache: cache.start() })
    }

    async fn serve(&mut self, attached: Attached) -> BreakReason {
        let Attached { mut inbound, cut, target, _cache } = attached;
        loop {
            let message = tokio::select! {
                biased;
                () = cut.cancelled() => return BreakReason::Cut,
                moved = self.target.changed() => match moved {
                    // Only its status is new, or the list has caught up with what was found there.
                    Ok(()) if self.target.borrow_and_update().same_process(&target) => continue,
                    Ok(()) => return BreakReason::Moved,
                    Err(_) => return BreakReason::Cut,
                },
                message = inbound.message() => message,
            };
            match message {
                Ok(Some(v1::AttachResponse { frame: Some(frame) })) => self.take(frame),
                Ok(Some(v1::AttachResponse { frame: None })) => {}
                Ok(None) => return BreakReason::Ended,
                Err(status) => return BreakReason::Attach(Box::new(status)),
            }
        }
    }

    fn take(&self, frame: Answer) {
        let instance = &self.link.instance;
        match frame {
            Answer::Step(step) => self.link.deliver(step),
            Answer::Load(load) => self.board.load(instance, (&load).into()),
            Answer::Role(change) => {
                tracing::info!(%instance, role = ?change.role(), phase = ?change.phase(), "instance changed");
                self.board.duty(instance, (&change).into());
            }
            Answer::Welcome(_) => {}
        }
    }
}
