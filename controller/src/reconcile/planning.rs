//! Who counts in a plan, and what comes of it for each.
//!
//! Those who have loaded count, and those who have a role and are on their way (lost and within their grace, or
//! loading it again); while nobody has loaded, all do, so that a fresh fleet has its roles before its weights. Those
//! who are set aside, cordoned by operators or in [quarantine](crate::fleet::health), get no role; the [stuck](super::stuck) keep what they have. When
//! a change is made is for [`super::steps`] to say.
//!
//! A plan explains itself: what is carried out is the same [`GroupPlan`] that operators are shown.

use std::collections::BTreeMap;

use baton_proto::{GroupName, InstanceId, Phase, Role};
use baton_registry::DesiredRole;
use tokio::time::Instant;
use tracing::info;

use super::{Aim, Budget, Reconciler, Record, places::SHORTEST_WAIT, steps::Step};
use crate::{
    fleet::{Contact, Member},
    journal::NewsKind,
    plan::{Candidate, Decision, Split, auto::Measured, plan},
};

/// What is planned for a group.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupPlan {
    pub group: GroupName,
    pub aim: Aim,
    /// What `aim` was weighed against, if it asks for that and enough is known.
    pub measured: Option<Measured>,
    /// The fewest instances with which `aim` would be met, by that.
    pub wanted: Option<Split>,
    /// Whether its prompts wait for too long.
    pub congested: bool,
    /// Of the moves that it may have.
    pub moves: Budget,
    /// Why nothing is decided yet; then nobody is in `members`.
    pub waits: Option<String>,
    pub members: Vec<MemberPlan>,
    /// When time alone may change the plan.
    again: Option<Instant>,
}

/// What is planned for an instance.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberPlan {
    pub id: InstanceId,
    /// The role it was given last.
    pub has: Option<Role>,
    pub decision: Decision,
    pub step: Step,
}

/// What matters of a group to one that loads.
#[derive(Clone, Copy)]
struct Around {
    /// Some member serves.
    serving: bool,
    /// Some member has loaded, or has a role.
    begun: bool,
}

impl Around {
    fn of(group: &[&Member]) -> Self {
        let begun = |member: &&Member| member.beat.phase != Phase::Loading || member.serving_role().is_some();
        Self { serving: group.iter().any(|member| member.is_serving()), begun: group.iter().any(begun) }
    }
}

/// A group that keeps growing is planned after this many times the settling time at the latest.
const SETTLE_TIMES: u32 = 4;

impl Reconciler {
    /// Plans every group and decides what may be done of it now.
    pub(super) fn replan(&mut self, now: Instant) {
        self.take_stock(now);
        self.watch_service();
        let plans = self.plans(now);
        let again = plans.iter().filter_map(|plan| plan.again).min();
        self.plan_at = again.map(|at| at.max(now + SHORTEST_WAIT));
        for plan in plans {
            if !plan.members.iter().any(|member| matches!(member.step, Step::Changes | Step::Waits(_))) {
                self.rebalanced(&plan.group);
            }
            for member in plan.members.into_iter().filter(|member| member.step == Step::Changes) {
                self.decide(&member.id, member.decision, now);
            }
        }
    }

    /// What is planned, by group.
    pub fn plans(&self, now: Instant) -> Vec<GroupPlan> {
        let mut groups: BTreeMap<&GroupName, Vec<&Member>> = BTreeMap::new();
        for member in self.members.values() {
            groups.entry(&member.spec.group).or_default().push(member);
        }
        groups.into_iter().map(|(group, members)| self.plan_of(group, &members, now)).collect()
    }

    fn plan_of(&self, group: &GroupName, members: &[&Member], now: Instant) -> GroupPlan {
        let aim = self.aim_of(group);
        let (measured, moves) = (self.measured(group, now), self.budget_of(group, now));
        let mut again = aim.plan_again_after().map(|after| now + after);
        let mut at = |when: Option<Instant>| again = again.into_iter().chain(when).min();
        let (mut planned, mut waits) = (Vec::new(), None);
        let aside = self.set_aside(members);
        let free: Vec<&Member> =
            members.iter().copied().filter(|member| !aside.contains_key(&member.spec.id)).collect();
        if let Some(until) = self.unsettled(&free, now) {
            at(Some(until));
            let seconds = (until - now).as_secs_f64();
            waits = Some(format!("waits up to {seconds:.1} s for more instances"));
        } else {
            let around = Around::of(members);
            let counts = |m: &&Member| m.stuck.is_none() && self.counts(m, around, now);
            members.iter().for_each(|member| at(self.counts_until(member, now)));
            let candidates: Vec<_> = free.into_iter().filter(counts).map(|m| self.candidate(m)).collect();
            let mut decisions = plan(self.policy_of(group, now), &candidates);
            decisions.extend(aside);
            let (steps, wait) = self.steps(members, &mut decisions, &moves, now);
            at(wait);
            planned.extend(members.iter().map(|member| {
                let id = member.spec.id.clone();
                let has = member.desired.as_ref().map(|desired| desired.role);
                let planned = decisions.remove(&id).zip(steps.get(&id).cloned());
                let (decision, step) = planned.unwrap_or_else(|| (not_counted(member), Step::NotCounted));
                MemberPlan { id, has, decision, step }
            }));
        }
        let wanted = measured.as_ref().map(|measured| self.wanted_by(measured));
        let congested = self.is_congested(group);
        let (group, members) = (group.clone(), planned);
        GroupPlan { group, aim, measured, wanted, congested, moves, waits, members, again }
    }

