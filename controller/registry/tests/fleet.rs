//! The readers' view: over a real etcd that stops, returns and compacts, and over an embedded store that begins anew.

use std::{sync::Arc, time::Duration};

use baton_proto::{Incarnation, InstanceId, LeaderEpoch, Phase, Role, RoleEpoch, v1};
use baton_registry::{
    DesiredRole, FleetSnapshot, FleetWatch, FleetWatchConfig, LeaderRecord, MemoryConfig, MemoryStore,
    ObservedStatus, Revision, Store, Txn, keys,
    records::encode_spec,
    testing::{EtcdServer, instance_spec},
};
use prost::Message as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

fn id(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a good id")
}

fn status(incarnation: u64, phase: Phase) -> ObservedStatus {
    ObservedStatus {
        incarnation: Incarnation(incarnation),
        role: Role::Decode,
        role_epoch: RoleEpoch(7),
        phase,
        load_permille: 0,
    }
}

fn desired() -> DesiredRole {
    DesiredRole {
        role: Role::Decode,
        epoch: RoleEpoch(7),
        reason: "why".into(),
        leader_epoch: LeaderEpoch(3),
        drain: None,
        cordoned: false,
    }
}

fn announce(name: &str) -> Txn {
    Txn::new()
        .put(keys::instance(&id(name)), encode_spec(&instance_spec(name, 1)), None)
        .put(keys::role(&id(name)), desired().encode(), None)
        .put(keys::status(&id(name)), status(1, Phase::Ready).encode(), None)
}

async fn txn(store: &dyn Store, txn: Txn) {
    assert!(store.txn(txn).await.expect("txn").succeeded);
}

async fn lead(store: &dyn Store, name: &str) {
    txn(store, Txn::new().delete(keys::LEADER)).await;
    let record = LeaderRecord { controller_id: name.into(), endpoint: "e:1".into() };
    txn(store, Txn::new().put(keys::LEADER, record.encode(), None)).await;
}

fn config() -> FleetWatchConfig {
    FleetWatchConfig { reconfirm: Duration::from_millis(600), ..FleetWatchConfig::default() }
}

