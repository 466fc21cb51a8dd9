//! The one suite that every store passes: the contract of `store.rs`, case by case.
//!
//! A case uses keys under a prefix of its own; cases run one after another, as revisions are the whole store's.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use baton_registry::{
    Compare, Event, KeyRange, LeaseId, Revision, Store, StoreError, Txn, Watch, WatchBatch, WatchError,
};
use futures::future::{BoxFuture, join_all};

/// Long enough for a loaded machine; a case that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A store under test.
pub(crate) struct Subject {
    pub(crate) store: Arc<dyn Store>,
    /// Forgets history up to a revision, as an operator would.
    pub(crate) compact: Box<dyn Fn(Revision) -> BoxFuture<'static, ()>>,
}

pub(crate) async fn run(subject: &Subject) {
    let store = &*subject.store;
    reads_what_was_put(store).await;
    conditions_decide(store).await;
    a_transaction_is_one_revision(store).await;
    refuses_ambiguous_transactions(store).await;
    deletes_by_prefix(store).await;
    watches_from_now_and_from_a_revision(store).await;
    watches_one_key(store).await;
    says_what_is_compacted(subject).await;
    misses_no_deletion_that_was_compacted(subject).await;
    leases_end_their_keys(store).await;
    leases_are_renewed_revoked_and_left(store).await;
    increments_are_not_lost(subject).await;
    a_resumed_watch_misses_nothing(subject).await;
}

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    let outcome = store.txn(Txn::new().put(key, value.to_owned(), None)).await.expect("put");
    assert!(outcome.succeeded);
    outcome.revision
}

async fn get(store: &dyn Store, key: &str) -> Option<String> {
    let listing = store.range(KeyRange::exact(key)).await.expect("range");
    listing.items.first().map(|item| String::from_utf8_lossy(&item.value).into_owned())
}

/// The next batch that is more than progress.
async fn next(watch: &mut Watch) -> Result<WatchBatch, WatchError> {
    let batch = async {
        loop {
            match watch.next().await {
                Ok(batch) if batch.events.is_empty() => {}
                other => return other,
            }
        }
    };
    tokio::time::timeout(PATIENCE, batch).await.expect("the watch stayed silent")
}

fn keys(batch: &WatchBatch) -> Vec<&str> {
    batch.events.iter().map(Event::key).collect()
}

async fn reads_what_was_put(store: &dyn Store) {
    let first = put(store, "/reads/b", "1").await;
    let second = put(store, "/reads/a", "2").await;
    let third = put(store, "/reads/b", "3").await;
    put(store, "/reads-not", "x").await;
    assert!(first < second && second < third);

    let listing = store.range(KeyRange::prefix("/reads/")).await.expect("range");
    assert!(listing.revision > third);
    let found: Vec<_> = listing
        .items
        .iter()
        .map(|item| {
            (item.key.as_str(), &item.value[..], item.create_revision, item.mod_revision, item.version)
        })
        .collect();
    let expected: Vec<(_, &[u8], _, _, _)> =
        vec![("/reads/a", b"2", second, second, 1), ("/reads/b", b"3", first, third, 2)];
    assert_eq!(found, expected);
    let exact = store.range(KeyRange::exact("/reads/a")).await.expect("range");
    assert_eq!(exact.items.len(), 1);
    assert_eq!(store.range(KeyRange::exact("/reads/")).await.expect("range").items, []);
    let all = store.range(KeyRange::prefix("")).await.expect("range of everything");
    assert!(all.items.len() >= 3);
}

async fn conditions_decide(store: &dyn Store) {
    let key = "/conditions/key";
    let attempt = |condition: Compare, value: &'static str| {
        let txn = Txn::new().when(condition).put(key, value, None);
        async move { store.txn(txn).await.expect("txn") }
    };
    let created = attempt(Compare::absent(key), "1").await;
    assert!(created.succeeded);
    let again = attempt(Compare::absent(key), "2").await;
    assert!(!again.succeeded);
    assert_eq!(again.revision, created.revision, "a failed transaction made a revision");
    assert!(attempt(Compare::value(key, "1"), "3").await.succeeded);
    assert!(!attempt(Compare::value(key, "1"), "4").await.succeeded);
    let changed = attempt(Compare::create_revision(key, created.revision), "5").await;
    assert!(changed.succeeded);
    assert!(!attempt(Compare::create_revision(key, changed.revision), "6").await.succeeded);
    assert!(attempt(Compare::mod_revision(key, changed.revision), "7").await.succeeded);
    assert!(!attempt(Compare::mod_revision(key, changed.revision), "8").await.succeeded);
    assert!(!attempt(Compare::value("/conditions/none", ""), "9").await.succeeded, "absent is not empty");
    assert_eq!(get(store, key).await.as_deref(), Some("7"));

    let one_of_two = Txn::new().when(Compare::value(key, "7")).when(Compare::absent(key)).delete(key);
    assert!(!store.txn(one_of_two).await.expect("txn").succeeded);
    assert_eq!(get(store, key).await.as_deref(), Some("7"));
}

