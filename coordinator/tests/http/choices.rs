//! Requests that want several answers: to one prompt, or to several.

use std::time::{Duration, Instant};

use crate::scripted::{Cluster, events, prompt_of, until};
use baton_coordinator::requests::Stage;
use baton_proto::v1;
use serde_json::{Value, json};
use v1::{FinishReason, dispatch::Work};

/// The text of each choice that a stream carried, and why it ended.
fn streamed(body: &str, choices: usize) -> Vec<(String, String)> {
    let mut all = vec![(String::new(), String::new()); choices];
    for event in events(body).into_iter().filter_map(|event| serde_json::from_str::<Value>(event).ok()) {
        for choice in event["choices"].as_array().expect("choices") {
            let (text, end) = &mut all[choice["index"].as_u64().expect("an index") as usize];
            assert!(end.is_empty(), "more after the end: {choice}");
            text.push_str(
                choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default(),
            );
            end.push_str(choice["finish_reason"].as_str().unwrap_or_default());
        }
    }
    all
}

#[tokio::test]
async fn one_pair_of_legs_carries_all_choices_and_each_ends_for_itself() {
    for stream in [true, false] {
        let (cluster, mut prefill, mut decode) = Cluster::pair().await;
        let body = json!({"n": 4, "seed": 7, "stop": "END", "max_tokens": 9, "stream": stream});
        let response = cluster.chat(body);
        let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
        let asked =
            [&p, &d].map(|leg| leg.sampling.as_ref().map(|sampling| (sampling.choices, sampling.seed)));
        assert_eq!(asked, [Some((4, 7)), Some((4, 7))]);
        decode.of_choice((d.leg, 2), 1, "yz", None);
        for (choice, first) in ["a", "E", "x", "\0"].into_iter().enumerate() {
            let end = if choice == 3 { FinishReason::Stop } else { FinishReason::HandedOff };
            prefill.of_choice((p.leg, choice as u32), 0, first, Some(end));
        }
        // Choice 3 has ended with its first token: decode need not go on with it.
        let cancel = decode.cancelled().await;
        assert_eq!((cancel.leg, cancel.choice), (d.leg, Some(3)));
        decode.of_choice((d.leg, 1), 1, "NDmore", None);
        let cancel = decode.cancelled().await;
        assert_eq!((cancel.choice, cancel.reason.as_str()), (Some(1), "stop_string"));
        decode.of_choice((d.leg, 0), 1, "bc", Some(FinishReason::Length));
        decode.of_choice((d.leg, 2), 3, "w", Some(FinishReason::Stop));
        let body = response.await.expect("ends").text().await.expect("a body");
        let expected = [("abc", "length"), ("", "stop"), ("xyzw", "stop"), ("", "stop")];
        if stream {
            assert_eq!(streamed(&body, 4), expected.map(|(text, end)| (text.to_owned(), end.to_owned())));
        } else {
            let answer: Value = serde_json::from_str(&body).expect("is JSON");
            for (index, (text, end)) in expected.into_iter().enumerate() {
                let choice = &answer["choices"][index];
                assert_eq!(
                    (&choice["message"]["content"], &choice["finish_reason"]),
                    (&json!(text), &json!(end))
                );
                assert_eq!(choice["index"], index);
            }
            // "abc", "END", "xyzw" and the stop token: what follows the stop string came too late.
            assert_eq!(answer["usage"]["completion_tokens"], 3 + 3 + 4 + 1);
            assert_eq!(answer["usage"]["prompt_tokens"], 18);
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 5);
        }
        cluster.at_rest().await;
        assert!(prefill.is_quiet() && decode.is_quiet(), "nothing else was cancelled");
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_the_whole_leg_at_once() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"n": 3, "stream": true}));
    let dispatch = mixed.dispatch().await;
    mixed.of_choice((dispatch.leg, 0), 0, "a", Some(FinishReason::Stop));
    mixed.of_choice((dispatch.leg, 1), 0, "b", None);
    drop(response.await.expect("begins"));
    let cancel = mixed.cancelled().await;
    assert_eq!((cancel.leg, cancel.choice), (dispatch.leg, None));
    cluster.at_rest().await;
    assert!(mixed.is_quiet());
}

