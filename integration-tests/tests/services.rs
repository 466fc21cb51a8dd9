//! The three services as binaries of their own, as on several machines: a real etcd holds the state, each process is
//! configured by file, environment and flags, and standard gRPC tools see health and reflection.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use baton_integration_tests::{
    binary, chat, eventually, folder, model,
    process::{self, Service, free_address},
    required,
};
use baton_proto::v1::{self, fleet_admin_client::FleetAdminClient};
use rustix::process::Signal;
use serde_json::Value;

fn etcd(dir: &Path, client: &str) -> Service {
    let peer = free_address();
    let mut etcd = Command::new("etcd");
    etcd.arg("--data-dir").arg(dir.join("etcd"));
    for (flag, address) in [
        ("--listen-client-urls", client),
        ("--advertise-client-urls", client),
        ("--listen-peer-urls", &peer),
        ("--initial-advertise-peer-urls", &peer),
    ] {
        etcd.args([flag, &format!("http://{address}")]);
    }
    etcd.arg(format!("--initial-cluster=default=http://{peer}"));
    Service::start(&mut etcd, &dir.join("etcd.log"))
}

async fn ctl(controller: &str, what: &str) -> Option<Vec<Value>> {
    let mut ctl = Command::new(binary("baton"));
    ctl.args(["ctl", "get", what, "-o", "json", "--controller", controller]).stdin(Stdio::null());
    let output =
        tokio::task::spawn_blocking(move || ctl.output()).await.expect("no panic").expect("baton starts");
    output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("ctl prints JSON"))
}

