//! Which Deployments of servers are scaled on Kubernetes, and how cautiously; see [`crate::scale`].

use std::{collections::BTreeMap, time::Duration};

use baton_process::{Invalid, duration};
use baton_proto::GroupName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::require;

/// Characters of a name, by Kubernetes.
const NAME_MAX: usize = 253;
/// One prefill and one decode.
const REPLICAS_LEAST: u32 = 2;
/// Replicas of a Deployment, at most: a number with a digit too many should not start a data centre.
const REPLICAS_MOST: u32 = 10_000;

/// What is [scaled on Kubernetes](../../README.md#scaling-on-kubernetes). Nothing, unless a group is named.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// By the name of a group, the Deployment that its servers are pods of and between how many replicas it is scaled. As a
    /// flag: `--set kubernetes.groups.default='{deployment="baton-server",max=8}'`.
    pub groups: BTreeMap<GroupName, ScaledGroup>,
    /// Namespace of the Deployments. Empty = that of the controller's own service account, or of the kubeconfig's context.
    pub namespace: String,
    /// A kubeconfig that says where the API server is and who asks. Empty = as the service account of the pod that the
    /// controller runs in.
    pub kubeconfig_file: String,
    /// The label of an instance that names its pod. Empty = `instance_id` is the pod's name.
    pub pod_label: String,
    /// For how long a group must have wanted fewer instances without a break before one is taken away. At least six
    /// `kubernetes.every`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub stabilisation: Duration,
    /// How often a Deployment and its pods are looked at. At least 1s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub every: Duration,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            groups: BTreeMap::new(),
            namespace: String::new(),
            kubeconfig_file: String::new(),
            pod_label: String::new(),
            stabilisation: Duration::from_secs(300),
            every: Duration::from_secs(5),
        }
    }
}

/// How one group is scaled, which NAME stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScaledGroup {
    /// The Deployment whose pods its servers are. Each has one of its own.
    pub deployment: String,
    /// Fewest replicas: one prefill and one decode, or more.
    #[serde(default = "fewest")]
    #[schemars(range(min = REPLICAS_LEAST))]
    pub min: u32,
    /// Most replicas. At least `min`.
    #[schemars(range(min = REPLICAS_LEAST, max = REPLICAS_MOST))]
    pub max: u32,
}

fn fewest() -> u32 {
    REPLICAS_LEAST
}

impl KubernetesConfig {
    pub(super) fn validate(&self) -> Result<(), Invalid> {
        self.check()?;
        let possible = self.groups.is_empty() || cfg!(feature = "kubernetes");
        let built = "this controller was built without Kubernetes: build it with `--features baton-controller/kubernetes`, \
                     or name no group here";
        require(possible, "kubernetes.groups", built)
    }

    fn check(&self) -> Result<(), Invalid> {
        let mut deployments = BTreeMap::new();
        for (name, group) in &self.groups {
            let key = |field: &str| format!("kubernetes.groups.{name}.{field}");
            let named = is_name(&group.deployment);
            require(named, &key("deployment"), "expected the name of a Deployment")?;
            let least = "expected at least 2: one prefill and one decode";
            require(group.min >= REPLICAS_LEAST, &key("min"), least)?;
            require(group.max >= group.min, &key("max"), "expected at least `min`")?;
            require(group.max <= REPLICAS_MOST, &key("max"), "expected at most 10000")?;
            if let Some(other) = deployments.insert(&group.deployment, name) {
                let twice = format!("group {other} has this Deployment already: expected one for each group");
                return Err(Invalid::new(key("deployment"), twice));
            }
        }
        let named = self.namespace.is_empty() || is_name(&self.namespace);
        require(named, "kubernetes.namespace", "expected the name of a namespace")?;
        let second = self.every >= Duration::from_secs(1);
        require(second, "kubernetes.every", "expected at least 1s")?;
        // Half of it without a look is a break.
        let whole = "expected at least six times `kubernetes.every`";
        require(self.stabilisation >= self.every * 6, "kubernetes.stabilisation", whole)
    }
}

/// As Kubernetes takes it for names of Deployments: nothing that would lead elsewhere in a path.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= NAME_MAX && name.chars().all(plain) && name.starts_with(ends) && name.ends_with(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled() -> KubernetesConfig {
        let group = ScaledGroup { deployment: "baton-server".to_owned(), min: 2, max: 8 };
        KubernetesConfig {
            groups: BTreeMap::from([(GroupName::default(), group)]),
            ..KubernetesConfig::default()
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_key() {
        type Change = fn(&mut KubernetesConfig);
        fn group(config: &mut KubernetesConfig) -> &mut ScaledGroup {
            config.groups.get_mut("default").expect("it is there")
        }
        let cases: [(&str, Change); 9] = [
            ("kubernetes.groups.default.deployment", |it| group(it).deployment.clear()),
            ("kubernetes.groups.default.deployment", |it| group(it).deployment = "a/b".to_owned()),
            ("kubernetes.groups.default.min", |it| group(it).min = 1),
            ("kubernetes.groups.default.max", |it| group(it).max = 1),
            ("kubernetes.groups.default.max", |it| group(it).max = 10_001),
            ("kubernetes.groups.other.deployment", |it| {
                let group = group(it).clone();
                it.groups.insert(GroupName::new("other").expect("a good name"), group);
            }),
            ("kubernetes.namespace", |it| it.namespace = "..".to_owned()),
            ("kubernetes.every", |it| it.every = Duration::ZERO),
            ("kubernetes.stabilisation", |it| it.stabilisation = Duration::from_secs(29)),
        ];
        assert!(scaled().check().is_ok());
        for (key, change) in cases {
            let mut config = scaled();
            change(&mut config);
            assert_eq!(config.check().expect_err("it is refused").key, key);
        }
    }

    #[cfg(not(feature = "kubernetes"))]
    #[test]
    fn a_controller_that_cannot_scale_says_so_at_start() {
        assert!(KubernetesConfig::default().validate().is_ok());
        let refused = scaled().validate().expect_err("it is refused");
        assert_eq!(refused.key, "kubernetes.groups");
        assert!(refused.to_string().contains("--features baton-controller/kubernetes"), "{refused}");
    }
}
