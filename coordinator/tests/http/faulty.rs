//! Instances that do not keep to what was agreed on, and what that costs: not more than it must.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use baton_proto::{ErrorCode, v1};
use baton_registry::{LeaderRecord, Store, Txn, keys, records};
use serde_json::json;
use v1::{FinishReason, attach_response::Frame as Answer};

use crate::{
    failures::error_of,
    scripted::{Cluster, Instance, other, served as model, until},
};

#[tokio::test]
async fn an_instance_that_floods_a_request_is_told_to_stop() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"stream": false}));
    // Nobody else is there to be asked the second time.
    for _ in 0..2 {
        let leg = mixed.dispatch().await.leg;
        // No token follows on from the one before it, and all come before anybody can read.
        let output = |at: u32| v1::LegOutput {
            leg,
            first_position: 900 - 2 * at,
            tokens: vec![97],
            ..Default::default()
        };
        mixed.say(Answer::Step(v1::StepOutput { legs: (0..200).map(output).collect() }));
        let cancel = mixed.cancelled().await;
        assert_eq!((cancel.leg, cancel.reason.as_str()), (leg, "flood"));
    }
    let (status, error) = error_of(response.await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (500, &json!("internal_error")));
    assert!(error["message"].as_str().expect("a message").contains("floods"), "{error}");
    cluster.at_rest().await;
}

/// The list comes after the stream: the one to what was started with another model stands already.
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

/// Answers dispatches until the test ends; counts them.
fn work(mut instance: Instance, answer: impl Fn(&Instance, u64) + Send + 'static) -> Arc<AtomicUsize> {
    let counted = Arc::new(AtomicUsize::new(0));
    let count = counted.clone();
    tokio::spawn(async move {
        loop {
            let leg = instance.dispatch().await.leg;
            count.fetch_add(1, Ordering::Relaxed);
            answer(&instance, leg);
        }
    });
    counted
}

fn fails(instance: &Instance, leg: u64) {
    instance.fail(leg, ErrorCode::HandoffFailed);
}

#[tokio::test]
async fn an_instance_that_fails_all_it_is_given_is_left_out_and_no_client_notices() {
    left_out(ErrorCode::HandoffFailed).await;
}

/// Of its device, or of the model there: whole batches fail with it.
#[tokio::test]
async fn nor_if_it_can_compute_nothing() {
    left_out(ErrorCode::Internal).await;
}

