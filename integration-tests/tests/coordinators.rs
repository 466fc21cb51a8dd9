//! Coordinators as operators see them: who is there, what they have served, over which links; and how little it matters
//! to them that somebody looks. And several of them behind one Service, of which one is restarted.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use baton_integration_tests::{
    APART, Cluster, binary,
    chat::{Events, ask, long_prompt, request},
    eventually, model,
    process::{self, Service, free_address},
};
use baton_proto::v1::{self, fleet_admin_client::FleetAdminClient, request_admin_client::RequestAdminClient};
use baton_registry::testing::EtcdServer;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

/// The one coordinator and the links, once the controller leads and has heard of both.
async fn seen(cluster: &Cluster) -> Option<(v1::Coordinator, Vec<v1::Link>)> {
    let mut admin = FleetAdminClient::connect(format!("http://{}", cluster.controller())).await.ok()?;
    let listed = admin.list_coordinators(v1::ListCoordinatorsRequest {}).await.ok()?.into_inner();
    let links = admin.list_links(v1::ListLinksRequest {}).await.ok()?.into_inner().links;
    assert!(listed.coordinators.len() <= 1, "{listed:?}");
    Some((listed.coordinators.into_iter().next()?, links))
}

fn beat(of: &v1::Coordinator) -> &v1::CoordinatorBeat {
    of.beat.as_ref().expect("a beat")
}

fn spec(of: &v1::Coordinator) -> &v1::CoordinatorSpec {
    of.spec.as_ref().expect("a spec")
}

#[tokio::test]
async fn a_coordinator_and_its_link_are_seen_and_outlive_the_controller() {
    let cluster = Cluster::start(&[]).await;
    let (before, unused) =
        eventually("a coordinator that is listed", || async { seen(&cluster).await }).await;
    assert_eq!(format!("http://{}", spec(&before).http_endpoint), cluster.url());
    assert_eq!(spec(&before).coordinator_id, "coordinator-0");
    let handoffs = |links: &[v1::Link]| links.iter().map(|link| link.handoffs).sum::<u64>();

    let body = request(cluster.model(), "What is the capital of France?", 12, false);
    ask(cluster.url(), &body).await;
    let (served, links) = eventually("a request that is counted", || async {
        let (coordinator, links) = seen(&cluster).await?;
        let one_more = beat(&coordinator).requests == beat(&before).requests + 1;
        (one_more && handoffs(&links) == handoffs(&unused) + 1).then_some((coordinator, links))
    })
    .await;
    assert_eq!(beat(&served).failures, beat(&before).failures);
    assert_eq!(links.len(), 1, "{links:?}");
    assert_eq!(links[0].prefill_instance, cluster.instance_of("prefill").await);
    assert_eq!(links[0].decode_instance, cluster.instance_of("decode").await);
    assert!(links[0].mean_micros > 0 && links[0].failures == 0, "{links:?}");

    let killed = cluster.kill("controller", Signal::KILL);
    let answer = ask(cluster.url(), &body).await;
    assert!(answer.contains("Paris"), "{answer}");
    cluster.assert_restarted("controller", killed).await;
    let (after, links_after) = eventually("the coordinator registered again", || async {
        let (coordinator, links) = seen(&cluster).await?;
        let one_more = beat(&coordinator).requests == beat(&served).requests + 1;
        (one_more && handoffs(&links) == handoffs(&unused) + 2).then_some((coordinator, links))
    })
    .await;
    assert_eq!(spec(&after), spec(&served), "the same process");
    assert_eq!(links_after.len(), 1);

    let killed = cluster.kill("coordinator", Signal::KILL);
    cluster.assert_restarted("coordinator", killed).await;
    let restarted = eventually("the next coordinator in its place", || async {
        let (coordinator, links) = seen(&cluster).await?;
        let later = spec(&coordinator).incarnation > spec(&after).incarnation;
        later.then_some((coordinator, links))
    })
    .await;
    assert_eq!(handoffs(&restarted.1), 0, "links are counted since the process started");
}

