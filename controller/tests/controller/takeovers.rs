//! How long a fleet is without a leader: two processes on a real etcd, and whoever leads is killed, again and again.
//!
//! `BATON_TAKEOVERS=20` kills more often than an ordinary run does.

use std::time::{Duration, Instant};

use baton_registry::{KeyRange, LeaderRecord, Store, keys, testing::EtcdServer};
use rustix::process::Signal;

use crate::processes::Controller;

/// In an ordinary run.
const TAKEOVERS: usize = 3;
/// As configured unless told otherwise.
const TTL: &str = "3s";
const AT_MOST: Duration = Duration::from_secs(5);

async fn leader(store: &dyn Store) -> Option<String> {
    let listing = store.range(KeyRange::exact(keys::LEADER)).await.expect("range");
    let record = LeaderRecord::decode(&listing.items.first()?.value).expect("a record");
    Some(record.controller_id)
}

#[tokio::test]
async fn another_leads_within_seconds_of_a_kill() {
    let times = std::env::var("BATON_TAKEOVERS").map_or(TAKEOVERS, |times| times.parse().expect("a number"));
    let etcd = EtcdServer::start().await;
    let store = etcd.store();
    let mut leading = Controller::start_with("c0", &etcd, TTL);
    leading.leads().await;
    let mut took = Vec::new();
    for turn in 1..=times {
        let next = Controller::start_with(&format!("c{turn}"), &etcd, TTL);
        // It stands by once it can say who leads.
        while !next.roles().await.is_err_and(|status| status.message().contains("does not lead")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let killed = Instant::now();
        leading.signal(Signal::KILL);
        next.leads().await;
        took.push(killed.elapsed());
        assert_eq!(leader(&store).await, Some(format!("c{turn}")));
        leading = next;
    }
    took.sort_unstable();
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    println!("{times} takeovers: median {median:?}, longest {longest:?}");
    assert!(longest <= AT_MOST, "a takeover took {longest:?}; all: {took:?}");
}
