//! Leadership on the embedded store and on a real etcd: one leader at a time, epochs that grow, and writes of a
//! deposed leader that have no effect.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_proto::{Protocols, v1};
use baton_registry::{
    Candidacy, Candidate, Fenced, KeyRange, LeaderRecord, Leadership, Lease, LeaseId, Listing, MemoryConfig,
    MemoryStore, Revision, StateFormats, Store, StoreError, Txn, TxnOutcome, Watch, keys,
    testing::EtcdServer,
};
use parking_lot::Mutex;
use prost::Message as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

fn memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::start(
        MemoryConfig::new(Revision(1)),
        CancellationToken::new(),
        &TaskTracker::new(),
    ))
}

fn candidate(store: &Arc<dyn Store>, name: &str) -> Candidate {
    let record = LeaderRecord { controller_id: name.into(), endpoint: format!("{name}:1") };
    Candidate { store: store.clone(), record, ttl: Duration::from_secs(2), formats: StateFormats::OURS }
}

async fn leader(store: &Arc<dyn Store>) -> Option<String> {
    let item = store.range(KeyRange::exact(keys::LEADER)).await.expect("range").items.pop()?;
    Some(LeaderRecord::decode(&item.value).expect("a record").controller_id)
}

async fn value(store: &Arc<dyn Store>, key: &str) -> Option<String> {
    let item = store.range(KeyRange::exact(key)).await.expect("range").items.pop()?;
    Some(String::from_utf8_lossy(&item.value).into_owned())
}

async fn write(leadership: &Leadership, key: &str, value: &'static str) -> Fenced {
    leadership.txn(Txn::new().put(key, value, None)).await.expect("txn")
}

async fn one_leads_and_a_deposed_one_writes_nothing(store: Arc<dyn Store>) {
    let (a, b) = (candidate(&store, "a"), candidate(&store, "b"));
    let first = a.campaign(|_| {}).await;
    assert_eq!(leader(&store).await.as_deref(), Some("a"));
    assert!(b.try_lead().await.expect("try").is_none());
    assert!(matches!(write(&first, "/x", "a").await, Fenced::Applied(_)));

    // Nobody renews: the lease of a ends, b leads.
    let second =
        tokio::time::timeout(Duration::from_secs(10), b.campaign(|_| {})).await.expect("b never led");
    assert_eq!(leader(&store).await.as_deref(), Some("b"));
    assert!(second.epoch() > first.epoch());
    assert_eq!(write(&first, "/x", "late").await, Fenced::Deposed);
    assert_eq!(value(&store, "/x").await.as_deref(), Some("a"));
    assert!(matches!(write(&second, "/x", "b").await, Fenced::Applied(_)));
    assert_eq!(value(&store, "/x").await.as_deref(), Some("b"));
    // The deposed one resigns late: that is not its successor's leadership.
    first.resign().await.expect("resign");
    assert_eq!(leader(&store).await.as_deref(), Some("b"));

    // A leader that resigns makes room at once.
    let since = std::time::Instant::now();
    let (third, ()) = tokio::join!(a.campaign(|_| {}), async { second.resign().await.expect("resign") });
    assert!(since.elapsed() < Duration::from_millis(1500), "took {:?}", since.elapsed());
    assert!(third.epoch() > second.epoch());
    assert_eq!(write(&second, "/x", "late").await, Fenced::Deposed);
}

async fn a_held_leadership_lasts(store: Arc<dyn Store>) {
    let (a, b) = (candidate(&store, "a"), candidate(&store, "b"));
    let first = a.campaign(|_| {}).await;
    let held = tokio::time::timeout(Duration::from_secs(5), first.hold());
    let (lost, other) = tokio::join!(held, tokio::time::timeout(Duration::from_secs(5), b.campaign(|_| {})));
    assert!(lost.is_err(), "lost: {lost:?}");
    assert!(other.is_err(), "two led");
}

/// Three builds: the first knows one format, the next reads the second, too, the last writes it.
async fn builds_that_follow_each_other_share_the_state(store: Arc<dyn Store>) {
    let of = |name: &str, newest, writes| {
        let formats = StateFormats { reads: Protocols::between(1, newest), writes };
        Candidate { formats, ..candidate(&store, name) }
    };
    let (first, next, last) = (of("first", 1, 1), of("next", 2, 1), of("last", 2, 2));
    let version = || async {
        let item = store.range(KeyRange::exact(keys::FORMAT)).await.expect("range").items.pop()?;
        Some(v1::FormatRecord::decode(&*item.value).expect("a record").version)
    };
    // A store that builds have used which say nothing of it.
    assert_eq!(version().await, None);
    for (candidate, written) in [(&first, 1), (&next, 1), (&first, 1), (&last, 2), (&next, 2)] {
        let leadership = candidate.try_lead().await.expect("try").expect("it leads");
        assert_eq!(version().await, Some(written), "{}", candidate.record.controller_id);
        leadership.resign().await.expect("resign");
    }
    // What the last has written is not for the first, which says so and stands aside.
    assert!(first.try_lead().await.expect("try").is_none());
    let told = Mutex::new(Vec::new());
    let campaign = first.campaign(|standing| told.lock().push(standing));
    let led = tokio::time::timeout(Duration::from_secs(1), campaign).await;
    assert!(led.is_err(), "it leads");
    let told = told.into_inner();
    let [Candidacy::Foreign(why), ..] = &told[..] else { panic!("{told:?}") };
    assert!(why.contains("of version 2, and this build reads version 1"), "{why}");
}