async fn left_out(code: ErrorCode) {
    let roles = [("bad", v1::Role::Mixed), ("good", v1::Role::Mixed)];
    let (cluster, [bad, good]) = Cluster::start(roles, |_| {}).await;
    let bad = work(bad, move |instance, leg| instance.fail(leg, code));
    let good = work(good, |instance, leg| instance.finish(leg, 0, "fine", FinishReason::Stop));
    let began = Instant::now();
    for turn in 0..60 {
        let response = cluster.chat(json!({})).await.expect("ends");
        assert_eq!(response.status(), 200, "request {turn}: {:?}", response.text().await);
    }
    // Five open the breaker, which lets one through after a second, and then more and more seldom.
    let most = 5 + began.elapsed().as_secs() as usize;
    let (bad, good) = (bad.load(Ordering::Relaxed), good.load(Ordering::Relaxed));
    assert!((5..=most).contains(&bad), "{bad} of at most {most}");
    assert_eq!(good, 60);
    let metrics = cluster.get("/metrics").await.text().await.expect("is read");
    assert!(metrics.contains("baton_coordinator_open_breakers 1"), "{metrics}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn who_is_refused_by_a_full_instance_goes_to_one_that_is_not() {
    let roles = [("full", v1::Role::Mixed), ("free", v1::Role::Mixed)];
    let (cluster, [full, free]) = Cluster::start(roles, |_| {}).await;
    let full = work(full, |instance, leg| instance.fail(leg, ErrorCode::QueueFull));
    let free = work(free, |instance, leg| instance.finish(leg, 0, "fine", FinishReason::Stop));
    for _ in 0..8 {
        assert_eq!(cluster.chat(json!({})).await.expect("ends").status(), 200);
    }
    let asked = [full, free].map(|of| of.load(Ordering::Relaxed));
    assert!(asked[0] > 0 && asked[1] == 8, "{asked:?}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn where_all_are_full_a_request_is_told_so_in_time() {
    let patience = Duration::from_millis(300);
    let (cluster, [full]) =
        Cluster::start([("full", v1::Role::Mixed)], |config| config.carry.patience = patience).await;
    let asked = work(full, |instance, leg| instance.fail(leg, ErrorCode::QueueFull));
    let began = Instant::now();
    let (status, error) = error_of(cluster.chat(json!({})).await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (429, &json!("queue_full")));
    let (took, asked) = (began.elapsed(), asked.load(Ordering::Relaxed));
    assert!(took >= patience && took < patience * 10 && (2..=16).contains(&asked), "{took:?}, {asked} times");
    cluster.at_rest().await;
}

/// There is nobody else, so that the breaker does not matter.
#[tokio::test]
async fn a_fleet_that_only_fails_is_not_given_twice_the_work() {
    let (cluster, [bad]) = Cluster::start([("bad", v1::Role::Mixed)], |_| {}).await;
    let bad = work(bad, fails);
    let (requests, began) = (100, Instant::now());
    let responses: Vec<_> = (0..requests).map(|_| cluster.chat(json!({}))).collect();
    for response in responses {
        let (status, error) = error_of(response.await.expect("ends")).await;
        assert_eq!((status, &error["code"]), (502, &json!("handoff_failed")));
    }
    let again = bad.load(Ordering::Relaxed) - requests;
    let most = requests / 5 + (10.0 * (1.0 + began.elapsed().as_secs_f64())) as usize;
    assert!((10..=most).contains(&again), "{again} were placed again, of at most {most}");
    let refused = cluster.get("/metrics").await.text().await.expect("is read");
    let refused =
        refused.lines().find(|line| line.starts_with("baton_coordinator_retry_budget_exhausted_total"));
    assert!(refused.is_some_and(|line| line.ends_with(&format!(" {}", requests - again))), "{refused:?}");
    cluster.at_rest().await;
}

/// The budget has ten, and a second's.
#[tokio::test]
async fn all_prompts_of_a_request_may_fail_by_one_fault() {
    let roles = [("bad", v1::Role::Mixed), ("good", v1::Role::Mixed)];
    let (cluster, [bad, good]) = Cluster::start(roles, |config| config.limits.max_choices = 64).await;
    let bad = work(bad, move |instance, leg| instance.fail(leg, ErrorCode::Internal));
    let good = work(good, |instance, leg| instance.finish(leg, 0, "fine", FinishReason::Stop));
    let prompts = vec!["hi"; 64];
    let body = json!({"model": "tiny", "prompt": prompts, "max_tokens": 9});
    let response = cluster.post("/v1/completions", body.to_string()).await.expect("ends");
    assert_eq!(response.status(), 200, "{:?}", response.text().await);
    let (bad, good) = (bad.load(Ordering::Relaxed), good.load(Ordering::Relaxed));
    assert!(bad > 24 && good == 64, "{bad} failed and {good} did not");
    cluster.at_rest().await;
}

/// What is still known of its legs of before is not taken for what it says of those that it is sent now.
#[tokio::test]
async fn an_instance_that_was_forgotten_and_comes_again_is_sent_new_numbers() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        config.fleet.absent_grace = Duration::from_millis(1);
        config.fleet.sweep = Duration::from_millis(5);
    })
    .await;
    let served = async |mixed: &mut Instance| {
        let response = cluster.chat(json!({}));
        let leg = mixed.dispatch().await.leg;
        mixed.finish(leg, 0, "a", FinishReason::Stop);
        assert_eq!(response.await.expect("ends").status(), 200);
        leg
    };
    let first = served(&mut mixed).await;
    let (key, spec) = (keys::instance(&mixed.id), records::encode_spec(&mixed.spec(&model())));
    // By a leader that wrote it itself: it is gone for good.
    let leader = LeaderRecord { controller_id: "c".into(), endpoint: "c:1".into() };
    let put = Txn::new().put(keys::LEADER, leader.encode(), None);
    cluster.store.txn(put).await.expect("puts");
    cluster.store.txn(Txn::new().put(&key, spec.clone(), None)).await.expect("puts");
    cluster.store.txn(Txn::new().delete(&key)).await.expect("deletes");
    mixed.kill().await;
    until("it is forgotten", || cluster.service.placer.attachments.get(&mixed.id).is_none()).await;
    mixed.restart().await;
    cluster.store.txn(Txn::new().put(&key, spec, None)).await.expect("puts");
    until("it is there again", || cluster.can_serve()).await;
    let again = served(&mut mixed).await;
    assert!(again > first, "leg {again} after leg {first}");
}
