//! The controller's mind: events in, commands out. Pure; time is an argument.
//!
//! Three questions are kept apart. What is observed: hellos, beats, silence ([`Reconciler::handle`]). What is wanted:
//! [`crate::plan`] over those who count ([`planning`]). What is done about the difference: writes for the store and
//! orders for sessions ([`Reconciler::conclude`], [`Reconciler::take_writes`]).
//!
//! A role is written before the instance is told, and told only after the write was made: what a deposed leader
//! decides is never heard. Writes are level-triggered: a key that may differ from the store is marked, and what it
//! should hold is looked up when it is written; one that failed is marked again.
//!
//! [`crate::lead`] feeds it and carries its commands out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use baton_proto::{
    ApiError, GroupName, Incarnation, InstanceId, InstanceLoad, InstanceSpec, Intent, LeaderEpoch, LinkUse,
    Phase, Role, RoleEpoch, Targets,
};
use baton_registry::DesiredRole;
use tokio::time::Instant;
use tracing::info;

use crate::{
    config::{CongestionConfig, HealthConfig, RoleConfig, SessionConfig},
    fleet::{Beat, Contact, Member, Members, SessionId, health::HealthBook},
    journal::{News, NewsKind},
    ranktable::RankTable,
};

mod admit;
mod aim;
mod change;
mod congestion;
mod cover;
mod health;
mod moves;
mod news;
mod places;
mod planning;
mod steps;
mod stuck;
mod writes;

pub use aim::Aim;
pub use change::{Change, Only};
pub use congestion::Queue;
pub use moves::Budget;
pub use planning::{GroupPlan, MemberPlan};
pub use steps::Step;
pub use writes::{Record, Write};

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    Hello {
        session: SessionId,
        spec: Box<InstanceSpec>,
        beat: Beat,
        unix_millis: u64,
    },
    Beat {
        session: SessionId,
        beat: Beat,
    },
    /// The instance leaves, cleanly.
    Bye {
        session: SessionId,
        reason: String,
    },
    /// The session broke.
    Closed {
        session: SessionId,
    },
    /// The store will not have this record, as it is.
    Refused {
        record: Record,
        reason: String,
    },
    /// A coordinator has seen so many more handoffs, well and failed, by link.
    Handoffs(Vec<LinkUse>),
    /// The ranktable of Ascend servers is another.
    RankTable(RankTable),
    /// The store has this role record now.
    RoleStored {
        id: InstanceId,
        epoch: RoleEpoch,
    },
}

/// What is to be said to an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    Welcome,
    Assign(DesiredRole),
    /// The last.
    Refuse {
        reason: ApiError,
        /// Of the process that is known by the same id.
        held: Option<Incarnation>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Order(SessionId, Order),
    /// End a session that has nothing more to say or to hear.
    Close(SessionId),
}

/// The role of an instance that is gone.
#[derive(Debug, Clone)]
struct Remembered {
    desired: DesiredRole,
    stored: Option<RoleEpoch>,
    since: Instant,
}

/// Instances whose health is known, here or gone, for each that there may be at a time.
const HEALTH_KEPT: usize = 2;

#[derive(Debug, Clone)]
pub struct Reconciler {
    sessions_config: SessionConfig,
    roles_config: RoleConfig,
    congestion_config: CongestionConfig,
    leader_epoch: LeaderEpoch,
    /// When this term began.
    began: Instant,
    /// The same, by the wall clock.
    began_unix_millis: u64,
    members: Members,
    sessions: BTreeMap<SessionId, InstanceId>,
    remembered: BTreeMap<InstanceId, Remembered>,
    unwritten: BTreeSet<Record>,
    /// Records that the store refused, and when to try again.
    refused: BTreeMap<Record, Instant>,
    /// When the groups' queues are to be looked at.
    queues_at: Instant,
    /// Something that plans depend on has changed.
    plan_due: bool,
    /// Who has come and is to be told its role, once it is clear that this is still to be its role.
    offers: BTreeSet<InstanceId>,
    /// When leases, places and memories are to be looked at.
    check_at: Instant,
    /// When they last were, or could have been.
    awake: Instant,
    /// When a plan that was put off is to be made.
    plan_at: Option<Instant>,
    /// Some instance came with a role that the store did not know: an earlier life of the store gave it, and others
    /// may be on their way back with theirs.
    adopted: bool,
    role_changes: u64,
    /// Refusals that were told of lately.
    refusals: BTreeMap<InstanceId, Instant>,
    /// What has not been told yet.
    news: Vec<News>,
    /// What is known of groups beside their members.
    groups: BTreeMap<GroupName, aim::Group>,
    /// What operators want of instances, also of those that are not here.
    intents: BTreeMap<InstanceId, Intent>,
    /// By what operators want groups divided.
    targets: BTreeMap<GroupName, Targets>,
    /// How members do.
    health: HealthBook,
    /// NPUs of Ascend servers.
    ranktable: RankTable,
}

