//! Answers that an instance has no more room for: they go on where there is room, and end where there is none.

use std::{pin::pin, time::Duration};

use baton_coordinator::CoordinatorConfig;
use baton_proto::{ErrorCode, v1};
use serde_json::{Value, json};
use v1::FinishReason;

use crate::{
    migrations::migrations,
    scripted::{Cluster, bytes, chat_text, events},
    stalls::either,
};

const MIXED: [(&str, v1::Role); 2] = [("a", v1::Role::Mixed), ("b", v1::Role::Mixed)];

/// How many answers have gone on elsewhere.
async fn moved(cluster: &Cluster) -> Option<String> {
    migrations(cluster, ErrorCode::KvExhausted).await
}

#[tokio::test]
async fn what_fills_an_instance_goes_on_at_another_as_if_it_had_begun_there() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 5, "stream": true}));
    let (small, large, first) = either(&mut a, &mut b).await;
    small.finish(first.leg, 0, "abc", FinishReason::Length);
    let resumed = large.dispatch().await;
    assert_eq!((&resumed.prompt_tokens, &resumed.sampling), (&first.prompt_tokens, &first.sampling));
    assert_eq!(resumed.generated_tokens, bytes("abc"));
    large.finish(resumed.leg, 3, "de", FinishReason::Length);
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "abcde");
    assert!(small.is_quiet());
    assert_eq!(moved(&cluster).await.as_deref(), Some("1"));
    cluster.at_rest().await;
}

/// Two choices of a whole answer: text and reason of each.
fn both(answer: &Value) -> [(&str, &str); 2] {
    [0, 1].map(|index| {
        let choice = &answer["choices"][index];
        let text = choice["message"]["content"].as_str().expect("a text");
        (text, choice["finish_reason"].as_str().expect("a reason"))
    })
}

#[tokio::test]
async fn of_several_choices_the_one_that_is_too_long_goes_and_the_others_stay() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, |_| {}).await;
    let response = cluster.chat(json!({"n": 2, "max_tokens": 4}));
    let (small, large, first) = either(&mut a, &mut b).await;
    small.of_choice((first.leg, 1), 0, "v", None);
    small.of_choice((first.leg, 0), 0, "abc", Some(FinishReason::Length));
    let outgrown = large.dispatch().await;
    assert_eq!(outgrown.generated_tokens, bytes("abc"));
    small.of_choice((first.leg, 1), 1, "w", Some(FinishReason::Stop));
    large.finish(outgrown.leg, 3, "d", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(both(&answer), [("abcd", "length"), ("vw", "stop")]);
    assert!(small.is_quiet(), "it was told to stop");
    assert_eq!(moved(&cluster).await.as_deref(), Some("1"));
    cluster.at_rest().await;
}

#[tokio::test]
async fn one_that_has_gone_is_not_begun_again_with_another_that_had_not_begun() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, |_| {}).await;
    let response = cluster.chat(json!({"n": 2, "max_tokens": 4}));
    let (small, large, first) = either(&mut a, &mut b).await;
    small.of_choice((first.leg, 0), 0, "abc", Some(FinishReason::Length));
    let outgrown = large.dispatch().await;
    small.cut();
    let begun = large.dispatch().await;
    let choices = begun.sampling.as_ref().map(|sampling| sampling.choices);
    assert_eq!((choices, begun.generated_tokens), (Some(1), vec![]));
    large.finish(begun.leg, 0, "vw", FinishReason::Stop);
    large.finish(outgrown.leg, 3, "d", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(both(&answer), [("abcd", "length"), ("vw", "stop")]);
    cluster.at_rest().await;
}

const APART: [(&str, v1::Role); 4] = [
    ("p0", v1::Role::Prefill),
    ("p1", v1::Role::Prefill),
    ("d0", v1::Role::Decode),
    ("d1", v1::Role::Decode),
];

