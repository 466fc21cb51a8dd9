//! The readers' side: a typed view of the fleet that follows the store.
//!
//! Coordinators (and a standby controller) start a [`FleetWatch`]: it lists everything under `/baton/v1/`, watches
//! from there, resumes by revision when the connection breaks and lists again when that history is gone. Loss of the
//! store or of the controller stops changes, never traffic: the last view stays ([`FleetSnapshot::stale_since`] says
//! since when it is only that), and what a new leader has not yet confirmed stays for a while (see [`view`]).
//!
//! It decides nothing: whether a stale or unconfirmed instance is still used is the reader's choice.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use baton_proto::{InstanceId, InstanceSpec, LeaderEpoch, Phase, Role, RoleEpoch};
use futures::FutureExt;
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    DesiredRole, Event, KeyRange, ObservedStatus, Revision, StateFormats, Store, StoreError, Watch,
    WatchBatch, WatchError, format::Found, keys,
};

#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod view;

use view::View;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FleetWatchConfig {
    /// First wait before the store is tried again; doubled up to `retry_max`.
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// How long after a change of leader an instance may take to be confirmed by it before it is dropped.
    pub reconfirm: Duration,
}

impl Default for FleetWatchConfig {
    fn default() -> Self {
        Self {
            retry_min: Duration::from_millis(50),
            retry_max: Duration::from_secs(1),
            reconfirm: Duration::from_secs(15),
        }
    }
}

/// The controller that leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    pub controller_id: String,
    /// host:port of its gRPC services.
    pub endpoint: String,
    pub epoch: LeaderEpoch,
}

/// One instance: what it is, what it should be, what it says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetInstance {
    pub spec: InstanceSpec,
    pub desired: Option<DesiredRole>,
    /// What this incarnation last said; none before it said anything.
    pub status: Option<ObservedStatus>,
    /// Whether the store has it now. If not, it was there before the leader changed and is kept until the new leader
    /// has had time to hear from it.
    pub confirmed: bool,
}

impl FleetInstance {
    /// The role and epoch it serves requests under, if it is ready and that role takes any.
    pub fn serving(&self) -> Option<(Role, RoleEpoch)> {
        let status =
            self.status.filter(|status| status.phase == Phase::Ready && status.role != Role::None)?;
        Some((status.role, status.role_epoch))
    }
}

/// The fleet as of a revision of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FleetSnapshot {
    /// 0 before the store was first read.
    pub revision: Revision,
    pub leader: Option<Leader>,
    pub instances: BTreeMap<InstanceId, Arc<FleetInstance>>,
    /// Since when the store has been out of reach, or in a format that this build does not know, so that this is only the last
    /// view; none = this is current.
    pub stale_since: Option<Instant>,
}

/// Follows the store in a task of its own; cheap to clone.
#[derive(Debug, Clone)]
pub struct FleetWatch {
    snapshots: watch::Receiver<Arc<FleetSnapshot>>,
}

impl FleetWatch {
    /// An empty, stale snapshot, and what follows the store for as long as it is polled.
    pub fn new(
        store: Arc<dyn Store>,
        config: FleetWatchConfig,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let empty = FleetSnapshot { stale_since: Some(Instant::now()), ..FleetSnapshot::default() };
        let (publish, snapshots) = watch::channel(Arc::new(empty));
        let view = View::new(config.reconfirm);
        let follower = Follower { store, config, view, stale_since: Some(Instant::now()), publish };
        (Self { snapshots }, follower.run())
    }

    /// Follows the store on `tasks`, until `shutdown`. Returns at once.
    pub fn start(
        store: Arc<dyn Store>,
        config: FleetWatchConfig,
        shutdown: CancellationToken,
        tasks: &TaskTracker,
    ) -> Self {
        let (watch, following) = Self::new(store, config);
        tasks.spawn(async move { shutdown.run_until_cancelled(following).await });
        watch
    }

    pub fn current(&self) -> Arc<FleetSnapshot> {
        self.snapshots.borrow().clone()
    }

    /// For `borrow`, `changed` and `wait_for`. It says closed once the watch was shut down.
    pub fn subscribe(&self) -> watch::Receiver<Arc<FleetSnapshot>> {
        self.snapshots.clone()
    }
}

