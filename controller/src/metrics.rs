//! What the controller shows of the fleet and of itself.

use std::collections::BTreeMap;

use baton_process::Metrics;
use baton_proto::{Phase, Role};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use tokio::time::Instant;

use crate::reconcile::Reconciler;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstanceLabels {
    role: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabels {
    group: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WantedLabels {
    group: String,
    role: &'static str,
}

/// Handles to the registered metrics; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ControllerMetrics {
    instances: Family<InstanceLabels, Gauge>,
    wanted: Family<WantedLabels, Gauge>,
    planned: Family<WantedLabels, Gauge>,
    served: Family<GroupLabels, Gauge>,
    lost: Gauge,
    stuck: Gauge,
    quarantined: Gauge,
    degraded_links: Gauge,
    /// 1 while this controller leads.
    pub leading: Gauge,
    pub leader_epoch: Gauge,
    /// Times that this controller began to lead.
    pub reigns: Counter,
    pub role_changes: Counter,
    pub sessions: Gauge,
    pub store_writes: Counter,
    pub store_errors: Counter,
}

impl ControllerMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        metrics.register(|registry| {
            let registry = registry.sub_registry_with_prefix("baton_controller");
            registry.register(
                "instances",
                "Registered instances by observed role and phase",
                own.instances.clone(),
            );
            registry.register(
                "instances_wanted",
                "The fewest instances of a role with which a group would meet its targets",
                own.wanted.clone(),
            );
            registry.register(
                "instances_planned",
                "Instances that do a phase by their group's plan; one that is mixed does both",
                own.planned.clone(),
            );
            registry.register(
                "group_served",
                "1 while both phases of a group that has served are served",
                own.served.clone(),
            );
            registry.register(
                "instances_lost",
                "Instances whose place is kept for their return",
                own.lost.clone(),
            );
            registry.register(
                "instances_stuck",
                "Instances that do not become what they should be",
                own.stuck.clone(),
            );
            registry.register(
                "instances_quarantined",
                "Instances that are out of service because they do badly",
                own.quarantined.clone(),
            );
            registry.register(
                "links_degraded",
                "Pairs of instances between which too many handoffs fail",
                own.degraded_links.clone(),
            );
            registry.register("leading", "1 while this controller leads", own.leading.clone());
            registry.register("leader_epoch", "Epoch of the present or last reign", own.leader_epoch.clone());
            registry.register("reigns", "Times that this controller began to lead", own.reigns.clone());
            registry.register("role_changes", "Roles decided", own.role_changes.clone());
            registry.register("sessions", "Sessions of instances", own.sessions.clone());
            registry.register("store_writes", "Keys written to the state store", own.store_writes.clone());
            registry.register("store_errors", "Failed calls of the state store", own.store_errors.clone());
        });
        own
    }

    /// Counts the fleet anew.
    pub fn observe(&self, mind: &Reconciler, now: Instant) {
        let (members, wanted) = (mind.members(), mind.wanted());
        let quarantined = members.keys().filter(|id| mind.verdict(id).is_quarantined()).count();
        self.quarantined.set(i64::try_from(quarantined).unwrap_or(i64::MAX));
        let degraded = mind.degraded_links(now).count();
        self.degraded_links.set(i64::try_from(degraded).unwrap_or(i64::MAX));
        self.served.clear();
        for (group, served) in mind.served() {
            self.served.get_or_create(&GroupLabels { group: group.to_owned() }).set(served.into());
        }
        // What a group has none of is 0, so that it can be compared.
        let mut planned: BTreeMap<(&str, &'static str), i64> = BTreeMap::new();
        for member in members.values() {
            let group = member.spec.group.as_str();
            planned.extend([Role::Prefill, Role::Decode].map(|role| ((group, role.name()), 0)));
        }
        for member in members.values() {
            let Some(role) = member.serving_role() else { continue };
            let phases = match role {
                Role::Mixed => &[Role::Prefill, Role::Decode][..],
                Role::Prefill | Role::Decode | Role::None => std::slice::from_ref(&role),
            };
            let group = member.spec.group.as_str();
            phases.iter().for_each(|phase| *planned.entry((group, phase.name())).or_default() += 1);
        }
        self.planned.clear();
        for ((group, role), count) in planned {
            self.planned.get_or_create(&WantedLabels { group: group.to_owned(), role }).set(count);
        }
        self.wanted.clear();
        for (group, wanted) in &wanted {
            for (role, count) in [(Role::Prefill, wanted.prefill), (Role::Decode, wanted.decode)] {
                let labels = WantedLabels { group: group.to_string(), role: role.name() };
                self.wanted.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        for role in Role::ALL {
            for phase in Phase::ALL {
                let alike = |member: &&crate::fleet::Member| {
                    member.is_registered() && (member.beat.role, member.beat.phase) == (role, phase)
                };
                let count = members.values().filter(alike).count();
                let labels = InstanceLabels { role: role.name(), phase: phase.name() };
                self.instances.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        let lost = members.values().filter(|member| !member.is_registered()).count();
        self.lost.set(i64::try_from(lost).unwrap_or(i64::MAX));
        let stuck = members.values().filter(|member| member.stuck.is_some()).count();
        self.stuck.set(i64::try_from(stuck).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_ask_for_metrics_that_there_are() {
        let rules = include_str!("../../deploy/alerts/baton.rules.yaml");
        let metrics = Metrics::new("controller");
        let own = ControllerMetrics::register(&metrics);
        // A family without members is not exported.
        let (group, role) = ("g".to_owned(), "decode");
        let _ = own.served.get_or_create(&GroupLabels { group: group.clone() });
        for family in [&own.wanted, &own.planned] {
            let _ = family.get_or_create(&WantedLabels { group: group.clone(), role });
        }
        let exported = metrics.render();
        let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let asked: Vec<_> = words.filter(|word| word.starts_with("baton_controller_")).collect();
        assert!(!asked.is_empty());
        for metric in asked {
            let family = metric.trim_end_matches("_total");
            assert!(exported.contains(&format!("# TYPE {family} ")), "nobody exports {metric}");
        }
    }
}
