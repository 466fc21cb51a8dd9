//! A controller with its embedded store and scripted servers, over real loopback gRPC.

use std::{sync::Arc, time::Duration};

use crate::cluster::{Node, PATIENCE, Server, beat, config, remote, spec, waiting};
use baton_proto::{InstanceId, Role, v1};
use baton_registry::{
    FleetWatch, FleetWatchConfig, KeyRange, Lease, LeaseId, Listing, Operation, Revision, Store, StoreError,
    Txn, TxnOutcome, Watch, keys,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Code;

fn loading() -> v1::InstanceBeat {
    beat(v1::Role::None, 0, v1::Phase::Loading)
}

#[tokio::test]
async fn two_servers_become_prefill_and_decode_and_everyone_sees_it() {
    let node = Node::start(config());
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let watch =
        FleetWatch::start(remote(&node.endpoint), FleetWatchConfig::default(), shutdown.clone(), &tasks);
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), loading()).await;
    let mut b = Server::join(&node.endpoint, spec("b", 1), loading()).await;
    let (first, second) = (a.next_role().await, b.next_role().await);
    assert_eq!((first.role(), second.role()), (v1::Role::Prefill, v1::Role::Decode));
    assert_eq!(first.reason, "1 prefill and 1 decode of 2 instances, for a ratio of 1:1");

    let mut snapshots = watch.subscribe();
    let both_serve = snapshots.wait_for(|fleet| {
        let serving: Vec<_> =
            fleet.instances.values().filter_map(|i| i.serving()).map(|(role, _)| role).collect();
        serving == [Role::Prefill, Role::Decode]
    });
    let fleet = tokio::time::timeout(PATIENCE, both_serve)
        .await
        .expect("the view never came")
        .expect("watch")
        .clone();
    assert_eq!(fleet.leader.as_ref().map(|leader| leader.endpoint.as_str()), Some(node.endpoint.as_str()));
    assert_eq!(fleet.leader.as_ref().map(|leader| leader.epoch.0), Some(a.leader_epoch));

    let roles = node.roles().await.expect("roles");
    let view = |view: &v1::RoleView| (view.instance_id.clone(), view.desired_role(), view.registered);
    assert_eq!(
        roles.iter().map(view).collect::<Vec<_>>(),
        [("a".to_owned(), v1::Role::Prefill, true), ("b".to_owned(), v1::Role::Decode, true),]
    );
    let listed =
        node.admin().await.list_instances(v1::ListInstancesRequest {}).await.expect("instances").into_inner();
    assert_eq!(listed.instances.len(), 2);
    assert_eq!(listed.instances[0].spec, Some(spec("a", 1)));
    assert!(listed.instances[0].registered_unix_millis > 1_700_000_000_000);
    let metrics = node.metrics.render();
    for line in
        ["baton_controller_leading 1", "baton_controller_role_changes_total 2", "baton_controller_sessions 2"]
    {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
    node.stop().await;
}

#[tokio::test]
async fn a_lone_server_is_mixed_until_another_joins() {
    let node = Node::start(config());
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await;
    assert_eq!(a.next_role().await.role(), v1::Role::Mixed);
    let mut b = Server::join(&node.endpoint, spec("b", 1), waiting()).await;
    assert_eq!(b.next_role().await.role(), v1::Role::Prefill);
    assert_eq!(a.next_role().await.role(), v1::Role::Decode);
}

#[tokio::test]
async fn a_crashed_server_returns_to_its_place_and_one_that_leaves_gives_it_up() {
    let node = Node::start(config());
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await;
    let mut b = Server::join(&node.endpoint, spec("b", 1), waiting()).await;
    let (_, held) = (a.next_role().await, b.next_role().await);
    drop(b);
    let mut b = Server::join_any(&[&node.endpoint], spec("b", 2), loading()).await;
    let again = b.next_role().await;
    assert_eq!(
        (again.role(), again.epoch),
        (held.role(), held.epoch),
        "the same assignment, to the new process"
    );
    a.hear_nothing(Duration::from_millis(200)).await;

    b.bye().await;
    assert_eq!(b.next_order(PATIENCE).await, Some(None), "the session ends");
    let alone = a.next_role().await;
    assert_eq!(alone.role(), v1::Role::Mixed);
    assert!(alone.epoch > held.epoch);
    let roles = node.roles().await.expect("roles");
    assert_eq!((roles[1].instance_id.as_str(), roles[1].registered), ("b", false));
}

#[tokio::test]
async fn a_silent_server_is_dropped_and_its_session_ended() {
    let node = Node::start(config());
    let mut a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await;
    let mut b = Server::join(&node.endpoint, spec("b", 1), waiting()).await;
    let (_, _) = (a.next_role().await, b.next_role().await);
    // b says nothing more; a is told once b's place is given up.
    let alone = a.next_role().await;
    assert_eq!(alone.role(), v1::Role::Mixed);
    assert_eq!(b.next_order(Duration::from_secs(5)).await, Some(None), "its session has ended");
}

