//! The task that leads: it stands for leadership and, while it has it, feeds the [`Reconciler`] and carries out what
//! that commands.
//!
//! States: standing by -> reigning -> standing by | stopped. The fleet's keys stand under one lease that the leader
//! keeps; a leader that resigns leaves them for the next. One transaction is under way at a time, so that writes
//! arrive in the order they were decided in; beats do not wait for it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use baton_process::HealthHandle;
use baton_proto::{InstanceId, InstanceLoad, InstanceSpec};
use baton_registry::{
    Candidate, DesiredRole, Fenced, KeyRange, LeaderRecord, Leadership, Lease, LeaseId, ObservedStatus,
    Store, StoreError, Txn,
    keys::{self, Key},
    records,
};
use futures::{FutureExt, future::BoxFuture};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    config::ControllerConfig,
    desk::{INBOX_CAPACITY, Inbox, Line, Message, Report},
    fleet::{Beat, SessionId},
    metrics::ControllerMetrics,
    reconcile::{Command, Event, Reconciler, Record, Write},
};

/// Keys written in one transaction; etcd takes 128 operations unless told otherwise.
const WRITES_PER_TXN: usize = 100;
/// Before the store is tried again.
const RETRY: Duration = Duration::from_millis(250);
/// How often metrics of the fleet are counted at most.
const OBSERVE_EVERY: Duration = Duration::from_millis(500);

/// The leading task's parts, for as long as the process runs.
pub(crate) struct Reigns {
    pub(crate) config: Arc<ControllerConfig>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) candidate: Candidate,
    pub(crate) desk: watch::Sender<Option<Inbox>>,
    pub(crate) metrics: ControllerMetrics,
    pub(crate) health: HealthHandle,
    pub(crate) shutdown: CancellationToken,
}

impl Reigns {
    pub(crate) fn candidate(
        config: &ControllerConfig,
        store: &Arc<dyn Store>,
        endpoint: String,
    ) -> Candidate {
        let record = LeaderRecord { controller_id: config.controller_id.clone(), endpoint };
        Candidate { store: store.clone(), record, ttl: config.leader.ttl }
    }

