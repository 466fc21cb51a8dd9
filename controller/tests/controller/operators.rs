//! Operators: they ask, change and follow what happens, by tokens or from the controller's own machine; what they want
//! is stored and outlives the leader.

use std::time::Duration;

use crate::cluster::{Node, PATIENCE, Server, config, on_etcd, spec, waiting};
use baton_proto::v1::{self, instance_plan::Step};
use baton_registry::testing::EtcdServer;
use sha2::{Digest, Sha256};
use tonic::{Code, Request};

/// Two that serve: a prefills, b decodes.
async fn pair(node: &Node) -> (Server, Server) {
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await;
    let mut b = Server::join(&node.endpoint, spec("b", 1), waiting()).await;
    let roles = (a.next_role().await.role(), b.next_role().await.role());
    assert_eq!(roles, (v1::Role::Prefill, v1::Role::Decode));
    let ready = |view: &v1::RoleView| view.phase() == v1::Phase::Ready;
    let until = tokio::time::Instant::now() + PATIENCE;
    while !node.roles().await.expect("roles").iter().all(ready) {
        assert!(tokio::time::Instant::now() < until, "they never serve");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (a, b)
}

fn cordon(id: &str, dry_run: bool) -> v1::CordonRequest {
    let reason = "disk".to_owned();
    v1::CordonRequest { instance_id: id.into(), reason, drain_millis: 7000, dry_run, ..Default::default() }
}

fn of<'a>(plan: &'a v1::PlanResponse, id: &str) -> &'a v1::InstancePlan {
    let mut all = plan.groups.iter().flat_map(|group| &group.instances);
    all.find(|instance| instance.instance_id == id).expect("it is planned")
}

#[tokio::test]
async fn a_cordon_can_be_tried_made_seen_and_taken_back() {
    let node = Node::start(config());
    let (mut a, mut b) = pair(&node).await;
    let mut admin = node.admin().await;

    let would = admin.cordon(cordon("a", true)).await.expect("a dry run").into_inner();
    assert!(would.dry_run);
    assert_eq!((of(&would, "b").planned(), of(&would, "b").step()), (v1::Role::Mixed, Step::Changes));
    assert_eq!(of(&would, "a").waits_for, "another instance to serve what it serves");
    tokio::join!(a.hear_nothing(Duration::from_millis(300)), b.hear_nothing(Duration::from_millis(300)));

    let plan = admin.cordon(cordon("a", false)).await.expect("a change").into_inner();
    assert_eq!(plan.groups, would.groups, "what was tried is what is done");
    assert_eq!(b.next_role().await.role(), v1::Role::Mixed);
    let told = a.next_role().await;
    assert_eq!((told.role(), told.reason.as_str()), (v1::Role::None, "cordoned by local: disk"));
    assert_eq!(told.drain_millis, 7000);
    let roles = node.roles().await.expect("roles");
    let intent = roles[0].intent.clone().expect("an intent");
    assert_eq!(intent.cordoned.map(|it| (it.by, it.reason)), Some(("local".into(), "disk".into())));

    admin.uncordon(v1::UncordonRequest { instance_id: "a".into(), dry_run: false }).await.expect("a change");
    assert_ne!(a.next_role().await.role(), v1::Role::None);

    let follow = v1::WatchEventsRequest { follow: true, ..Default::default() };
    let mut events = admin.watch_events(follow).await.expect("events").into_inner();
    let mut kinds = Vec::new();
    while kinds.last().is_none_or(|kind| kind != "uncordoned") {
        let event = tokio::time::timeout(PATIENCE, events.message()).await.expect("in time");
        let event = event.expect("no error").expect("it goes on");
        if event.kind == "cordoned" {
            assert_eq!((event.actor.as_str(), event.instance_id.as_str()), ("local", "a"));
        }
        kinds.push(event.kind);
    }
    for kind in
        ["leader_changed", "instance_joined", "role_decided", "role_taken", "group_serving", "cordoned"]
    {
        assert!(kinds.iter().any(|it| it == kind), "{kind} is not among {kinds:?}");
    }
    node.stop().await;
}