/// Twenty clients that leave while both legs are at work; half of the cancels are to be with both instances in a tenth of a
/// second, and none takes ten times as long.
#[tokio::test]
async fn every_leg_hears_soon_that_the_client_has_left() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let (mut times, within) = (Vec::new(), Duration::from_millis(100));
    for _ in 0..20 {
        let response = cluster.chat(json!({"stream": true}));
        let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
        response.abort();
        let left = Instant::now();
        assert_eq!((prefill.cancelled().await.leg, decode.cancelled().await.leg), (p.leg, d.leg));
        times.push(left.elapsed());
    }
    times.sort();
    assert!(times[10] <= within && times[19] <= 10 * within, "{times:?}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn one_choice_that_fails_fails_the_request() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"n": 2}));
    let dispatch = mixed.dispatch().await;
    mixed.of_choice((dispatch.leg, 1), 0, "b", None);
    mixed.fail(dispatch.leg, baton_proto::ErrorCode::KvExhausted);
    assert_eq!(response.await.expect("ends").status(), 503);
    assert_eq!(mixed.cancelled().await.leg, dispatch.leg);
    cluster.at_rest().await;
}

#[tokio::test]
async fn several_prompts_go_their_own_ways_and_count_their_choices_through() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let body = json!({"model": "tiny", "prompt": ["ab", "c"], "n": 2, "max_tokens": 2, "echo": true, "stream": true});
    let response = cluster.post("/v1/completions", body.to_string());
    let legs = [mixed.dispatch().await, mixed.dispatch().await];
    assert!(legs.iter().all(|leg| matches!(leg.work, Some(Work::Whole(_)))));
    assert_eq!((prompt_of(&legs[0]).len(), prompt_of(&legs[1]).len()), (2, 1));
    mixed.of_choice((legs[1].leg, 0), 0, "x", Some(FinishReason::Stop));
    mixed.of_choice((legs[0].leg, 1), 0, "pq", Some(FinishReason::Length));
    mixed.of_choice((legs[1].leg, 1), 0, "y", Some(FinishReason::Stop));
    mixed.of_choice((legs[0].leg, 0), 0, "rs", Some(FinishReason::Length));
    let body = response.await.expect("ends").text().await.expect("a body");
    let texts: Vec<String> = streamed(&body, 4).into_iter().map(|(text, _)| text).collect();
    assert_eq!(texts, ["abrs", "abpq", "cx", "cy"]);
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_prompt_that_is_placed_again_leaves_the_whole_requests_tokens_on_its_card() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let body = json!({"model": "tiny", "prompt": ["ab", "c"], "max_tokens": 1});
    let response = cluster.post("/v1/completions", body.to_string());
    let legs = [mixed.dispatch().await, mixed.dispatch().await];
    mixed.fail(legs[0].leg, baton_proto::ErrorCode::StaleEpoch);
    let again = mixed.dispatch().await;
    assert_eq!(again.prompt_tokens, legs[0].prompt_tokens);
    mixed.finish(legs[1].leg, 0, "y", FinishReason::Length);
    until("the other prompt's token is there", || {
        cluster.service.roster.list().iter().all(|card| card.completion_tokens() == 1)
    })
    .await;
    let cards = cluster.service.roster.list();
    assert!(matches!(cards[0].stage(), Stage::Placed { prompt_tokens: 3, .. }), "{:?}", cards[0].stage());
    mixed.finish(again.leg, 0, "x", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn more_choices_than_are_allowed_are_refused_by_name() {
    let (cluster, [_mixed]) =
        Cluster::start([("m", v1::Role::Mixed)], |config| config.limits.max_choices = 4).await;
    for n in [0, 5] {
        let response = cluster.chat(json!({"n": n})).await.expect("ends");
        assert_eq!(response.status(), 400);
        let body: Value = response.json().await.expect("JSON");
        assert_eq!(body["error"]["param"], "n");
        assert!(body["error"]["message"].as_str().expect("text").starts_with("n: must be"), "{body}");
    }
    cluster.at_rest().await;
}
