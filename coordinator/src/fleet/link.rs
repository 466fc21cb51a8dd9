//! One Attach stream to one instance: its task, and the handle through which requests use it.
//!
//! Started and stopped by [`crate::fleet::keeper`]. States: *down* -> connecting -> *up* (Welcome has come) -> down, with
//! a growing pause between attempts. While it is up, legs are dispatched over it and every message of the instance is
//! handed to the mailboxes of the legs in it, or to the board. When it breaks, every leg on it fails with
//! `instance_lost`; the instance cancels them on its side.
//!
//! An instance that does not get on is suspect: see [`stuck`]. What is to be sent waits in [`super::outbound`]; a dispatch
//! that finds no room there is refused. An instance that reads nothing of it for [`UNREAD_MOST`] is as good as lost: its
//! stream is cut, which cancels everything on it. What comes is read at once where it can be ([`super::inline`]).

mod reason;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod standing;
mod stuck;
mod target;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_process::tls::Dial;
use baton_proto::{ApiError, CoordinatorId, ErrorCode, Incarnation, InstanceId, LegId, v1};
use baton_schedule::{
    Side,
    board::{Board, Credit, LegNews},
    fleet::Duty,
};
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::yield_now,
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer, inference_client::InferenceClient};

use super::{
    Breakers,
    cache::CacheReader,
    guard::{Choices, LegGuard, first_choices, only},
    inline,
    leg::Output,
    mailbox::Mailbox,
    outbound::Outbound,
    stall::LOOK,
};
use crate::{
    config::{CHOICES_MOST, FleetConfig},
    metrics::Metrics,
};
use reason::BreakReason;
pub use reason::not_there;
use stuck::Pulse;
pub use target::Target;

/// How long an instance may read nothing though something waits: longer than its engine takes for a long step, during
/// which it may stop reading.
const UNREAD_MOST: Duration = Duration::from_secs(30);
/// Messages that are taken in before anybody reads what they brought.
const MESSAGES_AT_ONCE: usize = 16;
/// Deliveries, and answers read, before whoever else was woken has a turn. A turn given up wakes another thread, whether it finds
/// anything to do or not: with a single stream that was a quarter of what a token takes.
const WORK_BETWEEN_TURNS: usize = 64;
/// Largest message an instance may send: a step's tokens of all legs.
const INBOUND_BYTES_MOST: usize = 16 << 20;

/// How often each instance of so many is asked to tell its load: all together ten thousand times a second at most.
fn load_interval_millis(instances: usize) -> u32 {
    u32::try_from(instances / 10).unwrap_or(u32::MAX).clamp(50, 1000)
}

/// A leg waiting for output.
struct Slot {
    side: Side,
    mailbox: Arc<Mailbox>,
    /// Choices that have not ended.
    open: Choices,
    /// It has brought a token.
    begun: bool,
    sent: Instant,
}

struct Standing {
    outbound: Outbound,
    legs: HashMap<LegId, Slot>,
}

/// Handle to the stream of one instance.
pub struct Link {
    instance: InstanceId,
    /// Of all links: an instance that is forgotten and comes again is sent none that is still known of before.
    legs: Arc<AtomicU64>,
    /// `None` while down.
    channel: Mutex<Option<Standing>>,
    /// The instance does not get on, though the stream may stand.
    stuck: AtomicBool,
    /// It is about to stop what it does.
    drains: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Link {
    /// `legs` counts the legs of all links.
    pub fn new(instance: InstanceId, legs: Arc<AtomicU64>, metrics: Arc<Metrics>) -> Arc<Self> {
        let (stuck, drains) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { instance, legs, channel: Mutex::new(None), stuck, drains, metrics })
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
        let leg = LegId(self.legs.fetch_add(1, Ordering::Relaxed) + 1);
        dispatch.leg = leg.0;
        let choices = dispatch.sampling.as_ref().map_or(1, |sampling| sampling.choices);
        let open = first_choices(choices);
        credit.dispatched(side, leg, open.count_ones());
        up.outbound.push(Ask::Dispatch(dispatch));
        let sent = Instant::now();
        up.legs.insert(leg, Slot { side, mailbox: mailbox.clone(), open, begun: false, sent });
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
        let message =
            format!("the connection to instance {} was lost; send the request again", self.instance);
        self.lose(up.legs, &ApiError::new(ErrorCode::InstanceLost, message));
        true
    }

