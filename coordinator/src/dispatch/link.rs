//! One Attach stream to one instance: its task, and the handle through which requests use it.
//!
//! Started and stopped by [`crate::fleet::keeper`]. States: *down* -> connecting -> *up* (Welcome has come) -> down, with
//! a growing pause between attempts. While it is up, legs are dispatched over it and every message of the instance is
//! handed to the mailboxes of the legs in it, or to the board. When it breaks, every leg on it fails with
//! `instance_lost`; the instance cancels them on its side.
//!
//! What is to be sent waits in [`super::outbound`]; a dispatch that finds no room there is refused. An instance that reads
//! nothing of it for [`UNREAD_MOST`] is as good as lost: its stream is cut, which cancels everything on it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_process::{one_line, tls::Dial};
use baton_proto::{ApiError, CoordinatorId, ErrorCode, Incarnation, InstanceId, LegId, v1};
use baton_registry::ObservedStatus;
use baton_schedule::{
    Side,
    board::{Board, Credit, LegNews},
    fleet::Duty,
};
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Streaming, transport::Endpoint};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer, inference_client::InferenceClient};

use super::{
    guard::{Choices, LegGuard, first_choices, only},
    leg::Output,
    mailbox::Mailbox,
    outbound::Outbound,
};
use crate::{
    config::{CHOICES_MOST, FleetConfig},
    fleet::cache::CacheReader,
    metrics::Metrics,
};

/// How long an instance may read nothing though something waits: longer than its engine takes for a long step, during
/// which it may stop reading.
const UNREAD_MOST: Duration = Duration::from_secs(30);
/// How often that is looked at.
const UNREAD_LOOK: Duration = Duration::from_secs(1);
/// Largest message an instance may send: a step's tokens of all legs.
const INBOUND_BYTES_MOST: usize = 16 << 20;

/// How often each instance of so many is asked to tell its load: all together ten thousand times a second at most.
fn load_interval_millis(instances: usize) -> u32 {
    u32::try_from(instances / 10).unwrap_or(u32::MAX).clamp(50, 1000)
}

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

/// A leg waiting for output.
struct Slot {
    side: Side,
    mailbox: Arc<Mailbox>,
    /// Choices that have not ended.
    open: Choices,
    /// It has brought a token.
    begun: bool,
}

struct Standing {
    outbound: Outbound,
    legs: HashMap<LegId, Slot>,
}

/// Handle to the stream of one instance.
pub struct Link {
    instance: InstanceId,
    next_leg: AtomicU64,
    /// `None` while down.
    channel: Mutex<Option<Standing>>,
    metrics: Arc<Metrics>,
}

impl Link {
    pub fn new(instance: InstanceId, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { instance, next_leg: AtomicU64::new(1), channel: Mutex::new(None), metrics })
    }

    /// Sends one leg; its output goes to `mailbox` until the guard is dropped. An error: nothing was sent.
    pub fn dispatch(
        self: &Arc<Self>,
        side: Side,
        mailbox: &Arc<Mailbox>,
        credit: &mut Credit,
        mut dispatch: v1::Dispatch,
    ) -> Result<LegGuard, ApiError> {
        let mut channel = self.channel.lock();
        let Some(up) = channel.as_mut() else {
            return Err(not_there(&self.instance));
        };
        if !up.outbound.has_room() {
            let message = format!("instance {} takes no requests now; try again in a moment", self.instance);
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
        // Under the lock, so that legs leave in the order of their numbers, and are on the ledger before a load counts them.
        let leg = LegId(self.next_leg.fetch_add(1, Ordering::Relaxed));
        dispatch.leg = leg.0;
        let choices = dispatch.sampling.as_ref().map_or(1, |sampling| sampling.choices);
        let open = first_choices(choices);
        credit.dispatched(side, leg, open.count_ones());
        up.outbound.push(Ask::Dispatch(dispatch));
        up.legs.insert(leg, Slot { side, mailbox: mailbox.clone(), open, begun: false });
        Ok(LegGuard::new(self.clone(), leg, open))
    }

    /// Cancels choices of a leg; those that have ended are let be.
    pub(super) fn cancel(&self, leg: LegId, choices: Choices, reason: &'static str, damaged: bool) {
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
        up.outbound.push(Ask::Cancel(v1::Cancel { leg: leg.0, reason: reason.into(), choice, damaged }));
    }

    /// Whether the instance does not read what it is sent.
    fn is_deaf(&self) -> bool {
        let channel = self.channel.lock();
        channel.as_ref().is_some_and(|up| up.outbound.unread_for(Instant::now()) > UNREAD_MOST)
    }

    /// Whether the stream stands.
    pub fn is_up(&self) -> bool {
        self.channel.lock().is_some()
    }

    /// Hands a step's outputs to their legs. What the ledger is to know of them.
    fn deliver(&self, step: v1::StepOutput) -> Vec<LegNews> {
        let mut news = Vec::new();
        let mut channel = self.channel.lock();
        let Some(up) = channel.as_mut() else { return news };
        for output in step.legs {
            let leg = LegId(output.leg);
            let slot = up.legs.get_mut(&leg);
            // The ledger knows cancelled legs for as long as the instance works on them.
            if slot.as_ref().is_none_or(|slot| !slot.begun) && !output.tokens.is_empty() {
                news.push(LegNews::Prefilled(leg));
            }
            if output.end.is_some() {
                news.push(LegNews::ChoiceEnded(leg));
            }
            // What is not there was cancelled, and the instance had not read that yet.
            let Some(slot) = slot.filter(|slot| slot.open & only(output.choice) != 0) else {
                continue;
            };
            slot.begun |= !output.tokens.is_empty();
            if output.end.is_some() {
                slot.open &= !only(output.choice);
            }
            let over = slot.open == 0;
            slot.mailbox.deliver(slot.side, Output::from(output));
            if over {
                up.legs.remove(&leg);
            }
        }
        news
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

/// Nothing can be sent to an instance: it has just left, or been lost.
pub(super) fn not_there(instance: &InstanceId) -> ApiError {
    let message = format!("instance {instance} has just left; try again in a moment");
    ApiError::new(ErrorCode::Unavailable, message)
}

fn lost(instance: &InstanceId) -> ApiError {
    let message = format!("the connection to instance {instance} was lost; send the request again");
    ApiError::new(ErrorCode::InstanceLost, message)
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
    #[error("the instance reads nothing of what it is sent")]
    Deaf,
    #[error("the instance is not wanted any more")]
    Stopped,
    #[error("the instance was restarted or moved")]
    Moved,
}

/// A stream that stands.
struct Attached {
    inbound: Streaming<v1::AttachResponse>,
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
            self.board.detached(&self.link.instance);
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
                moved = self.target.changed() => match moved {
                    // Only its status is new, or the list has caught up with what was found there.
                    Ok(()) if self.target.borrow_and_update().same_process(&target) => continue,
                    Ok(()) => return BreakReason::Moved,
                    Err(_) => return BreakReason::Stopped,
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
            Answer::Step(step) => {
                let news = self.link.deliver(step);
                if !news.is_empty() {
                    self.board.told(instance, &news);
                }
            }
            Answer::Load(load) => self.board.load(instance, (&load).into()),
            Answer::Role(change) => {
                tracing::info!(%instance, role = ?change.role(), phase = ?change.phase(), "instance changed");
                self.board.duty(instance, (&change).into());
            }
            Answer::Welcome(_) => {}
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