/// Two coordinators and what they need, on an etcd.
struct Pair {
    dir: TempDir,
    etcd: EtcdServer,
    controller: String,
    urls: [String; 2],
    /// Where operators ask each.
    admins: [String; 2],
    coordinators: Vec<Service>,
    _others: Vec<Service>,
    decode: Service,
}

impl Pair {
    async fn start() -> Self {
        let [controller, decode, one, other, admin_one, admin_other] = [(); 6].map(|()| free_address());
        let (dir, etcd) = (tempfile::tempdir().expect("a temporary directory"), EtcdServer::start().await);
        let endpoints = format!("store.etcd.endpoints={}", json!([etcd.endpoint()]));
        let mut command = Command::new(binary("baton-controller"));
        command.args(["--set", "store.kind=etcd", "--set", &endpoints, "--listen", &controller]);
        command.args(["--set", "metrics_listen=127.0.0.1:0"]);
        let controls = Service::start(&mut command, &dir.path().join("controller.log"));
        let coordinators = [(&one, &admin_one), (&other, &admin_other)].map(|(listen, admin)| {
            let mut command = Command::new(binary("baton-coordinator"));
            command.args(["--set", &endpoints, "--listen", listen, "--admin-listen", admin]);
            // For a decode instance that is started again.
            command.args(["--set", &format!("id=at-{}", listen.replace(':', "-"))]);
            command.args([
                "--set",
                "limits.placement_timeout=1m",
                "--set",
                "limits.linger=1s",
                "--set",
                APART,
            ]);
            command.arg("--model").arg(model());
            Service::start(&mut command, &dir.path().join(format!("{listen}.log")))
        });
        let prefill = server(&dir, &controller, "prefill", "127.0.0.1:0");
        let decode = server(&dir, &controller, "decode", &decode);
        let [urls, admins] =
            [[one, other], [admin_one, admin_other]].map(|pair| pair.map(|at| format!("http://{at}")));
        let others = vec![controls, prefill];
        let coordinators = coordinators.into();
        let pair = Self { dir, etcd, controller, urls, admins, coordinators, _others: others, decode };
        for url in &pair.urls {
            eventually("a coordinator that is ready", || async {
                reqwest::get(format!("{url}/readiness")).await.ok()?.error_for_status().ok().map(drop)
            })
            .await;
        }
        pair
    }

    /// The decode instance dies, and one of its name comes in its place, elsewhere.
    fn replace_decode(&mut self) {
        process::signal(self.decode.0.id(), Signal::KILL);
        self.decode.0.wait().expect("a child can be waited for");
        self.decode = server(&self.dir, &self.controller, "decode", &free_address());
    }
}

fn server(dir: &TempDir, controller: &str, role: &str, listen: &str) -> Service {
    let mut command = Command::new(binary("baton-server"));
    command.args(["--instance-id", role, "--controller", controller, "--listen", listen]);
    let labels = format!("labels={{role = \"{role}\", supervisor = \"test\"}}");
    command.args(["--set", &labels, "--set", "runtime.threads=1", "--model"]).arg(model());
    Service::start(&mut command, &dir.path().join(format!("{role}.log")))
}

/// Reads a stream to its end; every event says to `said` that there was one more.
async fn read(url: String, body: Value, said: watch::Sender<usize>) -> String {
    let (mut events, mut text) = (Events::open(&url, &body).await, String::new());
    while let Some(data) = events.next().await.expect("the stream is not cut").strip_prefix("{") {
        let event: Value = serde_json::from_str(&format!("{{{data}")).expect("each event is JSON");
        assert!(event["error"].is_null(), "the stream failed: {event}");
        text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        said.send_modify(|events| *events += 1);
    }
    text
}