    fn lose(&self, legs: HashMap<LegId, Slot>, error: &ApiError) {
        self.metrics.legs_lost.inc_by(legs.len() as u64);
        for slot in legs.into_values() {
            for choice in (0..CHOICES_MOST).filter(|&choice| slot.open & only(choice) != 0) {
                slot.mailbox.deliver(slot.side, Output { choice, ..Output::failed(error.clone()) });
            }
        }
    }
}

/// A stream that stands.
struct Attached {
    inbound: Streaming<v1::AttachResponse>,
    /// Who answered, and where.
    target: Target,
    channel: Channel,
    /// Reads what the instance has cached, for as long.
    cache: AbortOnDropHandle<()>,
}

/// Keeps the stream up until `stop`.
pub struct LinkTask {
    pub link: Arc<Link>,
    pub board: Arc<Board>,
    pub coordinator: CoordinatorId,
    pub config: FleetConfig,
    pub breakers: Arc<Breakers>,
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
        let hello = v1::attach_request::Hello {
            coordinator_id: self.coordinator.to_string(),
            load_interval_millis: load_interval_millis(self.board.fleet_size()),
        };
        let (outbound, frames) = Outbound::new(hello);
        let greeted = async {
            let mut inbound = client.attach(frames).await.map_err(Box::new)?.into_inner();
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
        self.link.drains.store(false, Ordering::Relaxed);
        *self.link.channel.lock() = Some(Standing { outbound, legs: HashMap::new() });
        self.board.up(&self.link.instance, incarnation, duty);
        tracing::info!(instance = %self.link.instance, endpoint = %target.endpoint, ?duty, "stream is up");
        let cache = self.read_cache(incarnation, channel.clone());
        Ok(Attached { inbound, target: Target { incarnation, ..target }, channel, cache })
    }

    /// What the process at the other end says of its cache counts for the model that the board has it for now.
    fn read_cache(&self, incarnation: Incarnation, channel: Channel) -> AbortOnDropHandle<()> {
        let instance = self.link.instance.clone();
        let reader = CacheReader {
            feed: self.board.feed(&instance),
            instance,
            incarnation,
            coordinator: self.coordinator.clone(),
            channel,
            config: self.config.clone(),
            metrics: self.link.metrics.clone(),
        };
        reader.start()
    }

    async fn serve(&mut self, attached: Attached) -> BreakReason {
        let Attached { mut inbound, mut target, channel, mut cache } = attached;
        let mut pulse = Pulse::new(self, channel.clone());
        let mut look = interval(LOOK);
        let mut work = 0;
        loop {
            let message = tokio::select! {
                biased;
                _ = look.tick() => {
                    if self.link.is_deaf() {
                        return BreakReason::Deaf;
                    }
                    pulse.look();
                    continue;
                }
                () = pulse.answered() => continue,
                moved = self.target.changed() => {
                    if moved.is_err() {
                        return BreakReason::Stopped;
                    }
                    let listed = self.target.borrow_and_update().clone();
                    if !listed.same_process(&target) {
                        return BreakReason::Moved;
                    }
                    // Its status is new, or the list has caught up with what was found there: of another model, maybe.
                    if listed.revision != target.revision {
                        target.revision = listed.revision;
                        let reader = self.read_cache(target.incarnation, channel.clone());
                        drop(std::mem::replace(&mut cache, reader));
                    }
                    continue;
                }
                message = inbound.message() => message,
            };
            let (taken, woken) = inline::gather(|| self.take_all(message, &mut inbound, &mut pulse));
            work += 1 + woken.len();
            inline::read(woken);
            if work >= WORK_BETWEEN_TURNS {
                work = 0;
                yield_now().await;
            }
            if let Err(reason) = taken {
                return reason;
            }
        }
    }

    /// Takes a message and those that have come behind it, so that their readers read several steps at once.
    fn take_all(
        &self,
        first: Result<Option<v1::AttachResponse>, tonic::Status>,
        inbound: &mut Streaming<v1::AttachResponse>,
        pulse: &mut Pulse,
    ) -> Result<(), BreakReason> {
        let mut next = Some(first);
        for left in (0..MESSAGES_AT_ONCE).rev() {
            let Some(message) = next else { break };
            let response = message.map_err(Box::new)?.ok_or(BreakReason::Ended)?;
            if let Some(frame) = response.frame {
                pulse.heard(&frame);
                self.take(frame);
            }
            next = if left > 0 { inbound.message().now_or_never() } else { None };
        }
        Ok(())
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
                // First the board: what leaves it now is placed again at once, and not here.
                self.board.duty(instance, (&change).into());
                self.link.drains.store(change.phase() == v1::Phase::Draining, Ordering::Relaxed);
            }
            Answer::Welcome(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;
