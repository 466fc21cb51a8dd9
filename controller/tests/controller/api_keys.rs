//! API keys in the store: operators add and revoke them, and who leads does not matter to them.

use baton_proto::{KeyHash, v1};
use baton_registry::{KeyRange, Store, keys as layout, testing::EtcdServer};
use tonic::{Code, Status};

use crate::cluster::{Node, config, on_etcd};

/// One that leads.
async fn leader(etcd: &EtcdServer, id: &str) -> Node {
    let node = Node::start(on_etcd(id, &etcd.endpoint()));
    while let Err(refused) = names(&node).await {
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    node
}

fn key(name: &str) -> v1::ApiKey {
    v1::ApiKey {
        name: name.into(),
        tenant: "alice".into(),
        sha256: hash(name),
        requests_per_minute: 60,
        band: v1::Band::Batch.into(),
        weight: 2,
        ..Default::default()
    }
}

fn hash(of: &str) -> bytes::Bytes {
    let hex = KeyHash::of(of).to_hex();
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    (0..hex.len()).step_by(2).map(byte).collect()
}

async fn add(node: &Node, key: v1::ApiKey) -> Result<(), Status> {
    node.admin().await.add_api_key(v1::AddApiKeyRequest { key: Some(key) }).await.map(drop)
}

async fn revoke(node: &Node, name: &str) -> Result<(), Status> {
    node.admin().await.revoke_api_key(v1::RevokeApiKeyRequest { name: name.into() }).await.map(drop)
}

async fn list(node: &Node) -> Result<Vec<v1::ApiKey>, Status> {
    Ok(node.admin().await.list_api_keys(v1::ListApiKeysRequest {}).await?.into_inner().keys)
}

async fn names(node: &Node) -> Result<Vec<String>, Status> {
    Ok(list(node).await?.into_iter().map(|key| key.name).collect())
}

#[tokio::test]
async fn keys_are_added_listed_and_revoked_and_outlive_the_leader() {
    let etcd = EtcdServer::start().await;
    let mut first = leader(&etcd, "c1").await;
    add(&first, key("a-1")).await.expect("is added");
    add(&first, key("a-2")).await.expect("is added");
    let listed = list(&first).await.expect("a list");
    let [a, _] = &listed[..] else { panic!("{listed:?}") };
    assert_eq!((a.created_by.as_str(), a.created_unix_millis > 0), ("local", true));
    let unsigned = v1::ApiKey { created_by: String::new(), created_unix_millis: 0, ..a.clone() };
    assert_eq!(unsigned, key("a-1"), "with all that it may");
    let stored = etcd.store().range(KeyRange::prefix(layout::API_KEYS)).await.expect("a listing");
    assert_eq!(stored.items.len(), 2);

    first.kill();
    let second = leader(&etcd, "c2").await;
    revoke(&second, "a-1").await.expect("is revoked");
    assert_eq!(names(&second).await.expect("a list"), ["a-2"]);
    assert_eq!(revoke(&second, "a-1").await.expect_err("is gone").code(), Code::NotFound);
    let events = v1::WatchEventsRequest::default();
    let mut events = second.admin().await.watch_events(events).await.expect("events").into_inner();
    let mut said = Vec::new();
    while let Some(event) = events.message().await.expect("no error") {
        said.push((event.kind, event.message, event.actor));
    }
    assert!(said.contains(&("api_key_revoked".into(), "API key a-1".into(), "local".into())), "{said:?}");
    second.stop().await;
}

#[tokio::test]
async fn what_cannot_be_a_key_is_refused_by_field_and_what_is_there_stays() {
    let etcd = EtcdServer::start().await;
    let node = leader(&etcd, "c1").await;
    add(&node, key("a")).await.expect("is added");
    for (bad, code, said) in [
        (key("a"), Code::AlreadyExists, "called a already"),
        (v1::ApiKey { name: "b".into(), ..key("a") }, Code::AlreadyExists, "there already, as a"),
        (key("B b"), Code::InvalidArgument, "key: an API key's name"),
        (v1::ApiKey { tenant: String::new(), ..key("b") }, Code::InvalidArgument, "key: a tenant's name"),
        (v1::ApiKey { sha256: Default::default(), ..key("b") }, Code::InvalidArgument, "sha256"),
    ] {
        let refused = add(&node, bad).await.expect_err(said);
        assert!(refused.code() == code && refused.message().contains(said), "{refused}");
    }
    assert_eq!(revoke(&node, "A").await.expect_err("no name").code(), Code::InvalidArgument);
    assert_eq!(names(&node).await.expect("a list"), ["a"]);
    node.stop().await;
}

#[tokio::test]
async fn a_controller_that_would_forget_them_takes_none() {
    let node = Node::start(config());
    for refused in [add(&node, key("a")).await, revoke(&node, "a").await, list(&node).await.map(drop)] {
        let refused = refused.expect_err("it embeds its store");
        assert!(refused.message().contains("api_keys.file"), "{refused}");
    }
    node.stop().await;
}