/// Waits until this coordinator grants one part of so many of what API keys may.
async fn shared_among(url: &str, coordinators: u32) {
    let line = format!("baton_coordinator_api_key_sharers {coordinators}");
    eventually(&line, || async {
        let metrics = reqwest::get(format!("{url}/metrics")).await.ok()?.text().await.ok()?;
        metrics.lines().any(|shown| shown == line).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_coordinator_that_is_restarted_ends_its_streams_and_sends_new_clients_to_the_other() {
    const STREAMS: usize = 64;
    let mut pair = Pair::start().await;
    let both = pair.urls.clone();
    shared_among(&both[0], 2).await;
    shared_among(&both[1], 2).await;
    let body = |stream| {
        let prompt = format!("Question {}. {}", stream % 8, long_prompt(10));
        request("SmolLM2-135M-Instruct", &prompt, 60, true)
    };
    let mut expected = Vec::new();
    for stream in 0..8 {
        expected.push(read(pair.urls[0].clone(), body(stream), watch::Sender::new(0)).await);
    }

    let (mut streams, mut saids) = (Vec::new(), Vec::new());
    for stream in 0..STREAMS {
        let (say, said) = watch::channel(0);
        streams.push(tokio::spawn(read(pair.urls[stream % 2].clone(), body(stream), say)));
        saids.push(said);
    }
    for said in &mut saids {
        said.wait_for(|events| *events >= 3).await.expect("the stream goes on");
    }
    let stopped = Instant::now();
    process::signal(pair.coordinators[0].0.id(), Signal::TERM);
    eventually("a coordinator that is not ready", || async {
        let answer = reqwest::get(format!("{}/readiness", pair.urls[0])).await.expect("it still answers");
        (answer.status() == 503).then_some(())
    })
    .await;
    assert!(stopped.elapsed() < Duration::from_secs(1), "{:?}", stopped.elapsed());
    // Whoever has not noticed yet is served.
    let late = tokio::spawn(read(pair.urls[0].clone(), body(3), watch::Sender::new(0)));
    // Of what happens to the fleet meanwhile, it hears.
    pair.replace_decode();
    let elsewhere = tokio::spawn(read(pair.urls[1].clone(), body(5), watch::Sender::new(0)));

    // Who comes when nobody is let in any more is told so, though it brings much, and the rest of the drain is seen.
    let much = json!({ "model": "SmolLM2-135M-Instruct", "prompt": "x".repeat(4 << 20) });
    let refused = eventually("a coordinator that lets nobody in", || async {
        let sent = reqwest::Client::new().post(format!("{}/v1/completions", pair.urls[0])).json(&much).send();
        let answer = sent.await.expect("it still answers");
        (answer.status() == 503).then_some(answer)
    })
    .await;
    assert_eq!(refused.headers()["connection"], "close");
    assert!(refused.text().await.expect("a body").contains("shutting down"));
    let metrics = reqwest::get(format!("{}/metrics", pair.urls[0])).await.expect("it is observed");
    assert!(metrics.text().await.expect("a body").contains("baton_coordinator_in_flight"));
    let mut admin = RequestAdminClient::connect(pair.admins[0].clone()).await.expect("operators are let in");
    let listed = admin.list_requests(v1::ListRequestsRequest {}).await.expect("a list").into_inner();
    assert!(!listed.requests.is_empty());
    drop(admin);

    shared_among(&both[1], 1).await;
    for (stream, text) in streams.into_iter().enumerate() {
        assert_eq!(text.await.expect("no stream fails"), expected[stream % 8], "stream {stream}");
    }
    assert_eq!(late.await.expect("it is served"), expected[3]);
    assert_eq!(elsewhere.await.expect("it is served"), expected[5]);
    let status = process::wait_exit(&mut pair.coordinators[0].0, Duration::from_secs(30));
    assert!(status.success(), "{status}");
    assert!(reqwest::get(format!("{}/readiness", pair.urls[0])).await.is_err(), "nobody listens there");
    let log = std::fs::read_to_string(
        pair.dir.path().join(format!("{}.log", pair.urls[0].trim_start_matches("http://"))),
    );
    let log = log.expect("a log");
    assert!(!log.contains("cut off"), "{log}");
    drop(pair.etcd);
}
