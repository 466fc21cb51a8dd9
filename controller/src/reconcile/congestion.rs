//! Which groups are congested: looked at with every beat's time, told when it changes.

use std::{collections::BTreeMap, time::Duration};

use baton_proto::GroupName;
use tokio::time::Instant;

use super::Reconciler;
use crate::{
    fleet::{Member, congestion::Backlog},
    journal::NewsKind,
};

/// A group's queue, for people and alarms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Queue {
    /// How long what is queued would take to prefill.
    pub wait: Duration,
    pub congested: bool,
}

impl Reconciler {
    /// Looks at the queues of all groups, if it is time for that.
    pub(super) fn watch_queues(&mut self, now: Instant) {
        if self.queues_at > now {
            return;
        }
        self.queues_at = now + self.sessions_config.beat;
        let mut members: BTreeMap<&GroupName, Vec<&Member>> = BTreeMap::new();
        for member in self.members.values() {
            members.entry(&member.spec.group).or_default().push(member);
        }
        let backlogs = members.into_iter().map(|(group, members)| {
            let bound = self.congestion_config.wait;
            let bound = if bound.is_zero() { self.aim_of(group).targets.ttft } else { bound };
            (group.clone(), Backlog::of(members), bound)
        });
        for (name, backlog, bound) in backlogs.collect::<Vec<_>>() {
            let group = self.groups.entry(name.clone()).or_default();
            group.wait = backlog.as_ref().map(Backlog::wait);
            // Nobody waits for those that are gone, and of those that are new nobody can say for how long.
            let wait = group.wait.unwrap_or_default();
            let after = self.congestion_config.after;
            let (kind, side, bound) = match group.congestion.observe(now, wait, bound, after) {
                Some(true) => (NewsKind::CongestionRaised, "above", bound),
                Some(false) => (NewsKind::CongestionCleared, "below", bound / 2),
                None => continue,
            };
            let (after, bound) = (after.as_secs_f64(), bound.as_secs_f64());
            let nobody = || "nobody prefills who has measured how fast".to_owned();
            let backlog = backlog.as_ref().map_or_else(nobody, Backlog::to_string);
            self.tell_group(kind, &name, format!("{backlog}; {side} {bound:.1} s for {after:.0} s"));
        }
    }

    pub(super) fn is_congested(&self, group: &GroupName) -> bool {
        self.groups.get(group).is_some_and(|group| group.wait.is_some() && group.congestion.is_raised())
    }

    /// By group, where somebody prefills and has measured how fast.
    pub fn queues(&self) -> impl Iterator<Item = (&GroupName, Queue)> {
        self.groups.iter().filter_map(|(name, group)| {
            let congested = group.congestion.is_raised();
            Some((name, Queue { wait: group.wait?, congested }))
        })
    }
}
