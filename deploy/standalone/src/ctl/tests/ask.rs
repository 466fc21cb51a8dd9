//! Questions: who is asked, what, as whom, and what is said when it goes wrong.

use std::{fs, time::Duration};

use baton_process::one_line;
use baton_proto::v1::FleetEvent;
use tonic::{
    Code, Status,
    transport::{Certificate, Identity, ServerTlsConfig},
};

use super::{
    super::{
        connect::{Reach, ReachArgs},
        coordinators::tests::coordinator as listed,
        fake::{Fake, Says, coordinator, coordinator_for, nobody},
        output::Table,
        placement, requests,
        watch::EVERY,
    },
    fleet, reach, run, says,
};

#[tokio::test]
async fn every_question_asks_what_it_is_for() {
    for (line, asked) in [
        ("get instances server-0 --no-headers", vec!["instances"]),
        (
            "describe instance server-0",
            vec!["instances", "roles", "plan of \"default\"", "events after 0 false \"server-0\""],
        ),
        ("explain group default --ratio 1:3", vec!["plan of \"default\", what if"]),
        ("explain role server-0", vec!["roles", "plan of \"\""]),
        ("describe role server-0", vec!["roles", "plan of \"\"", "events after 0 false \"server-0\""]),
        (
            "describe link server-0 server-1",
            vec!["links", "coordinators", "roles", "events after 0 false \"server-0\""],
        ),
        ("describe event 7", vec!["events after 0 false \"\"", "roles"]),
    ] {
        let fake = Fake::controller(says()).await;
        run(line, &fake).await.unwrap();
        assert_eq!(fake.asked(), asked, "{line}");
    }
}

#[tokio::test]
async fn the_leader_is_followed_once_and_then_kept() {
    let leads = Fake::controller(says()).await;
    let follows = Fake::controller(Says { leader: Some(leads.address.clone()), ..Default::default() }).await;
    let mut asked = fleet(&reach(&[&follows.address]));
    assert_eq!(asked.instances().await.unwrap().len(), 1);
    assert_eq!(asked.roles().await.unwrap().len(), 1);
    assert_eq!(
        (follows.asked(), leads.asked()),
        (vec!["instances".to_owned()], vec!["instances".to_owned(), "roles".to_owned()])
    );

    // Two that name each other: no leader, and no going round.
    let lost = Fake::controller(Says { leader: Some(follows.address.clone()), ..Default::default() }).await;
    let text = fleet(&reach(&[&lost.address])).instances().await.unwrap_err().to_string();
    assert_eq!(
        text,
        format!("the controller at {} cannot answer now: this controller does not lead", follows.address)
    );

    let to_nobody = Fake::controller(Says { leader: Some(nobody()), ..Default::default() }).await;
    let text = one_line(&fleet(&reach(&[&to_nobody.address])).instances().await.unwrap_err());
    assert!(text.contains("does not lead") && text.contains("can be reached from here"), "{text}");
}

#[tokio::test]
async fn the_first_controller_that_answers_is_asked() {
    let fake = Fake::controller(says()).await;
    let gone = nobody();
    assert_eq!(fleet(&reach(&[&gone, &fake.address])).roles().await.unwrap().len(), 1);
    let text = fleet(&reach(&[&gone])).roles().await.unwrap_err().to_string();
    assert!(text.starts_with(&format!("the controller at {gone} does not answer: ")), "{text}");
}

#[tokio::test]
async fn a_token_says_who_asks() {
    let fake = Fake::controller(Says { token: Some("s3cret"), ..says() }).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let with = |token: &str| {
        fs::write(&file, token).unwrap();
        fleet(&ReachArgs { token_file: Some(file.clone()), ..reach(&[&fake.address]) })
    };
    assert_eq!(with("s3cret\n").instances().await.unwrap().len(), 1);
    let text = with("0ther").instances().await.unwrap_err().to_string();
    assert!(
        text.contains("does not accept the token: nobody has this token") && !text.contains("0ther"),
        "{text}"
    );
    let text = fleet(&reach(&[&fake.address])).instances().await.unwrap_err().to_string();
    assert!(text.contains("does not know who asks: no token came; say so with --token-file"), "{text}");
}

