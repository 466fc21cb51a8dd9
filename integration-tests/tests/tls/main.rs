//! A cluster of processes that speak mutual TLS, with certificates of `deploy/certificates`: it serves, operators are
//! known by their certificates, whoever lacks the right one is refused on each plane, and certificates and authority
//! change while it serves.

mod fleet;

use std::{fs, path::Path, process::Output, time::Duration};

use baton_integration_tests::{
    authority::{Authority, alert},
    chat, eventually, metrics,
    process::panics,
    strangers::{self, Way, crowd},
    tokens::Tokens,
};
use baton_process::{Tls, TlsConfig, one_line, tls::Role};
use baton_proto::v1::{
    self, control_client::ControlClient, fleet_admin_client::FleetAdminClient, handoff_client::HandoffClient,
    inference_client::InferenceClient, kv_cache_client::KvCacheClient,
    request_admin_client::RequestAdminClient, store_client::StoreClient,
};
use fleet::Fleet;
use futures::stream::{empty, iter};
use tonic::{Code, Status, transport::Channel};

const MODEL: &str = "SmolLM2-135M-Instruct";
/// What a server's log says of a changed handoff secret.
const SECRET_TAKEN: &str = "the changed handoff secret is taken";
/// Who does not get on with a handshake has five seconds; a busy machine's delay comes on top.
const HANDSHAKE_MOST: Duration = Duration::from_secs(10);