    /// Leads whenever it can, until the shutdown.
    pub(crate) async fn run(self) {
        loop {
            self.health
                .set_not_ready("standing by: another controller leads, or the state store cannot be reached");
            let leadership = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                leadership = self.candidate.campaign() => leadership,
            };
            self.metrics.leading.set(1);
            self.metrics.leader_epoch.set(i64::try_from(leadership.epoch().0).unwrap_or(i64::MAX));
            let end = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => None,
                lost = leadership.hold() => Some(lost.to_string()),
                deposed = self.reign(&leadership) => Some(deposed),
            };
            // First of all nothing is taken in any more; dropping the reign has ended every session.
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
    async fn reign(&self, leadership: &Leadership) -> String {
        let mut lease = self.new_lease(None).await;
        let (instances, roles) = self.load().await;
        let now = Instant::now();
        let (sessions, policy) = (self.config.sessions.clone(), self.config.roles.clone());
        let mut mind = Reconciler::new(sessions, policy, leadership.epoch(), now);
        info!(epoch = %leadership.epoch(), instances = instances.len(), roles = roles.len(), "the reign begins");
        mind.inherit(instances, roles, now);

        let (messages, mut inbox) = mpsc::channel(INBOX_CAPACITY);
        self.desk.send_replace(Some(Inbox { messages, epoch: leadership.epoch() }));
        self.health.set_ready();
        let mut reign =
            Reign { mind, lines: BTreeMap::new(), metrics: &self.metrics, changes: 0, one_by_one: 0 };
        let mut ends_of_lease = self.new_lease(Some(lease)).boxed();
        let mut write: Option<BoxFuture<'_, Written>> = None;
        let mut write_after = now;
        let mut observe_at = now;
        let mut batch = Vec::new();
        loop {
            let now = Instant::now();
            reign.conclude(now);
            if observe_at <= now {
                self.metrics.observe(reign.mind.members(), &reign.mind.wanted());
                observe_at = now + OBSERVE_EVERY;
            }
            if write.is_none() && write_after <= now && reign.mind.has_writes() {
                let writes = reign.take_writes();
                write = Some(make(leadership, lease.id, writes).boxed());
            }
            let mut wake = reign.mind.next_deadline().min(observe_at);
            if write.is_none() && reign.mind.has_writes() {
                wake = wake.min(write_after);
            }
            tokio::select! {
                biased;
                written = maybe(&mut write) => {
                    write = None;
                    match reign.written(written) {
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
                    reign.mind.lease_ended();
                    ends_of_lease = self.new_lease(Some(lease)).boxed();
                }
                taken = inbox.recv_many(&mut batch, INBOX_CAPACITY) => {
                    // The desk holds a sender for as long as this runs.
                    debug_assert!(taken > 0, "the inbox is closed while the reign goes on");
                    for message in batch.drain(..) {
                        reign.take(message, Instant::now());
                    }
                }
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

    /// What earlier leaders left, read until it can be.
    async fn load(&self) -> (Vec<(InstanceSpec, Option<Beat>)>, BTreeMap<InstanceId, DesiredRole>) {
        let listing = loop {
            match self.store.range(KeyRange::prefix(keys::ROOT)).await {
                Ok(listing) => break listing,
                Err(error) => {
                    self.metrics.store_errors.inc();
                    warn!(%error, "cannot read what is known of the fleet; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        let (mut specs, mut roles, mut statuses) =
            (Vec::new(), BTreeMap::new(), BTreeMap::<InstanceId, ObservedStatus>::new());
        for item in listing.items {
            let taken = match Key::parse(&item.key) {
                Key::Instance(_) => records::decode_spec(&item.value).map(|spec| specs.push(spec)),
                Key::Role(id) => DesiredRole::decode(&item.value).map(|role| roles.extend([(id, role)])),
                Key::Status(id) => {
                    ObservedStatus::decode(&item.value).map(|status| statuses.extend([(id, status)]))
                }
                Key::Leader | Key::Intent(_) | Key::Targets(_) | Key::Other => Ok(()),
            };
            if let Err(error) = taken {
                warn!(key = item.key, %error, "a record in the state store is not readable and is left out");
            }
        }
        let with_beat = |spec: InstanceSpec| {
            let status = statuses.get(&spec.id).filter(|status| status.incarnation == spec.incarnation);
            let beat = status.map(beat_of);
            (spec, beat)
        };
        (specs.into_iter().map(with_beat).collect(), roles)
    }
}

fn beat_of(status: &ObservedStatus) -> Beat {
    Beat {
        role: status.role,
        role_epoch: status.role_epoch,
        phase: status.phase,
        load_permille: status.load_permille,
        load: InstanceLoad::default(),
    }
}

/// The fleet's keys, under way to the store.
async fn make(leadership: &Leadership, lease: LeaseId, writes: Vec<Write>) -> Written {
    let operations = writes.iter().map(|write| write.operation(lease)).collect();
    let outcome = leadership.txn(Txn { conditions: Vec::new(), operations }).await;
    Written { writes, outcome }
}

async fn maybe<T>(future: &mut Option<BoxFuture<'_, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

struct Written {
    writes: Vec<Write>,
    outcome: Result<Fenced, StoreError>,
}

enum After {
    GoOn,
    Wait,
    LeaseGone,
    Deposed,
}

/// What a reign consists of besides its futures.
struct Reign<'a> {
    mind: Reconciler,
    lines: BTreeMap<SessionId, Line>,
    metrics: &'a ControllerMetrics,
    changes: u64,
    /// So many keys are written alone, because the store refused one of them.
    one_by_one: usize,
}

impl Reign<'_> {
    fn take(&mut self, message: Message, now: Instant) {
        match message {
            Message::Hello { event, session, line } => {
                self.lines.insert(session, line);
                self.handle(event, now);
            }
            Message::Event(event) => {
                if let Event::Closed { session } = &event {
                    self.lines.remove(session);
                }
                self.handle(event, now);
            }
            Message::Report(answer) => {
                let members = self.mind.members().clone();
                let gone = self.mind.remembered();
                let remembered = gone.map(|(id, desired)| (id.clone(), desired.clone())).collect();
                // Whoever asked may have gone.
                answer.send(Report { members, remembered, at: now }).ok();
            }
        }
    }

    fn handle(&mut self, event: Event, now: Instant) {
        let commands = self.mind.handle(event, now);
        self.carry_out(commands, now);
    }

    fn conclude(&mut self, now: Instant) {
        let commands = self.mind.conclude(now);
        self.carry_out(commands, now);
        let changes = self.mind.role_changes();
        self.metrics.role_changes.inc_by(changes - std::mem::replace(&mut self.changes, changes));
        self.metrics.sessions.set(i64::try_from(self.lines.len()).unwrap_or(i64::MAX));
    }

    fn carry_out(&mut self, commands: Vec<Command>, now: Instant) {
        for command in commands {
            match command {
                Command::Close(session) => drop(self.lines.remove(&session)),
                Command::Order(session, order) => {
                    let told =
                        self.lines.get(&session).is_some_and(|line| line.orders.try_send(order).is_ok());
                    if !told && self.lines.remove(&session).is_some() {
                        warn!(%session, "an instance does not read its orders: its session is ended");
                        // Its answer would be to close this very session: nothing more to carry out.
                        self.mind.handle(Event::Closed { session }, now);
                    }
                }
            }
        }
    }

    fn take_writes(&mut self) -> Vec<Write> {
        let alone = self.one_by_one > 0;
        self.one_by_one = self.one_by_one.saturating_sub(1);
        self.mind.take_writes(if alone { 1 } else { WRITES_PER_TXN })
    }

    fn written(&mut self, written: Written) -> After {
        let Written { writes, outcome } = written;
        match outcome {
            Ok(Fenced::Applied(revision)) => {
                debug!(%revision, keys = writes.len(), "written");
                self.metrics.store_writes.inc_by(writes.len() as u64);
                let now = Instant::now();
                for Write { record, epoch, .. } in writes {
                    if let (Record::Role(id), Some(epoch)) = (record, epoch) {
                        self.handle(Event::RoleStored { id, epoch }, now);
                    }
                }
                After::GoOn
            }
            Ok(Fenced::Deposed) => After::Deposed,
            Ok(Fenced::Conflict) => {
                self.mind.give_back(writes);
                After::GoOn
            }
            // Another try would be refused, too, and hold up everybody else's: the key at fault is left out for a while.
            Err(StoreError::Invalid(reason)) => {
                self.metrics.store_errors.inc();
                match writes.as_slice() {
                    [write] => {
                        error!(key = write.key(), reason, "the state store refuses this record");
                        let record = write.record.clone();
                        self.handle(Event::Refused { record, reason }, Instant::now());
                    }
                    _ => {
                        self.one_by_one = writes.len();
                        self.mind.give_back(writes);
                    }
                }
                After::GoOn
            }
            Err(error) => {
                self.metrics.store_errors.inc();
                warn!(%error, keys = writes.len(), "changes were not written; trying again");
                self.mind.give_back(writes);
                if matches!(error, StoreError::LeaseNotFound(_)) { After::LeaseGone } else { After::Wait }
            }
        }
    }
}
