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
//! [`crate::reign`] feeds it and carries its commands out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use baton_proto::{ApiError, ErrorCode, InstanceId, LeaderEpoch, RoleEpoch};
use baton_registry::{DesiredRole, InstanceSpec, Operation, Role, keys};
use bytes::Bytes;
use tokio::time::Instant;
use tracing::info;

use crate::{
    config::{RoleConfig, SessionConfig},
    fleet::{Beat, Contact, Member, Members, SessionId},
    plan::Policy,
};

mod planning;

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    Hello {
        session: SessionId,
        spec: InstanceSpec,
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
    Refuse(ApiError),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Order(SessionId, Order),
    /// End a session that has nothing more to say or to hear.
    Close(SessionId),
}

/// Which of an instance's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Instance,
    Role,
    Status,
}

/// A key and what the store should have there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub kind: Kind,
    pub id: InstanceId,
    /// None = no such key.
    pub value: Option<Bytes>,
    /// Of a role record.
    pub epoch: Option<RoleEpoch>,
}

impl Write {
    pub fn key(&self) -> String {
        match self.kind {
            Kind::Instance => keys::instance(&self.id),
            Kind::Role => keys::role(&self.id),
            Kind::Status => keys::status(&self.id),
        }
    }

    /// As a change of the store. Roles outlive the instance and the leader, the others end with `lease`.
    pub fn operation(&self, lease: baton_registry::LeaseId) -> Operation {
        let lease = (self.kind != Kind::Role).then_some(lease);
        match &self.value {
            Some(value) => Operation::Put { key: self.key(), value: value.clone(), lease },
            None => Operation::Delete { key: self.key() },
        }
    }
}

/// The role of an instance that is gone.
#[derive(Debug, Clone)]
struct Remembered {
    desired: DesiredRole,
    stored: Option<RoleEpoch>,
    since: Instant,
}

#[derive(Debug)]
pub struct Reconciler {
    sessions_config: SessionConfig,
    roles_config: RoleConfig,
    leader_epoch: LeaderEpoch,
    /// When this reign began.
    began: Instant,
    members: Members,
    sessions: BTreeMap<SessionId, InstanceId>,
    remembered: BTreeMap<InstanceId, Remembered>,
    unwritten: BTreeSet<(Kind, InstanceId)>,
    /// Something that plans depend on has changed.
    plan_due: bool,
    /// When leases, places and memories are to be looked at.
    check_at: Instant,
    /// When a plan that was put off is to be made.
    plan_at: Option<Instant>,
    /// Some instance came with a role that the store did not know: an earlier life of the store gave it, and others
    /// may be on their way back with theirs.
    adopted: bool,
    role_changes: u64,
}

