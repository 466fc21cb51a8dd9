//! Scaling by a real API server of Kubernetes: `deploy/kubernetes/cluster build` brings it, and then
//! `cargo test -p baton-controller --features kubernetes --test kubernetes -- --ignored` runs this.
//!
//! There are no nodes: what a kubelet would say of pods is said here, and a server by the name of each pod is a script.

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../controller/cluster.rs"]
mod cluster;
mod control_plane;
mod pods;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use baton_controller::config::{KubernetesConfig, ScaledGroup};
use baton_proto::{GroupName, RolePolicy, v1};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Secret};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;

use cluster::Node;
use control_plane::{ControlPlane, NAMESPACE};
use pods::Pods;

/// A test that waits this long for one thing has failed.
const PATIENCE: Duration = Duration::from_secs(90);
const DEPLOYMENT: &str = "baton-server";

/// Waits until it holds; in vain it tells what has happened.
async fn until(node: &Node, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        if began.elapsed() > PATIENCE {
            let all = events(node).await;
            let told = all.iter().map(|it| format!("{} {} {}", it.kind, it.instance_id, it.message));
            panic!("in vain: {what}\n{}\n{}", told.collect::<Vec<_>>().join("\n"), node.metrics.render());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn config(kubeconfig: &str) -> baton_controller::ControllerConfig {
    let mut config = cluster::config();
    // Two cores carry all of it.
    config.sessions.lease = Duration::from_secs(5);
    config.roles.policy = RolePolicy::Auto;
    config.roles.auto.every = Duration::from_millis(500);
    config.roles.auto.pause = Duration::from_secs(1);
    config.roles.lost_grace = Duration::from_millis(500);
    let group = ScaledGroup { deployment: DEPLOYMENT.to_owned(), min: 2, max: 4 };
    config.kubernetes = KubernetesConfig {
        groups: BTreeMap::from([(GroupName::default(), group)]),
        namespace: NAMESPACE.to_owned(),
        kubeconfig_file: kubeconfig.to_owned(),
        stabilisation: Duration::from_secs(8),
        every: Duration::from_secs(1),
        ..KubernetesConfig::default()
    };
    config
}

async fn replicas(deployments: &Api<Deployment>) -> i32 {
    let scale = deployments.get_scale(DEPLOYMENT).await.expect("a scale");
    scale.spec.and_then(|spec| spec.replicas).expect("replicas")
}

async fn events(node: &Node) -> Vec<v1::FleetEvent> {
    let all = v1::WatchEventsRequest::default();
    let mut stream = node.admin().await.watch_events(all).await.expect("events").into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await.expect("an event") {
        events.push(event);
    }
    events
}

async fn count(node: &Node, kind: &str) -> usize {
    events(node).await.iter().filter(|event| event.kind == kind).count()
}

/// Changes the Deployment without a break, to nobody's harm.
async fn annotate(deployments: Api<Deployment>, number: usize) {
    for round in 0_u64.. {
        let annotations = json!({"metadata": {"annotations": {format!("test/{number}"): round.to_string()}}});
        let (params, patch) = (PatchParams::default(), Patch::Merge(annotations));
        // They meet one another, too.
        deployments.patch(DEPLOYMENT, &params, &patch).await.ok();
    }
}

fn code(error: kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a control plane of Kubernetes: deploy/kubernetes/cluster build"]
async fn a_group_is_scaled_out_and_in_with_the_rights_of_the_manifest() {
    let Some(mut plane) = ControlPlane::start() else { return };
    let admin = plane.admin().await;
    control_plane::create_namespace(&admin).await;
    control_plane::create_deployment(&admin, DEPLOYMENT, 2).await;
    control_plane::create_deployment(&admin, "another", 0).await;
    control_plane::apply_manifest(&admin, &["ServiceAccount"]).await;
    let kubeconfig = plane.kubeconfig_of_controller(&admin).await;
    let node = Node::start(config(&kubeconfig));
    let pods = Pods::tend(admin.clone(), &node.endpoint);
    let deployments: Api<Deployment> = Api::namespaced(admin.clone(), NAMESPACE);

    // Without rights it says which it needs, and goes on once it has them.
    until(&node, "it says what it may not do", async || count(&node, "scaling_failed").await > 0).await;
    let all = events(&node).await;
    let failed = all.iter().find(|event| event.kind == "scaling_failed").expect("it failed");
    let rule = "resources: [deployments/scale], resourceNames: [baton-server], verbs: [get]";
    assert!(failed.message.contains(rule) && failed.message.contains("403"), "{}", failed.message);
    control_plane::apply_manifest(&admin, &["Role", "RoleBinding"]).await;
    until(&node, "it may", async || count(&node, "scaling_recovered").await == 1).await;

    // More is asked for while the Deployment changes all the time.
    let wanted = || node.metrics.render().contains(r#"scaling_replicas_wanted{group="default"} 3"#);
    let conflicts = || node.metrics.render().contains(r#"reason="conflict""#);
    pods.ask_for(12.0);
    let others: Vec<_> = (0..4).map(|number| tokio::spawn(annotate(deployments.clone(), number))).collect();
    until(&node, "three are wanted, and others change the Deployment", async || wanted() && conflicts())
        .await;
    others.iter().for_each(|other| other.abort());
    until(&node, "it is scaled out", async || replicas(&deployments).await == 3).await;
    until(&node, "the third serves", async || pods.serving() == 3).await;
    assert_eq!(count(&node, "scaled_out").await, 1);

    // Nothing more than that.
    let secrets: Api<Secret> = Api::namespaced(plane.client(&kubeconfig).await, NAMESPACE);
    assert_eq!(code(secrets.list(&ListParams::default()).await.expect_err("refused")), 403);
    let own: Api<Deployment> = Api::namespaced(plane.client(&kubeconfig).await, NAMESPACE);
    assert_eq!(code(own.get(DEPLOYMENT).await.expect_err("refused")), 403);
    assert_eq!(code(own.get_scale("another").await.expect_err("refused")), 403);
    let one = pods.names().first().cloned().expect("a pod");
    let own = pods.api(plane.client(&kubeconfig).await);
    assert_eq!(code(own.delete(&one, &DeleteParams::default()).await.expect_err("refused")), 403);
    let image = Patch::Strategic(json!({"spec": {"containers": [{"name": "server", "image": "another"}]}}));
    let patched = own.patch(&one, &PatchParams::default(), &image).await;
    assert_eq!(code(patched.expect_err("refused")), 403);

    // The API server is gone for a while: it is said, and nothing else happens.
    plane.stop("apiserver");
    until(&node, "it says that it cannot scale", async || count(&node, "scaling_failed").await == 2).await;
    assert_eq!(pods.serving(), 3);
    plane.start_part("apiserver");
    until(&node, "it goes on", async || count(&node, "scaling_recovered").await == 2).await;

    // Less is asked for: one is emptied, ceases to be ready and is the one that goes.
    let last = pods.last().expect("a pod");
    pods.ask_for(1.0);
    until(&node, "it is scaled in", async || replicas(&deployments).await == 2).await;
    until(&node, "its pod is gone", async || pods.names().len() == 2).await;
    let (gone, drained) = pods.gone().first().cloned().expect("one is gone");
    assert!(drained, "{gone} was not drained");
    assert_ne!(gone, last, "that one goes if nothing tells pods apart");
    until(&node, "nothing is left of the cordon", async || {
        let roles = node.roles().await.expect("roles");
        roles.iter().all(|role| role.intent.as_ref().is_none_or(|intent| intent.cordoned.is_none()))
    })
    .await;
    let told = events(&node).await;
    let cordoned: Vec<_> = told.iter().filter(|event| event.kind == "cordoned").collect();
    assert_eq!(cordoned.len(), 1, "{cordoned:?}");
    assert_eq!((&cordoned[0].instance_id, cordoned[0].actor.as_str()), (&gone, "autoscaler"));
    assert_eq!(count(&node, "scaled_in").await, 1);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((replicas(&deployments).await, count(&node, "scaled_out").await), (2, 1));
    pods.end().await;
    node.stop().await;
}