#[tokio::test]
async fn bad_hellos_and_wrong_incarnations_are_refused() {
    let node = Node::start(config());
    let endpoint = node.endpoint.clone();
    let a = Server::join_any(&[&endpoint], spec("a", 5), waiting()).await;
    let a = a.live();
    let refused = async |incarnation| {
        let called = Server::call(&endpoint, spec("a", incarnation), waiting()).await;
        let refuse = called.expect("a session").err().expect("a refusal");
        assert_eq!(refuse.held_incarnation, 5);
        refuse.reason.expect("a reason")
    };
    assert_eq!(refused(4).await.code(), v1::ErrorCode::StaleEpoch);
    let twin = refused(6).await;
    assert_eq!(twin.code(), v1::ErrorCode::AlreadyExists);
    assert!(twin.message.contains("incarnation 5"), "{}", twin.message);

    let wrong = [
        (v1::InstanceSpec { instance_id: "A b".into(), ..spec("a", 1) }, "an instance id must be"),
        (v1::InstanceSpec { model: None, ..spec("b", 1) }, "model is missing"),
        (
            v1::InstanceSpec { inference_endpoint: String::new(), ..spec("b", 1) },
            "inference_endpoint is missing",
        ),
        (
            v1::InstanceSpec { labels: [("l".into(), "x".repeat(9 << 10))].into(), ..spec("b", 1) },
            "over the limit of 8192: give it fewer or shorter labels",
        ),
    ];
    for (spec, says) in wrong {
        let status = Server::call(&endpoint, spec, waiting()).await.err().expect("a refusal");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(says), "{}", status.message());
    }
    let phase = v1::InstanceBeat { phase: 99, ..waiting() };
    let status = Server::call(&endpoint, spec("b", 1), phase).await.err().expect("a refusal");
    assert_eq!(status.code(), Code::InvalidArgument);
    let epoch = v1::InstanceBeat { role_epoch: u64::MAX, ..waiting() };
    let status = Server::call(&endpoint, spec("b", 1), epoch).await.err().expect("a refusal");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("a role epoch is at most 2^62"), "{}", status.message());
    assert!(!a.is_finished(), "the one that is here is not disturbed");
}

#[tokio::test]
async fn the_embedded_store_is_read_by_all_and_written_by_nobody_else() {
    let node = Node::start(config());
    let _a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await.live();
    let store = remote(&node.endpoint);
    let leader = || async {
        let listing = store.range(KeyRange::exact(keys::LEADER)).await.expect("is read");
        listing.items.into_iter().next().expect("a leader")
    };
    let before = leader().await;
    let lease = before.lease.expect("it stands under a lease");
    let written = [
        store.txn(Txn::new().delete(keys::LEADER)).await.err(),
        store.txn(Txn::new().put("/baton/v1/roles/a", "mine", None)).await.err(),
        store.grant_lease(Duration::from_secs(60)).await.err(),
        store.keep_alive(lease).await.err(),
        store.revoke_lease(lease).await.err(),
    ];
    for refused in written {
        assert!(
            matches!(&refused, Some(StoreError::Refused(why)) if why.contains("only be read")),
            "{refused:?}"
        );
    }
    assert_eq!(leader().await.create_revision, before.create_revision);
    store.watch(KeyRange::prefix(keys::ROOT), None).await.expect("is watched");
}

/// A store that will not have one key.
#[derive(Debug)]
struct Picky(Arc<dyn Store>, String);

#[async_trait::async_trait]
impl Store for Picky {
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError> {
        self.0.range(range).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if txn.operations.iter().any(|it| matches!(it, Operation::Put { key, .. } if *key == self.1)) {
            return Err(StoreError::Invalid("as the test wants it".into()));
        }
        self.0.txn(txn).await
    }

