//! Keeps the stream to one instance up, and takes in what comes on it.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use baton_process::tls::Dial;
use baton_proto::{CoordinatorId, Incarnation, v1};
use baton_schedule::{board::Board, fleet::Duty};
use futures::FutureExt;
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
use v1::{attach_response::Frame as Answer, inference_client::InferenceClient};

use super::{Attachment, Slots, Target, Up, reason::BreakReason, stuck::Pulse};
use crate::{
    config::FleetConfig,
    fleet::{
        Breakers,
        cache::{CacheReader, Memory},
        inline,
        outbound::Outbound,
        stall::LOOK,
    },
};

/// Messages that are taken in before anybody reads what they brought.
const MESSAGES_AT_ONCE: usize = 16;
/// Deliveries, and answers read, before whoever else was woken has a turn. A turn given up wakes another thread, whether it
/// finds anything to do or not: with a single stream that was a quarter of what a token takes.
const WORK_BETWEEN_TURNS: usize = 64;
/// How long what an instance has cached is remembered when the stream to it has broken: longer than a busy one keeps the
/// changes that would be missed.
const MEMORY_KEPT: Duration = Duration::from_secs(60);
/// Largest message an instance may send: a step's tokens of all legs.
const INBOUND_BYTES_MOST: usize = 16 << 20;

/// How often each instance of so many is asked to tell its load: all together ten thousand times a second at most.
pub(super) fn load_interval_millis(instances: usize) -> u32 {
    u32::try_from(instances / 10).unwrap_or(u32::MAX).clamp(50, 1000)
}

/// A stream that stands.
struct Attached {
    inbound: Streaming<v1::AttachResponse>,
    /// Who answered, and where.
    target: Target,
    channel: Channel,
    /// What it said of its load at first.
    load: Option<v1::InstanceLoad>,
    /// Reads what the instance has cached, for as long.
    cache: AbortOnDropHandle<()>,
}

/// Waits for the load of an instance that has said welcome, as it is to be told at first; `None`: it is not within `patience`.
/// `role` is renewed if that changes meanwhile.
async fn first_load(
    inbound: &mut Streaming<v1::AttachResponse>,
    role: &mut v1::RoleChange,
    patience: Duration,
) -> Result<Option<v1::InstanceLoad>, BreakReason> {
    let told = async {
        loop {
            let message = inbound.message().await.map_err(Box::new)?.ok_or(BreakReason::Ended)?;
            match message.frame {
                Some(Answer::Load(load)) => return Ok(Some(load)),
                Some(Answer::Role(change)) if change.epoch >= role.epoch => *role = change,
                _ => {}
            }
        }
    };
    timeout(patience, told).await.unwrap_or(Ok(None))
}

/// A bug that one message meets costs its stream, and not the instance until the coordinator is started again.
async fn survived(serving: impl Future<Output = BreakReason>) -> BreakReason {
    AssertUnwindSafe(serving).catch_unwind().await.unwrap_or(BreakReason::Bug)
}

/// Keeps the stream up until `stop`.
pub struct AttachTask {
    pub attachment: Arc<Attachment>,
    pub board: Arc<Board>,
    pub coordinator: CoordinatorId,
    pub config: FleetConfig,
    pub breakers: Arc<Breakers>,
    /// The way to this instance.
    pub dial: Dial,
    pub target: watch::Receiver<Target>,
    pub stop: CancellationToken,
    /// Of the process that was connected to last.
    pub memory: Option<Memory>,
}

