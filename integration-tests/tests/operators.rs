//! Operators at work on a live fleet: roles are switched, instances cordoned, drained and taken back while clients ask
//! without a break, and none of them sees a failure or another text.

use std::{
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use baton_integration_tests::{
    Cluster, binary,
    chat::{Events, ask, request},
    eventually,
    tokens::Tokens,
};
use tokio::task::JoinSet;

/// Clients that ask all the time.
const CLIENTS: usize = 4;

/// Clients, each with a prompt of its own, until they are told to stop; streamed and whole answers in turns.
struct Load {
    over: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: JoinSet<()>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Self {
        let (over, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let prompt = format!("Count from {client} on, in words.");
            let body = move |model: &str, stream| request(model, &prompt, 60, stream);
            let (url, model) = (cluster.url().to_owned(), cluster.model().to_owned());
            let expected = ask(&url, &body(&model, false)).await;
            let (over, answered) = (over.clone(), answered.clone());
            clients.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let (text, error) = Events::open(&url, &body(&model, true)).await.rest().await;
                    assert_eq!(error, None, "client {client}");
                    assert_eq!(text, expected, "client {client}");
                    assert_eq!(ask(&url, &body(&model, false)).await, expected, "client {client}");
                    answered.fetch_add(2, Ordering::Relaxed);
                }
            });
        }
        Self { over, answered, clients }
    }

    /// Waits until so many more were answered, as they are.
    async fn goes_on(&self, more: usize) {
        let until = self.answered.load(Ordering::Relaxed) + more;
        eventually("answers", || async { (self.answered.load(Ordering::Relaxed) >= until).then_some(()) })
            .await;
    }

    async fn end(mut self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("no client saw a failure");
        }
        self.answered.load(Ordering::Relaxed)
    }
}

async fn serves_as(cluster: &Cluster, instance: &str, role: &str) {
    eventually(&format!("{instance} to be {role}"), || async {
        let roles = cluster.role_epochs().await;
        let is = roles.get(instance).is_some_and(|(is, _)| is == role);
        let out = role == "none" && !roles.contains_key(instance);
        (is || out).then_some(())
    })
    .await;
}

#[tokio::test]
async fn roles_are_switched_and_instances_drained_under_load_without_a_failure() {
    let cluster = Cluster::start(&["--prefill", "1", "--decode", "2"]).await;
    let load = Load::start(&cluster).await;
    load.goes_on(CLIENTS).await;

    // The other way round: one more prefills, then decodes again.
    let moved = cluster.instance_of("decode").await;
    cluster.run_ctl(&["set-role", &moved, "prefill"]).await;
    serves_as(&cluster, &moved, "prefill").await;
    load.goes_on(CLIENTS).await;
    cluster.run_ctl(&["set-role", &moved, "decode"]).await;
    serves_as(&cluster, &moved, "decode").await;
    load.goes_on(CLIENTS).await;
    cluster.run_ctl(&["set-role", &moved, "auto"]).await;

    // The only one that prefills is drained: another takes its place first.
    let prefill = cluster.instance_of("prefill").await;
    let said = cluster.run_ctl(&["drain", &prefill, "--within", "20s", "--reason", "new disk"]).await;
    assert!(said.contains(&prefill), "{said}");
    serves_as(&cluster, &prefill, "none").await;
    load.goes_on(CLIENTS).await;
    cluster.run_ctl(&["uncordon", &prefill]).await;
    eventually("all three to serve", || async { (cluster.role_epochs().await.len() == 3).then_some(()) })
        .await;
    load.goes_on(CLIENTS).await;

    // By ratio: two prefill.
    cluster.run_ctl(&["set-targets", "default", "--ratio", "2:1"]).await;
    eventually("two that prefill", || async {
        let roles = cluster.roles().await;
        (roles == ["decode", "prefill", "prefill"]).then_some(())
    })
    .await;
    load.goes_on(CLIENTS).await;

    let answered = load.end().await;
    assert!(answered > 6 * CLIENTS, "{answered}");
    let events = cluster.ctl("events").await;
    for kind in ["pinned", "cordoned", "uncordoned", "targets_set", "role_taken"] {
        assert!(events.iter().any(|event| event["kind"] == kind), "no {kind} among the events");
    }
    cluster.assert_nothing_held().await;
    tokio::time::timeout(Duration::from_secs(90), cluster.stop()).await.expect("it stops");
}

