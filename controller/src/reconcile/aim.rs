//! By what each group is divided: a ratio, or what its instances report; as configured, or as operators want it.
//!
//! Every beat feeds the meter of its group. With the policy `auto` the plans of [`super::planning`] are made anew
//! every `roles.auto.every`, and after a move a group is left alone for `roles.auto.pause`: the instance has to be
//! emptied and to show what it does in its new role. While there is nothing to go by (at first, at night, after a change of
//! leader) nobody is moved, and who has no role yet is given one by the ratio.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    time::Duration,
};

use baton_proto::{GroupName, Role, RolePolicy, Targets};
use tokio::time::Instant;

use super::{Reconciler, moves::Moves};
use crate::{
    config::RoleConfig,
    demand::Meter,
    fleet::{Member, congestion::Congestion},
    plan::{
        Policy, Ratio, Split,
        auto::{self, Caution, Measured},
    },
};

/// What is known of a group beside its members.
#[derive(Debug, Clone, Default)]
pub(super) struct Group {
    meter: Meter,
    block_tokens: u32,
    /// No serving member is moved before.
    pause_until: Option<Instant>,
    /// The fewest instances with which it would meet its targets.
    wanted: Option<Split>,
    /// So many moves may still be made for small gains.
    pub(super) rebalance: usize,
    pub(super) moves: Moves,
    pub(super) congestion: Congestion,
    /// How long what is queued would take to prefill, when it was last looked at and could be said.
    pub(super) wait: Option<Duration>,
    /// Whether both phases were served when it was last looked at; none = it was never served.
    pub(super) served: Option<bool>,
}

/// By what a group is divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aim {
    pub policy: RolePolicy,
    pub ratio: Ratio,
    pub targets: auto::Targets,
    /// Whether operators set some of it.
    pub set: bool,
    every: Duration,
}

impl Aim {
    /// As configured, with what operators want in its place.
    fn of(config: &RoleConfig, wanted: Option<&Targets>) -> Self {
        let set = wanted.is_some();
        let wanted = wanted.cloned().unwrap_or_default();
        let count = |wanted: Option<NonZeroU32>, configured| wanted.map_or(configured, NonZeroU32::get);
        Self {
            policy: wanted.policy.unwrap_or(config.policy),
            ratio: Ratio {
                prefill: count(wanted.prefill, config.prefill),
                decode: count(wanted.decode, config.decode),
            },
            targets: auto::Targets {
                ttft: wanted.ttft.unwrap_or(config.auto.ttft),
                tpot: wanted.tpot.unwrap_or(config.auto.tpot),
            },
            set,
            every: config.auto.every,
        }
    }

    /// How long a plan is good for.
    pub(super) fn plan_again_after(&self) -> Option<Duration> {
        (self.policy == RolePolicy::Auto).then_some(self.every)
    }
}

impl Reconciler {
    pub(super) fn aim_of(&self, group: &GroupName) -> Aim {
        Aim::of(&self.roles_config, self.targets.get(group))
    }

    /// A member has reported.
    pub(super) fn measure(&mut self, member: &Member, now: Instant) {
        let group = self.groups.entry(member.spec.group.clone()).or_default();
        group.block_tokens = member.spec.kv_layout.block_tokens;
        group.meter.report(now, &member.spec.id, member.spec.incarnation, &member.beat.load);
    }

    /// A serving member of the group is given another role.
    pub(super) fn moved(&mut self, group: &GroupName, role: Role, now: Instant) {
        if let Some(group) = self.groups.get_mut(group) {
            if role != Role::None {
                group.moves.made(now, self.roles_config.moves_most);
            }
            group.pause_until = Some(now + self.roles_config.auto.pause);
            group.rebalance = group.rebalance.saturating_sub(1);
        }
    }

    /// Small gains are worth a move, until the plan asks for no more or each of the group has been moved once.
    pub(super) fn rebalance(&mut self, group: &GroupName) {
        let members = self.members.values().filter(|member| member.spec.group == *group).count();
        self.groups.entry(group.clone()).or_default().rebalance = members;
    }

    pub(super) fn rebalanced(&mut self, group: &GroupName) {
        if let Some(group) = self.groups.get_mut(group) {
            group.rebalance = 0;
        }
    }

    /// Learns what groups want now, and forgets those without members.
    pub(super) fn take_stock(&mut self, now: Instant) {
        let members = &self.members;
        let occupied: BTreeSet<&GroupName> = members.values().map(|member| &member.spec.group).collect();
        // One that nobody is left of serves nobody, which is to be seen for as long as its instances are remembered.
        let forgotten = self.remembered.is_empty();
        for (name, group) in &mut self.groups {
            group.served = group.served.map(|served| served && occupied.contains(name));
        }
        self.groups.retain(|name, group| occupied.contains(name) || (group.served.is_some() && !forgotten));
        for (name, group) in &mut self.groups {
            group.meter.retain(|id| members.get(id).is_some_and(|member| member.spec.group == *name));
        }
        let wanted: Vec<_> = self
            .groups
            .keys()
            .map(|name| (name.clone(), self.measured(name, now).map(|measured| self.wanted_by(&measured))))
            .collect();
        for (name, wanted) in wanted {
            if let Some(group) = self.groups.get_mut(&name) {
                group.wanted = wanted;
            }
        }
    }

    pub(super) fn wanted_by(&self, measured: &Measured) -> Split {
        auto::wanted(measured, self.sessions_config.max_instances)
    }

    /// The fewest instances with which it would meet its targets, by group, where enough has been measured to say so.
    pub fn wanted(&self) -> BTreeMap<GroupName, Split> {
        self.groups.iter().filter_map(|(name, group)| Some((name.clone(), group.wanted?))).collect()
    }

    pub(super) fn policy_of(&self, group: &GroupName, now: Instant) -> Policy {
        let Aim { policy, ratio, .. } = self.aim_of(group);
        match (policy, self.measured(group, now)) {
            (RolePolicy::Ratio, _) => Policy::Ratio(ratio),
            (RolePolicy::Auto, None) => Policy::Keep(ratio),
            (RolePolicy::Auto, Some(measured)) => Policy::Measured(measured, ratio),
        }
    }

    /// None if the group is not divided by what is measured, or if too little is known.
    pub(super) fn measured(&self, name: &GroupName, now: Instant) -> Option<Measured> {
        let aim = self.aim_of(name);
        let group = self.groups.get(name).filter(|_| aim.policy == RolePolicy::Auto)?;
        let paused = group.pause_until.is_some_and(|until| now < until);
        let caution = match (group.rebalance > 0, paused) {
            (true, _) => Caution::NONE,
            // No pressure is larger than this: nobody is moved.
            (false, true) => Caution { pressure: f64::INFINITY, ..Caution::default() },
            (false, false) => Caution::default(),
        };
        Some(Measured {
            demand: group.meter.demand(now)?,
            speed: group.meter.speed(group.block_tokens)?,
            targets: aim.targets,
            caution,
        })
    }
}