impl AttachTask {
    /// Runs until stopped; reconnects with a growing pause.
    pub async fn run(mut self) {
        let mut pause = self.config.reconnect_min;
        let mut left = Instant::now();
        loop {
            let began = Instant::now();
            let stop = self.stop.clone();
            let reason = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                reason = survived(self.connect_and_serve()) => Some(reason),
            };
            // First the board: a leg that fails now may be placed again at once, and not here.
            self.board.down(&self.attachment.instance, Instant::now());
            let was_up = self.attachment.break_off();
            self.board.detached(&self.attachment.instance);
            let Some(reason) = reason else { return };
            if was_up {
                left = Instant::now();
                tracing::info!(instance = %self.attachment.instance, %reason, "stream is down");
            } else {
                self.memory.take_if(|_| left.elapsed() > MEMORY_KEPT);
                tracing::debug!(instance = %self.attachment.instance, %reason, "cannot connect yet");
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
        let (mut inbound, first) = greeted.map_err(|_| BreakReason::NoWelcome)??;
        let expected = self.attachment.instance.clone();
        let (incarnation, mut role) = match first.and_then(|first| first.frame) {
            Some(Answer::Welcome(v1::attach_response::Welcome { instance_id, incarnation, role }))
                if instance_id == expected.as_str() =>
            {
                (Incarnation(incarnation), role.unwrap_or_default())
            }
            other => {
                let got = format!("{other:.80?}");
                return Err(BreakReason::WrongPeer { expected, got });
            }
        };
        let load = first_load(&mut inbound, &mut role, self.config.connect_timeout).await?;
        // Before it is placed on: what another process had is not its.
        self.forget_others(incarnation);
        let (instance, duty) = (&self.attachment.instance, Duty::from(&role));
        self.attachment.drains.store(role.phase() == v1::Phase::Draining, Ordering::Relaxed);
        *self.attachment.stream.lock() = Some(Up { outbound, legs: Slots::default() });
        match &load {
            Some(load) => self.board.up_with(instance, incarnation, duty, load.into()),
            None => self.board.up(instance, incarnation, duty),
        }
        tracing::info!(%instance, endpoint = %target.endpoint, ?duty, "stream is up");
        let cache = self.read_cache(incarnation, channel.clone());
        Ok(Attached { inbound, target: Target { incarnation, ..target }, channel, load, cache })
    }

    /// What is remembered of another process, or of another model, counts no more.
    fn forget_others(&mut self, incarnation: Incarnation) {
        let subject = self.board.subject(&self.attachment.instance);
        self.memory.take_if(|memory| !memory.is_of(&subject, incarnation));
    }

    /// What the process at the other end says of its cache counts for the model that the board has it for now.
    fn read_cache(&mut self, incarnation: Incarnation, channel: Channel) -> AbortOnDropHandle<()> {
        let instance = self.attachment.instance.clone();
        self.forget_others(incarnation);
        let anew = || Memory::new(incarnation, self.board.feed(&instance));
        let memory = self.memory.get_or_insert_with(anew).clone();
        let reader = CacheReader {
            instance,
            memory,
            coordinator: self.coordinator.clone(),
            channel,
            config: self.config.clone(),
            metrics: self.attachment.metrics.clone(),
        };
        reader.start()
    }

    async fn serve(&mut self, attached: Attached) -> BreakReason {
        let Attached { mut inbound, mut target, channel, load, mut cache } = attached;
        let mut pulse = Pulse::new(self, channel.clone());
        load.into_iter().for_each(|load| pulse.heard(&Answer::Load(load)));
        let mut look = interval(LOOK);
        let mut work = 0;
        loop {
            let message = tokio::select! {
                biased;
                _ = look.tick() => {
                    if self.attachment.is_deaf() {
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
        let instance = &self.attachment.instance;
        match frame {
            Answer::Step(step) => {
                let news = self.attachment.deliver(step);
                if !news.is_empty() {
                    self.board.take_news(instance, &news);
                }
            }
            Answer::Load(load) => {
                self.board.load(instance, (&load).into());
                // Others may have come since it began to drain.
                if self.attachment.drains() {
                    self.attachment.wake_waiting();
                }
            }
            Answer::Role(change) => {
                tracing::info!(%instance, role = ?change.role(), phase = ?change.phase(), "instance changed");
                // First the board: what leaves it now is placed again at once, and not here.
                self.board.duty(instance, (&change).into());
                let drains = change.phase() == v1::Phase::Draining;
                self.attachment.drains.store(drains, Ordering::Relaxed);
                if drains {
                    self.attachment.wake_all();
                }
            }
            Answer::Welcome(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bug_ends_a_stream_and_not_its_task() {
        let bug = async { panic!("as the test wants it") };
        assert!(matches!(survived(bug).await, BreakReason::Bug));
        assert!(matches!(survived(async { BreakReason::Moved }).await, BreakReason::Moved));
    }
}
