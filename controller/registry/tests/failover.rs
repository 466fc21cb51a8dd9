//! A cluster of three etcd members that die and freeze one after another: the store goes on with those that are left.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use baton_registry::{
    Compare, EtcdConfig, EtcdStore, Event, KeyRange, Revision, Store, StoreError, Txn, testing::EtcdServer,
};
use rustix::process::{Pid, Signal, kill_process};

/// A takeover of etcd's own takes between one and two seconds, and more on a machine that is busy.
const SOON: Duration = Duration::from_secs(20);

fn over(members: &[EtcdServer]) -> Arc<dyn Store> {
    let config = EtcdConfig::new(members.iter().map(EtcdServer::endpoint));
    Arc::new(EtcdStore::new(&config).expect("good endpoints"))
}

fn signal(member: &EtcdServer, signal: Signal) {
    let pid = i32::try_from(member.pid().expect("it runs")).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("it runs");
}

/// Writes until the value is known to be there. Each try depends on what was read before it: one whose answer is lost
/// may still arrive, from a member that thaws, and must not undo a later write.
async fn put(store: &dyn Store, key: &str, value: &'static str) -> Revision {
    let until = Instant::now() + SOON;
    loop {
        let tried = match store.range(KeyRange::exact(key)).await {
            Err(error) => Err(error),
            Ok(listing) => match listing.items.first() {
                Some(item) if item.value == value => return item.mod_revision,
                Some(item) => {
                    let unchanged = Compare::mod_revision(key, item.mod_revision);
                    store.txn(Txn::new().when(unchanged).put(key, value, None)).await
                }
                None => store.txn(Txn::new().when(Compare::absent(key)).put(key, value, None)).await,
            },
        };
        match tried {
            Ok(outcome) if outcome.succeeded => return outcome.revision,
            Ok(_) => {}
            Err(StoreError::Unavailable(_) | StoreError::Unknown(_)) if Instant::now() < until => {}
            Err(error) => panic!("{error}"),
        }
    }
}

async fn get(store: &dyn Store, key: &str) -> Option<Vec<u8>> {
    let until = Instant::now() + SOON;
    loop {
        match store.range(KeyRange::exact(key)).await {
            Ok(listing) => return listing.items.first().map(|item| item.value.to_vec()),
            Err(StoreError::Unavailable(_)) if Instant::now() < until => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Watches and folds, again and again, until a value is seen.
async fn see(store: &dyn Store, key: &str, value: &str, from: Revision) {
    let until = Instant::now() + SOON * 2;
    let mut seen = from;
    loop {
        assert!(Instant::now() < until, "{value} was never seen");
        let Ok(mut watch) = store.watch(KeyRange::exact(key), Some(seen)).await else { continue };
        while let Ok(Ok(batch)) = tokio::time::timeout(SOON, watch.next()).await {
            seen = batch.revision.next();
            if batch.events.iter().any(|event| matches!(event, Event::Put(item) if item.value == value)) {
                return;
            }
        }
    }
}

#[tokio::test]
async fn any_member_may_die_or_freeze() {
    let mut members = EtcdServer::start_cluster(3).await;
    let store = over(&members);
    let first = put(&*store, "/x", "0").await;
    for (index, value) in ["1", "2", "3"].into_iter().enumerate() {
        let seen = tokio::spawn({
            let store = store.clone();
            async move { see(&*store, "/x", value, first).await }
        });
        members[index].kill();
        put(&*store, "/x", value).await;
        assert_eq!(get(&*store, "/x").await.as_deref(), Some(value.as_bytes()));
        seen.await.expect("seen");
        members[index].restart().await;
    }
    for (member, value) in members.iter().zip(["4", "5", "6"]) {
        signal(member, Signal::STOP);
        put(&*store, "/x", value).await;
        assert_eq!(get(&*store, "/x").await.as_deref(), Some(value.as_bytes()));
        signal(member, Signal::CONT);
    }
}

#[tokio::test]
async fn without_a_majority_it_says_so_and_comes_back() {
    let mut members = EtcdServer::start_cluster(3).await;
    let store = over(&members);
    put(&*store, "/x", "1").await;
    members[1].kill();
    members[2].kill();
    let since = Instant::now();
    let refused = store.txn(Txn::new().put("/x", "2", None)).await.expect_err("a write by a minority");
    assert!(matches!(refused, StoreError::Unavailable(_) | StoreError::Unknown(_)), "{refused:?}");
    let refused = store.range(KeyRange::exact("/x")).await.expect_err("a read by a minority");
    assert!(matches!(refused, StoreError::Unavailable(_)), "{refused:?}");
    assert!(since.elapsed() < Duration::from_secs(30), "gave up after {:?}", since.elapsed());
    members[1].restart().await;
    put(&*store, "/x", "3").await;
    assert_eq!(get(&*store, "/x").await.as_deref(), Some(&b"3"[..]));
}

#[tokio::test]
async fn a_watch_of_what_never_changes_stands() {
    let etcd = EtcdServer::start().await;
    let store = etcd.store();
    let mut watch = store.watch(KeyRange::exact("/x"), None).await.expect("etcd answers");
    // etcd ends connections of clients that probe them too often, after three probes or so.
    let quiet = tokio::time::timeout(Duration::from_secs(28), watch.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    put(&store, "/x", "1").await;
    let seen = tokio::time::timeout(SOON, watch.next()).await.expect("in time").expect("it stands");
    assert!(matches!(&seen.events[..], [Event::Put(_)]), "{seen:?}");
}