struct Follower {
    store: Arc<dyn Store>,
    config: FleetWatchConfig,
    view: View,
    stale_since: Option<Instant>,
    publish: watch::Sender<Arc<FleetSnapshot>>,
}

impl Follower {
    async fn run(mut self) {
        let mut wait = self.config.retry_min;
        let mut told = String::new();
        loop {
            let error = match self.follow().await {
                Followed::Compacted => {
                    self.view.forget_revision();
                    continue;
                }
                Followed::Foreign { current, why } => {
                    self.view.forget_revision();
                    if current || told != why {
                        wait = self.config.retry_min;
                        warn!(why, "the fleet view stays as it is, as the state is none for this build");
                        told.clone_from(&why);
                    }
                    why
                }
                Followed::Broken { current: true, error } => {
                    wait = self.config.retry_min;
                    warn!(%error, "the fleet view is stale until the state store answers again");
                    error
                }
                Followed::Broken { current: false, error } => error,
            };
            self.stale_since.get_or_insert_with(Instant::now);
            self.publish();
            tracing::debug!(%error, ?wait, "trying the state store again");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(self.config.retry_max);
        }
    }

    /// Lists unless the view can be resumed, then watches until that ends.
    async fn follow(&mut self) -> Followed {
        let mut current = false;
        match self.follow_until_error(&mut current).await {
            Ok(never) => match never {},
            Err(FollowError::Watch(WatchError::Compacted(revision))) => {
                info!(%revision, "the state store has compacted what the fleet view missed: listing again");
                Followed::Compacted
            }
            Err(FollowError::Foreign(why)) => Followed::Foreign { current, why },
            Err(FollowError::Watch(WatchError::Broken(error))) => Followed::Broken { current, error },
            Err(FollowError::Store(error)) => Followed::Broken { current, error: error.to_string() },
        }
    }

    async fn follow_until_error(
        &mut self,
        current: &mut bool,
    ) -> Result<std::convert::Infallible, FollowError> {
        understood(Found::read(&*self.store).await?)?;
        if self.view.revision().is_none() {
            let listing = self.store.range(KeyRange::prefix(keys::ROOT)).await?;
            understood(Found::of(&listing.items))?;
            self.view.relist(listing, Instant::now());
        }
        let from = self.view.revision().unwrap_or_default().next();
        let mut watch = self.store.watch(KeyRange::prefix(keys::ROOT), Some(from)).await?;
        loop {
            let batch = tokio::select! {
                biased;
                batch = next(&mut watch, *current) => batch?,
                () = sleep_until(self.view.next_sweep()) => None,
            };
            if let Some(batch) = batch {
                understood(Found::of(batch.events.iter().filter_map(|event| match event {
                    Event::Put(item) => Some(item),
                    Event::Delete { .. } => None,
                })))?;
                self.view.apply(batch, Instant::now());
            }
            self.view.sweep(Instant::now());
            if !std::mem::replace(current, true) && self.stale_since.take().is_some() {
                info!(revision = %self.view.revision().unwrap_or_default(), "the fleet view is current");
            }
            self.publish();
        }
    }

    fn publish(&mut self) {
        let snapshot = Arc::new(self.view.snapshot(self.stale_since));
        self.publish.send_if_modified(|published| {
            let changed = **published != *snapshot;
            *published = snapshot;
            changed
        });
    }
}

/// The next batch; or, of a fresh watch, what it has at hand, as that may be the news that it does not stand.
async fn next(watch: &mut Watch, wait: bool) -> Result<Option<WatchBatch>, WatchError> {
    if wait { watch.next().await.map(Some) } else { watch.next().now_or_never().transpose() }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn understood(found: Found) -> Result<(), FollowError> {
    found.refusal(StateFormats::OURS).map_or(Ok(()), |why| Err(FollowError::Foreign(why)))
}

enum Followed {
    Compacted,
    /// The state is of a format that this build does not know. `current`: whether the view had become current before.
    Foreign {
        current: bool,
        why: String,
    },
    /// The same.
    Broken {
        current: bool,
        error: String,
    },
}

enum FollowError {
    Foreign(String),
    Watch(WatchError),
    Store(StoreError),
}

impl From<WatchError> for FollowError {
    fn from(error: WatchError) -> Self {
        Self::Watch(error)
    }
}

impl From<StoreError> for FollowError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
