//! The task that leads: it stands for leadership and, while it has it, feeds the [`Reconciler`] and carries out what
//! that commands.
//!
//! States: standing by -> leading -> standing by | stopped. The fleet's keys stand under one lease that the leader
//! keeps; a leader that resigns leaves them for the next. One transaction is under way at a time, so that writes
//! arrive in the order they were decided in; beats do not wait for it.

use std::{sync::Arc, time::Duration};

use baton_process::{Health, HealthHandle};
use baton_proto::LeaderEpoch;
use baton_registry::{
    Candidacy, Candidate, LeaderRecord, Leadership, Lease, StateFormats, Store, StoreError,
};
use futures::{FutureExt, future::BoxFuture};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    clock::unix_millis,
    config::ControllerConfig,
    desk::{INBOX_CAPACITY, Inbox},
    journal::{Journal, News, NewsKind},
    metrics::ControllerMetrics,
    ranktable::RankTable,
    reconcile::{Event, Reconciler},
};

mod answers;
mod inherit;
mod work;

use inherit::Inherited;
use work::{After, Leading, Written, make};

/// Before the store is tried again.
const RETRY: Duration = Duration::from_millis(250);
/// How often metrics of the fleet are counted at most.
const OBSERVE_EVERY: Duration = Duration::from_millis(500);

/// The leading task's parts, for as long as the process runs.
pub(crate) struct LeaderTask {
    pub(crate) config: Arc<ControllerConfig>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) candidate: Candidate,
    pub(crate) desk: watch::Sender<Option<Inbox>>,
    pub(crate) journal: Journal,
    /// None unless a ranktable is followed.
    pub(crate) ranktable: Option<watch::Receiver<RankTable>>,
    pub(crate) metrics: ControllerMetrics,
    pub(crate) health: HealthHandle,
    pub(crate) shutdown: CancellationToken,
}

impl LeaderTask {
    pub(crate) fn candidate(
        config: &ControllerConfig,
        store: &Arc<dyn Store>,
        endpoint: String,
    ) -> Candidate {
        let record = LeaderRecord { controller_id: config.controller_id.clone(), endpoint };
        Candidate { store: store.clone(), record, ttl: config.leader.ttl, formats: StateFormats::OURS }
    }

