//! Who may be here, and with which role: the answers to a hello.

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode, InstanceId, InstanceSpec, Role, RoleEpoch};
use baton_registry::DesiredRole;
use tokio::time::Instant;
use tracing::info;

use super::{Command, Order, Reconciler, Record};
use crate::{
    fleet::{Beat, Contact, Member, SessionId},
    journal::NewsKind,
    ranktable::RankTable,
};

/// Between two entries in the journal that say that an instance is refused.
const REFUSALS_APART: Duration = Duration::from_secs(60);
/// Such entries in that time.
const REFUSALS_MOST: usize = 64;

impl Reconciler {
    pub(super) fn hello(
        &mut self,
        session: SessionId,
        mut spec: InstanceSpec,
        beat: Beat,
        unix_millis: u64,
        now: Instant,
    ) -> Vec<Command> {
        let (id, reported_devices) = (spec.id.clone(), spec.device_count);
        self.count_npus(&mut spec, reported_devices);
        if let Err(refusal) = self.admit(&spec) {
            info!(instance = %id, incarnation = %spec.incarnation, %refusal, "a session is refused");
            if self.is_new_refusal(&id, now) {
                self.tell_of(NewsKind::InstanceRefused, &id, Some(spec.group), refusal.message.clone());
            }
            let held = self.members.get(&id).map(|member| member.spec.incarnation);
            let refuse = Order::Refuse { reason: refusal, held };
            return vec![Command::Order(session, refuse), Command::Close(session)];
        }
        let mut commands = Vec::new();
        let before = self.members.remove(&id);
        // The same process has called again and the old stream has not broken yet.
        if let Some(old) = before.as_ref().and_then(Member::session) {
            self.sessions.remove(&old);
            commands.push(Command::Close(old));
        }
        let known = before.as_ref().is_some_and(|member| *member.spec == spec);
        let was_lost = before.as_ref().map_or_else(
            || self.remembered.contains_key(&id),
            |member| matches!(member.contact, Contact::Lost { .. }),
        );
        let (desired, stored) = match (&before, self.remembered.remove(&id)) {
            (Some(member), _) => (member.desired.clone(), member.stored),
            (None, Some(remembered)) => (Some(remembered.desired), remembered.stored),
            (None, None) => (None, None),
        };
        info!(
            instance = %id, incarnation = %spec.incarnation, %session, model = spec.model.name, group = %spec.group,
            role = beat.role.name(), epoch = %beat.role_epoch, "an instance is here"
        );
        let late_since = before.as_ref().filter(|_| known).and_then(|member| member.late_since);
        let stuck = before.as_ref().filter(|_| known).and_then(|member| member.stuck.clone());
        let joined = before.as_ref().filter(|_| known).map_or(now, |member| member.joined);
        let mut member = Member {
            spec: Arc::new(spec),
            reported_devices,
            beat,
            last_beat: now,
            contact: Contact::Connected(session),
            registered_unix_millis: unix_millis,
            joined,
            desired,
            stored,
            told: None,
            late_since,
            stuck,
        };
        self.health.observe(now, &member.spec, &member.beat);
        self.sessions.insert(session, id.clone());
        if self.adopt(&mut member) || self.renew(&mut member) || (was_lost && self.fence(&mut member)) {
            self.mark(Record::Role(id.clone()));
        }
        self.mark_registration(&id);
        self.plan_due = true;
        commands.push(Command::Order(session, Order::Welcome));
        self.offers.insert(id.clone());
        let joined = (!known).then(|| {
            let spec = &member.spec;
            format!("{} at {}, version {}", spec.model.name, spec.inference_endpoint, spec.version)
        });
        self.members.insert(id.clone(), member);
        if let Some(message) = joined {
            self.tell(NewsKind::InstanceJoined, &id, message);
        }
        self.check_at = self.check_at.min(now + self.sessions_config.lease);
        commands
    }

    /// One that calls again and again is told of once in a while.
    fn is_new_refusal(&mut self, id: &InstanceId, now: Instant) -> bool {
        self.refusals.retain(|_, at| now.duration_since(*at) < REFUSALS_APART);
        let is_new = self.refusals.len() < REFUSALS_MOST && !self.refusals.contains_key(id);
        if is_new {
            self.refusals.insert(id.clone(), now);
        }
        is_new
    }

    /// What the ranktable says of it counts, whatever it says itself.
    fn count_npus(&self, spec: &mut InstanceSpec, reported: u32) {
        spec.device_count = self.ranktable.npus(spec).unwrap_or(reported);
    }