#[tokio::test]
async fn coordinators_are_shown_the_token_too() {
    let at = coordinator_for("request-a", Some("s3cret")).await;
    let listed = vec![listed("c-0", &at)];
    let fake = Fake::controller(Says { token: Some("s3cret"), coordinators: listed, ..says() }).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let with = |token: &str| {
        fs::write(&file, token).unwrap();
        fleet(&ReachArgs { token_file: Some(file.clone()), ..reach(&[&fake.address]) })
    };
    let asked = &mut with("s3cret");
    assert_eq!(requests::list(asked).await.unwrap().rows[0].key, "request-a");
    assert_eq!(placement::find(asked, "request-a").await.unwrap().0, "c-0");
    // The controller lets nobody else in, so a coordinator is named.
    let named = ReachArgs { coordinator: vec![at.clone()], ..reach(&[&nobody()]) };
    let text = requests::list(&mut fleet(&named)).await.unwrap_err().to_string();
    assert!(text.starts_with(&format!("the coordinator at {at} does not know who asks")), "{text}");
    fs::write(&file, "0ther").unwrap();
    let other = ReachArgs { token_file: Some(file.clone()), ..named };
    let text = placement::find(&mut fleet(&other), "request-a").await.unwrap_err().to_string();
    assert!(text.contains("does not accept the token: nobody has this token"), "{text}");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    for (code, message, says) in [
        (
            Code::PermissionDenied,
            "bob only looks",
            "does not allow this: bob only looks; ask as somebody who may",
        ),
        (
            Code::FailedPrecondition,
            "nobody would decode: use force",
            "refused: nobody would decode: use force",
        ),
        (Code::NotFound, "no instance is called x", "refused: no instance is called x"),
        (Code::Unimplemented, "", "is of a version that does not know this: upgrade it"),
        (
            Code::Unavailable,
            "no controller leads at the moment: try again",
            "cannot answer now: no controller leads",
        ),
        (Code::Internal, "the store is broken", "failed: the store is broken; its log says more"),
    ] {
        let fake =
            Fake::controller(Says { refuses: Some(Status::new(code, message)), ..Default::default() }).await;
        let text = run("get roles", &fake).await.unwrap_err().to_string();
        assert!(text.starts_with(&format!("the controller at {} {says}", fake.address)), "{text}");
    }
}

#[tokio::test]
async fn requests_come_from_every_coordinator_that_answers() {
    let (a, b, gone) = (coordinator("request-a").await, coordinator("request-b").await, nobody());
    let listed = vec![listed("c-0", &a), listed("c-1", &gone), listed("c-2", &b)];
    let fake = Fake::controller(Says { coordinators: listed, ..Default::default() }).await;
    let keys = |table: Table| table.rows.into_iter().map(|row| row.key).collect::<Vec<_>>();
    let args = reach(&[&fake.address]);
    assert_eq!(keys(requests::list(&mut fleet(&args)).await.unwrap()), ["request-a", "request-b"]);

    // Those that are named are asked alone, and no controller for them.
    let named = ReachArgs { coordinator: vec![b], ..reach(&[&gone]) };
    assert_eq!(keys(requests::list(&mut fleet(&named)).await.unwrap()), ["request-b"]);
    let text = requests::list(&mut fleet(&ReachArgs { coordinator: vec![gone.clone()], ..args })).await;
    assert!(text.unwrap_err().to_string().starts_with(&format!("the coordinator at {gone} does not answer")));
}