impl Reconciler {
    pub fn new(
        sessions_config: SessionConfig,
        roles_config: RoleConfig,
        health: HealthConfig,
        leader_epoch: LeaderEpoch,
        now: Instant,
    ) -> Self {
        let health =
            HealthBook::new(health, sessions_config.beat, HEALTH_KEPT * sessions_config.max_instances);
        Self {
            health,
            ranktable: RankTable::default(),
            sessions_config,
            roles_config,
            leader_epoch,
            began: now,
            began_unix_millis: 0,
            members: Members::new(),
            sessions: BTreeMap::new(),
            remembered: BTreeMap::new(),
            unwritten: BTreeSet::new(),
            refused: BTreeMap::new(),
            groups: BTreeMap::new(),
            intents: BTreeMap::new(),
            targets: BTreeMap::new(),
            congestion_config: CongestionConfig::default(),
            queues_at: now,
            plan_due: true,
            offers: BTreeSet::new(),
            check_at: now,
            awake: now,
            plan_at: None,
            adopted: false,
            role_changes: 0,
            refusals: BTreeMap::new(),
            news: Vec::new(),
        }
    }

    /// With another idea of when a group is congested.
    pub fn with_congestion(self, congestion_config: CongestionConfig) -> Self {
        Self { congestion_config, ..self }
    }

    /// Takes over what an earlier leader left in the store. Its instances have a lease to come back within.
    pub fn inherit(
        &mut self,
        instances: Vec<(InstanceSpec, Option<Beat>)>,
        roles: BTreeMap<InstanceId, DesiredRole>,
        now: Instant,
    ) {
        for (spec, beat) in instances {
            let desired = roles.get(&spec.id).cloned();
            if desired.as_ref().is_some_and(|desired| desired.role != Role::None) {
                // It has served, as far as is known; whether it does now will be seen.
                self.groups.entry(spec.group.clone()).or_default().served.get_or_insert(true);
            }
            let stored = desired.as_ref().map(|desired| desired.epoch);
            let beat = beat.unwrap_or_else(silent);
            let id = spec.id.clone();
            let contact = Contact::Silent { since: now };
            let (registered_unix_millis, told) = (0, None);
            let member = Member {
                reported_devices: spec.device_count,
                spec: Arc::new(spec),
                beat,
                last_beat: now,
                contact,
                registered_unix_millis,
                joined: now,
                desired,
                stored,
                told,
                late_since: None,
                stuck: None,
            };
            // Under this leader's own lease: the earlier one's ends.
            self.mark_registration(&id);
            self.members.insert(id, member);
        }
        for (id, desired) in roles {
            if !self.members.contains_key(&id) {
                let stored = Some(desired.epoch);
                self.remembered.insert(id, Remembered { desired, stored, since: now });
            }
        }
        self.check_at = self.next_check(now);
    }

    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Roles of instances that are gone.
    pub fn remembered(&self) -> impl Iterator<Item = (&InstanceId, &DesiredRole)> {
        self.remembered.iter().map(|(id, remembered)| (id, &remembered.desired))
    }

    /// Role records decided so far.
    pub fn role_changes(&self) -> u64 {
        self.role_changes
    }