async fn a_transaction_is_one_revision(store: &dyn Store) {
    put(store, "/one/old", "1").await;
    let mut watch = store.watch(KeyRange::prefix("/one/"), None).await.expect("watch");
    let before = store.range(KeyRange::prefix("/one/")).await.expect("range").revision;
    let txn = Txn::new().put("/one/a", "1", None).put("/one/b", "2", None).delete("/one/old");
    let outcome = store.txn(txn).await.expect("txn");
    assert_eq!(outcome.revision, before.next());
    let batch = next(&mut watch).await.expect("batch");
    assert_eq!(keys(&batch), ["/one/a", "/one/b", "/one/old"]);
    assert_eq!(batch.revision, outcome.revision);
    assert!(batch.events.iter().all(|event| event.revision() == outcome.revision), "{batch:?}");

    let nothing = store.txn(Txn::new().delete("/one/none")).await.expect("txn");
    assert!(nothing.succeeded);
    assert_eq!(nothing.revision, outcome.revision, "a transaction without effect made a revision");
}

async fn refuses_ambiguous_transactions(store: &dyn Store) {
    let wrong = [
        Txn::new().put("/wrong/a", "1", None).put("/wrong/a", "2", None),
        Txn::new().put("/wrong/a", "1", None).delete("/wrong/a"),
        Txn::new().delete_prefix("/wrong/").put("/wrong/a", "1", None),
        Txn::new().put("", "1", None),
        Txn::new().put("/wrong/big", vec![0; baton_registry::store::VALUE_MAX_BYTES + 1], None),
    ];
    for txn in wrong {
        let refused = store.txn(txn.clone()).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
    assert_eq!(store.range(KeyRange::prefix("/wrong/")).await.expect("range").items, []);
    let big = Txn::new().put("/big", vec![7; baton_registry::store::VALUE_MAX_BYTES], None);
    assert!(store.txn(big).await.expect("the largest value").succeeded);
}

async fn deletes_by_prefix(store: &dyn Store) {
    for key in ["/gone/a", "/gone/b", "/gone0"] {
        put(store, key, "1").await;
    }
    let mut watch = store.watch(KeyRange::prefix("/gone"), None).await.expect("watch");
    store.txn(Txn::new().delete_prefix("/gone/")).await.expect("txn");
    assert_eq!(keys(&next(&mut watch).await.expect("batch")), ["/gone/a", "/gone/b"]);
    assert_eq!(get(store, "/gone0").await.as_deref(), Some("1"));
    // A key that comes back is a new one.
    let back = put(store, "/gone/a", "2").await;
    let item = store.range(KeyRange::exact("/gone/a")).await.expect("range").items.remove(0);
    assert_eq!((item.create_revision, item.version), (back, 1));
}

async fn watches_from_now_and_from_a_revision(store: &dyn Store) {
    let first = put(store, "/watch/a", "1").await;
    let second = put(store, "/watch/b", "2").await;
    let mut now = store.watch(KeyRange::prefix("/watch/"), None).await.expect("watch");
    let mut past = store.watch(KeyRange::prefix("/watch/"), Some(first)).await.expect("watch");
    let mut after = store.watch(KeyRange::prefix("/watch/"), Some(second.next())).await.expect("watch");
    put(store, "/watched-not", "x").await;
    store.txn(Txn::new().delete("/watch/a")).await.expect("txn");
    let last = put(store, "/watch/c", "3").await;

    let mut seen = Vec::new();
    while seen.last().is_none_or(|batch: &WatchBatch| batch.revision < last) {
        seen.push(next(&mut past).await.expect("batch"));
    }
    let order: Vec<_> = seen.iter().flat_map(keys).collect();
    assert_eq!(order, ["/watch/a", "/watch/b", "/watch/a", "/watch/c"]);
    assert!(
        matches!(&seen[0].events[0], Event::Put(item) if item.value == "1" && item.mod_revision == first)
    );
    assert!(matches!(&seen[2].events[0], Event::Delete { .. }));
    for watch in [&mut now, &mut after] {
        let batch = next(watch).await.expect("batch");
        assert!(matches!(&batch.events[..], [Event::Delete { key, .. }] if key == "/watch/a"), "{batch:?}");
    }
}

async fn watches_one_key(store: &dyn Store) {
    let mut watch = store.watch(KeyRange::exact("/exact/a"), None).await.expect("watch");
    put(store, "/exact/a/b", "1").await;
    put(store, "/exact/ab", "1").await;
    let revision = put(store, "/exact/a", "1").await;
    let batch = next(&mut watch).await.expect("batch");
    assert_eq!((keys(&batch), batch.revision), (vec!["/exact/a"], revision));
}

async fn says_what_is_compacted(subject: &Subject) {
    let store = &*subject.store;
    let old = put(store, "/compact/a", "1").await;
    let newer = put(store, "/compact/a", "2").await;
    let newest = put(store, "/compact/a", "3").await;
    (subject.compact)(newer).await;
    let mut watch = store.watch(KeyRange::prefix("/compact/"), Some(old)).await.expect("watch");
    let gone = next(&mut watch).await;
    assert!(matches!(gone, Err(WatchError::Compacted(revision)) if revision >= newer), "{gone:?}");
    let mut watch = store.watch(KeyRange::prefix("/compact/"), Some(newest)).await.expect("watch");
    assert_eq!(next(&mut watch).await.expect("batch").revision, newest);
    // The state itself is not history.
    assert_eq!(get(store, "/compact/a").await.as_deref(), Some("3"));
}

/// An etcd from before August 2024 forgets a deletion at the very revision that was compacted, and does not say so to who watches
/// from there (etcd-io/etcd#18089).
async fn misses_no_deletion_that_was_compacted(subject: &Subject) {
    let store = &*subject.store;
    let before = put(store, "/compact/deleted", "1").await;
    let change = Txn::new().delete("/compact/deleted").put("/compact/added", "1", None);
    let deleted = store.txn(change).await.expect("txn").revision;
    (subject.compact)(deleted).await;
    let mut watch = store.watch(KeyRange::prefix("/compact/"), Some(before.next())).await.expect("watch");
    let gone = next(&mut watch).await;
    assert!(matches!(gone, Err(WatchError::Compacted(revision)) if revision >= deleted), "{gone:?}");
    let after = put(store, "/compact/after", "1").await;
    let mut watch = store.watch(KeyRange::prefix("/compact/"), Some(deleted.next())).await.expect("watch");
    let batch = next(&mut watch).await.expect("batch");
    assert_eq!((keys(&batch), batch.revision), (vec!["/compact/after"], after));
}

async fn leases_end_their_keys(store: &dyn Store) {
    let lease = store.grant_lease(Duration::from_millis(1500)).await.expect("lease");
    assert!(lease.ttl >= Duration::from_secs(2), "rounded down to {:?}", lease.ttl);
    let mut watch = store.watch(KeyRange::prefix("/leased/"), None).await.expect("watch");
    let txn = Txn::new().put("/leased/a", "1", Some(lease.id)).put("/leased/b", "1", Some(lease.id)).put(
        "/leased/free",
        "1",
        None,
    );
    let since = std::time::Instant::now();
    store.txn(txn).await.expect("txn");
    let listed = store.range(KeyRange::exact("/leased/a")).await.expect("range").items.remove(0);
    assert_eq!(listed.lease, Some(lease.id));
    assert_eq!(next(&mut watch).await.expect("batch").events.len(), 3);

    let ended = next(&mut watch).await.expect("batch");
    let mut both = keys(&ended);
    both.sort_unstable();
    assert_eq!(both, ["/leased/a", "/leased/b"], "the keys of a lease end together");
    assert!(since.elapsed() >= Duration::from_millis(1000), "ended after {:?}", since.elapsed());
    assert_eq!(get(store, "/leased/free").await.as_deref(), Some("1"));
    assert_eq!(store.keep_alive(lease.id).await, Err(StoreError::LeaseNotFound(lease.id)));
}

async fn leases_are_renewed_revoked_and_left(store: &dyn Store) {
    let unknown = LeaseId(0x0123_4567_89ab);
    let txn = Txn::new().put("/lease/a", "1", Some(unknown));
    assert_eq!(store.txn(txn).await, Err(StoreError::LeaseNotFound(unknown)));
    assert_eq!(store.keep_alive(unknown).await, Err(StoreError::LeaseNotFound(unknown)));
    assert_eq!(store.revoke_lease(unknown).await, Ok(()));
    assert!(matches!(store.grant_lease(Duration::from_millis(10)).await, Err(StoreError::Invalid(_))));

    let lease = store.grant_lease(Duration::from_secs(2)).await.expect("lease");
    let other = store.grant_lease(Duration::from_secs(60)).await.expect("lease");
    for (key, lease) in [("/lease/stays", lease.id), ("/lease/moves", lease.id), ("/lease/leaves", lease.id)]
    {
        store.txn(Txn::new().put(key, "1", Some(lease))).await.expect("txn");
    }
    store.txn(Txn::new().put("/lease/moves", "2", Some(other.id))).await.expect("txn");
    store.txn(Txn::new().put("/lease/leaves", "2", None)).await.expect("txn");
    // Renewed for longer than it would last: the lease is there as long as that goes on.
    let until = tokio::time::Instant::now() + Duration::from_secs(4);
    while tokio::time::Instant::now() < until {
        assert_eq!(store.keep_alive(lease.id).await.expect("renewal"), lease.ttl);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(get(store, "/lease/stays").await.as_deref(), Some("1"));
    store.revoke_lease(lease.id).await.expect("revoke");
    assert_eq!(get(store, "/lease/stays").await, None);
    assert_eq!(get(store, "/lease/moves").await.as_deref(), Some("2"));
    assert_eq!(get(store, "/lease/leaves").await.as_deref(), Some("2"));
    store.revoke_lease(other.id).await.expect("revoke");
    assert_eq!(get(store, "/lease/moves").await, None);
}

/// Read, compare, write, from several tasks at once: the sum is right only if each step is atomic and reads are
/// not stale.
async fn increments_are_not_lost(subject: &Subject) {
    let increments = (0..4).map(|_| {
        let store = subject.store.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < 10 {
                let found = store.range(KeyRange::exact("/counter")).await.expect("range").items.pop();
                let txn = match found {
                    None => Txn::new().when(Compare::absent("/counter")).put("/counter", "1", None),
                    Some(item) => {
                        let count: u32 = String::from_utf8_lossy(&item.value).parse().expect("a number");
                        Txn::new().when(Compare::mod_revision("/counter", item.mod_revision)).put(
                            "/counter",
                            (count + 1).to_string(),
                            None,
                        )
                    }
                };
                done += u32::from(store.txn(txn).await.expect("txn").succeeded);
            }
        })
    });
    for task in join_all(increments).await {
        task.expect("increments");
    }
    assert_eq!(get(&*subject.store, "/counter").await.as_deref(), Some("40"));
}