    /// Leads whenever it can, until the shutdown.
    pub(crate) async fn run(self) {
        loop {
            self.health.set_not_ready("the state store has not said yet which controller leads");
            // One that stands by does its work, too: it takes over, and tells whoever calls who leads.
            let standing = |standing| match standing {
                Candidacy::Behind(leader) => {
                    self.health.set(Health::Partly(format!("standing by: {leader} leads")));
                }
                Candidacy::Foreign(why) => {
                    if self.health.set(Health::NotReady(format!("it cannot lead: {why}"))) {
                        warn!(why, "this controller cannot lead");
                    }
                }
                Candidacy::Cut(why) => {
                    self.health.set_not_ready(format!("the state store cannot be reached: {why}"));
                }
            };
            let leadership = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                leadership = self.candidate.campaign(standing) => leadership,
            };
            self.metrics.leading.set(1);
            self.metrics.elections_won.inc();
            self.metrics.leader_epoch.set(i64::try_from(leadership.epoch().0).unwrap_or(i64::MAX));
            let end = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => None,
                lost = leadership.hold() => Some(lost.to_string()),
                deposed = self.lead(&leadership) => Some(deposed),
            };
            // First of all nothing is taken in any more; the end of `lead` has ended every session.
            self.desk.send_replace(None);
            self.metrics.leading.set(0);
            self.metrics.sessions.set(0);
            match end {
                Some(reason) => warn!(epoch = %leadership.epoch(), reason, "this controller leads no more"),
                None => {
                    if let Err(error) = leadership.resign().await {
                        warn!(%error, "could not resign: the next leader has to wait for the lease");
                    }
                    return;
                }
            }
        }
    }

    /// Leads until deposed, and says how it learnt that.
    async fn lead(&self, leadership: &Leadership) -> String {
        let mut lease = self.new_lease(None).await;
        let inherited = self.load().await;
        let now = Instant::now();
        let (sessions, policy) = (self.config.sessions.clone(), self.config.roles.clone());
        let mut mind = Reconciler::new(sessions, policy, self.config.health.clone(), leadership.epoch(), now)
            .with_congestion(self.config.congestion.clone());
        let Inherited { instances, roles, health, intents, targets } = inherited;
        info!(epoch = %leadership.epoch(), instances = instances.len(), roles = roles.len(), "the term begins");
        mind.inherit(instances, roles, now);
        mind.inherit_health(health, now, unix_millis());
        mind.inherit_intents(intents, targets);
        self.journal.begin(leadership.epoch(), leads(&self.config.controller_id, leadership.epoch()));

        let (messages, mut inbox) = mpsc::channel(INBOX_CAPACITY);
        self.desk.send_replace(Some(Inbox {
            messages,
            epoch: leadership.epoch(),
            term: leadership.term(),
            leadership: leadership.clone(),
        }));
        self.health.set_ready();
        let mut leading = Leading::new(mind, &self.journal, &self.metrics);
        let mut ends_of_lease = self.new_lease(Some(lease)).boxed();
        let mut write: Option<BoxFuture<'_, Written>> = None;
        let mut write_after = now;
        let mut observe_at = now;
        let mut batch = Vec::new();
        let mut ranktable = self.ranktable.clone();
        if let Some(table) = &mut ranktable {
            table.mark_changed();
        }
        loop {
            let now = Instant::now();
            leading.conclude(now);
            if observe_at <= now {
                self.metrics.observe(&leading.mind, now);
                observe_at = now + OBSERVE_EVERY;
            }
            if write.is_none() && write_after <= now && leading.mind.has_writes() {
                let writes = leading.take_writes();
                write = Some(make(leadership, lease.id, writes).boxed());
            }
            let mut wake = leading.next_deadline().min(observe_at);
            if write.is_none() && leading.mind.has_writes() {
                wake = wake.min(write_after);
            }
            tokio::select! {
                biased;
                written = maybe(&mut write) => {
                    write = None;
                    match leading.written(written) {
                        After::GoOn => {}
                        After::Wait => write_after = Instant::now() + RETRY,
                        After::LeaseGone => {
                            write_after = Instant::now() + RETRY;
                            ends_of_lease = self.new_lease(None).boxed();
                        }
                        After::Deposed => return "another controller has taken over".to_owned(),
                    }
                }
                fresh = &mut ends_of_lease => {
                    lease = fresh;
                    leading.mind.lease_ended();
                    ends_of_lease = self.new_lease(Some(lease)).boxed();
                }
                taken = inbox.recv_many(&mut batch, INBOX_CAPACITY) => {
                    // The desk holds a sender for as long as this runs.
                    debug_assert!(taken > 0, "the inbox is closed while the term goes on");
                    for message in batch.drain(..) {
                        leading.take(message, Instant::now());
                    }
                }
                table = changed(&mut ranktable) => leading.handle(Event::RankTable(table), Instant::now()),
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Keeps a lease for the fleet's keys until it has ended, then grants another. Without one, grants one at once.
    async fn new_lease(&self, old: Option<Lease>) -> Lease {
        if let Some(old) = old {
            let mut wait = old.ttl / 3;
            loop {
                tokio::time::sleep(wait).await;
                match self.store.keep_alive(old.id).await {
                    Ok(_) => wait = old.ttl / 3,
                    Err(StoreError::LeaseNotFound(_)) => break,
                    Err(error) => {
                        self.metrics.store_errors.inc();
                        debug!(%error, "the lease of the fleet's records was not renewed; trying again");
                        wait = RETRY;
                    }
                }
            }
            warn!("the lease of the fleet's records has ended: they are written again");
        }
        loop {
            match self.store.grant_lease(self.config.leader.records_ttl).await {
                Ok(lease) => return lease,
                Err(error) => {
                    self.metrics.store_errors.inc();
                    warn!(%error, "no lease for the fleet's records; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

fn leads(controller: &str, epoch: LeaderEpoch) -> News {
    let message = format!("{controller} leads, epoch {epoch}");
    News { kind: NewsKind::LeaderChanged, group: None, instance: None, message, actor: None }
}

/// The ranktable once it has changed; never, if none is followed or nobody follows it any more.
async fn changed(table: &mut Option<watch::Receiver<RankTable>>) -> RankTable {
    if let Some(table) = table
        && table.changed().await.is_ok()
    {
        return table.borrow_and_update().clone();
    }
    std::future::pending().await
}

async fn maybe<T>(future: &mut Option<BoxFuture<'_, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
