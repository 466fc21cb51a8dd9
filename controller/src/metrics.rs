//! What the controller shows of the fleet and of itself.

use std::{
    collections::{BTreeMap, HashSet},
    hash::Hash,
    sync::{Arc, atomic::AtomicU64},
};

use baton_process::Metrics;
use baton_proto::{Phase, Role};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use tokio::time::Instant;

use crate::reconcile::Reconciler;

mod scaling;

pub use scaling::ScalingMetrics;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstanceLabels {
    role: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabels {
    group: String,
}

fn of(group: &str) -> GroupLabels {
    GroupLabels { group: group.to_owned() }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WantedLabels {
    group: String,
    role: &'static str,
}

/// A family whose members come and go. They are never all cleared: a scrape at any time finds each that stays.
#[derive(Debug, Clone)]
struct Series<L, M> {
    family: Family<L, M>,
    shown: Arc<Mutex<HashSet<L>>>,
}

impl<L: Clone + Eq + Hash, M: Default> Default for Series<L, M> {
    fn default() -> Self {
        Self { family: Family::default(), shown: Arc::default() }
    }
}

impl<L: Clone + Eq + Hash, M: Default> Series<L, M> {
    /// Has these members and no others; `set` gives a member its value.
    fn show<V>(&self, members: impl IntoIterator<Item = (L, V)>, set: impl Fn(&M, V)) {
        let shown = &mut *self.shown.lock();
        let mut gone = std::mem::take(shown);
        for (labels, value) in members {
            set(&self.family.get_or_create(&labels), value);
            gone.remove(&labels);
            shown.insert(labels);
        }
        for labels in gone {
            self.family.remove(&labels);
        }
    }
}

/// Handles to the registered metrics; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ControllerMetrics {
    instances: Family<InstanceLabels, Gauge>,
    wanted: Series<WantedLabels, Gauge>,
    planned: Series<WantedLabels, Gauge>,
    served: Series<GroupLabels, Gauge>,
    congested: Series<GroupLabels, Gauge>,
    wait_seconds: Series<GroupLabels, Gauge<f64, AtomicU64>>,
    lost: Gauge,
    stuck: Gauge,
    quarantined: Gauge,
    degraded_links: Gauge,
    /// 1 while this controller leads.
    pub leading: Gauge,
    pub leader_epoch: Gauge,
    /// Times that this controller began to lead.
    pub elections_won: Counter,
    pub role_changes: Counter,
    pub sessions: Gauge,
    pub store_writes: Counter,
    pub store_errors: Counter,
    pub scaling: ScalingMetrics,
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
                own.wanted.family.clone(),
            );
            registry.register(
                "instances_planned",
                "Instances that do a phase by their group's plan; one that is mixed does both",
                own.planned.family.clone(),
            );
            registry.register(
                "group_served",
                "1 while both phases of a group that has served are served",
                own.served.family.clone(),
            );
            registry.register(
                "group_congested",
                "1 while prompts of a group wait too long",
                own.congested.family.clone(),
            );
            registry.register(
                "group_prefill_wait_seconds",
                "How long the prompts that a group has queued would take to prefill",
                own.wait_seconds.family.clone(),
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
            registry.register("leader_epoch", "Epoch of the present or last term", own.leader_epoch.clone());
            registry.register(
                "elections_won",
                "Times that this controller began to lead",
                own.elections_won.clone(),
            );
            registry.register("role_changes", "Roles decided", own.role_changes.clone());
            registry.register("sessions", "Sessions of instances", own.sessions.clone());
            registry.register("store_writes", "Keys written to the state store", own.store_writes.clone());
            registry.register("store_errors", "Failed calls of the state store", own.store_errors.clone());
            own.scaling.register(registry);
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
        let served = mind.served().into_iter().map(|(group, served)| (of(group), served));
        self.served.show(served, |gauge, served| {
            gauge.set(served.into());
        });
        let queues: Vec<_> = mind.queues().collect();
        let congested = queues.iter().map(|(group, queue)| (of(group.as_str()), queue.congested));
        self.congested.show(congested, |gauge, congested| {
            gauge.set(congested.into());
        });
        let waits = queues.iter().map(|(group, queue)| (of(group.as_str()), queue.wait.as_secs_f64()));
        self.wait_seconds.show(waits, |gauge, seconds| {
            gauge.set(seconds);
        });
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
        let labels = |group: &str, role| WantedLabels { group: group.to_owned(), role };
        let planned = planned.into_iter().map(|((group, role), count)| (labels(group, role), count));
        self.planned.show(planned, |gauge, count| {
            gauge.set(count);
        });
        let wanted = wanted.iter().flat_map(|(group, wanted)| {
            [(Role::Prefill, wanted.prefill), (Role::Decode, wanted.decode)].map(|(role, count)| {
                (labels(group.as_str(), role.name()), i64::try_from(count).unwrap_or(i64::MAX))
            })
        });
        self.wanted.show(wanted, |gauge, count| {
            gauge.set(count);
        });
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
    fn alerts_and_dashboards_ask_for_metrics_that_there_are() {
        let asking = concat!(
            include_str!("../../deploy/alerts/baton.rules.yaml"),
            include_str!("../../deploy/dashboards/control-plane.json"),
        );
        let metrics = Metrics::new("controller");
        let own = ControllerMetrics::register(&metrics);
        // A family without members is not exported.
        let (group, role) = ("g".to_owned(), "decode");
        for family in [&own.served, &own.congested] {
            family.show([(GroupLabels { group: group.clone() }, 1)], |gauge, value| {
                gauge.set(value);
            });
        }
        for family in [&own.wanted, &own.planned] {
            family.show([(WantedLabels { group: group.clone(), role }, 1)], |gauge, value| {
                gauge.set(value);
            });
        }
        own.wait_seconds.show([(GroupLabels { group }, 0.5)], |gauge, value| {
            gauge.set(value);
        });
        let scaled = baton_proto::GroupName::default();
        own.instances.get_or_create(&InstanceLabels { role, phase: "ready" }).set(1);
        own.scaling.show(&scaled, 2, Some(3));
        own.scaling.failing(&scaled, true);
        own.scaling.changed(&scaled, true);
        own.scaling.error(&scaled, "forbidden");
        let exported = metrics.render();
        let words = asking.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let asked: Vec<_> = words.filter(|word| word.starts_with("baton_controller_")).collect();
        assert!(!asked.is_empty());
        for metric in asked {
            let family = metric.trim_end_matches("_total");
            assert!(exported.contains(&format!("# TYPE {family} ")), "nobody exports {metric}");
        }
    }
    #[test]
    fn a_scrape_at_any_time_finds_every_member_that_stays() {
        let series = Series::<GroupLabels, Gauge>::default();
        let names: Vec<String> = (0..50).map(|number| format!("g{number}")).collect();
        let all = || names.iter().map(|name| (of(name), 1));
        let set = |gauge: &Gauge, value| {
            gauge.set(value);
        };
        series.show(all(), set);
        let ended = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let scrapes = scope.spawn(|| {
                let mut registry = prometheus_client::registry::Registry::default();
                registry.register("members", "Members", series.family.clone());
                let mut fewest = usize::MAX;
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    let mut text = String::new();
                    prometheus_client::encoding::text::encode(&mut text, &registry).expect("a scrape");
                    fewest = fewest.min(text.matches("members{").count());
                }
                fewest
            });
            for round in 0..2000 {
                series.show(all().chain([(of(&format!("other{round}")), 1)]), set);
            }
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(scrapes.join().expect("no panic") >= names.len());
        });
        series.show(all().take(1), set);
        assert_eq!(series.shown.lock().len(), 1, "the others are gone");
    }
}
