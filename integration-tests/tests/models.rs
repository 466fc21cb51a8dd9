//! Two models in one cluster, behind one coordinator: real processes, the official client at both at once, and faults of
//! one that are none of the other's.

use std::process::{Command, Stdio};

use baton_integration_tests::{
    Cluster,
    chat::{Events, ask, request},
    eventually, folder, process, required,
};
use rustix::process::Signal;
use serde_json::Value;

/// Random weights of another family than SmolLM2's; its tokens are bytes, more or less.
const TINY: &str = "hf-bf16-qwen3moe-some-dense";

/// Instances that run a model, with their roles.
async fn instances(cluster: &Cluster, model: &str) -> Vec<(String, String)> {
    let views = cluster.ctl("instances").await;
    let of_model = views.iter().filter(|view| view["model"]["name"] == model);
    let field = |view: &Value, key: &str| view[key].as_str().expect("text").to_owned();
    of_model.map(|view| (field(view, "instance_id"), field(view, "role"))).collect()
}

#[tokio::test]
async fn two_models_are_served_at_once_and_fail_apart() {
    let tiny = folder().join("../server/runtime/tests/reference/tiny").join(TINY);
    let cluster = Cluster::start(&["--model", tiny.to_str().expect("UTF-8"), "--threads", "1"]).await;
    let real = cluster.model().to_owned();
    for model in [real.as_str(), TINY] {
        let mut roles: Vec<_> = instances(&cluster, model).await.into_iter().map(|(_, role)| role).collect();
        roles.sort();
        assert_eq!(roles, ["decode", "prefill"], "{model}");
    }
    let shown = cluster.run_ctl(&["get", "coordinators"]).await;
    assert!(shown.contains(&format!("{real},{TINY}")), "{shown}");

    let client = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/two_models.py"))
        .args([&format!("{}/v1", cluster.url()), &real, TINY])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the Python client starts");
    let output = process::finish(client, std::time::Duration::from_secs(120));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.assert_nothing_held().await;

    // The one that has lost its decode instance, and the one that streams on.
    let of_real = request(&real, "Tell me a story about a river.", 80, true);
    let of_tiny = request(TINY, "the hen in the rain", 40, false);
    let mut whole = of_real.clone();
    whole["stream"] = Value::Bool(false);
    let (expected, of_tiny_expected) = (ask(cluster.url(), &whole).await, ask(cluster.url(), &of_tiny).await);
    let mut events = Events::open(cluster.url(), &of_real).await;
    events.next().await.expect("the stream has begun");
    let (name, killed) = kill_decode_of(&cluster, TINY).await;
    assert_eq!(events.rest().await, (expected, None));
    cluster.assert_restarted(&name, killed).await;
    serves_all(&cluster).await;
    assert_eq!(ask(cluster.url(), &of_tiny).await, of_tiny_expected);

    let (name, killed) = kill_decode_of(&cluster, &real).await;
    for _ in 0..3 {
        assert_eq!(ask(cluster.url(), &of_tiny).await, of_tiny_expected);
    }
    cluster.assert_restarted(&name, killed).await;
    serves_all(&cluster).await;
    cluster.assert_nothing_held().await;
    cluster.stop().await;
}

/// With -9; its name, and the pid it had.
async fn kill_decode_of(cluster: &Cluster, model: &str) -> (String, u32) {
    let of_model = instances(cluster, model).await;
    let (name, _) = of_model.iter().find(|(_, role)| role == "decode").expect("one decodes");
    (name.clone(), cluster.kill(name, Signal::KILL))
}

/// Waits until the coordinator says that it serves both models.
async fn serves_all(cluster: &Cluster) {
    eventually("both models served", || async {
        let answer = reqwest::get(format!("{}/readiness", cluster.url())).await.ok()?;
        (answer.text().await.ok()? == r#"{"status":"ready"}"#).then_some(())
    })
    .await;
}