#[tokio::test]
async fn what_a_drain_does_not_wait_for_goes_on_elsewhere() {
    let cluster = Cluster::start(&["--prefill", "1", "--decode", "2"]).await;
    let body = |stream| request(cluster.model(), "Tell me a long story of a river.", 600, stream);
    let expected = ask(cluster.url(), &body(false)).await;
    let mut events = Events::open(cluster.url(), &body(true)).await;
    for _ in 0..5 {
        events.next().await.expect("the stream goes on");
    }
    let running = cluster.ctl("requests").await;
    let decode = running[0]["decode_instance"].as_str().expect("one decodes").to_owned();
    cluster.run_ctl(&["drain", &decode, "--within", "100ms"]).await;
    serves_as(&cluster, &decode, "none").await;
    let (rest, error) = events.rest().await;
    assert_eq!(error, None);
    assert!(expected.ends_with(&rest) && !rest.is_empty(), "{rest}");
    assert!(rest.len() * 2 > expected.len(), "it had hardly begun");
    cluster.assert_nothing_held().await;
    cluster.stop().await;
}

/// `baton ctl` as one of the operators, or as nobody.
fn ctl_as(cluster: &Cluster, tokens: &Tokens, name: Option<&str>, arguments: &[&str]) -> Output {
    let mut ctl = Command::new(binary("baton"));
    ctl.arg("ctl").args(arguments).args(["--controller", cluster.controller()]).stdin(Stdio::null());
    if let Some(name) = name {
        ctl.arg("--token-file").arg(tokens.of(name));
    }
    ctl.output().expect("baton starts")
}

#[tokio::test]
async fn tokens_say_who_asks_controllers_and_coordinators_alike() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = Tokens::write(folder.path());
    let settings = ["controller", "coordinator"].map(|service| format!("{service}.{}", tokens.setting()));
    let cluster = Cluster::start(&["--set", &settings[0], "--set", &settings[1]]).await;
    let url = format!("{}/v1/chat/completions", cluster.url());
    let body = request(cluster.model(), "What is the capital of France?", 12, false);
    let answer = reqwest::Client::new().post(url).json(&body).send().await.expect("an answer");
    let id = answer.headers()["x-request-id"].to_str().expect("an id").to_owned();
    answer.text().await.expect("it ends");

    let said = |name, arguments: &[&str]| {
        let output = ctl_as(&cluster, &tokens, name, arguments);
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text.into_owned())
    };
    eventually("the coordinator, listed", || async {
        said(Some("bob"), &["get", "coordinators"]).1.contains("serving").then_some(())
    })
    .await;
    for name in ["alice", "bob"] {
        let (done, text) = said(Some(name), &["get", "requests"]);
        assert!(done && text.contains("no requests are running"), "{name}: {text}");
        let (done, text) = said(Some(name), &["explain", "placement", &id]);
        assert!(done && text.contains("prefill on server-"), "{name}: {text}");
    }
    let (done, text) = said(Some("bob"), &["set-targets", "default", "--ratio", "1:1"]);
    assert!(!done && text.contains("bob may look but not change"), "{text}");
    for (name, why) in [(Some("carol"), "this token is not known"), (None, "a token, or the certificate")] {
        let (done, text) = said(name, &["get", "roles"]);
        assert!(!done && text.contains("the controller at") && text.contains(why), "{text}");
        let run = ["get", "requests", "--coordinator", cluster.coordinator()];
        let (done, text) = said(name, &run);
        assert!(!done && text.contains("the coordinator at") && text.contains(why), "{text}");
    }

    let (done, request) = said(Some("bob"), &["describe", "request", &id]);
    assert!(done && request.contains("Generated:           12 tokens"), "{request}");
    let (_, roles) = said(Some("bob"), &["get", "roles", "--no-headers"]);
    let of = |role: &str| {
        let line = roles.lines().find(|line| line.split_whitespace().nth(1) == Some(role));
        line.and_then(|line| line.split_whitespace().next()).expect("there is one").to_owned()
    };
    let (prefill, decode) = (of("prefill"), of("decode"));
    let (done, role) = said(Some("bob"), &["describe", "role", &prefill]);
    assert!(done && role.contains("role_taken"), "{role}");
    let link = ["describe", "link", &prefill, &decode];
    eventually("the handoff, counted", || async {
        let (done, text) = said(Some("bob"), &link);
        (done && text.contains("Handoffs:            1, and 0 that failed")).then_some(())
    })
    .await;
    let (_, events) = said(Some("bob"), &["get", "events", &prefill, "-o", "wide", "--no-headers"]);
    let number = events.split_whitespace().next().expect("an event").to_owned();
    let (done, event) = said(Some("bob"), &["describe", "event", &number]);
    assert!(done && event.contains(&format!("Event:               {number}")), "{event}");
    cluster.stop().await;
}
