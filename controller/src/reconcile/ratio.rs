//! By what each group is divided: the configured ratio, or what its instances report.
//!
//! Every beat feeds the meter of its group. With `roles.policy = "auto"` the plans of [`super::planning`] are made anew
//! every `roles.auto.every`, and after a move a group is left alone for `roles.auto.pause`: the instance has to be
//! emptied and to show what it does in its new role. While there is nothing to go by (at first, at night, after a change of
//! leader) nobody is moved, and who has no role yet is given one by the ratio.

use std::{collections::BTreeMap, time::Duration};

use baton_proto::GroupName;
use tokio::time::Instant;

use super::Reconciler;
use crate::{
    config::RolePolicy,
    demand::Meter,
    fleet::Member,
    plan::{
        Policy, Ratio,
        auto::{self, Caution, Measured, Targets},
    },
};

/// What is known of a group beside its members.
#[derive(Debug, Default)]
pub(super) struct Group {
    meter: Meter,
    block_tokens: u32,
    /// No serving member is moved before.
    pause_until: Option<Instant>,
    wanted: Option<Wanted>,
}

/// The fewest instances with which a group would meet its targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub prefill: usize,
    pub decode: usize,
}

impl Reconciler {
    /// A member has reported.
    pub(super) fn measure(&mut self, member: &Member, now: Instant) {
        if self.roles_config.policy != RolePolicy::Auto {
            return;
        }
        let group = self.groups.entry(member.spec.group.clone()).or_default();
        group.block_tokens = member.spec.kv_layout.block_tokens;
        group.meter.report(now, &member.spec.id, member.spec.incarnation, &member.beat.load);
    }

    /// A serving member of the group is given another role.
    pub(super) fn moved(&mut self, group: &GroupName, now: Instant) {
        if let Some(group) = self.groups.get_mut(group) {
            group.pause_until = Some(now + self.roles_config.auto.pause);
        }
    }

    /// Learns what groups want now, and forgets those without members.
    pub(super) fn take_stock(&mut self, now: Instant) {
        let members = &self.members;
        self.groups.retain(|name, _| members.values().any(|member| member.spec.group == *name));
        for (name, group) in &mut self.groups {
            group.meter.retain(|id| members.get(id).is_some_and(|member| member.spec.group == *name));
        }
        let most = self.sessions_config.max_instances;
        let wanted: Vec<_> = self
            .groups
            .iter()
            .map(|(name, group)| (name.clone(), self.measured(group, now)))
            .map(|(name, measured)| (name, measured.map(|measured| auto::wanted(&measured, most))))
            .collect();
        for (name, wanted) in wanted {
            if let Some(group) = self.groups.get_mut(&name) {
                group.wanted = wanted.map(|(prefill, decode)| Wanted { prefill, decode });
            }
        }
    }

    /// By group, where enough has been measured to say so.
    pub fn wanted(&self) -> BTreeMap<&str, Wanted> {
        self.groups.iter().filter_map(|(name, group)| Some((name.as_str(), group.wanted?))).collect()
    }

    pub(super) fn policy_of(&self, group: &str, now: Instant) -> Policy {
        let configured = Ratio { prefill: self.roles_config.prefill, decode: self.roles_config.decode };
        if self.roles_config.policy == RolePolicy::Ratio {
            return Policy::Ratio(configured);
        }
        let measured = self.groups.get(group).and_then(|group| self.measured(group, now));
        measured.map_or(Policy::Keep(configured), Policy::Measured)
    }

    fn measured(&self, group: &Group, now: Instant) -> Option<Measured> {
        let config = &self.roles_config.auto;
        let paused = group.pause_until.is_some_and(|until| now < until);
        let caution = Caution::default();
        Some(Measured {
            demand: group.meter.demand(now)?,
            speed: group.meter.speed(group.block_tokens)?,
            targets: Targets { ttft: config.ttft, tpot: config.tpot },
            // No pressure is larger than this: nobody is moved.
            caution: if paused { Caution { pressure: f64::INFINITY, ..caution } } else { caution },
        })
    }

    /// How long a plan is good for.
    pub(super) fn plan_again_after(&self) -> Option<Duration> {
        (self.roles_config.policy == RolePolicy::Auto).then_some(self.roles_config.auto.every)
    }
}