fn said(output: &Output) -> String {
    assert!(!output.status.success(), "it is to be refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A call to each service of the cluster's ports, and how it was refused.
struct Planes {
    controller: String,
    coordinator: String,
    server: String,
}

impl Planes {
    async fn refusals(&self, caller: &Tls) -> Vec<(&'static str, Status)> {
        let to = |address: &str, role| -> Channel {
            let endpoint = format!("http://{address}").parse::<tonic::transport::Endpoint>().expect("good");
            caller.dial(role).connect_lazy(&endpoint)
        };
        let controller = || to(&self.controller, Role::Controller);
        let coordinator = || to(&self.coordinator, Role::Coordinator);
        let server = || to(&self.server, Role::Server);
        let answers = [
            ("Session", ControlClient::new(controller()).session(empty()).await.err()),
            ("Coordinate", ControlClient::new(controller()).coordinate(empty()).await.err()),
            ("Range", StoreClient::new(controller()).range(v1::RangeRequest::default()).await.err()),
            (
                "FleetAdmin",
                FleetAdminClient::new(controller()).list_roles(v1::ListRolesRequest {}).await.err(),
            ),
            (
                "RequestAdmin",
                RequestAdminClient::new(coordinator()).list_requests(v1::ListRequestsRequest {}).await.err(),
            ),
            ("Attach", InferenceClient::new(server()).attach(empty()).await.err()),
            ("Exchange", HandoffClient::new(server()).exchange(empty()).await.err()),
            ("Events", KvCacheClient::new(server()).events(v1::KvEventsRequest::default()).await.err()),
        ];
        answers.into_iter().filter_map(|(plane, refused)| Some((plane, refused?))).collect()
    }
}

#[tokio::test]
async fn every_plane_speaks_mutual_tls() {
    let mut fleet = Fleet::start().await;
    let admin = fleet.authority.issue("admin", "alice");
    let viewer = fleet.authority.issue("viewer", "bob");
    let body = chat::request(MODEL, "What is the capital of France?", 12, false);
    let answer = chat::ask(&fleet.url, &body).await;
    assert!(answer.contains("Paris"), "{answer}");

    // Prefill and decode are apart, so the cache was handed over by way of TLS, too.
    let roles = fleet.get(&admin, "roles").await.expect("the controller knows an admin");
    let mut observed: Vec<_> = roles.iter().map(|role| role["observed_role"].as_str()).collect();
    observed.sort();
    assert_eq!(observed, [Some("decode"), Some("prefill")]);
    let requests = fleet.get(&viewer, "requests").await.expect("the coordinator knows a viewer");
    assert_eq!(requests.len(), 0);
    let listed = eventually("the coordinator, listed", || async {
        fleet.get(&viewer, "coordinators").await.filter(|listed| !listed.is_empty())
    });
    assert_eq!(listed.await[0]["coordinator_id"], "e-0");

    // Who changed what is known by certificate.
    let refused = fleet.ctl(&viewer, &["set-role", "alpha", "auto"]).await;
    assert!(said(&refused).contains("bob may look but not change"), "{}", said(&refused));
    eventually("what was refused is in the audit log, too", || async {
        fleet.logged("c-0", r#"actor="bob" refused="SetRole" of="alpha" from="127.0.0.1:"#).then_some(())
    })
    .await;
    let changed = fleet.ctl(&admin, &["set-targets", "default", "--ratio", "1:1"]).await;
    assert!(changed.status.success(), "{}", String::from_utf8_lossy(&changed.stderr));
    let events = fleet.get(&admin, "events").await.expect("events");
    assert!(events.iter().any(|event| event.to_string().contains("alice")), "{events:?}");

    strangers_are_refused(&fleet, &admin).await;
    let instances = fleet.get(&admin, "instances").await.expect("the controller answers");
    assert_eq!(instances.len(), 2);

    // An instance is who its certificate says.
    fleet.server("gamma", "delta");
    eventually("an instance that calls itself otherwise is refused", || async {
        fleet.logged("gamma", "with the certificate of another").then_some(())
    })
    .await;
    assert_eq!(fleet.get(&admin, "instances").await.expect("the controller answers").len(), 2);
}

/// How a server answers one that calls itself `alpha`.
async fn hello_of_alpha(server: &str, caller: &Tls) -> Status {
    let endpoint = format!("http://{server}").parse::<tonic::transport::Endpoint>().expect("good");
    let hello = v1::SenderHello { instance_id: "alpha".into(), ..Default::default() };
    let body = Some(v1::sender_message::Body::Hello(hello));
    let hello = v1::SenderMessage { body, ..Default::default() };
    let mut client = HandoffClient::new(caller.dial(Role::Server).connect_lazy(&endpoint));
    client.exchange(iter([hello])).await.expect_err("it has no layout")
}

/// How a server answers one that calls itself `e-0`, to those calls of coordinators that say who makes them.
async fn hellos_of_a_coordinator(server: &str, caller: &Tls) -> [Status; 2] {
    let endpoint = format!("http://{server}").parse::<tonic::transport::Endpoint>().expect("good");
    let channel = caller.dial(Role::Server).connect_lazy(&endpoint);
    let coordinator_id = "e-0".to_owned();
    let hello = v1::attach_request::Hello { coordinator_id: coordinator_id.clone(), ..Default::default() };
    let hello = v1::AttachRequest { frame: Some(v1::attach_request::Frame::Hello(hello)) };
    let attached = InferenceClient::new(channel.clone()).attach(iter([hello])).await;
    let events = KvCacheClient::new(channel)
        .events(v1::KvEventsRequest { coordinator_id, ..Default::default() })
        .await;
    [attached.map(drop).expect_err("refused"), events.map(drop).expect_err("refused")]
}

/// By each plane: those of another authority, and those of ours with the wrong role.
async fn strangers_are_refused(fleet: &Fleet, admin: &TlsConfig) {
    let instances = fleet.get(admin, "instances").await.expect("the controller answers");
    let planes = Planes {
        controller: fleet.controller.clone(),
        coordinator: fleet.coordinator.clone(),
        server: instances[0]["inference_endpoint"].as_str().expect("an endpoint").to_owned(),
    };
    let all =
        ["Session", "Coordinate", "Range", "FleetAdmin", "RequestAdmin", "Attach", "Exchange", "Events"];

    let elsewhere = Authority::new(fleet.dir.path().join("elsewhere"));
    // They believe us, too, as else they would not get as far as to show who they are.
    let both = fleet.dir.path().join("both");
    let read = |file: &Path| std::fs::read_to_string(file).expect("a file");
    let theirs = elsewhere.issue("viewer", "mallory");
    std::fs::write(&both, read(&admin.ca_file) + &read(&theirs.ca_file)).expect("a file");
    for role in ["controller", "coordinator", "server", "admin"] {
        let theirs = elsewhere.issue(role, "mallory");
        let stranger = TlsConfig { ca_file: both.clone(), ..theirs };
        let stranger = Tls::of_operator(&stranger, None).expect("good files");
        let refused = planes.refusals(&stranger).await;
        assert_eq!(refused.iter().map(|(plane, _)| *plane).collect::<Vec<_>>(), all, "{role}");
        for (plane, status) in refused {
            let text = one_line(&status);
            assert!(text.contains("received fatal alert"), "{plane} of a stranger's {role}: {text}");
        }
    }
    ports_refuse(&planes, &fleet.authority, &elsewhere);
    let plaintext = planes.refusals(&Tls::plaintext()).await;
    assert_eq!(plaintext.len(), all.len());
    for (plane, status) in plaintext {
        let text = one_line(&status);
        assert!(text.contains("this port speaks mutual TLS"), "{plane} in plaintext: {text}");
    }

    for (role, may) in [
        ("controller", &[][..]),
        ("coordinator", &["Coordinate", "Range", "Attach", "Events"]),
        ("server", &["Session", "Exchange"]),
        ("viewer", &["FleetAdmin", "RequestAdmin"]),
    ] {
        let caller = Tls::of_operator(&fleet.authority.issue(role, "mallory"), None).expect("good files");
        let denied: Vec<_> = planes
            .refusals(&caller)
            .await
            .into_iter()
            .filter(|(_, status)| status.code() == Code::PermissionDenied)
            .map(|(plane, _)| plane)
            .collect();
        let expected: Vec<_> = all.into_iter().filter(|plane| !may.contains(plane)).collect();
        assert_eq!(denied, expected, "to a {role}");
        if role == "server" {
            let refused = hello_of_alpha(&planes.server, &caller).await;
            assert_eq!(refused.message(), "alpha says hello on a connection of mallory");
        }
        if role == "coordinator" {
            for refused in hellos_of_a_coordinator(&planes.server, &caller).await {
                let (code, text) = (refused.code(), refused.message());
                assert_eq!(code, Code::PermissionDenied, "{text}");
                assert!(text.starts_with("e-0 says hello with the certificate of another: "), "{text}");
            }
        }
    }
}

/// Each port: those without a certificate, with one of another authority, and with one that was good once.
fn ports_refuse(planes: &Planes, ours: &Authority, theirs: &Authority) {
    let ca_file = ours.0.join("ca.crt");
    let expired = ours.issue_expired("admin", "late");
    let (stranger, good) = (theirs.issue("admin", "mallory"), ours.issue("admin", "alice"));
    for port in [&planes.controller, &planes.coordinator, &planes.server] {
        for (shown, words) in [
            (None, "certificate required"),
            (Some(&stranger), "unknown ca"),
            (Some(&expired), "certificate expired"),
        ] {
            let said = alert(port, &ca_file, shown).unwrap_or_else(|| panic!("{port}: no {words}"));
            assert!(said.contains(words), "{port}: {said}");
        }
        assert_eq!(alert(port, &ca_file, Some(&good)), None, "{port}");
    }
}

#[tokio::test]
async fn tokens_do_in_place_of_certificates() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = Tokens::write(folder.path());
    let fleet = Fleet::without_servers(&["--set", &tokens.setting()]).await;
    // Of a person without a certificate.
    let nobody = TlsConfig { ca_file: fleet.authority.0.join("ca.crt"), ..TlsConfig::default() };
    let ask = async |name: &str, arguments: &[&str]| {
        let file = tokens.of(name).display().to_string();
        let own = ["--token-file", &file, "--trust-domain", "baton"];
        fleet.ctl(&nobody, &[arguments, &own[..]].concat()).await
    };
    eventually("the coordinator, listed", || async {
        let listed = ask("bob", &["get", "coordinators"]).await;
        String::from_utf8_lossy(&listed.stdout).contains("serving").then_some(())
    })
    .await;
    for name in ["alice", "bob"] {
        let listed = ask(name, &["get", "requests"]).await;
        assert!(listed.status.success(), "{name}: {}", said(&listed));
        let unknown = ask(name, &["explain", "placement", "none-has-this"]).await;
        assert!(said(&unknown).contains("no coordinator knows request"), "{name}: {}", said(&unknown));
    }
    let at = fleet.coordinator.as_str();
    let refused = said(&ask("carol", &["get", "requests", "--coordinator", at]).await);
    assert!(refused.contains("does not accept the token: this token is not known"), "{refused}");
    let without = ["get", "requests", "--coordinator", at, "--trust-domain", "baton"];
    let refused = said(&fleet.ctl(&nobody, &without).await);
    assert!(refused.contains("does not know who asks: a token, or the certificate"), "{refused}");
    eventually("who was refused is in the coordinator's audit log", || async {
        fleet.logged("e-0", r#"actor="anonymous" refused="ListRequests""#).then_some(())
    })
    .await;
    let viewer = fleet.authority.issue("viewer", "vera");
    assert!(fleet.get(&viewer, "requests").await.is_some(), "a certificate does, too");
    let server = fleet.authority.issue("server", "s");
    let refused = said(&fleet.ctl(&server, &["get", "requests", "--coordinator", at]).await);
    assert!(refused.contains("does not know who asks"), "a certificate of another role does not: {refused}");
}

#[tokio::test]
async fn certificates_and_authority_change_while_it_serves() {
    let mut fleet = Fleet::start().await;
    let admin = fleet.authority.issue("admin", "alice");
    let body = chat::request(MODEL, "Tell me a long story.", 4000, true);
    let mut story = chat::Events::open(&fleet.url, &body).await;
    story.next().await.expect("it begins");
    let old = Authority(fleet.dir.path().join("old"));
    fs::create_dir(&old.0).expect("a folder");
    let kept = |path: &Path| {
        let copy = old.0.join(path.file_name().expect("a name"));
        fs::copy(path, &copy).expect("a copy");
        copy
    };
    let before = TlsConfig { cert_file: kept(&admin.cert_file), key_file: kept(&admin.key_file), ..admin };

    let taken = async |what: &str, times: usize| {
        for name in ["c-0", "e-0", "alpha", "beta"] {
            eventually(&format!("{what} taken by {name}"), || async {
                let log = fs::read_to_string(fleet.log(name)).unwrap_or_default();
                (log.matches("changed TLS files are taken").count() >= times).then_some(())
            })
            .await;
        }
    };
    fleet.authority.run(&["rotate"]);
    taken("a second authority", 1).await;
    // Whoever still believes both is told by the others, not by itself.
    let before = TlsConfig { ca_file: kept(&before.ca_file), ..before };
    for (role, name) in
        [("controller", "c-0"), ("coordinator", "e-0"), ("server", "alpha"), ("server", "beta")]
    {
        fleet.authority.issue(role, name);
    }
    let admin = fleet.authority.issue("admin", "alice");
    taken("new certificates", 2).await;
    assert!(fleet.get(&before, "roles").await.is_some(), "both authorities are believed");
    fleet.authority.run(&["retire"]);
    taken("the new authority alone", 3).await;
    assert!(fleet.get(&admin, "roles").await.is_some(), "the new certificate is good");
    let text = said(&fleet.ctl(&before, &["get", "roles"]).await);
    assert!(text.contains("received fatal alert"), "the old one is not: {text}");

    assert!(!fleet.get(&admin, "requests").await.expect("an answer").is_empty(), "the story is not over");
    let event = story.next().await.expect("what runs on the connections of before goes on");
    assert!(!event.contains("error"), "{event}");
    drop(story);
    fleet.server("gamma", "gamma");
    eventually("a third instance, on connections made anew", || async {
        fleet.get(&admin, "instances").await.filter(|instances| instances.len() == 3)
    })
    .await;
}

#[tokio::test]
async fn who_is_slow_or_makes_no_sense_is_turned_away_before_tls_and_within() {
    let fleet = Fleet::start().await;
    let viewer = fleet.authority.issue("viewer", "victor");
    let instances =
        fleet.get(&fleet.authority.issue("admin", "alice"), "instances").await.expect("is let in");
    let server = instances[0]["inference_endpoint"].as_str().expect("an endpoint").to_owned();
    let ports = [fleet.controller.clone(), fleet.coordinator.clone(), server];
    let within = Way::tls(Some(&viewer));
    let crowds = async {
        let (before, within) = tokio::join!(
            crowd(&ports, &Way::Plaintext, 10, strangers::before_tls()),
            crowd(&ports, &within, 3, strangers::of_grpc()),
        );
        println!("all were turned away after {before:?} before TLS at most, and after {within:?} within");
        assert!(before < HANDSHAKE_MOST, "{before:?}");
    };
    let body = chat::request(MODEL, "What is the capital of France?", 12, false);
    let honest = async {
        for _ in 0..6 {
            assert!(chat::ask(&fleet.url, &body).await.contains("Paris"));
        }
    };
    tokio::join!(crowds, honest);
    for name in ["c-0", "e-0", "alpha", "beta"] {
        let log = fs::read_to_string(fleet.log(name)).expect("a log");
        assert_eq!(panics(&log).collect::<Vec<_>>(), Vec::<&str>::new(), "{name}");
    }
}

#[tokio::test]
async fn the_handoff_secret_changes_while_caches_are_handed_over() {
    let mut fleet = Fleet::without_servers(&[]).await;
    // Each has a file of its own, so that they go by other secrets for a while.
    let file = |name: &str| fleet.dir.path().join(format!("{name}.secret"));
    let files = ["alpha", "beta"].map(|name| (name, file(name)));
    let change = |file: &Path, to: &str| {
        let new = file.with_extension("new");
        fs::write(&new, to.repeat(32)).expect("a file");
        fs::rename(&new, file).expect("in its place");
    };
    for (name, file) in &files {
        change(file, "a");
        fleet.server_with(name, name, &["--set", &format!("handoff.secret_file={}", file.display())]);
    }
    fleet.is_ready().await;
    let body = chat::request(MODEL, "What is the capital of France?", 12, false);
    for (times, to) in [(1, "b"), (2, "c")] {
        for (name, file) in &files {
            change(file, to);
            eventually(&format!("{to}, taken by {name}"), || async {
                let log = fs::read_to_string(fleet.log(name)).unwrap_or_default();
                (log.matches(SECRET_TAKEN).count() >= times).then_some(())
            })
            .await;
            assert!(chat::ask(&fleet.url, &body).await.contains("Paris"));
        }
    }
    let shown = async |url: String| reqwest::get(url).await.expect("answers").text().await.expect("text");
    let metrics = shown(format!("{}/metrics", fleet.url)).await;
    assert_eq!(metrics::sum(&metrics, "baton_coordinator_migrations_total", "").unwrap_or(0.0), 0.0);
    let admin = fleet.authority.issue("admin", "alice");
    let (mut whole, mut aborted) = (0.0, 0.0);
    for instance in fleet.get(&admin, "instances").await.expect("is let in") {
        let endpoint = instance["metrics_endpoint"].as_str().expect("an endpoint");
        let metrics = shown(format!("http://{endpoint}/metrics")).await;
        let count = |name: &str| metrics::sum(&metrics, name, "").unwrap_or(0.0);
        whole += count("baton_server_transfers_in_total");
        aborted += count("baton_server_transfers_aborted_total");
    }
    assert!(whole >= 4.0 && aborted == 0.0, "{whole} caches were received whole, {aborted} were not");
}