async fn probe(address: &str, services: &[&str]) {
    let probe = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/grpc_probe.py"))
        .arg(address)
        .args(services)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the probe starts");
    let output = process::finish(probe, Duration::from_secs(60));
    assert!(output.status.success(), "{address}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until it is ready, and asks it: the request, and its answer.
async fn served(url: &str) -> (Value, String) {
    eventually("a coordinator that is ready", || async {
        reqwest::get(format!("{url}/readiness")).await.ok()?.error_for_status().ok().map(drop)
    })
    .await;
    let body = chat::request("SmolLM2-135M-Instruct", "What is the capital of France?", 12, false);
    let answer = chat::ask(url, &body).await;
    assert!(answer.contains("Paris"), "{answer}");
    (body, answer)
}

/// The instances, one of which prefills and the other decodes.
async fn apart(controller: &str) -> Vec<Value> {
    let instances = ctl(controller, "instances").await.expect("the controller answers");
    let roles: BTreeSet<_> = instances.iter().map(|instance| instance["role"].as_str()).collect();
    assert_eq!(roles, BTreeSet::from([Some("prefill"), Some("decode")]), "{instances:?}");
    instances
}

#[tokio::test]
async fn three_services_and_etcd() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let dir = dir.path();
    let [etcd_at, controller_at, http_at, admin_at] = [(); 4].map(|()| free_address());
    let mut store = etcd(dir, &etcd_at);

    // By file.
    let config = dir.join("controller.toml");
    let text = format!(
        "listen = \"{controller_at}\"\nmetrics_listen = \"127.0.0.1:0\"\n\
         [store]\nkind = \"etcd\"\netcd.endpoints = [\"{etcd_at}\"]\n"
    );
    fs::write(&config, text).expect("a file");
    let mut controller = Service::start(
        Command::new(binary("baton-controller")).arg("--config").arg(&config),
        &dir.join("controller.log"),
    );
    // By environment.
    let _coordinator = Service::start(
        Command::new(binary("baton-coordinator"))
            .env("BATON_COORDINATOR__STORE__ETCD__ENDPOINTS", &etcd_at)
            .env("BATON_COORDINATOR__MODELS", format!("[{{path = {:?}}}]", model()))
            .env("BATON_COORDINATOR__LISTEN", &http_at)
            .env("BATON_COORDINATOR__ADMIN_LISTEN", &admin_at),
        &dir.join("coordinator.log"),
    );
    // By flags. They keep their caches in different types, and take in each other's.
    let mut servers = [("alpha", "bf16"), ("beta", "int8")].map(|(name, kv_dtype)| {
        Service::start(
            Command::new(binary("baton-server"))
                .args([
                    "--instance-id",
                    name,
                    "--controller",
                    &controller_at,
                    "--set",
                    "runtime.threads=1",
                    "--set",
                    &format!("runtime.kv_dtype={kv_dtype}"),
                    "--set",
                    "handoff.convert=true",
                    "--model",
                ])
                .arg(model()),
            &dir.join(format!("{name}.log")),
        )
    });

    let url = format!("http://{http_at}");
    let (body, answer) = served(&url).await;

    let instances = apart(&controller_at).await;
    for instance in &instances {
        let endpoint = instance["inference_endpoint"].as_str().expect("an endpoint");
        probe(endpoint, &["baton.v1.Inference", "baton.v1.Handoff", "baton.v1.KvCache"]).await;
    }
    probe(&controller_at, &["baton.v1.Control", "baton.v1.FleetAdmin"]).await;
    probe(&admin_at, &["baton.v1.RequestAdmin"]).await;

    // Without etcd, and without a controller, traffic goes on.
    process::signal(store.0.id(), Signal::KILL);
    process::wait_exit(&mut store.0, Duration::from_secs(10));
    assert_eq!(chat::ask(&url, &body).await, answer);
    process::signal(controller.0.id(), Signal::KILL);
    process::wait_exit(&mut controller.0, Duration::from_secs(10));
    assert_eq!(chat::ask(&url, &body).await, answer);

    // A server ends in order when asked to.
    for server in &mut servers {
        process::signal(server.0.id(), Signal::TERM);
        assert!(process::wait_exit(&mut server.0, Duration::from_secs(30)).success());
    }
}

/// As pods are told by the manifests: to listen everywhere, and what their address is, without brackets.
#[tokio::test]
async fn on_ipv6() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let dir = dir.path();
    let port = || free_address().rsplit_once(':').expect("host:port").1.to_owned();
    let [etcd_at, controller_at, http_at] = [(); 3].map(|()| format!("[::1]:{}", port()));
    let everywhere = |at: &str| at.replace("[::1]", "*");
    let _store = etcd(dir, &etcd_at);
    let start = |program: &str, name: &str, settings: &[(&str, &str)]| {
        let mut command = Command::new(binary(program));
        let prefix = program.to_uppercase().replace('-', "_");
        command.envs(settings.iter().map(|(key, value)| (format!("{prefix}__{key}"), value)));
        Service::start(&mut command, &dir.join(format!("{name}.log")))
    };
    let model = model();
    let (model, models) = (model.to_str().expect("UTF-8"), format!("[{{path = {model:?}}}]"));
    let settings = [
        ("STORE__KIND", "etcd"),
        ("STORE__ETCD__ENDPOINTS", &*etcd_at),
        ("LISTEN", &everywhere(&controller_at)),
    ];
    let common = [("ADVERTISE_HOST", "::1"), ("METRICS_LISTEN", "*:0")];
    let _controller = start("baton-controller", "controller", &[&settings[..], &common].concat());
    let settings =
        [("STORE__ETCD__ENDPOINTS", &*etcd_at), ("MODELS", &models), ("LISTEN", &everywhere(&http_at))];
    let settings = [&settings[..], &common, &[("ADMIN_LISTEN", "*:0")]].concat();
    let _coordinator = start("baton-coordinator", "coordinator", &settings);
    let listens = [("LISTEN", "*:0"), ("KV_DATA_LISTEN", "*:0"), ("RUNTIME__THREADS", "1")];
    let _servers = ["alpha", "beta"].map(|name| {
        let settings = [("INSTANCE_ID", name), ("CONTROLLERS", &*controller_at), ("MODEL__PATH", model)];
        start("baton-server", name, &[&settings[..], &common, &listens].concat())
    });

    served(&format!("http://{http_at}")).await;
    let instances = apart(&controller_at).await;
    for instance in &instances {
        let endpoint = instance["inference_endpoint"].as_str().expect("an endpoint");
        assert!(endpoint.starts_with("[::1]:"), "{endpoint}");
        probe(endpoint, &["baton.v1.Handoff"]).await;
    }
}

/// Coordinators that a controller lists; none unless it leads.
async fn coordinators(controller: &str) -> Option<Vec<v1::Coordinator>> {
    let mut admin = FleetAdminClient::connect(format!("http://{controller}")).await.ok()?;
    let listed = admin.list_coordinators(v1::ListCoordinatorsRequest {}).await.ok()?;
    Some(listed.into_inner().coordinators)
}