    /// What is decided of one that no plan counts, because operators said so or because it does badly.
    pub(super) fn aside(&self, member: &Member) -> Option<Decision> {
        let id = &member.spec.id;
        let unwanted = |reason| Decision { role: Role::None, reason };
        let Some(cordoned) = self.intents.get(id).and_then(|intent| intent.cordoned.as_ref()) else {
            let verdict = self.health.verdict(id);
            return verdict.is_quarantined().then(|| unwanted(verdict.to_string()));
        };
        let because =
            if cordoned.reason.is_empty() { String::new() } else { format!(": {}", cordoned.reason) };
        Some(unwanted(format!("cordoned by {}{because}", cordoned.by)))
    }

    /// Who no plan counts. If nobody else is there, those in quarantine serve all the same: badly is better than not.
    fn set_aside<'a>(&self, members: &[&'a Member]) -> BTreeMap<&'a InstanceId, Decision> {
        let mut aside: BTreeMap<_, _> =
            members.iter().filter_map(|member| Some((&member.spec.id, self.aside(member)?))).collect();
        let others = |member: &&Member| !aside.contains_key(&member.spec.id) && member.session().is_some();
        if !members.iter().any(|member| others(member) && !member.is_loading()) {
            aside.retain(|id, _| self.is_cordoned(id));
        }
        aside
    }

    pub(super) fn is_cordoned(&self, id: &InstanceId) -> bool {
        self.intents.get(id).is_some_and(|intent| intent.cordoned.is_some())
    }

    fn candidate<'a>(&'a self, member: &'a Member) -> Candidate<'a> {
        let (spec, role, serving) = (&member.spec, member.serving_role(), member.is_serving());
        let pinned = self.intents.get(&spec.id).and_then(|intent| intent.pinned.as_ref());
        let by = |by: &'a str| if by.is_empty() { "an operator" } else { by };
        let pin = pinned.map(|pinned| (pinned.role, by(&pinned.by)));
        Candidate { spec, role, serving, pin: pin.or_else(|| labelled_role(member)) }
    }

    /// Until when a group that has no roles yet waits for more instances.
    fn unsettled(&self, members: &[&Member], now: Instant) -> Option<Instant> {
        let wanted = (self.roles_config.prefill + self.roles_config.decode) as usize;
        if members.len() >= wanted || members.iter().any(|member| member.serving_role().is_some()) {
            return None;
        }
        let settle = self.roles_config.settle;
        let first = members.iter().map(|member| member.joined).min()?;
        let last = members.iter().map(|member| member.joined).max()?;
        let until = (last + settle).min(first + settle * SETTLE_TIMES);
        (until > now).then_some(until)
    }

    fn counts(&self, member: &Member, around: Around, now: Instant) -> bool {
        let has_role = member.serving_role().is_some();
        match member.contact {
            // Its place is kept.
            Contact::Lost { .. } => has_role,
            _ if member.beat.phase != Phase::Loading => true,
            _ if has_role => self.counts_until(member, now).is_some() || !around.serving,
            _ => !around.begun,
        }
    }

    /// When a loading instance with a role ceases to count; none if it has, or if it is not of that kind.
    fn counts_until(&self, member: &Member, now: Instant) -> Option<Instant> {
        let until = member.joined + self.roles_config.load_grace;
        let loading = member.is_registered() && member.beat.phase == Phase::Loading;
        (loading && member.serving_role().is_some() && until > now).then_some(until)
    }

    fn decide(&mut self, id: &InstanceId, decision: Decision, now: Instant) {
        let leader_epoch = self.leader_epoch;
        let Some(epoch) = self.members.get(id).map(|member| self.next_epoch(member)) else { return };
        let Some(member) = self.members.get_mut(id) else { return };
        let was = member.desired.as_ref().map_or("none", |desired| desired.role.name());
        let Decision { role, reason } = decision;
        let cordoned = self.intents.get(id).and_then(|intent| intent.cordoned.as_ref());
        let cordoned = cordoned.filter(|_| role == Role::None);
        let (drain, cordoned) = (cordoned.and_then(|cordoned| cordoned.drain), cordoned.is_some());
        info!(instance = %id, was, role = role.name(), %epoch, reason, "a role is decided");
        let message = format!("{was} -> {}: {reason}", role.name());
        member.desired = Some(DesiredRole { role, epoch, reason, leader_epoch, drain, cordoned });
        member.late_since = None;
        let moved = (member.is_serving() && member.beat.role != role).then(|| member.spec.group.clone());
        self.role_changes += 1;
        self.mark(Record::Role(id.clone()));
        self.tell(NewsKind::RoleDecided, id, message);
        if let Some(group) = moved {
            self.moved(&group, role, now);
        }
    }
}

/// Says which role an instance is to have, for those who would rather write it where they deploy it.
const ROLE_LABEL: &str = "role";

fn labelled_role(member: &Member) -> Option<(Role, &'static str)> {
    let label = member.spec.labels.get(ROLE_LABEL)?;
    let role = Role::ALL.into_iter().find(|role| role.name() == label && *role != Role::None)?;
    Some((role, "its label `role`"))
}

/// What is said of one that no plan counts.
fn not_counted(member: &Member) -> Decision {
    let role = member.desired.as_ref().map_or(Role::None, |desired| desired.role);
    let reason = match &member.stuck {
        Some(stuck) => format!("stuck: {stuck}"),
        None if member.is_loading() => "is loading".to_owned(),
        None => "is gone".to_owned(),
    };
    Decision { role, reason }
}