#[tokio::test]
async fn what_cannot_be_done_is_named() {
    let node = Node::start(config());
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await;
    assert_eq!(a.next_role().await.role(), v1::Role::Mixed);
    let mut admin = node.admin().await;
    let mut refused = async |request: v1::CordonRequest| admin.cordon(request).await.expect_err("refused");
    let last = refused(cordon("a", false)).await;
    assert!(last.message().contains("start another instance first, or cordon it by force"), "{last}");
    let stranger = refused(cordon("x", false)).await;
    assert_eq!((stranger.code(), stranger.message()), (Code::NotFound, "no instance x is known"));
    let bad = refused(cordon("A b", false)).await;
    assert!(bad.message().starts_with("instance_id: "), "{bad}");
    let reason = "x".repeat(201);
    let long = refused(v1::CordonRequest { reason, ..cordon("a", false) }).await;
    assert_eq!(long.message(), "reason: at most 200 characters");
    let none = v1::SetRoleRequest { instance_id: "a".into(), role: v1::Role::None.into(), dry_run: false };
    let none = admin.set_role(none).await.expect_err("refused");
    assert!(none.message().contains("cordon an instance"), "{none}");
    let group = v1::ExplainPlanRequest { group: "other".into(), targets: None };
    assert_eq!(admin.explain_plan(group).await.expect_err("refused").code(), Code::NotFound);
    node.stop().await;
}

#[tokio::test]
async fn viewers_look_and_admins_change_and_strangers_do_neither() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tokens");
    let line = |name: &str, right: &str| {
        let hash: String = Sha256::digest(name.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name} {right} {hash}\n")
    };
    std::fs::write(&path, line("alice", "admin") + &line("bob", "viewer")).expect("a file");
    let mut config = config();
    config.admin.tokens_file = path.to_str().expect("a path").to_owned();
    let node = Node::start(config);
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await;
    a.next_role().await;
    let mut admin = node.admin().await;
    fn by<T>(token: &str, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let value = format!("Bearer {token}").parse().expect("a header");
        request.metadata_mut().insert("authorization", value);
        request
    }
    let unpin = || v1::SetRoleRequest { instance_id: "a".into(), ..Default::default() };
    assert!(admin.list_roles(by("bob", v1::ListRolesRequest {})).await.is_ok());
    assert!(admin.set_role(by("bob", v1::SetRoleRequest { dry_run: true, ..unpin() })).await.is_ok());
    let refused = admin.set_role(by("bob", unpin())).await.expect_err("he may not");
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(admin.set_role(by("alice", unpin())).await.is_ok());
    for stranger in [by("carol", v1::ListRolesRequest {}), Request::new(v1::ListRolesRequest {})] {
        assert_eq!(admin.list_roles(stranger).await.expect_err("a stranger").code(), Code::Unauthenticated);
    }
    let events = v1::WatchEventsRequest::default();
    assert_eq!(admin.watch_events(events).await.expect_err("a stranger").code(), Code::Unauthenticated);
    node.stop().await;
}

#[tokio::test]
async fn what_operators_want_outlives_the_leader() {
    let etcd = EtcdServer::start().await;
    let mut leader = Node::start(on_etcd("c1", &etcd.endpoint()));
    let (mut a, b) = pair(&leader).await;
    let standby = Node::start(on_etcd("c2", &etcd.endpoint()));
    let b = b.live();
    leader.admin().await.cordon(cordon("a", false)).await.expect("a change");
    assert_eq!(a.next_role().await.role(), v1::Role::None);

    leader.kill();
    let state = b.await.expect("b lived");
    assert_eq!(state.role(), v1::Role::Mixed);
    let endpoints = [leader.endpoint.as_str(), standby.endpoint.as_str()];
    let mut a = Server::join_any(&endpoints, spec("a", 1), a.state).await;
    let mut b = Server::join_any(&endpoints, spec("b", 1), state).await;
    let during = Duration::from_secs(3);
    tokio::join!(a.hear_nothing(during), b.hear_nothing(during));
    let uncordon = v1::UncordonRequest { instance_id: "a".into(), dry_run: false };
    standby.admin().await.uncordon(uncordon).await.expect("a change");
    assert_ne!(a.next_role().await.role(), v1::Role::None);
}