    async fn watch(&self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError> {
        self.0.watch(range, from).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.0.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.0.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0.revoke_lease(lease).await
    }
}

#[tokio::test]
async fn a_record_that_the_store_refuses_holds_up_no_other() {
    let refused = InstanceId::new("a").expect("an id");
    let node = Node::start_over(config(), move |store| Arc::new(Picky(store, keys::instance(&refused))));
    let store = remote(&node.endpoint);
    let (mut a, mut b) = (
        Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await,
        Server::join_any(&[&node.endpoint], spec("b", 1), waiting()).await,
    );
    assert_eq!(
        (a.next_role().await.role(), b.next_role().await.role()),
        (v1::Role::Prefill, v1::Role::Decode)
    );
    let listed = store.range(KeyRange::prefix(keys::INSTANCES)).await.expect("lists");
    let b = keys::instance(&InstanceId::new("b").expect("an id"));
    assert_eq!(listed.items.iter().map(|item| &item.key).collect::<Vec<_>>(), [&b]);
}

#[tokio::test]
async fn an_instance_whose_role_the_store_refuses_is_done_without() {
    let refused = InstanceId::new("a").expect("an id");
    let node = Node::start_over(config(), move |store| Arc::new(Picky(store, keys::role(&refused))));
    let _a = Server::join_any(&[&node.endpoint], spec("a", 1), waiting()).await.live();
    let mut b = Server::join_any(&[&node.endpoint], spec("b", 1), waiting()).await;
    while b.next_role().await.role() != v1::Role::Mixed {}
    let roles = node.roles().await.expect("roles");
    assert_eq!(roles[0].stuck, "the state store refuses its role record: as the test wants it");
    assert_eq!((roles[0].instance_id.as_str(), roles[1].stuck.as_str()), ("a", ""));
    assert!(node.metrics.render().contains("baton_controller_instances_stuck"));
}

#[tokio::test]
async fn a_controller_that_starts_anew_changes_nothing() {
    let mut node = Node::start(config());
    let endpoint = node.endpoint.clone();
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let watch = FleetWatch::start(remote(&endpoint), FleetWatchConfig::default(), shutdown.clone(), &tasks);
    let mut a = Server::join_any(&[&endpoint], spec("a", 1), waiting()).await;
    let mut b = Server::join(&endpoint, spec("b", 1), waiting()).await;
    let (first, second) = (a.next_role().await, b.next_role().await);
    let serving =
        |fleet: &baton_registry::FleetSnapshot| fleet.instances.values().filter_map(|i| i.serving()).count();
    let mut snapshots = watch.subscribe();
    let both = tokio::time::timeout(PATIENCE, snapshots.wait_for(|fleet| serving(fleet) == 2)).await;
    drop(both.expect("the view never came").expect("watch"));
    let epoch = a.leader_epoch;

    node.kill();
    assert_eq!(a.next_order(PATIENCE).await, Some(None), "the session broke");
    let stale = tokio::time::timeout(PATIENCE, snapshots.wait_for(|fleet| fleet.stale_since.is_some())).await;
    assert_eq!(serving(&stale.expect("never stale").expect("watch")), 2, "the last view stays");
    let node = Node::start_at(config(), &endpoint);
    // From here on, no view may be without the two.
    let watched = tokio::spawn({
        let mut snapshots = watch.subscribe();
        async move {
            loop {
                let (count, confirmed) = {
                    let fleet = snapshots.borrow_and_update();
                    let confirmed = fleet.instances.values().filter(|i| i.confirmed).count();
                    (serving(&fleet), confirmed == 2 && fleet.stale_since.is_none())
                };
                assert_eq!(count, 2, "a view without the two who serve");
                if confirmed
                    && snapshots.borrow().leader.as_ref().is_some_and(|leader| leader.epoch.0 > epoch)
                {
                    return;
                }
                snapshots.changed().await.expect("watch");
            }
        }
    });
    let (held_a, held_b) = (a.state, b.state);
    let mut b = Server::join_any(&[&endpoint], spec("b", 1), held_b).await;
    // Only one is back, for longer than a group takes to settle.
    b.hear_nothing(Duration::from_millis(700)).await;
    let mut a = Server::join_any(&[&endpoint], spec("a", 1), held_a).await;
    assert!(a.leader_epoch > epoch, "epochs grow over restarts");
    let (during, also) = (Duration::from_millis(2500), Duration::from_millis(2500));
    tokio::join!(a.hear_nothing(during), b.hear_nothing(also));
    tokio::time::timeout(PATIENCE, watched).await.expect("never confirmed").expect("the view");
    let roles = node.roles().await.expect("roles");
    let views: Vec<_> = roles.iter().map(|view| (view.desired_role(), view.desired_epoch)).collect();
    assert_eq!(views, [(first.role(), first.epoch), (second.role(), second.epoch)]);
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
}

#[tokio::test]
async fn the_counts_of_the_configuration_are_met() {
    let mut config = config();
    (config.roles.prefill, config.roles.decode) = (1, 3);
    let node = Node::start(config);
    let mut servers = Vec::new();
    for name in ["a", "b", "c", "d"] {
        servers.push(Server::join_any(&[&node.endpoint], spec(name, 1), loading()).await);
    }
    let mut roles = Vec::new();
    for server in &mut servers {
        roles.push(server.next_role().await.role());
    }
    assert_eq!(roles, [v1::Role::Prefill, v1::Role::Decode, v1::Role::Decode, v1::Role::Decode]);
    assert!(InstanceId::new("a").is_ok());
}