    /// Takes an event in. [`Self::conclude`] is to be called after one or several.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Command> {
        match event {
            Event::Hello { session, spec, beat, unix_millis } => {
                self.hello(session, *spec, beat, unix_millis, now)
            }
            Event::Beat { session, beat } => self.beat(session, beat, now),
            Event::Bye { session, reason } => self.bye(session, &reason, now),
            Event::Closed { session } => {
                self.closed(session, now);
                Vec::new()
            }
            Event::RoleStored { id, epoch } => {
                if let Some(remembered) = self.remembered.get_mut(&id) {
                    // It left while its role was being written, and may come back.
                    remembered.stored = Some(epoch);
                }
                let Some(member) = self.members.get_mut(&id) else { return Vec::new() };
                member.stored = Some(epoch);
                let order = offer(member);
                self.follow(&id, now);
                order.into_iter().collect()
            }
            Event::Handoffs(links) => {
                self.health.observe_handoffs(now, &links);
                Vec::new()
            }
            Event::RankTable(table) => {
                self.take_ranktable(table);
                Vec::new()
            }
            Event::Refused { record, reason } => {
                self.refused(record, reason, now);
                Vec::new()
            }
        }
    }

    fn beat(&mut self, session: SessionId, beat: Beat, now: Instant) -> Vec<Command> {
        let Some(id) = self.sessions.get(&session).cloned() else { return vec![Command::Close(session)] };
        let Some(mut member) = self.members.remove(&id) else { return vec![Command::Close(session)] };
        let status = member.status();
        if member.beat.phase != beat.phase || member.beat.role_epoch != beat.role_epoch {
            self.plan_due = true;
        }
        let converged = member.has_converged();
        member.beat = beat;
        member.last_beat = now;
        self.measure(&member, now);
        self.health.observe(now, &member.spec, &member.beat);
        if member.status() != status {
            self.mark(Record::Status(id.clone()));
        }
        if self.adopt(&mut member) {
            self.mark(Record::Role(id.clone()));
        }
        let taken = (!converged && member.has_converged()).then_some(beat.role);
        self.members.insert(id.clone(), member);
        if let Some(role) = taken {
            self.tell(NewsKind::RoleTaken, &id, format!("serves as {}", role.name()));
        }
        self.follow(&id, now);
        Vec::new()
    }

    fn bye(&mut self, session: SessionId, reason: &str, now: Instant) -> Vec<Command> {
        if let Some(id) = self.sessions.remove(&session)
            && let Some(member) = self.members.remove(&id)
        {
            info!(instance = %id, reason, "an instance leaves");
            self.tell_of(NewsKind::InstanceLeft, &id, Some(member.spec.group.clone()), reason);
            // It said so: its place is not kept, only the memory of its role.
            self.remember(id.clone(), member, now);
            self.unregister(&id);
        }
        vec![Command::Close(session)]
    }

    fn closed(&mut self, session: SessionId, now: Instant) {
        if let Some(id) = self.sessions.remove(&session)
            && let Some(member) = self.members.get_mut(&id)
        {
            info!(instance = %id, %session, "a session broke; the registration lasts until its lease ends");
            member.contact = Contact::Silent { since: now };
            // Whether it heard what was on its way is not known: if need be, that is taken back.
            member.told = None;
        }
    }

    fn unregister(&mut self, id: &InstanceId) {
        self.mark_registration(id);
        self.plan_due = true;
    }

    /// Draws the consequences of events and of time: ended leases, places given up, new roles.
    pub fn conclude(&mut self, now: Instant) -> Vec<Command> {
        let mut commands = Vec::new();
        self.make_up_for_a_stall(now);
        if self.check_at <= now {
            commands = self.expire(now);
            self.give_up(now);
            self.find_stuck(now);
            self.check_at = self.next_check(now);
        }
        let looked = self.health.look(now);
        looked.kept.into_iter().for_each(|id| self.mark(Record::Health(id)));
        looked.links.iter().for_each(|change| self.tell_of_link(change));
        for (id, verdict) in looked.moved {
            self.plan_due = true;
            let kind = if verdict.is_quarantined() {
                NewsKind::InstanceQuarantined
            } else {
                NewsKind::InstanceReleased
            };
            self.tell(kind, &id, verdict.to_string());
        }
        self.watch_queues(now);
        self.plan_if_due(now);
        for id in std::mem::take(&mut self.offers) {
            commands.extend(self.members.get_mut(&id).and_then(offer));
            self.follow(&id, now);
        }
        self.plan_if_due(now);
        commands
    }

    fn plan_if_due(&mut self, now: Instant) {
        if self.plan_due || self.plan_at.is_some_and(|at| at <= now) {
            (self.plan_due, self.plan_at) = (false, None);
            self.replan(now);
        }
    }

    /// When [`Self::conclude`] will have something to do without an event.
    pub fn next_deadline(&self) -> Instant {
        let queues = Some(self.queues_at).filter(|_| !self.members.is_empty());
        let timers = self.plan_at.into_iter().chain(self.health.next_look()).chain(queues);
        timers.fold(self.check_at, Instant::min)
    }
}

/// The order that an instance needs, if it has not had it: a stored role later than the one it holds.
fn offer(member: &mut Member) -> Option<Command> {
    let session = member.session()?;
    let desired = member.desired.as_ref()?;
    let due = member.stored >= Some(desired.epoch)
        && member.told < Some(desired.epoch)
        && member.beat.role_epoch < desired.epoch;
    due.then(|| {
        member.told = Some(desired.epoch);
        Command::Order(session, Order::Assign(desired.clone()))
    })
}

/// Of an instance that has not been heard of.
fn silent() -> Beat {
    let (role, role_epoch, load) = (Role::None, RoleEpoch(0), InstanceLoad::default());
    Beat { role, role_epoch, phase: Phase::Loading, load_permille: 0, load }
}

#[cfg(test)]
mod tests;
