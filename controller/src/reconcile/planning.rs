//! Who counts in a plan, and when a change it asks for is made.
//!
//! Those who have loaded count, and those who have a role and are on their way (lost and within their grace, or
//! loading it again); while nobody has loaded, all do, so that a fresh fleet has its roles before its weights. What
//! serves is moved, or left without a role, one at a time in a group, only once every other has taken on what it was
//! given, and only if both phases go on being served. The [stuck](super::stuck) do not count.

use std::collections::BTreeMap;

use baton_proto::{InstanceId, Phase, Role, RoleEpoch};
use baton_registry::DesiredRole;
use tokio::time::Instant;
use tracing::info;

use super::{Kind, Reconciler, cover::Cover, places::SHORTEST_WAIT};
use crate::{
    fleet::{Contact, Member},
    plan::{Candidate, Decision, plan},
};

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
        let mut groups: BTreeMap<&str, Vec<&Member>> = BTreeMap::new();
        for member in self.members.values() {
            groups.entry(member.spec.group.as_str()).or_default().push(member);
        }
        let mut decided = Vec::new();
        let mut again: Vec<Instant> = self.plan_again_after().map(|after| now + after).into_iter().collect();
        for (group, members) in &groups {
            if let Some(until) = self.unsettled(members, now) {
                again.push(until);
                continue;
            }
            let around = Around::of(members);
            let counting: Vec<_> = members
                .iter()
                .copied()
                .filter(|m| m.stuck.is_none() && self.counts(m, around, now))
                .collect();
            again.extend(members.iter().filter_map(|member| self.counts_until(member, now)));
            let candidates: Vec<_> = counting
                .iter()
                .map(|m| Candidate { spec: &m.spec, role: m.serving_role(), serving: m.is_serving() })
                .collect();
            let plan = plan(self.policy_of(group, now), &candidates);
            let (permitted, wait) = self.permitted(members, &counting, plan, now);
            again.extend(wait);
            decided.extend(permitted);
        }
        self.plan_at = again.into_iter().min().map(|at| at.max(now + SHORTEST_WAIT));
        for (id, decision) in decided {
            self.decide(&id, decision, now);
        }
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

    /// Which of the plan's changes are made now, and when to look at the others again if time will change that.
    fn permitted(
        &self,
        group: &[&Member],
        counting: &[&Member],
        mut plan: BTreeMap<&InstanceId, Decision>,
        now: Instant,
    ) -> (Vec<(InstanceId, Decision)>, Option<Instant>) {
        // While others with roles of the same time may be on their way back, who has a role keeps it.
        let hold =
            Some(self.began + self.roles_config.lost_grace).filter(|until| self.adopted && now < *until);
        let (mut permitted, mut moves, mut wait) = (Vec::new(), Vec::new(), None);
        let mut settling = false;
        for member in counting {
            let Some(decision) = plan.remove(&member.spec.id) else { continue };
            let has = member.desired.as_ref().map(|desired| desired.role);
            let unwanted = decision.role == Role::None;
            if has == Some(decision.role) {
                settling |= member.is_on_its_way();
            } else if member.serving_role().is_none() || (unwanted && !member.is_serving()) {
                settling |= !unwanted;
                permitted.push((member.spec.id.clone(), decision));
            } else if hold.is_some() {
                wait = hold;
            } else if member.is_serving() {
                settling |= member.is_on_its_way();
                moves.push((*member, decision));
            } else if member.session().is_none() {
                // It may have come to serve since it was last heard: it is heard again, or its place given up, first.
                settling = true;
            } else {
                settling = true;
                permitted.push((member.spec.id.clone(), decision));
            }
        }
        if !settling {
            let cover = Cover::of(group);
            let affordable = moves.into_iter().find(|(member, decision)| cover.spares(member, decision.role));
            permitted.extend(affordable.map(|(member, decision)| (member.spec.id.clone(), decision)));
        }
        (permitted, wait)
    }

    fn decide(&mut self, id: &InstanceId, decision: Decision, now: Instant) {
        let leader_epoch = self.leader_epoch;
        let Some(member) = self.members.get_mut(id) else { return };
        let before = member.desired.as_ref().map_or(RoleEpoch(0), |desired| desired.epoch);
        // Later than what the instance holds and than anything an earlier leader gave.
        let epoch = RoleEpoch((before.max(member.beat.role_epoch).0 + 1).max(leader_epoch.0));
        let was = member.desired.as_ref().map_or("none", |desired| desired.role.name());
        let Decision { role, reason } = decision;
        info!(instance = %id, was, role = role.name(), %epoch, reason, "a role is decided");
        member.desired = Some(DesiredRole { role, epoch, reason, leader_epoch });
        member.late_since = None;
        let moved = member.is_serving().then(|| member.spec.group.clone());
        self.role_changes += 1;
        self.mark(Kind::Role, id);
        if let Some(group) = moved {
            self.moved(&group, now);
        }
    }
}
