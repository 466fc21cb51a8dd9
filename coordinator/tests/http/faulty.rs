//! Instances that do not keep to what was agreed on, and what that costs: not more than it must.

use baton_proto::v1;
use baton_registry::{Store, Txn, keys, records};
use serde_json::json;
use v1::attach_response::Frame as Answer;

use crate::{
    failures::error_of,
    scripted::{Cluster, other, until},
};

#[tokio::test]
async fn an_instance_that_floods_a_request_is_told_to_stop() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"stream": false}));
    let leg = mixed.dispatch().await.leg;
    // No token follows on from the one before it, and all come before anybody can read.
    let output =
        |at: u32| v1::LegOutput { leg, first_position: 900 - 2 * at, tokens: vec![97], ..Default::default() };
    mixed.say(Answer::Step(v1::StepOutput { legs: (0..200).map(output).collect() }));
    let (status, error) = error_of(response.await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (500, &json!("internal_error")));
    assert!(error["message"].as_str().expect("a message").contains("floods"), "{error}");
    let cancel = mixed.cancelled().await;
    assert_eq!((cancel.leg, cancel.reason.as_str()), (leg, "flood"));
    cluster.at_rest().await;
}

/// The list comes after the link: the stream to what was started with another model stands already.
#[tokio::test]
async fn what_is_cached_counts_for_the_model_that_is_listed_now() {
    let (cluster, [mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    mixed.cache.opened(1).await;
    mixed.cache.snapshot(1, &[]);
    let speaks = |revision: &str| !cluster.service.placer.board.caches.dialects(revision).is_empty();
    until("the cache is known", || speaks("r1")).await;
    let spec = records::encode_spec(&mixed.spec(&other()));
    let put = Txn::new().put(keys::instance(&mixed.id), spec, None);
    cluster.store.txn(put).await.expect("the store takes it");
    mixed.cache.opened(2).await;
    mixed.cache.snapshot(1, &[]);
    until("it counts for the other model", || speaks("r2") && !speaks("r1")).await;
}
