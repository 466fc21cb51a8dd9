//! API keys from end to end: operators make and revoke them with `baton ctl`, they lie in a real etcd, and the official
//! OpenAI client is let in, told to wait or sent away by them. No log of any service carries one.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use baton_integration_tests::{
    binary, eventually, folder, model,
    process::{self, Service, free_address},
    required,
};
use baton_proto::KeyHash;
use baton_registry::testing::EtcdServer;
use reqwest::StatusCode;
use serde_json::Value;

/// What `baton ctl key ...` prints to standard output, if it succeeds.
async fn key(controller: &str, arguments: &str) -> Option<String> {
    let mut ctl = Command::new(binary("baton"));
    ctl.args(["ctl", "key"]).args(arguments.split(' ')).args(["--controller", controller]);
    let output = tokio::task::spawn_blocking(move || ctl.stdin(Stdio::null()).output()).await;
    let output = output.expect("no panic").expect("baton starts");
    output.status.success().then(|| String::from_utf8(output.stdout).expect("is text").trim().to_owned())
}

/// Waits until the coordinator answers who has this key in this way.
async fn answers(url: &str, key: &str, status: StatusCode) {
    let client = reqwest::Client::new();
    eventually(&format!("{status} for a key"), || async {
        let answer = client.get(format!("{url}/v1/models")).bearer_auth(key).send().await.ok()?;
        (answer.status() == status).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_official_client_is_let_in_by_its_key_and_within_its_limits() {
    let etcd = EtcdServer::start().await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let dir = dir.path();
    let [controller_at, http_at] = [(); 2].map(|()| free_address());
    let in_etcd = format!("store.etcd.endpoints=[\"{}\"]", etcd.endpoint());
    let start = |program: &str, settings: &[&str]| {
        let mut command = Command::new(binary(program));
        // All there is to be said: no key may be in it.
        command.args(["--set", "process.log.level=trace"]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        if program != "baton-controller" {
            command.arg("--model").arg(model());
        }
        Service::start(&mut command, &dir.join(format!("{program}.log")))
    };
    let listen = format!("listen={controller_at}");
    let _controller = start(
        "baton-controller",
        &["store.kind=etcd", &in_etcd, &listen, "metrics_listen=127.0.0.1:0", "roles.settle=100ms"],
    );
    let listen = format!("listen={http_at}");
    let _coordinator =
        start("baton-coordinator", &[&in_etcd, &listen, "admin_listen=127.0.0.1:0", "api_keys.store=true"]);
    let controllers = format!("controllers=[\"{controller_at}\"]");
    let _server = start("baton-server", &[&controllers, "runtime.threads=1"]);
    let url = format!("http://{http_at}");
    eventually("a coordinator that is ready", || async {
        reqwest::get(format!("{url}/readiness")).await.ok()?.error_for_status().ok().map(drop)
    })
    .await;

    let add = async |arguments: &str| {
        let added = eventually("a controller that leads", || key(&controller_at, arguments)).await;
        assert!(added.starts_with("sk-baton-"), "{arguments}");
        added
    };
    let good = add("add good --tenant alice").await;
    let limited = add("add limited --requests-per-minute 2 --tokens-per-minute 5000").await;
    let revoked = add("add revoked --tenant alice").await;
    for key in [&good, &limited, &revoked] {
        answers(&url, key, StatusCode::OK).await;
    }
    key(&controller_at, "revoke revoked").await.expect("is revoked");
    answers(&url, &revoked, StatusCode::UNAUTHORIZED).await;
    assert_eq!(key(&controller_at, "add good").await, None, "the name is taken");
    let listed = key(&controller_at, "list -o json").await.expect("a list");
    let listed: Vec<Value> = serde_json::from_str(&listed).expect("is JSON");
    let names: Vec<_> = listed.iter().map(|key| (key["name"].as_str(), key["tenant"].as_str())).collect();
    assert_eq!(names, [(Some("good"), Some("alice")), (Some("limited"), Some("limited"))]);
    assert_eq!(listed[0]["sha256"], KeyHash::of(&good).to_hex());

    let client = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/api_keys.py"))
        .args([&format!("{url}/v1"), "SmolLM2-135M-Instruct", &good, &limited, &revoked])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the Python client starts");
    let output = process::finish(client, Duration::from_secs(300));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let metrics = reqwest::get(format!("{url}/metrics")).await.expect("an answer").text().await;
    let metrics = metrics.expect("is read");
    for line in [
        "baton_coordinator_api_keys 2",
        "baton_coordinator_tenant_requests_total{tenant=\"alice\"} 2",
        "baton_coordinator_tenant_requests_total{tenant=\"limited\"} 3",
    ] {
        assert!(metrics.lines().any(|shown| shown == line), "{line} is not in {metrics}");
    }
    for program in ["baton-controller", "baton-coordinator", "baton-server"] {
        let log = fs::read_to_string(dir.join(format!("{program}.log"))).expect("a log");
        assert!(log.contains("TRACE"), "{program} has said all it can");
        for key in [&good, &limited, &revoked] {
            assert!(!log.contains(key.as_str()), "{program} has logged a key");
        }
    }
    let log = fs::read_to_string(dir.join("baton-coordinator.log")).expect("a log");
    assert!(log.contains("api_key=\"limited\""), "requests are logged with their key's name");
    let log = fs::read_to_string(dir.join("baton-controller.log")).expect("a log");
    assert!(log.contains("api_key_added") && log.contains("api_key_revoked"), "changes are in the record");
}
