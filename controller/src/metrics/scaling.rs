//! What is shown of scaling on Kubernetes. Families without members are not exported: who does not scale shows nothing.

use baton_proto::GroupName;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{GroupLabels, of};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    group: String,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    group: String,
    reason: &'static str,
}

/// By group; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ScalingMetrics {
    replicas: Family<GroupLabels, Gauge>,
    wanted: Family<GroupLabels, Gauge>,
    failing: Family<GroupLabels, Gauge>,
    changes: Family<ChangeLabels, Counter>,
    errors: Family<ErrorLabels, Counter>,
}

impl ScalingMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "scaling_replicas",
            "Replicas that the Deployment of a group is to have",
            self.replicas.clone(),
        );
        registry.register(
            "scaling_replicas_wanted",
            "Replicas that a group wants, within its limits; nothing while nobody can say",
            self.wanted.clone(),
        );
        registry.register(
            "scaling_failing",
            "1 while a group cannot be scaled; the events and the log say why",
            self.failing.clone(),
        );
        registry.register("scaling_changes", "Changes of replicas, out and in", self.changes.clone());
        registry.register("scaling_errors", "Steps of scaling that failed, by reason", self.errors.clone());
    }

    /// What was seen last.
    pub fn show(&self, group: &GroupName, replicas: u32, wanted: Option<u32>) {
        let labels = of(group.as_str());
        self.replicas.get_or_create(&labels).set(replicas.into());
        match wanted {
            Some(wanted) => {
                self.wanted.get_or_create(&labels).set(wanted.into());
            }
            None => {
                self.wanted.remove(&labels);
            }
        }
    }

    pub fn failing(&self, group: &GroupName, failing: bool) {
        self.failing.get_or_create(&of(group.as_str())).set(failing.into());
    }

    pub fn changed(&self, group: &GroupName, out: bool) {
        let (group, direction) = (group.to_string(), if out { "out" } else { "in" });
        self.changes.get_or_create(&ChangeLabels { group, direction }).inc();
    }

    pub fn error(&self, group: &GroupName, reason: &'static str) {
        self.errors.get_or_create(&ErrorLabels { group: group.to_string(), reason }).inc();
    }

    /// This controller scales no more: another does, and says how it is.
    pub fn forget(&self) {
        self.replicas.clear();
        self.wanted.clear();
        self.failing.clear();
    }
}