#[tokio::test]
async fn a_coordinator_follows_the_leader_and_is_missed_when_it_dies() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let dir = dir.path();
    let [etcd_at, first_at, second_at] = [(); 3].map(|()| free_address());
    let _store = etcd(dir, &etcd_at);
    let lease = Duration::from_secs(2);
    let controller = |id: &str, at: &str| {
        let settings = [
            format!("controller_id={id}"),
            format!("listen={at}"),
            "metrics_listen=127.0.0.1:0".to_owned(),
            "store.kind=etcd".to_owned(),
            format!("store.etcd.endpoints=[\"{etcd_at}\"]"),
            "leader.ttl=2s".to_owned(),
            "sessions.beat=100ms".to_owned(),
            format!("sessions.lease={}s", lease.as_secs()),
        ];
        let mut command = Command::new(binary("baton-controller"));
        command.args(settings.iter().flat_map(|setting| ["--set", setting]));
        Service::start(&mut command, &dir.join(format!("{id}.log")))
    };
    let coordinator = |id: &str| {
        let mut command = Command::new(binary("baton-coordinator"));
        command
            .env("BATON_COORDINATOR__STORE__ETCD__ENDPOINTS", &etcd_at)
            .env("BATON_COORDINATOR__MODELS", format!("[{{path = {:?}}}]", model()))
            .args(["--set", &format!("id={id}"), "--set", "advertise_host=a.b"])
            .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        Service::start(&mut command, &dir.join(format!("{id}.log")))
    };
    let listed = async |at: &str, ids: &[&str]| {
        let what = format!("{ids:?} listed at {at}");
        eventually(&what, || async {
            let listed = coordinators(at).await?;
            let id = |of: &v1::Coordinator| of.spec.clone().unwrap_or_default().coordinator_id;
            (listed.iter().map(id).collect::<Vec<_>>() == ids).then_some(listed)
        })
        .await
    };

    let mut first = controller("c1", &first_at);
    eventually("a leader", || coordinators(&first_at)).await;
    let _second = controller("c2", &second_at);
    let (mut one, mut other) = (coordinator("one"), coordinator("other"));
    let there = listed(&first_at, &["one", "other"]).await;
    let http = &there[0].spec.as_ref().expect("a spec").http_endpoint;
    assert!(http.starts_with("a.b:"), "{http} is not what was advertised");
    assert_eq!(coordinators(&second_at).await, None, "it does not lead");

    process::signal(first.0.id(), Signal::KILL);
    process::wait_exit(&mut first.0, Duration::from_secs(10));
    let moved = listed(&second_at, &["one", "other"]).await;
    let spec = |of: &[v1::Coordinator]| of.iter().map(|of| of.spec.clone()).collect::<Vec<_>>();
    assert_eq!(spec(&moved), spec(&there), "the same processes");

    // One that dies is missed after its lease; one that stops says so.
    process::signal(one.0.id(), Signal::KILL);
    process::wait_exit(&mut one.0, Duration::from_secs(10));
    let died = Instant::now();
    listed(&second_at, &["other"]).await;
    let missed = died.elapsed();
    assert!(missed > lease / 2 && missed < lease * 2, "missed after {missed:?}");
    process::signal(other.0.id(), Signal::TERM);
    assert!(process::wait_exit(&mut other.0, Duration::from_secs(30)).success());
    assert_eq!(coordinators(&second_at).await, Some(Vec::new()));
}

#[test]
fn wrong_configuration_is_one_clear_line() {
    let cases: [(&str, &[&str], &[&str]); 11] = [
        ("baton-controller", &["--set", "roles.prefil=2"], &["roles.prefil", "roles.prefill"]),
        ("baton-controller", &["--set", "sessions.beat=soon"], &["sessions.beat"]),
        ("baton-controller", &["--config", "/no/such/file.toml"], &["/no/such/file.toml"]),
        ("baton-coordinator", &["--set", "store.controller=127.0.0.1:1"], &["models"]),
        ("baton-server", &["--model", "/no/such/model", "--role", "mixed"], &["/no/such/model"]),
        ("baton-server", &["--model", "x", "--role", "boss"], &["role", "boss"]),
        // What is not served has no setting, and the reason is said.
        (
            "baton-server",
            &["--set", "runtime.device=npu"],
            &["runtime.device", "there is no device to choose"],
        ),
        (
            "baton-server",
            &["--set", "model.lora_modules=a"],
            &["model.lora_modules", "are not served: merge"],
        ),
        ("baton-server", &["--set", "runtime.speculative=4"], &["runtime.speculative", "token by token"]),
        (
            "baton-server",
            &["--set", "multiNodesInferEnabled=true"],
            &["multiNodesInferEnabled", "one machine"],
        ),
        ("baton-server", &["--set", "runtime.tensor_parallel_size=8"], &["one machine", "more instances"]),
    ];
    for (service, arguments, words) in cases {
        refused(service, arguments, words);
    }
}

/// A link that leads out of it is named, with where it leads.
#[test]
fn models_are_opened_under_their_root_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let link = folder.path().join("link.gguf");
    std::os::unix::fs::symlink(model(), &link).expect("a link");
    let (link, root) = (link.to_str().expect("UTF-8"), folder.path().display());
    let words = [link, "is not under", "SmolLM2-135M-Instruct.Q4_1.gguf"];
    let root_of_server = format!("model.root={root}");
    refused("baton-server", &["--model", link, "--role", "mixed", "--set", &root_of_server], &words);
    let settings = [
        &format!("model_root={root}"),
        &format!("models=[{{path = {link:?}}}]"),
        "store.controller=127.0.0.1:1",
        "listen=127.0.0.1:0",
        "admin_listen=127.0.0.1:0",
    ];
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    refused("baton-coordinator", &settings, &words);
}

/// Its one error has these words.
fn refused(service: &str, arguments: &[&str], words: &[&str]) {
    let error = process::refused(service, arguments);
    words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in: {error}"));
}
