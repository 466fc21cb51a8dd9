//! Histories of concurrent clients of every store are linearizable; etcd's also while its members die and freeze.

mod history;

use std::{
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_registry::{
    Compare, EtcdConfig, EtcdStore, Event, KeyRange, MemoryConfig, MemoryStore, RemoteConfig, RemoteStore,
    Revision, Store, StoreError, StoreService, Txn, testing::EtcdServer,
};
use history::{Call, What, check};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::{Pid, Signal, kill_process};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const CLIENTS: u64 = 6;
const KEYS: RangeInclusive<u32> = 1..=4;
/// How long clients of a store that nothing happens to go on.
const A_WHILE: Duration = Duration::from_secs(2);
/// Events that an embedded store keeps here: beyond what its clients can make in their time, so that all can be read.
const HISTORY_EVENTS: usize = 1 << 24;

fn key(random: &mut StdRng) -> String {
    format!("/k/a/{}", random.random_range(KEYS))
}

/// One client, until the time is over: reads, increments, writes of two keys at once, deletions.
async fn client(store: Arc<dyn Store>, number: u64, until: Instant) -> Vec<Call> {
    let mut random = StdRng::seed_from_u64(number);
    let (mut calls, mut written) = (Vec::new(), 0);
    while Instant::now() < until {
        let began = Instant::now();
        // Every value is written once, so that a change tells who made it.
        written += 1;
        let value = || format!("{number}.{written}");
        let txn = match random.random_range(0..10) {
            0..4 => {
                if let Ok(listing) = store.range(KeyRange::prefix("/k/")).await {
                    calls.push(Call { began, ended: Some(Instant::now()), what: What::Read(listing) });
                }
                continue;
            }
            4..7 => {
                let key = key(&mut random);
                let Ok(listing) = store.range(KeyRange::exact(&key)).await else { continue };
                let unchanged = match listing.items.first() {
                    Some(item) => Compare::mod_revision(&key, item.mod_revision),
                    None => Compare::absent(&key),
                };
                Txn::new().when(unchanged).put(key, value(), None)
            }
            7 => Txn::new().put("/k/a/1", value(), None).put("/k/a/2", value(), None),
            8 => Txn::new().delete(key(&mut random)).put("/k/b", value(), None),
            _ => Txn::new().when(Compare::absent("/k/a/3")).delete_prefix("/k/a/").put("/k/b", value(), None),
        };
        let began = Instant::now();
        let (ended, outcome) = match store.txn(txn.clone()).await {
            Ok(outcome) => (Some(Instant::now()), Some(outcome)),
            Err(StoreError::Unknown(_)) => (None, None),
            Err(_) => continue, // nothing was done
        };
        calls.push(Call { began, ended, what: What::Write(txn, outcome) });
    }
    calls
}

/// All changes after `start`, up to one that is made now.
async fn changes(store: &dyn Store, start: Revision) -> Vec<Event> {
    let mut watch = store.watch(KeyRange::prefix("/k/"), Some(start.next())).await.expect("watched");
    let last = store.txn(Txn::new().put("/k/end", "", None)).await.expect("written").revision;
    let mut events = Vec::new();
    loop {
        let batch = watch.next().await.expect("the history is kept");
        let end = batch.revision >= last;
        events.extend(batch.events.into_iter().filter(|event| event.revision() < last));
        if end {
            return events;
        }
    }
}

/// Lets clients at a store without keys under `/k/`, while `faults` happen to it, and checks what they saw.
async fn run(store: Arc<dyn Store>, time: Duration, faults: impl Future<Output = ()>) {
    let start = store.range(KeyRange::prefix("/k/")).await.expect("read").revision;
    let until = Instant::now() + time;
    let clients: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(client(store.clone(), number, until))).collect();
    faults.await;
    let mut calls = Vec::new();
    for client in clients {
        calls.extend(client.await.expect("no panic"));
    }
    let events = changes(&*store, start).await;
    let lost = calls.iter().filter(|call| call.ended.is_none()).count();
    println!("{} calls, {} changes, {lost} answers lost", calls.len(), events.len());
    assert!(events.len() > 50, "only {} changes: too little happened to say anything", events.len());
    check(&calls, events).unwrap_or_else(|why| panic!("not linearizable: {why}"));
}

fn memory_store(shutdown: &CancellationToken, tasks: &TaskTracker) -> MemoryStore {
    let config = MemoryConfig { history_events: HISTORY_EVENTS, ..MemoryConfig::new(Revision(1)) };
    MemoryStore::start(config, shutdown.clone(), tasks)
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded() {
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let store = memory_store(&shutdown, &tasks);
    run(Arc::new(store), Duration::from_millis(100), async {}).await;
    shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn remote() {
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let store = memory_store(&shutdown, &tasks);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let service = StoreService::new(Arc::new(store), shutdown.clone()).writable().into_server();
    let server = tonic::transport::Server::builder().add_service(service);
    tasks.spawn(
        server.serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            shutdown.clone().cancelled_owned(),
        ),
    );
    let client = RemoteStore::new(&RemoteConfig::new([address.to_string()])).expect("client");
    run(Arc::new(client), A_WHILE, async {}).await;
    shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd() {
    let server = EtcdServer::start().await;
    run(Arc::new(server.store()), A_WHILE, async {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_whose_members_die_and_freeze() {
    let mut members = EtcdServer::start_cluster(3).await;
    let config = EtcdConfig::new(members.iter().map(EtcdServer::endpoint));
    let store = Arc::new(EtcdStore::new(&config).expect("good endpoints"));
    let pause = || tokio::time::sleep(A_WHILE);
    let faults = async {
        // Each in turn, so that the leader is among them.
        for member in &mut members {
            pause().await;
            let pid = i32::try_from(member.pid().expect("it runs")).ok().and_then(Pid::from_raw);
            let signal = |signal| kill_process(pid.expect("a pid"), signal).expect("it runs");
            signal(Signal::STOP);
            pause().await;
            signal(Signal::CONT);
            pause().await;
            member.kill();
            pause().await;
            member.restart().await;
        }
    };
    run(store, A_WHILE * 14, faults).await;
}
