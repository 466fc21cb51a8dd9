//! What is counted of requests and of the links that they use, as the controller is told it.

use std::time::Duration;

use baton_proto::{ErrorCode, LinkUse, v1};
use serde_json::json;
use tokio::time::Instant;
use v1::FinishReason;

use crate::scripted::{Cluster, answer, until};

/// Of the links used in the last minute: names, handoffs, failures; and the mean of the first.
fn links(cluster: &Cluster) -> (Vec<(String, u64, u64)>, u64) {
    let used = cluster.service.placer.handoffs.used_since(Instant::now() - Duration::from_secs(60));
    let view = |link: &LinkUse| (format!("{}>{}", link.prefill, link.decode), link.handoffs, link.failures);
    (used.iter().map(view).collect(), used.first().map_or(0, |link| link.mean_micros))
}

/// Requests that have ended, and those that failed by no fault of the client.
fn counts(cluster: &Cluster) -> (u64, u64) {
    (cluster.service.metrics.ended.get(), cluster.service.metrics.failed.get())
}

#[tokio::test]
async fn a_handoff_is_counted_once_and_timed_from_token_to_token() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({"n": 2, "max_tokens": 3}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    assert_eq!(links(&cluster).0, []);
    let tokens = async |tokens| {
        let all_are_there = || cluster.service.roster.list()[0].completion_tokens() == tokens;
        until("tokens are counted", all_are_there).await;
    };
    let began = Instant::now();
    for choice in 0..2 {
        prefill.of_choice((p.leg, choice), 0, "a", Some(FinishReason::HandedOff));
    }
    tokens(2).await;
    let pause = Duration::from_millis(60);
    tokio::time::sleep(pause).await;
    for choice in 0..2 {
        decode.of_choice((d.leg, choice), 1, "b", None);
    }
    tokens(4).await;
    let passed = began.elapsed();
    // Later tokens change nothing.
    tokio::time::sleep(passed).await;
    for choice in 0..2 {
        decode.of_choice((d.leg, choice), 2, "c", Some(FinishReason::Length));
    }
    assert_eq!(response.await.expect("ends").status(), 200);
    let (used, mean) = links(&cluster);
    assert_eq!(used, [("p>d".to_owned(), 1, 0)]);
    let mean = Duration::from_micros(mean);
    assert!((pause..=passed).contains(&mean), "{mean:?} of {passed:?}");
    assert_eq!(counts(&cluster), (1, 0));

    let response = cluster.chat(json!({"max_tokens": 3}));
    answer(&mut prefill, &mut decode, "abc").await;
    assert_eq!(response.await.expect("ends").status(), 200);
    assert_eq!(links(&cluster).0, [("p>d".to_owned(), 2, 0)]);
    assert_eq!(counts(&cluster), (2, 0));
}

#[tokio::test]
async fn failures_of_a_link_are_told_from_other_ends() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    // Both attempts fail on their way.
    let response = cluster.chat(json!({}));
    for _ in 0..2 {
        let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
        decode.fail(d.leg, ErrorCode::HandoffFailed);
        prefill.fail(p.leg, ErrorCode::HandoffFailed);
    }
    assert_eq!(response.await.expect("ends").status(), 502);
    assert_eq!(links(&cluster).0, [("p>d".to_owned(), 0, 2)]);
    assert_eq!(counts(&cluster), (1, 1));
    cluster.at_rest().await;

    // Prefill ends the answer itself; a client leaves; a client asks for nonsense.
    let response = cluster.chat(json!({"max_tokens": 3}));
    let (p, _) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.finish(p.leg, 0, "\0", FinishReason::Stop);
    assert_eq!(response.await.expect("ends").status(), 200);
    decode.cancelled().await;
    let response = cluster.chat(json!({}));
    let _ = (prefill.dispatch().await, decode.dispatch().await);
    response.abort();
    until("the client's leaving is counted", || counts(&cluster).0 == 3).await;
    assert_eq!(cluster.chat(json!({"n": -1})).await.expect("ends").status(), 400);
    assert_eq!(links(&cluster).0, [("p>d".to_owned(), 0, 2)], "none of these was the link's");
    assert_eq!(counts(&cluster), (4, 1));
}

#[tokio::test]
async fn one_instance_alone_hands_nothing_over() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 3}));
    let leg = mixed.dispatch().await.leg;
    mixed.finish(leg, 0, "abc", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    assert_eq!(links(&cluster).0, []);
    assert_eq!(counts(&cluster), (1, 0));
}
