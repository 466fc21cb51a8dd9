//! Answers that an instance has no more room for: they go on where there is room, and end where there is none.

use baton_proto::v1;
use serde_json::{Value, json};
use v1::{FinishReason, attach_request::Frame as Ask};

use crate::{
    scripted::{Cluster, bytes, chat_text, events},
    stalls::either,
};

const MIXED: [(&str, v1::Role); 2] = [("a", v1::Role::Mixed), ("b", v1::Role::Mixed)];

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
    let metrics = cluster.get("/metrics").await.text().await.expect("a body");
    assert!(metrics.contains("baton_coordinator_migrations_total{reason=\"kv_exhausted\",model=\"tiny\"} 1"));
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
async fn choices_of_an_instance_that_one_of_them_fills_go_on_each_by_itself() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, |_| {}).await;
    let response = cluster.chat(json!({"n": 2, "max_tokens": 4}));
    let (small, large, first) = either(&mut a, &mut b).await;
    small.of_choice((first.leg, 1), 0, "v", None);
    small.of_choice((first.leg, 0), 0, "abc", Some(FinishReason::Length));
    // The other choice has room on both, and goes out before its old leg is cancelled.
    let (mut dispatched, mut cancelled) = (0, None);
    while dispatched < 2 || cancelled.is_none() {
        let (at, is_large, frame) = tokio::select! {
            frame = small.next() => (&*small, false, frame),
            frame = large.next() => (&*large, true, frame),
        };
        match frame {
            Ask::Cancel(cancel) => assert!(cancelled.replace(cancel.leg).is_none() && !is_large),
            Ask::Dispatch(dispatch) if dispatch.generated_tokens == bytes("v") => {
                at.finish(dispatch.leg, 1, "w", FinishReason::Stop);
                dispatched += 1;
            }
            Ask::Dispatch(dispatch) => {
                assert_eq!((is_large, &dispatch.generated_tokens), (true, &bytes("abc")));
                at.finish(dispatch.leg, 3, "d", FinishReason::Length);
                dispatched += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(cancelled, Some(first.leg));
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(both(&answer), [("abcd", "length"), ("vw", "stop")]);
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
    let metrics = cluster.get("/metrics").await.text().await.expect("a body");
    assert!(!metrics.contains("kv_exhausted"), "nothing has moved");
    cluster.at_rest().await;
}