#[tokio::test]
async fn a_decode_that_is_full_is_left_for_another_amid_a_half_matched_stop_string() {
    let (cluster, [mut p0, mut p1, mut d0, mut d1]) = Cluster::start(APART, |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 8, "stop": "END"}));
    let (prefill, _, first) = either(&mut p0, &mut p1).await;
    let (small, large, taken) = either(&mut d0, &mut d1).await;
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    small.finish(taken.leg, 1, "bE", FinishReason::Length);
    let resumed = large.dispatch().await;
    assert_eq!(resumed.generated_tokens, bytes("abE"));
    let (prefill, _, again) = either(&mut p0, &mut p1).await;
    // Now all of the prompt is cached, which is the request's own doing.
    prefill.hand_on(again.leg, 3, "N", 16);
    large.tokens(resumed.leg, 4, "Dxy");
    assert_eq!(large.cancelled().await.reason, "stop_string");
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "ab");
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 5);
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_prefill_whose_context_is_full_is_left_and_the_decode_is_not() {
    let (cluster, [mut p0, mut p1, mut decode]) =
        Cluster::start([APART[0], APART[1], APART[2]], |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 3}));
    let (small, large, first) = either(&mut p0, &mut p1).await;
    let unused = decode.dispatch().await;
    small.finish(first.leg, 0, "a", FinishReason::Length);
    assert_eq!(decode.cancelled().await.leg, unused.leg);
    let (again, resumed) = (large.dispatch().await, decode.dispatch().await);
    assert_eq!((&again.generated_tokens, &resumed.generated_tokens), (&bytes("a"), &bytes("a")));
    large.finish(again.leg, 1, "b", FinishReason::HandedOff);
    decode.finish(resumed.leg, 2, "c", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "abc");
    cluster.at_rest().await;
}

#[tokio::test]
async fn what_nobody_takes_on_after_all_is_complete_as_it_is() {
    // It is as full itself, or has no room in its line for as long as anybody waits.
    for code in [ErrorCode::KvExhausted, ErrorCode::ContextLengthExceeded, ErrorCode::QueueFull] {
        let patience = |config: &mut CoordinatorConfig| config.carry.patience = Duration::from_millis(300);
        let (cluster, [mut a, mut b]) = Cluster::start(MIXED, patience).await;
        let response = cluster.chat(json!({"max_tokens": 5}));
        let (small, large, first) = either(&mut a, &mut b).await;
        small.finish(first.leg, 0, "abc", FinishReason::Length);
        let mut response = pin!(response);
        let response = loop {
            tokio::select! {
                again = large.dispatch() => large.fail(again.leg, code),
                // Nothing tells that it is as full as it was.
                again = small.dispatch() => small.fail(again.leg, code),
                response = &mut response => break response.expect("ends"),
            }
        };
        assert_eq!(response.status(), 200, "{code:?}");
        let answer: Value = response.json().await.expect("is JSON");
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&json!("abc"), &json!("length"))
        );
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn what_has_come_further_is_not_ended_by_a_failure() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 5}));
    let (small, large, first) = either(&mut a, &mut b).await;
    small.finish(first.leg, 0, "abc", FinishReason::Length);
    let resumed = large.dispatch().await;
    large.tokens(resumed.leg, 3, "d");
    large.fail(resumed.leg, ErrorCode::KvExhausted);
    let response = response.await.expect("ends");
    let status = response.status();
    assert_eq!(status, 503, "{:?}", response.text().await);
    cluster.at_rest().await;
}

#[tokio::test]
async fn where_nobody_has_more_room_a_choice_ends_and_the_others_go_on() {
    let (cluster, [mut only]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"n": 2, "max_tokens": 4}));
    let dispatch = only.dispatch().await;
    only.of_choice((dispatch.leg, 1), 0, "v", None);
    only.of_choice((dispatch.leg, 0), 0, "ab", Some(FinishReason::Length));
    only.of_choice((dispatch.leg, 1), 1, "wxy", Some(FinishReason::Length));
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(both(&answer), [("ab", "length"), ("vwxy", "length")]);
    assert!(only.is_quiet(), "it was asked for more, or to stop");
    assert_eq!(moved(&cluster).await, None);
    cluster.at_rest().await;
}
