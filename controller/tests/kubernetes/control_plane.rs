//! A control plane of Kubernetes in a folder of its own, and what a test puts into it.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use k8s_openapi::api::{
    apps::v1::Deployment,
    authentication::v1::TokenRequest,
    core::v1::{Namespace, ServiceAccount},
    rbac::v1::{Role, RoleBinding},
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// As the manifest has it.
pub(crate) const NAMESPACE: &str = "baton";
const ACCOUNT: &str = "baton-controller";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes")
}

pub(crate) struct ControlPlane {
    folder: tempfile::TempDir,
}

impl ControlPlane {
    /// None, and a line that says why, where there is none to start.
    pub(crate) fn start() -> Option<Self> {
        let built = Command::new(deploy().join("cluster")).arg("built").status().expect("the script runs");
        if !built.success() {
            eprintln!("skipped: there is no API server of Kubernetes: deploy/kubernetes/cluster build");
            return None;
        }
        let plane = Self { folder: tempfile::tempdir().expect("a folder") };
        plane.script("start", None);
        Some(plane)
    }

    fn script(&self, command: &str, part: Option<&str>) {
        let mut script = Command::new(deploy().join("cluster"));
        let status = script.arg(command).arg(self.folder.path()).args(part).status();
        assert!(status.expect("the script runs").success(), "{command} {part:?}");
    }

    pub(crate) fn stop(&mut self, part: &str) {
        self.script("stop", Some(part));
    }

    pub(crate) fn start_part(&mut self, part: &str) {
        self.script("start", Some(part));
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("a path").to_owned()
    }

    pub(crate) async fn admin(&self) -> Client {
        self.client(&self.path("kubeconfig")).await
    }

    pub(crate) async fn client(&self, kubeconfig: &str) -> Client {
        let read = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
        Client::try_from(config.expect("a configuration")).expect("a client")
    }

    /// With a token of the service account that the manifest makes, as a pod of its has it.
    pub(crate) async fn kubeconfig_of_controller(&self, admin: &Client) -> String {
        let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), NAMESPACE);
        let request = TokenRequest::default();
        let token = accounts.create_token_request(ACCOUNT, &PostParams::default(), &request).await;
        let token = token.expect("a token").status.expect("a status").token;
        let of_admin = Kubeconfig::read_from(self.path("kubeconfig")).expect("a kubeconfig");
        let mut own = serde_json::to_value(&of_admin).expect("a value");
        own["users"] = json!([{"name": "admin", "user": {"token": token}}]);
        let path = self.path("controller.kubeconfig");
        // JSON is YAML.
        std::fs::write(&path, own.to_string()).expect("a file");
        path
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let mut script = Command::new(deploy().join("cluster"));
        script.arg("stop").arg(self.folder.path()).status().ok();
    }
}

fn typed<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("of its type")
}

pub(crate) async fn create_namespace(admin: &Client) {
    let namespaces: Api<Namespace> = Api::all(admin.clone());
    let namespace = typed(json!({"metadata": {"name": NAMESPACE}}));
    namespaces.create(&PostParams::default(), &namespace).await.expect("a namespace");
}

pub(crate) async fn create_deployment(admin: &Client, name: &str, replicas: i32) {
    let labels = json!({"app": name});
    let container = json!({"name": "server", "image": "baton-server"});
    let deployment = typed(json!({
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }));
    let deployments: Api<Deployment> = Api::namespaced(admin.clone(), NAMESPACE);
    deployments.create(&PostParams::default(), &deployment).await.expect("a Deployment");
}

/// What of the rights that scaling needs is of these kinds, as it stands in the file.
pub(crate) async fn apply_manifest(admin: &Client, kinds: &[&str]) {
    let manifest = deploy().join("chart/objects/controller-scaling/rbac.yaml");
    let text = std::fs::read_to_string(manifest).expect("the manifest");
    let mut applied = 0;
    for document in text.split("\n---\n") {
        let value: Value = serde_saphyr::from_str(document).expect("YAML");
        let kind = value["kind"].as_str().expect("a kind").to_owned();
        if !kinds.contains(&kind.as_str()) {
            continue;
        }
        assert_eq!(value["metadata"]["namespace"], NAMESPACE);
        let params = PostParams::default();
        match kind.as_str() {
            "ServiceAccount" => {
                let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), NAMESPACE);
                accounts.create(&params, &typed(value)).await.map(drop)
            }
            "Role" => {
                let roles: Api<Role> = Api::namespaced(admin.clone(), NAMESPACE);
                roles.create(&params, &typed(value)).await.map(drop)
            }
            "RoleBinding" => {
                let bindings: Api<RoleBinding> = Api::namespaced(admin.clone(), NAMESPACE);
                bindings.create(&params, &typed(value)).await.map(drop)
            }
            other => panic!("the manifest has a {other}, which nobody expects"),
        }
        .expect("it is taken");
        applied += 1;
    }
    assert_eq!(applied, kinds.len());
}
