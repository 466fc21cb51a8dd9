//! What is asked of the API server: the scale of a Deployment, and its pods.
//!
//! Three calls and no more, so that the rights they need are few. Each is bounded in time and not repeated here: whoever
//! asked looks again first.

use std::{collections::BTreeMap, path::Path, time::Duration};

use baton_registry::Term;
use k8s_openapi::api::{apps::v1::Deployment, autoscaling::v1::Scale, core::v1::Pod as KubePod};
use kube::{
    Api, Client, Config,
    api::{ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;

use super::{
    decide::Pod,
    error::{Call, OpenError, ScaleError},
};
use crate::config::KubernetesConfig;

/// How long the API server may take to accept a connection, and to answer.
const CONNECT: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(10);
/// Pods of one page of a list, and of a Deployment at most.
const PAGE: u32 = 500;
const PODS_MOST: usize = 20_000;
/// The label that tells versions of a Deployment apart.
const TEMPLATE: &str = "pod-template-hash";

/// The API server, asked about one namespace.
pub(super) struct Cluster {
    client: Client,
    namespace: String,
}

/// A Deployment and its pods.
pub(super) struct Looked {
    pub(super) replicas: u32,
    /// Of the Deployment: a change is refused if it has another by then.
    pub(super) version: String,
    pub(super) pods: BTreeMap<String, Pod>,
}

impl Cluster {
    /// Nothing is asked yet.
    pub(super) async fn open(config: &KubernetesConfig) -> Result<Self, OpenError> {
        let mut kube = match config.kubeconfig_file.as_str() {
            "" => Config::incluster().map_err(OpenError::NoServiceAccount)?,
            file => {
                let read = Kubeconfig::read_from(Path::new(file)).map_err(OpenError::Kubeconfig)?;
                let options = KubeConfigOptions::default();
                Config::from_custom_kubeconfig(read, &options).await.map_err(OpenError::Kubeconfig)?
            }
        };
        kube.connect_timeout = Some(CONNECT);
        kube.default_retry = false;
        let namespace = match config.namespace.as_str() {
            "" => kube.default_namespace.clone(),
            namespace => namespace.to_owned(),
        };
        let client = Client::try_from(kube).map_err(OpenError::Client)?;
        Ok(Self { client, namespace })
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(super) async fn look(&self, deployment: &str) -> Result<Looked, ScaleError> {
        let call = Call::GetScale;
        let scale = self.bounded(call, deployment, self.deployments().get_scale(deployment)).await?;
        let version = scale.metadata.resource_version.ok_or(ScaleError::Incomplete("its version"))?;
        let replicas = scale.spec.and_then(|spec| spec.replicas).unwrap_or(0);
        let selector =
            scale.status.and_then(|status| status.selector).filter(|selector| !selector.is_empty());
        let selector = selector.ok_or(ScaleError::Incomplete("the Deployment's selector"))?;
        let pods = self.list(deployment, &selector).await?;
        Ok(Looked { replicas: u32::try_from(replicas).unwrap_or(0), version, pods })
    }

    async fn list(&self, deployment: &str, selector: &str) -> Result<BTreeMap<String, Pod>, ScaleError> {
        let mut params = ListParams::default().labels(selector).limit(PAGE);
        let mut pods = BTreeMap::new();
        loop {
            let page = self.bounded(Call::ListPods, deployment, self.pods().list(&params)).await?;
            pods.extend(page.items.iter().filter_map(|pod| Some((pod.metadata.name.clone()?, pod_of(pod)))));
            if pods.len() > PODS_MOST {
                return Err(ScaleError::TooManyPods(PODS_MOST));
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(pods),
            }
        }
    }

    /// Errors: `Conflict` if the Deployment has changed since it had this version, `Leading` if another may lead by now; then
    /// nothing more is sent.
    pub(super) async fn scale(
        &self,
        deployment: &str,
        to: u32,
        version: &str,
        term: &Term,
    ) -> Result<(), ScaleError> {
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": version},
            "spec": {"replicas": to},
        }));
        let (deployments, params) = (self.deployments(), PatchParams::default());
        let patched = deployments.patch_scale(deployment, &params, &patch);
        let patched = term.within(self.bounded(Call::PatchScale, deployment, patched));
        let scale: Scale = patched.await.ok_or(ScaleError::Leading)??;
        let replicas = scale.spec.and_then(|spec| spec.replicas);
        let taken = replicas.and_then(|replicas| u32::try_from(replicas).ok()) == Some(to);
        if taken { Ok(()) } else { Err(ScaleError::Incomplete("the replicas that were asked for")) }
    }

    fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn pods(&self) -> Api<KubePod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn bounded<T>(
        &self,
        call: Call,
        deployment: &str,
        answer: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, ScaleError> {
        let late = ScaleError::Late { call, after: ANSWER };
        let answered = tokio::time::timeout(ANSWER, answer).await.map_err(|_| late)?;
        let (namespace, deployment) = (self.namespace.clone(), deployment.to_owned());
        answered.map_err(|source| match &source {
            kube::Error::Api(status) if status.code == 401 => ScaleError::Unknown,
            kube::Error::Api(status) if status.code == 403 => {
                ScaleError::Forbidden { call, namespace, deployment }
            }
            kube::Error::Api(status) if status.code == 409 => ScaleError::Conflict,
            kube::Error::Api(status) if status.code == 404 => {
                ScaleError::NoDeployment { namespace, deployment }
            }
            _ => ScaleError::Call { call, source },
        })
    }
}

fn pod_of(pod: &KubePod) -> Pod {
    let label = |name: &str| pod.metadata.labels.as_ref().and_then(|labels| labels.get(name)).cloned();
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    Pod {
        // One that has ended holds no replica: another is made in its place.
        leaving: pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed")),
        placed: pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()),
        running: phase == Some("Running"),
        ready: conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True"),
        template: label(TEMPLATE).unwrap_or_default(),
    }
}