#[tokio::test]
async fn a_placement_is_explained_by_whoever_carries_the_request() {
    let (a, b, gone) = (coordinator("request-a").await, coordinator("request-b").await, nobody());
    let listed = |addresses: &[&String]| {
        let coordinators = addresses.iter().enumerate().map(|(n, at)| listed(&format!("c-{n}"), at));
        Says { coordinators: coordinators.collect(), ..Default::default() }
    };
    let fake = Fake::controller(listed(&[&a, &gone, &b])).await;
    let mut asked = fleet(&reach(&[&fake.address]));
    let (coordinator, answer) = placement::find(&mut asked, "request-b").await.unwrap();
    assert_eq!((coordinator.as_str(), answer.placements.len()), ("c-2", 2));
    // The one that does not answer may be the one that knows it.
    let text = placement::find(&mut asked, "request-c").await.unwrap_err().to_string();
    assert!(text.starts_with(&format!("the coordinator at {gone} does not answer")), "{text}");
    let fake = Fake::controller(listed(&[&a, &b])).await;
    let text = run("explain placement request-c", &fake).await.unwrap_err().to_string();
    assert!(text.starts_with("no coordinator knows request request-c"), "{text}");
    run("explain placement request-a -o json", &fake).await.unwrap();
    run("describe request request-a", &fake).await.unwrap();
}

#[tokio::test]
async fn requests_of_the_cluster_here_need_no_controller() {
    let directory = tempfile::tempdir().unwrap();
    let mut here = crate::run_file::tests::example(std::process::id(), 1);
    here.coordinator = coordinator("request-a").await;
    here.controller = nobody();
    here.write(directory.path()).unwrap();
    let args = ReachArgs { run_dir: Some(directory.path().to_owned()), ..Default::default() };
    assert_eq!(requests::list(&mut fleet(&args)).await.unwrap().rows[0].key, "request-a");
}

#[tokio::test]
async fn events_are_followed_and_the_last_ones_kept() {
    let event = |sequence| FleetEvent { sequence, ..Default::default() };
    let fake = Fake::controller(Says { events: (1..=20).map(event).collect(), ..Default::default() }).await;
    let mut asked = fleet(&reach(&[&fake.address]));
    let last = asked.events(0, false, "server-0").await.unwrap().last(3).await.unwrap();
    assert_eq!(last.iter().map(|event| event.sequence).collect::<Vec<_>>(), [18, 19, 20]);
    let mut followed = asked.events(19, true, "").await.unwrap();
    assert_eq!(followed.next().await.unwrap().unwrap().sequence, 20);
    let more = tokio::time::timeout(Duration::from_millis(50), followed.next()).await;
    assert!(more.is_err(), "it waits for what comes");
}

#[tokio::test]
async fn every_kind_can_be_watched() {
    let at = coordinator("request-a").await;
    let watched = [
        ("instances", "instances"),
        ("roles", "roles"),
        ("requests", "coordinators"),
        ("coordinators", "coordinators"),
        ("links", "links"),
        ("groups", "plan of \"\""),
        ("events", "events after 0 true \"\""),
    ]
    .map(async |(kind, asked)| {
        let fake = Fake::controller(Says { coordinators: vec![listed("c-0", &at)], ..says() }).await;
        let goes_on = tokio::time::timeout(EVERY * 5 / 2, run(&format!("get {kind} -w"), &fake)).await;
        assert!(goes_on.is_err(), "{kind}: {goes_on:?}");
        // Events come by themselves, the rest is looked at again and again.
        let least = if kind == "events" { 1 } else { 2 };
        let times = fake.asked().iter().filter(|question| *question == asked).count();
        assert!(times >= least, "{kind}: {:?}", fake.asked());
    });
    futures::future::join_all(watched).await;
}

#[tokio::test]
async fn names_that_nothing_has_are_an_error() {
    let fake = Fake::controller(says()).await;
    for line in [
        "get instances server-9",
        "describe instance server-9",
        "describe role server-9",
        "explain role server-9",
    ] {
        let text = run(line, &fake).await.unwrap_err().to_string();
        assert_eq!(text, "no instance is called server-9: there are server-0", "{line}");
    }
    let text = run("describe link server-0 server-9", &fake).await.unwrap_err().to_string();
    assert_eq!(text, "no link is called server-0 -> server-9: there are server-0 -> server-1");
    let text = run("describe event 8", &fake).await.unwrap_err().to_string();
    assert!(text.starts_with("no event has the number 8: the controller holds those from 7 to 7"), "{text}");
    let text = run("describe request r", &fake).await.unwrap_err().to_string();
    assert!(text.starts_with("no coordinator knows request r"), "{text}");
    let text = run("describe group g", &fake).await.unwrap_err().to_string();
    assert_eq!(text, "no group is called g: there are default");
    let text = run("get roles -l zone=a", &fake).await.unwrap_err().to_string();
    assert!(text.contains("only they have labels"), "{text}");
}