impl Reconciler {
    pub fn new(
        sessions_config: SessionConfig,
        roles_config: RoleConfig,
        leader_epoch: LeaderEpoch,
        now: Instant,
    ) -> Self {
        Self {
            sessions_config,
            roles_config,
            leader_epoch,
            began: now,
            members: Members::new(),
            sessions: BTreeMap::new(),
            remembered: BTreeMap::new(),
            unwritten: BTreeSet::new(),
            plan_due: true,
            check_at: now,
            plan_at: None,
            adopted: false,
            role_changes: 0,
        }
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
            let stored = desired.as_ref().map(|desired| desired.epoch);
            let beat = beat.unwrap_or(SILENT);
            let id = spec.id.clone();
            let contact = Contact::Silent { since: now };
            let (registered_unix_millis, told) = (0, None);
            let member = Member {
                spec,
                beat,
                last_beat: now,
                contact,
                registered_unix_millis,
                joined: now,
                desired,
                stored,
                told,
            };
            // Under this leader's own lease: the earlier one's ends.
            self.mark(Kind::Instance, &id);
            self.mark(Kind::Status, &id);
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
                self.hello(session, spec, beat, unix_millis, now)
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
                offer(member).into_iter().collect()
            }
        }
    }

    fn hello(
        &mut self,
        session: SessionId,
        spec: InstanceSpec,
        beat: Beat,
        unix_millis: u64,
        now: Instant,
    ) -> Vec<Command> {
        let id = spec.id.clone();
        if let Err(refusal) = self.admit(&spec) {
            info!(instance = %id, incarnation = %spec.incarnation, %refusal, "a session is refused");
            return vec![Command::Order(session, Order::Refuse(refusal)), Command::Close(session)];
        }
        let mut commands = Vec::new();
        let before = self.members.remove(&id);
        // The same process has called again and the old stream has not broken yet.
        if let Some(old) = before.as_ref().and_then(Member::session) {
            self.sessions.remove(&old);
            commands.push(Command::Close(old));
        }
        let known = before.as_ref().is_some_and(|member| member.spec == spec);
        let (desired, stored) = match (&before, self.remembered.remove(&id)) {
            (Some(member), _) => (member.desired.clone(), member.stored),
            (None, Some(remembered)) => (Some(remembered.desired), remembered.stored),
            (None, None) => (None, None),
        };
        info!(
            instance = %id, incarnation = %spec.incarnation, %session, model = spec.model.name, group = spec.group,
            role = beat.role.name(), epoch = %beat.role_epoch, "an instance is here"
        );
        let joined = before.as_ref().filter(|_| known).map_or(now, |member| member.joined);
        let mut member = Member {
            spec,
            beat,
            last_beat: now,
            contact: Contact::Connected(session),
            registered_unix_millis: unix_millis,
            joined,
            desired,
            stored,
            told: None,
        };
        self.sessions.insert(session, id.clone());
        if self.adopt(&mut member) {
            self.mark(Kind::Role, &id);
        }
        self.mark(Kind::Instance, &id);
        self.mark(Kind::Status, &id);
        self.plan_due = true;
        commands.push(Command::Order(session, Order::Welcome));
        commands.extend(offer(&mut member));
        self.members.insert(id, member);
        self.check_at = self.check_at.min(now + self.sessions_config.lease);
        commands
    }

    /// Whether a session may be: one process per id, and none that a later one has replaced.
    fn admit(&self, spec: &InstanceSpec) -> Result<(), ApiError> {
        let Some(member) = self.members.get(&spec.id) else {
            let limit = self.sessions_config.max_instances;
            return if self.members.len() < limit {
                Ok(())
            } else {
                let message = format!("{limit} instances are registered, which is the limit");
                Err(ApiError::new(ErrorCode::QueueFull, message))
            };
        };
        let (held, offered) = (member.spec.incarnation, spec.incarnation);
        let id = &spec.id;
        if offered < held {
            let message =
                format!("instance {id} has been started again since: incarnation {held} replaces {offered}");
            return Err(ApiError::new(ErrorCode::StaleEpoch, message));
        }
        if offered > held && member.session().is_some() {
            let message = format!(
                "instance {id} is here already, as incarnation {held}: give this process another id, or call again \
                 once the other is gone"
            );
            return Err(ApiError::new(ErrorCode::AlreadyExists, message));
        }
        Ok(())
    }

    /// An instance that holds a later role than is known here has it from an earlier life of the store: it stays.
    fn adopt(&mut self, member: &mut Member) -> bool {
        let (role, epoch) = (member.beat.role, member.beat.role_epoch);
        if epoch.0 == 0 || member.desired.as_ref().is_some_and(|desired| desired.epoch >= epoch) {
            return false;
        }
        info!(instance = %member.spec.id, role = role.name(), %epoch, "its role is adopted");
        let reason = "held when this controller began".to_owned();
        member.desired = Some(DesiredRole { role, epoch, reason, leader_epoch: self.leader_epoch });
        self.adopted |= role != Role::None;
        true
    }

    fn beat(&mut self, session: SessionId, beat: Beat, now: Instant) -> Vec<Command> {
        let Some(id) = self.sessions.get(&session).cloned() else { return vec![Command::Close(session)] };
        let Some(mut member) = self.members.remove(&id) else { return vec![Command::Close(session)] };
        let status = member.status();
        if member.beat.phase != beat.phase || member.beat.role_epoch != beat.role_epoch {
            self.plan_due = true;
        }
        member.beat = beat;
        member.last_beat = now;
        if member.status() != status {
            self.mark(Kind::Status, &id);
        }
        if self.adopt(&mut member) {
            self.mark(Kind::Role, &id);
        }
        self.members.insert(id, member);
        Vec::new()
    }

    fn bye(&mut self, session: SessionId, reason: &str, now: Instant) -> Vec<Command> {
        if let Some(id) = self.sessions.remove(&session)
            && let Some(member) = self.members.remove(&id)
        {
            info!(instance = %id, reason, "an instance leaves");
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
        }
    }

    fn unregister(&mut self, id: &InstanceId) {
        self.mark(Kind::Instance, id);
        self.mark(Kind::Status, id);
        self.plan_due = true;
    }

    fn mark(&mut self, kind: Kind, id: &InstanceId) {
        self.unwritten.insert((kind, id.clone()));
    }

    /// Draws the consequences of events and of time: ended leases, places given up, new roles.
    pub fn conclude(&mut self, now: Instant) -> Vec<Command> {
        let mut commands = Vec::new();
        if self.check_at <= now {
            commands = self.expire(now);
            self.give_up(now);
            self.check_at = self.next_check(now);
        }
        if self.plan_due || self.plan_at.is_some_and(|at| at <= now) {
            (self.plan_due, self.plan_at) = (false, None);
            self.replan(now);
        }
        commands
    }

    /// Ends registrations whose lease has run out.
    fn expire(&mut self, now: Instant) -> Vec<Command> {
        let lease = self.sessions_config.lease;
        let mut commands = Vec::new();
        let silent: Vec<InstanceId> = self
            .members
            .iter()
            .filter(|(_, member)| member.is_registered() && now.duration_since(member.last_beat) >= lease)
            .map(|(id, _)| id.clone())
            .collect();
        for id in silent {
            let Some(member) = self.members.get_mut(&id) else { continue };
            let since = match member.contact {
                Contact::Silent { since } => since,
                _ => member.last_beat,
            };
            if let Contact::Connected(session) = member.contact {
                self.sessions.remove(&session);
                commands.push(Command::Close(session));
            }
            info!(instance = %id, silent = ?now.duration_since(member.last_beat), "an instance is lost");
            member.contact = Contact::Lost { since };
            self.unregister(&id);
        }
        commands
    }

    /// Gives up the places of those that did not come back in time, and in the end the memory of their roles.
    fn give_up(&mut self, now: Instant) {
        let grace = self.roles_config.lost_grace;
        let overdue = |_: &InstanceId, member: &mut Member| matches!(member.contact, Contact::Lost { since } if now.duration_since(since) >= grace);
        let gone: Vec<_> = self.members.extract_if(.., overdue).collect();
        for (id, member) in gone {
            info!(instance = %id, "its place is given up");
            self.plan_due = true;
            self.remember(id, member, now);
        }
        let memory = self.roles_config.memory;
        let faded =
            |_: &InstanceId, remembered: &mut Remembered| now.duration_since(remembered.since) >= memory;
        for (id, _) in self.remembered.extract_if(.., faded) {
            self.unwritten.insert((Kind::Role, id));
        }
    }

    fn remember(&mut self, id: InstanceId, member: Member, now: Instant) {
        if let Some(desired) = member.desired {
            let remembered = Remembered { desired, stored: member.stored, since: now };
            self.remembered.insert(id, remembered);
            self.check_at = self.check_at.min(now + self.roles_config.memory);
        }
    }

    /// When the next lease, place or memory may end. Later beats only put it off, so it need not follow them.
    fn next_check(&self, now: Instant) -> Instant {
        let leases = self.members.values().map(|member| match member.contact {
            Contact::Lost { since } => since + self.roles_config.lost_grace,
            _ => member.last_beat + self.sessions_config.lease,
        });
        let memories = self.remembered.values().map(|remembered| remembered.since + self.roles_config.memory);
        let never = now + Duration::from_secs(24 * 3600);
        leases.chain(memories).min().unwrap_or(never).max(now + SHORTEST_WAIT)
    }

    /// When [`Self::conclude`] will have something to do without an event.
    pub fn next_deadline(&self) -> Instant {
        self.plan_at.map_or(self.check_at, |at| at.min(self.check_at))
    }

    pub fn has_writes(&self) -> bool {
        !self.unwritten.is_empty()
    }

    /// What to write next, at most `limit` keys.
    pub fn take_writes(&mut self, limit: usize) -> Vec<Write> {
        let mut writes = Vec::new();
        while writes.len() < limit
            && let Some((kind, id)) = self.unwritten.pop_first()
        {
            let member = self.members.get(&id);
            let registered = member.filter(|member| member.is_registered());
            let desired = member.map_or_else(
                || self.remembered.get(&id).map(|r| &r.desired),
                |member| member.desired.as_ref(),
            );
            let value = match kind {
                Kind::Instance => registered.map(|member| member.spec.encode()),
                Kind::Status => registered.map(|member| member.status().encode()),
                Kind::Role => desired.map(DesiredRole::encode),
            };
            let epoch = desired.filter(|_| kind == Kind::Role).map(|desired| desired.epoch);
            writes.push(Write { kind, id, value, epoch });
        }
        writes
    }

    /// Marks what could not be written, to be looked up and written again.
    pub fn give_back(&mut self, writes: impl IntoIterator<Item = Write>) {
        self.unwritten.extend(writes.into_iter().map(|write| (write.kind, write.id)));
    }

    /// Everything that stands under the leader's lease has to be written again: the lease has ended.
    pub fn lease_ended(&mut self) {
        let ids: Vec<_> = self.members.keys().cloned().collect();
        for id in &ids {
            self.mark(Kind::Instance, id);
            self.mark(Kind::Status, id);
        }
    }

    fn policy(&self) -> Policy {
        Policy { prefill: self.roles_config.prefill, decode: self.roles_config.decode }
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
const SILENT: Beat = Beat {
    role: Role::None,
    role_epoch: RoleEpoch(0),
    phase: baton_registry::Phase::Loading,
    load_permille: 0,
    load: crate::fleet::Load {
        running_sequences: 0,
        waiting_sequences: 0,
        queued_prefill_tokens: 0,
        kv_blocks_total: 0,
        kv_blocks_free: 0,
        prefill_tokens_per_second: 0,
        decode_step_micros: 0,
        outgoing_transfers: 0,
        incoming_transfers: 0,
    },
};

/// Never shorter than this, so that a wait of zero cannot spin.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests;
