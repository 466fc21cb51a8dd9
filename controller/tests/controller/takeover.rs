//! Two controllers on a real etcd: one leads, the other stands by and takes over.

use std::time::{Duration, Instant};

use crate::cluster::{Node, PATIENCE, Server, on_etcd, spec, waiting};
use baton_proto::{LEADER_METADATA, v1};
use baton_registry::testing::EtcdServer;
use tonic::Code;

/// Starts a leader, then one that stands by.
async fn leader_and_standby(etcd: &EtcdServer) -> (Node, Node) {
    let leader = Node::start(on_etcd("c1", &etcd.endpoint()));
    let until = Instant::now() + PATIENCE;
    while leader.roles().await.is_err() {
        assert!(Instant::now() < until, "it never leads");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (leader, Node::start(on_etcd("c2", &etcd.endpoint())))
}

#[tokio::test]
async fn a_standby_refuses_and_names_the_leader() {
    let etcd = EtcdServer::start().await;
    let (leader, standby) = leader_and_standby(&etcd).await;
    let refusal = Server::call(&standby.endpoint, spec("a", 1), waiting()).await.err().expect("a refusal");
    assert_eq!(refusal.code(), Code::Unavailable);
    assert!(refusal.message().contains(&format!("ask c1 at {}", leader.endpoint)), "{}", refusal.message());
    let named = refusal.metadata().get(LEADER_METADATA).and_then(|named| named.to_str().ok());
    assert_eq!(named, Some(leader.endpoint.as_str()), "for servers, which go straight there");
    assert_eq!(standby.roles().await.expect_err("a refusal").code(), Code::Unavailable);
    assert!(leader.metrics.render().contains("baton_controller_leading 1"));
    assert!(standby.metrics.render().contains("baton_controller_leading 0"));
}

#[tokio::test]
async fn the_standby_takes_over_from_a_killed_leader_and_changes_nothing() {
    let etcd = EtcdServer::start().await;
    let (mut leader, standby) = leader_and_standby(&etcd).await;
    let mut a = Server::join(&leader.endpoint, spec("a", 1), waiting()).await;
    let mut b = Server::join(&leader.endpoint, spec("b", 1), waiting()).await;
    let (first, second) = (a.next_role().await, b.next_role().await);
    assert_eq!((first.role(), second.role()), (v1::Role::Prefill, v1::Role::Decode));
    let epoch = a.leader_epoch;

    let killed = Instant::now();
    leader.kill();
    assert_eq!(a.next_order(PATIENCE).await, Some(None));
    let endpoints = [leader.endpoint.as_str(), standby.endpoint.as_str()];
    let mut a = Server::join_any(&endpoints, spec("a", 1), a.state).await;
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(5), "taken over after {took:?}");
    assert!(a.leader_epoch > epoch);
    let mut b = Server::join_any(&endpoints, spec("b", 1), b.state).await;
    let during = Duration::from_secs(3);
    tokio::join!(a.hear_nothing(during), b.hear_nothing(during));
    let roles = standby.roles().await.expect("roles");
    let views: Vec<_> = roles.iter().map(|view| (view.desired_role(), view.desired_epoch)).collect();
    assert_eq!(views, [(first.role(), first.epoch), (second.role(), second.epoch)]);
    // And it decides: the one that is left alone is mixed, under a later epoch.
    b.bye().await;
    let alone = a.next_role().await;
    assert_eq!(alone.role(), v1::Role::Mixed);
    assert!(alone.epoch > first.epoch);
}

#[tokio::test]
async fn a_leader_that_stops_hands_over_at_once() {
    let etcd = EtcdServer::start().await;
    let (leader, standby) = leader_and_standby(&etcd).await;
    let a = Server::join(&leader.endpoint, spec("a", 1), waiting()).await;
    let state = a.state;
    let since = Instant::now();
    leader.stop().await;
    Server::join_any(&[&standby.endpoint], spec("a", 1), state).await;
    assert!(
        since.elapsed() < Duration::from_millis(1900),
        "took {:?}: it waited for the lease",
        since.elapsed()
    );
}

#[tokio::test]
async fn a_store_that_goes_and_comes_changes_no_role() {
    let mut etcd = EtcdServer::start().await;
    let (leader, standby) = leader_and_standby(&etcd).await;
    let mut a = Server::join(&leader.endpoint, spec("a", 1), waiting()).await;
    let mut b = Server::join(&leader.endpoint, spec("b", 1), waiting()).await;
    let (first, second) = (a.next_role().await, b.next_role().await);
    etcd.kill();
    // Without a store nobody leads, after a while: the sessions end, the servers keep what they are.
    assert_eq!(a.next_order(PATIENCE).await, Some(None));
    etcd.restart().await;
    let endpoints = [leader.endpoint.as_str(), standby.endpoint.as_str()];
    let mut a = Server::join_any(&endpoints, spec("a", 1), a.state).await;
    let mut b = Server::join_any(&endpoints, spec("b", 1), b.state).await;
    let during = Duration::from_secs(3);
    tokio::join!(a.hear_nothing(during), b.hear_nothing(during));
    assert_eq!((a.state.role_epoch, b.state.role_epoch), (first.epoch, second.epoch));
}