#[tokio::test]
async fn embedded() {
    builds_that_follow_each_other_share_the_state(memory()).await;
    one_leads_and_a_deposed_one_writes_nothing(memory()).await;
    a_held_leadership_lasts(memory()).await;
}

#[tokio::test]
async fn etcd() {
    let server = EtcdServer::start().await;
    builds_that_follow_each_other_share_the_state(Arc::new(server.store())).await;
    let server = EtcdServer::start().await;
    one_leads_and_a_deposed_one_writes_nothing(Arc::new(server.store())).await;
    let server = EtcdServer::start().await;
    a_held_leadership_lasts(Arc::new(server.store())).await;
}

#[tokio::test]
async fn a_leader_cut_off_from_its_store_stops_before_its_lease_ends() {
    let mut server = EtcdServer::start().await;
    let store: Arc<dyn Store> = Arc::new(server.store());
    let leadership = candidate(&store, "a").campaign(|_| {}).await;
    let since = std::time::Instant::now();
    server.kill();
    let lost =
        tokio::time::timeout(Duration::from_secs(10), leadership.hold()).await.expect("it goes on leading");
    assert!(since.elapsed() <= Duration::from_millis(2500), "led for {:?} without a store", since.elapsed());
    assert!(matches!(lost, baton_registry::election::Lost::NotRenewed(_)), "{lost:?}");
}

#[tokio::test]
async fn what_is_done_outside_the_store_is_not_gone_on_with_once_another_may_lead() {
    let store = memory();
    let leadership = candidate(&store, "a").campaign(|_| {}).await;
    let term = leadership.term();
    let long = term.within(tokio::time::sleep(Duration::from_secs(3)));
    let held = tokio::select! {
        lost = leadership.hold() => panic!("{lost}"),
        held = long => held,
    };
    assert_eq!(held, Some(()), "its lease is renewed meanwhile");

    let mut sent = false;
    let action = async {
        // As a process does that is stopped for longer than its lease.
        std::thread::sleep(Duration::from_millis(2500));
        tokio::task::yield_now().await;
        sent = true;
    };
    assert_eq!((term.within(action).await, sent), (None, false));

    let leadership =
        tokio::time::timeout(Duration::from_secs(10), candidate(&store, "b").campaign(|_| {})).await;
    let leadership = leadership.expect("b never led");
    assert_eq!(leadership.term().within(async { 1 }).await, Some(1));
    leadership.resign().await.expect("resign");
    assert_eq!(leadership.term().within(async { 1 }).await, None);
}

/// A store that loses answers: a transaction is said to be unanswered, and is made later or never.
#[derive(Debug)]
struct Lossy {
    inner: Arc<dyn Store>,
    lose_next: Mutex<bool>,
    lost: Mutex<Vec<Txn>>,
}

#[async_trait]
impl Store for Lossy {
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError> {
        self.inner.range(range).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if std::mem::take(&mut *self.lose_next.lock()) {
            self.lost.lock().push(txn);
            return Err(StoreError::Unknown("lost".into()));
        }
        self.inner.txn(txn).await
    }

    async fn watch(&self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError> {
        self.inner.watch(range, from).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.revoke_lease(lease).await
    }
}

#[tokio::test]
async fn an_unanswered_write_that_arrives_late_has_no_effect() {
    let lossy =
        Arc::new(Lossy { inner: memory(), lose_next: Mutex::new(false), lost: Mutex::new(Vec::new()) });
    let store: Arc<dyn Store> = lossy.clone();
    let leadership = candidate(&store, "a").campaign(|_| {}).await;
    *lossy.lose_next.lock() = true;
    let lost = leadership.txn(Txn::new().put("/x", "old", None)).await;
    assert!(matches!(lost, Err(StoreError::Unknown(_))), "{lost:?}");
    assert!(matches!(write(&leadership, "/x", "new").await, Fenced::Applied(_)));

    let late = lossy.lost.lock().pop().expect("the lost one");
    assert!(!lossy.inner.txn(late).await.expect("txn").succeeded);
    assert_eq!(value(&store, "/x").await.as_deref(), Some("new"));
    // The same with the renewal of the leader's key itself lost and late.
    *lossy.lose_next.lock() = true;
    leadership.txn(Txn::new().put("/x", "old", None)).await.expect_err("lost");
    *lossy.lose_next.lock() = true;
    leadership.txn(Txn::new().put("/x", "newer", None)).await.expect_err("lost");
    assert!(matches!(write(&leadership, "/x", "newest").await, Fenced::Applied(_)));
    let lost = std::mem::take(&mut *lossy.lost.lock());
    for late in lost {
        lossy.inner.txn(late).await.expect("txn");
    }
    assert_eq!(value(&store, "/x").await.as_deref(), Some("newest"));
    assert_eq!(write(&leadership, "/x", "last").await, Fenced::Conflict, "the key has moved on");
    assert!(matches!(write(&leadership, "/x", "last").await, Fenced::Applied(_)));
}