    pub(super) fn take_ranktable(&mut self, table: RankTable) {
        self.ranktable = table;
        let ids: Vec<_> = self.members.keys().cloned().collect();
        for id in ids {
            let Some(mut member) = self.members.remove(&id) else { continue };
            let before = member.spec.device_count;
            self.count_npus(Arc::make_mut(&mut member.spec), member.reported_devices);
            if member.spec.device_count != before {
                info!(instance = %id, before, now = member.spec.device_count, "it has another number of NPUs");
                self.mark(Record::Instance(id.clone()));
                self.plan_due = true;
            }
            self.members.insert(id, member);
        }
    }

    /// Whether a session may be: one process per id, and none that a later one has replaced. An incumbent whose session
    /// has broken, or that this leader has yet to hear of, may be on its way back: its place is held for its lease.
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
        // Two processes whose clocks had been set back may have settled on one incarnation; a process keeps its address.
        let another = offered > held || spec.inference_endpoint != member.spec.inference_endpoint;
        let gone = !member.is_registered() || (member.session().is_none() && succeeds(&member.spec, spec));
        if another && !gone {
            let message = format!(
                "instance {id} is here already, as incarnation {held}: give this process another id, or call again \
                 once the other has been silent for its lease"
            );
            return Err(ApiError::new(ErrorCode::AlreadyExists, message));
        }
        Ok(())
    }

    /// An instance that holds a later role than is known here has it from an earlier life of the store: it stays.
    pub(super) fn adopt(&mut self, member: &mut Member) -> bool {
        let (role, epoch) = (member.beat.role, member.beat.role_epoch);
        if epoch.0 == 0
            || epoch > RoleEpoch::COUNTED_FROM_MOST
            || member.desired.as_ref().is_some_and(|desired| desired.epoch >= epoch)
        {
            return false;
        }
        info!(instance = %member.spec.id, role = role.name(), %epoch, "its role is adopted");
        let reason = "held when this controller began".to_owned();
        let (leader_epoch, drain, cordoned) = (self.leader_epoch, None, false);
        member.desired = Some(DesiredRole { role, epoch, reason, leader_epoch, drain, cordoned });
        self.adopted |= role != Role::None;
        true
    }

    /// An adopted role that has to be told to a new process gets an epoch of this term: the earlier leader may have
    /// told the earlier process a later one, which is lost with that leader's store.
    fn renew(&self, member: &mut Member) -> bool {
        let held = member.beat.role_epoch;
        let Some(desired) = &mut member.desired else { return false };
        // What a leader decides itself has an epoch no lower than its own.
        let adopted = desired.epoch.0 < desired.leader_epoch.0;
        let due = adopted && held < desired.epoch;
        if due {
            desired.epoch = RoleEpoch(self.leader_epoch.0);
            desired.leader_epoch = self.leader_epoch;
        }
        due
    }

    /// One that was lost has its role again under a new epoch: what others were told of the one before holds no more.
    fn fence(&self, member: &mut Member) -> bool {
        let epoch = self.next_epoch(member);
        let Some(desired) = member.desired.as_mut().filter(|desired| desired.role != Role::None) else {
            return false;
        };
        (desired.epoch, desired.leader_epoch) = (epoch, self.leader_epoch);
        true
    }

    /// Later than what the instance holds, if that can be, and than anything an earlier leader gave.
    pub(super) fn next_epoch(&self, member: &Member) -> RoleEpoch {
        let before = member.desired.as_ref().map_or(RoleEpoch(0), |desired| desired.epoch);
        let held = Some(member.beat.role_epoch).filter(|held| *held <= RoleEpoch::COUNTED_FROM_MOST);
        RoleEpoch((before.max(held.unwrap_or(RoleEpoch(0))).0 + 1).max(self.leader_epoch.0))
    }
}

/// Says who starts the process: one supervisor starts the next process of an id only when the last has ended.
const SUPERVISOR_LABEL: &str = "supervisor";

/// Whether the earlier process must have ended: the later one has its address, to which it was bound before it called,
/// or its supervisor.
fn succeeds(earlier: &InstanceSpec, later: &InstanceSpec) -> bool {
    let (before, after) = (earlier.labels.get(SUPERVISOR_LABEL), later.labels.get(SUPERVISOR_LABEL));
    earlier.inference_endpoint == later.inference_endpoint || (before.is_some() && before == after)
}