struct Reader {
    watch: FleetWatch,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Reader {
    fn of(store: Arc<dyn Store>) -> Self {
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        Self { watch: FleetWatch::start(store, config(), shutdown.clone(), &tasks), shutdown, tasks }
    }

    async fn until(&self, what: &str, condition: impl FnMut(&FleetSnapshot) -> bool) -> Arc<FleetSnapshot> {
        let mut condition = condition;
        let mut snapshots = self.watch.subscribe();
        let reached = snapshots.wait_for(|snapshot| condition(snapshot));
        match tokio::time::timeout(Duration::from_secs(20), reached).await {
            Ok(reached) => reached.expect("the watch ended").clone(),
            Err(_) => panic!("never {what}: {:?}", self.watch.current()),
        }
    }

    async fn end(self) {
        self.shutdown.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

fn names(snapshot: &FleetSnapshot) -> Vec<&str> {
    snapshot.instances.keys().map(InstanceId::as_str).collect()
}

#[tokio::test]
async fn follows_etcd_through_an_outage_and_a_compaction() {
    let mut server = EtcdServer::start().await;
    let store: Arc<dyn Store> = Arc::new(server.store());
    lead(&*store, "c").await;
    txn(&*store, announce("a")).await;
    let reader = Reader::of(store.clone());
    assert!(reader.watch.current().stale_since.is_some(), "nothing has been read yet");
    let seen = reader.until("current", |view| view.stale_since.is_none() && !view.instances.is_empty()).await;
    let a = &seen.instances[&id("a")];
    assert_eq!((&a.spec, a.desired.as_ref(), a.confirmed), (&instance_spec("a", 1), Some(&desired()), true));
    assert_eq!(a.serving(), Some((Role::Decode, RoleEpoch(7))));
    assert_eq!(seen.leader.as_ref().map(|leader| leader.controller_id.as_str()), Some("c"));

    txn(&*store, announce("b")).await;
    reader.until("b", |view| names(view) == ["a", "b"]).await;
    server.kill();
    let stale = reader.until("stale", |view| view.stale_since.is_some()).await;
    assert_eq!(names(&stale), ["a", "b"], "the last view stays");
    server.restart().await;
    // Missed while the view was away, and compacted before it is back: listing again shows it all the same.
    let writer = server.store();
    txn(&writer, announce("c").delete(keys::instance(&id("b")))).await;
    let revision = writer.range(baton_registry::KeyRange::prefix(keys::ROOT)).await.expect("range").revision;
    writer.compact(revision).await.expect("compact");
    reader.until("b gone and c there", |view| names(view) == ["a", "c"] && view.stale_since.is_none()).await;
    txn(&writer, Txn::new().delete(keys::instance(&id("c")))).await;
    reader.until("c gone", |view| names(view) == ["a"]).await;
    reader.end().await;
}

#[tokio::test]
async fn what_a_new_leader_has_not_confirmed_stays_for_a_while() {
    let store = Arc::new(MemoryStore::start(
        MemoryConfig::new(Revision(1)),
        CancellationToken::new(),
        &TaskTracker::new(),
    ));
    lead(&*store, "c").await;
    txn(&*store, announce("a")).await;
    txn(&*store, announce("b")).await;
    let reader = Reader::of(store.clone());
    reader.until("both", |view| names(view) == ["a", "b"]).await;

    // The leader is gone, and with it its lease: the keys vanish, the instances do not.
    txn(&*store, Txn::new().delete(keys::LEADER)).await;
    txn(&*store, Txn::new().delete_prefix(keys::INSTANCES).delete_prefix(keys::STATUS)).await;
    let kept = reader.until("unconfirmed", |view| view.instances.values().all(|i| !i.confirmed)).await;
    assert_eq!(names(&kept), ["a", "b"]);
    assert!(kept.instances[&id("a")].serving().is_some());
    // Longer than `reconfirm`: without a leader nothing is given up.
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(names(&reader.watch.current()), ["a", "b"]);

    lead(&*store, "d").await;
    txn(&*store, announce("a")).await;
    let half = reader.until("a confirmed", |view| view.instances[&id("a")].confirmed).await;
    assert_eq!(names(&half), ["a", "b"], "b may still be on its way");
    reader.until("b given up", |view| names(view) == ["a"]).await;
    // What this leader wrote, it also takes away.
    txn(&*store, announce("b")).await;
    reader.until("b back", |view| names(view) == ["a", "b"]).await;
    txn(&*store, Txn::new().delete(keys::instance(&id("b")))).await;
    reader.until("b gone", |view| names(view) == ["a"]).await;
    reader.end().await;
}

/// Of a build two later, say.
fn format(version: u32) -> Txn {
    Txn::new().put(keys::FORMAT, v1::FormatRecord { version }.encode_to_vec(), None)
}

#[tokio::test]
async fn a_format_that_it_does_not_know_leaves_the_view_as_it_is() {
    let tasks = TaskTracker::new();
    let config = MemoryConfig::new(Revision(1));
    let store: Arc<dyn Store> = Arc::new(MemoryStore::start(config, CancellationToken::new(), &tasks));
    txn(&*store, announce("a")).await;
    let reader = Reader::of(store.clone());
    let before = reader.until("there", |now| now.instances.len() == 1 && now.stale_since.is_none()).await;
    txn(&*store, format(2)).await;
    reader.until("stale", |now| now.stale_since.is_some()).await;
    // It does not look at what is written in that format.
    txn(&*store, announce("b")).await;
    let late = Reader::of(store.clone());
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(reader.watch.current().instances, before.instances);
    assert!(late.watch.current().instances.is_empty());
    txn(&*store, format(1)).await;
    for reader in [reader, late] {
        reader.until("current", |now| now.instances.len() == 2 && now.stale_since.is_none()).await;
        reader.end().await;
    }
}

#[tokio::test]
async fn what_has_not_changed_is_shared_between_snapshots() {
    let mut server = EtcdServer::start().await;
    let store: Arc<dyn Store> = Arc::new(server.store());
    lead(&*store, "c").await;
    txn(&*store, announce("a")).await;
    txn(&*store, announce("b")).await;
    let reader = Reader::of(store.clone());
    let before = reader.until("both", |view| names(view) == ["a", "b"] && view.stale_since.is_none()).await;
    txn(&*store, Txn::new().put(keys::status(&id("b")), status(1, Phase::Draining).encode(), None)).await;
    let draining = |view: &FleetSnapshot| {
        view.instances[&id("b")].status.is_some_and(|status| status.phase == Phase::Draining)
    };
    let after = reader.until("b drains", draining).await;
    assert!(Arc::ptr_eq(&before.instances[&id("a")], &after.instances[&id("a")]));
    // Also when all is listed again.
    server.kill();
    reader.until("stale", |view| view.stale_since.is_some()).await;
    server.restart().await;
    let writer = server.store();
    let last = txn_revision(&writer).await;
    writer.compact(last).await.expect("compact");
    let again = reader.until("current", |view| view.stale_since.is_none() && view.revision >= last).await;
    assert!(Arc::ptr_eq(&before.instances[&id("a")], &again.instances[&id("a")]));
    assert!(Arc::ptr_eq(&after.instances[&id("b")], &again.instances[&id("b")]));
    reader.end().await;
}

#[tokio::test]
async fn a_status_of_another_incarnation_is_not_this_ones() {
    let store = Arc::new(MemoryStore::start(
        MemoryConfig::new(Revision(1)),
        CancellationToken::new(),
        &TaskTracker::new(),
    ));
    lead(&*store, "c").await;
    txn(&*store, announce("a")).await;
    let reader = Reader::of(store.clone());
    reader.until("a serves", |view| view.instances.values().any(|i| i.serving().is_some())).await;
    txn(&*store, Txn::new().put(keys::instance(&id("a")), encode_spec(&instance_spec("a", 2)), None)).await;
    let seen = reader.until("2", |view| view.instances[&id("a")].spec.incarnation == Incarnation(2)).await;
    assert_eq!(seen.instances[&id("a")].serving(), None);
    txn(&*store, Txn::new().put(keys::status(&id("a")), status(2, Phase::Loading).encode(), None)).await;
    reader.until("loading", |view| view.instances[&id("a")].status.is_some()).await;
    assert_eq!(reader.watch.current().instances[&id("a")].serving(), None);
    // A record that cannot be read is no reason to forget a good one.
    txn(&*store, Txn::new().put(keys::status(&id("a")), "\u{1}not a record", None)).await;
    txn(&*store, Txn::new().put(keys::instance(&id("b")), encode_spec(&instance_spec("x", 2)), None)).await;
    let last = txn_revision(&*store).await;
    let seen = reader.until("all read", |view| view.revision >= last).await;
    assert!(seen.instances[&id("a")].status.is_some());
    assert_eq!(names(&seen), ["a"]);
    reader.end().await;
}

async fn txn_revision(store: &dyn Store) -> Revision {
    store.txn(Txn::new().put("/baton/v1/config/x", "1", None)).await.expect("txn").revision
}