/// Whatever the writers do and wherever the watch is cut, folding its events gives the state.
async fn a_resumed_watch_misses_nothing(subject: &Subject) {
    let store = subject.store.clone();
    let start = put(&*store, "/fold/start", "1").await;
    let writers = (0..3u32).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for step in 0..40u32 {
                let (ours, shared) =
                    (format!("/fold/{writer}/{}", step % 5), format!("/fold/shared/{}", step % 3));
                let txn = match step % 4 {
                    3 => Txn::new().delete(ours).delete(shared),
                    _ => Txn::new().put(ours, step.to_string(), None).put(shared, writer.to_string(), None),
                };
                store.txn(txn).await.expect("txn");
            }
        })
    });
    let reader = async {
        let mut folded = BTreeMap::new();
        let mut seen = start;
        'resume: loop {
            let mut watch = store.watch(KeyRange::prefix("/fold/"), Some(seen.next())).await.expect("watch");
            for _ in 0..7 {
                let batch = next(&mut watch).await.expect("batch");
                assert!(batch.revision > seen, "revision {} after {seen}", batch.revision);
                seen = batch.revision;
                for event in batch.events {
                    match event {
                        Event::Put(item) => folded.insert(item.key, item.value),
                        Event::Delete { key, .. } => folded.remove(&key),
                    };
                }
                if folded.contains_key("/fold/end") {
                    break 'resume folded;
                }
            }
        }
    };
    let writes = async {
        for task in join_all(writers).await {
            task.expect("writer");
        }
        put(&*store, "/fold/end", "1").await;
    };
    let (mut folded, ()) = tokio::join!(reader, writes);
    let listed = store.range(KeyRange::prefix("/fold/")).await.expect("range").items;
    folded.insert("/fold/start".into(), "1".into());
    assert_eq!(folded, listed.into_iter().map(|item| (item.key, item.value)).collect());
}
