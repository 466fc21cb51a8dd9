//! Every store passes the one suite: embedded, embedded over gRPC, and a real etcd.

mod suite;

use std::{sync::Arc, time::Duration};

use baton_registry::{
    MemoryConfig, MemoryStore, RemoteConfig, RemoteStore, Revision, Store, StoreError, StoreService, Txn,
    testing::EtcdServer,
};
use suite::Subject;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

fn memory(shutdown: &CancellationToken, tasks: &TaskTracker) -> MemoryStore {
    MemoryStore::start(MemoryConfig::new(Revision(1_700_000_000_000)), shutdown.clone(), tasks)
}

fn compact(store: &MemoryStore) -> Box<dyn Fn(Revision) -> futures::future::BoxFuture<'static, ()>> {
    let store = store.clone();
    Box::new(move |revision| {
        store.compact(revision);
        Box::pin(async {})
    })
}

#[tokio::test]
async fn embedded() {
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let store = memory(&shutdown, &tasks);
    suite::run(&Subject { store: Arc::new(store.clone()), compact: compact(&store) }).await;
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
}

#[tokio::test]
async fn remote() {
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let store = memory(&shutdown, &tasks);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let service = StoreService::new(Arc::new(store.clone()), shutdown.clone()).writable().into_server();
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), shutdown.clone().cancelled_owned());
    let server = tasks.spawn(server);
    // The first endpoint is dead: calls have to go on to the second.
    let config = RemoteConfig::new(["127.0.0.1:1".to_owned(), address.to_string()]);
    let client = RemoteStore::new(&config).expect("client");
    suite::run(&Subject { store: Arc::new(client), compact: compact(&store) }).await;
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
    server.await.expect("server").expect("serving");
}

#[tokio::test]
async fn etcd() {
    let server = EtcdServer::start().await;
    let config = baton_registry::EtcdConfig::new(["127.0.0.1:1".to_owned(), server.endpoint()]);
    let store = Arc::new(baton_registry::EtcdStore::new(&config).expect("client"));
    let compactor = store.clone();
    let compact = move |revision| -> futures::future::BoxFuture<'static, ()> {
        let store = compactor.clone();
        Box::pin(async move { store.compact(revision).await.expect("compact") })
    };
    suite::run(&Subject { store, compact: Box::new(compact) }).await;
}

#[tokio::test]
async fn what_memory_holds_is_bounded() {
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let config = MemoryConfig { keys: 2, leases: 1, ..MemoryConfig::new(Revision(1)) };
    let store = MemoryStore::start(config, shutdown.clone(), &tasks);
    let put = |key: &str| store.txn(Txn::new().put(key, "1", None));
    let refused = |error: Option<StoreError>| matches!(error, Some(StoreError::Refused(why)) if why.contains("limit is 2"));
    put("a").await.expect("room");
    let two = Txn::new().put("b", "1", None).put("c", "1", None);
    assert!(refused(store.txn(two).await.err()), "none of a transaction that does not fit is made");
    put("b").await.expect("room");
    assert!(refused(put("c").await.err()));
    put("a").await.expect("a key that is there may change");
    store.txn(Txn::new().delete("a")).await.expect("a full store takes deletions");
    put("c").await.expect("the room given back");

    let lease = store.grant_lease(Duration::from_secs(60)).await.expect("room");
    let full = store.grant_lease(Duration::from_secs(60)).await;
    assert!(matches!(&full, Err(StoreError::Refused(why)) if why.contains("1 leases")), "{full:?}");
    store.revoke_lease(lease.id).await.expect("ends");
    store.grant_lease(Duration::from_secs(60)).await.expect("the room given back");
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
}
