//! Why scaling does not go on, and what to do about it.

use std::time::Duration;

use baton_proto::ApiError;

/// Where the rules are that this needs.
const MANIFEST: &str = "deploy/kubernetes/chart/objects/controller-scaling/rbac.yaml";

/// How the API server cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("kubernetes.kubeconfig_file: {0}")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    #[error(
        "kubernetes: this controller is in no pod with a service account ({0}): run it in the cluster, or set \
         `kubernetes.kubeconfig_file`"
    )]
    NoServiceAccount(#[source] kube::config::InClusterError),
    #[error("kubernetes: the API server cannot be reached as it is configured: {0}")]
    Client(#[source] kube::Error),
}

/// What was asked of the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    GetScale,
    PatchScale,
    ListPods,
}

impl Call {
    /// As in "may not ...".
    fn what(self) -> &'static str {
        match self {
            Self::GetScale => "read the scale of the Deployment",
            Self::PatchScale => "change the scale of the Deployment",
            Self::ListPods => "list pods",
        }
    }

    /// The rule of a Role that lets it be asked.
    fn rule(self, deployment: &str) -> String {
        let scale = |verb| {
            format!(
                "{{apiGroups: [apps], resources: [deployments/scale], resourceNames: [{deployment}], verbs: [{verb}]}}"
            )
        };
        match self {
            Self::GetScale => scale("get"),
            Self::PatchScale => scale("patch"),
            Self::ListPods => r#"{apiGroups: [""], resources: [pods], verbs: [list]}"#.to_owned(),
        }
    }
}

/// Why a step was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScaleError {
    #[error("this controller leads no more")]
    NotLeading,
    #[error(
        "its leadership was not renewed in time, and another controller may lead by now: nothing is changed"
    )]
    Leading,
    /// The Deployment, or the cordon of an instance, is not what it was when it was looked at.
    #[error("somebody else changed it at the same time")]
    Conflict,
    #[error("it may not {} in namespace {namespace} (403): add {} to its Role, see {}", .call.what(), .call.rule(.deployment), MANIFEST)]
    Forbidden { call: Call, namespace: String, deployment: String },
    #[error(
        "the API server does not take its credentials (401): look at the service account's token, or at `kubernetes.kubeconfig_file`"
    )]
    Unknown,
    #[error(
        "there is no Deployment {deployment} in namespace {namespace}: see `kubernetes.groups` and `kubernetes.namespace`"
    )]
    NoDeployment { namespace: String, deployment: String },
    #[error("the API server has not answered within {after:?}: cannot {}", .call.what())]
    Late { call: Call, after: Duration },
    #[error("cannot {}: {source}", .call.what())]
    Call { call: Call, source: kube::Error },
    #[error("the answer says nothing of {0}")]
    Incomplete(&'static str),
    #[error("more than {0} pods are the Deployment's: its selector takes in too much")]
    TooManyPods(usize),
    #[error("the controller refuses to change the fleet so: {0}")]
    Refused(#[from] ApiError),
}

impl ScaleError {
    /// As metrics name it.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::NotLeading | Self::Leading => "not_leading",
            Self::Conflict => "conflict",
            Self::Forbidden { .. } => "forbidden",
            Self::Unknown => "unauthorized",
            Self::NoDeployment { .. } => "no_deployment",
            Self::Late { .. } => "timeout",
            Self::Call { .. } | Self::Incomplete(_) => "api",
            Self::TooManyPods(_) => "pods",
            Self::Refused(_) => "refused",
        }
    }
}