#[tokio::test]
async fn controllers_are_asked_by_tls_and_show_who_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, ours, theirs) = (authority(), "client", "controller.test");
    let server = signed(&ca, theirs);
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&server.0, &server.1))
        .client_ca_root(Certificate::from_pem(ca.0.pem()));
    let fake = Fake::controller_with(says(), Some(tls)).await;
    let client = signed(&ca, ours);
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        Some(path)
    };
    let whole = ReachArgs {
        ca_file: file("ca", &ca.0.pem()),
        cert_file: file("cert", &client.0),
        key_file: file("key", &client.1),
        tls_server_name: Some(theirs.into()),
        ..reach(&[&fake.address])
    };
    assert_eq!(fleet(&whole).instances().await.unwrap().len(), 1);

    let stranger = ReachArgs { ca_file: file("other", &authority().0.pem()), ..whole.clone() };
    let text = fleet(&stranger).instances().await.unwrap_err().to_string();
    assert!(text.contains("does not answer") && text.contains("certificate"), "{text}");
    let another = ReachArgs { tls_server_name: Some("else.test".into()), ..whole.clone() };
    assert!(fleet(&another).instances().await.is_err(), "a certificate for another name");
    let unknown = ReachArgs { cert_file: None, key_file: None, ..whole };
    assert!(fleet(&unknown).instances().await.is_err(), "without a certificate of ours");
    let system =
        ReachArgs { tls_server_name: Some(theirs.into()), ..reach(&[&format!("https://{}", fake.address)]) };
    let text = fleet(&system).instances().await.unwrap_err().to_string();
    assert!(text.contains("does not answer"), "{text}");
}

#[tokio::test]
async fn a_token_is_shown_to_the_controllers_of_one_trust_domain() {
    let directory = tempfile::tempdir().unwrap();
    let ca = authority();
    let server = signed_for(&ca, rcgen::SanType::URI("spiffe://ours/baton/controller".try_into().unwrap()));
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(&server.0, &server.1));
    let fake = Fake::controller_with(says(), Some(tls)).await;
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        Some(path)
    };
    let of = |domain: Option<&str>| ReachArgs {
        ca_file: file("ca", &ca.0.pem()),
        token_file: file("token", "secret"),
        trust_domain: domain.map(str::to_owned),
        ..reach(&[&fake.address])
    };
    assert_eq!(fleet(&of(Some("ours"))).instances().await.unwrap().len(), 1);
    let text = fleet(&of(Some("theirs"))).instances().await.unwrap_err().to_string();
    assert!(text.contains("spiffe://theirs/baton/controller was asked for"), "{text}");
    let refused = |args: ReachArgs| Reach::new(&args).unwrap_err().to_string();
    let text = refused(of(None));
    assert!(text.contains("add --trust-domain DOMAIN"), "{text}");
    let idle = ReachArgs { tls_server_name: Some("controller.test".into()), ..of(Some("ours")) };
    assert!(refused(idle).contains("without --tls-server-name"));
}

type Authority = (rcgen::Certificate, rcgen::Issuer<'static, rcgen::KeyPair>);

fn authority() -> Authority {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    (params.self_signed(&key).unwrap(), rcgen::Issuer::new(params, key))
}

/// A certificate and its key, in PEM.
fn signed(authority: &Authority, name: &str) -> (String, String) {
    signed_for(authority, rcgen::SanType::DnsName(name.try_into().unwrap()))
}

fn signed_for(authority: &Authority, name: rcgen::SanType) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![name];
    (params.signed_by(&key, &authority.1).unwrap().pem(), key.serialize_pem())
}
