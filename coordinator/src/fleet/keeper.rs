//! Keeps one attachment per instance of the store's list.
//!
//! Spawned once by [`crate::build`]. Reads the list as it changes, starts, retargets and stops [`AttachTask`]s, and hands
//! out attachments by instance. Ends when requests have drained, and the attachments with it: [`Attachments::stop_all`].

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use baton_process::tls::Dial;
use baton_proto::{CoordinatorId, InstanceId};
use baton_registry::{FleetSnapshot, Revision};
use baton_schedule::fleet::{Change, Spec};
use baton_schedule::{board::Board, index::SHARDS};
use parking_lot::RwLock;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{AttachTask, Attachment, Breakers, Target};
use crate::{config::FleetConfig, metrics::Metrics};

struct Entry {
    attachment: Arc<Attachment>,
    target: watch::Sender<Target>,
    stop: CancellationToken,
}

/// Attachments by instance.
#[derive(Default)]
pub struct Attachments {
    entries: RwLock<Entries>,
    /// How many legs were sent on all of them.
    legs: Arc<AtomicU64>,
}

#[derive(Default)]
struct Entries {
    attachments: HashMap<InstanceId, Entry>,
    /// No attachment is started any more.
    closed: bool,
}

impl Attachments {
    pub fn get(&self, instance: &InstanceId) -> Option<Arc<Attachment>> {
        self.entries.read().attachments.get(instance).map(|entry| entry.attachment.clone())
    }

    /// Ends every stream; what is still on them fails. For the end of a drain.
    pub fn stop_all(&self) {
        let mut entries = self.entries.write();
        entries.closed = true;
        for entry in entries.attachments.values() {
            entry.stop.cancel();
        }
    }
}

#[cfg(test)]
impl Attachments {
    /// Attachments that nobody keeps.
    pub fn of(attachments: impl IntoIterator<Item = (InstanceId, Arc<Attachment>)>) -> Self {
        let entry = |(id, attachment)| {
            let target = Target {
                endpoint: String::new(),
                incarnation: baton_proto::Incarnation(1),
                revision: String::new(),
                status: None,
            };
            (id, Entry { attachment, target: watch::Sender::new(target), stop: CancellationToken::new() })
        };
        let attachments = attachments.into_iter().map(entry).collect();
        Self { entries: RwLock::new(Entries { attachments, closed: false }), ..Self::default() }
    }
}

/// The task that owns the attachments.
pub struct Keeper {
    pub board: Arc<Board>,
    pub attachments: Arc<Attachments>,
    pub coordinator: CoordinatorId,
    pub config: FleetConfig,
    pub metrics: Arc<Metrics>,
    pub breakers: Arc<Breakers>,
    /// The way to instances.
    pub dial: Dial,
    /// The store's list.
    pub listed: watch::Receiver<Arc<FleetSnapshot>>,
    pub tasks: TaskTracker,
    /// Requests have ended, and none comes any more.
    pub drained: CancellationToken,
    /// The list that the board was told last.
    pub told: Option<Vec<Spec>>,
}

impl Keeper {
    /// Runs until requests have drained: those that are left may have to be moved to an instance that comes now.
    pub async fn run(mut self) {
        let mut tick = interval(self.config.sweep);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut source_alive = true;
        self.take_list();
        loop {
            tokio::select! {
                biased;
                () = self.drained.cancelled() => break,
                changed = self.listed.changed(), if source_alive => match changed {
                    Ok(()) => self.take_list(),
                    Err(_) => source_alive = false,
                },
                _ = tick.tick() => {
                    let changes = self.board.sweep(Instant::now());
                    self.apply(changes);
                    // A shard at a time, so that placing never waits long; one round at most, so that new lists do not either.
                    for _ in 0..SHARDS {
                        if !self.board.caches.sweep() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    self.metrics.show_cached_blocks(self.board.caches.blocks());
                    let stale_since = self.listed.borrow().stale_since;
                    self.metrics.show_fleet_stale(stale_since.map_or(Duration::ZERO, |since| since.elapsed()));
                }
            }
        }
    }

    fn take_list(&mut self) {
        let listed = self.listed.borrow_and_update().clone();
        if listed.revision == Revision::default() {
            // The store has not been read yet.
            return;
        }
        // Most lists only have other statuses, and whoever places is not to wait while a large fleet is compared.
        let specs: Vec<_> = listed.instances.values().map(|instance| Spec::from(&instance.spec)).collect();
        if self.told.as_ref() != Some(&specs) {
            let changes = self.board.list(&specs, Instant::now());
            self.apply(changes);
            self.told = Some(specs);
        }
        let entries = self.attachments.entries.read();
        for (id, instance) in &listed.instances {
            if let Some(entry) = entries.attachments.get(id) {
                entry.target.send_if_modified(|target| {
                    std::mem::replace(&mut target.status, instance.status) != instance.status
                });
            }
        }
    }

    fn apply(&self, changes: Vec<Change>) {
        let mut entries = self.attachments.entries.write();
        if entries.closed {
            return;
        }
        let entries = &mut entries.attachments;
        for change in changes {
            match change {
                Change::Target(spec) => {
                    let (endpoint, incarnation) = (spec.inference_endpoint, spec.incarnation);
                    let target = Target { endpoint, incarnation, revision: spec.revision, status: None };
                    match entries.get(&spec.id) {
                        Some(entry) => entry.target.send_modify(|held| {
                            *held = Target { status: held.status.take(), ..target };
                        }),
                        None => {
                            entries.insert(spec.id.clone(), self.start(spec.id, target));
                        }
                    }
                }
                Change::Forget(id) => {
                    if let Some(entry) = entries.remove(&id) {
                        entry.stop.cancel();
                    }
                }
            }
        }
    }

    fn start(&self, instance: InstanceId, target: Target) -> Entry {
        let (target, receiver) = watch::channel(target);
        let dial = self.dial.clone().named(instance.as_str());
        let attachment = Attachment::new(instance, self.attachments.legs.clone(), self.metrics.clone());
        let stop = CancellationToken::new();
        let task = AttachTask {
            attachment: attachment.clone(),
            board: self.board.clone(),
            coordinator: self.coordinator.clone(),
            config: self.config.clone(),
            breakers: self.breakers.clone(),
            dial,
            target: receiver,
            stop: stop.clone(),
            memory: None,
        };
        self.tasks.spawn(task.run());
        Entry { attachment, target, stop }
    }
}
