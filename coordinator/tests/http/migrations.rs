//! Answers that one instance begins and another ends: the client sees a pause, and nothing lost, repeated or changed.

use std::time::Duration;

use crate::scripted::{Cluster, Instance, PATIENCE, bytes, chat_text, consumed, events};
use baton_coordinator::CoordinatorConfig;
use baton_proto::{ErrorCode, v1};
use serde_json::{Value, json};
use v1::{FinishReason, attach_response::Frame as Answer, dispatch::Work};

/// What the next of two instances is sent, and which of them it is.
async fn either(a: &mut Instance, b: &mut Instance) -> (usize, v1::Dispatch) {
    tokio::select! {
        dispatch = a.dispatch() => (0, dispatch),
        dispatch = b.dispatch() => (1, dispatch),
    }
}

/// How many answers have gone on elsewhere for this reason.
pub(crate) async fn migrations(cluster: &Cluster, reason: ErrorCode) -> Option<String> {
    let metrics = cluster.get("/metrics").await.text().await.expect("a body");
    let name = format!("baton_coordinator_migrations_total{{reason=\"{}\",model=\"tiny\"}} ", reason.name());
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map(str::to_owned)
}

/// A request that nobody answers ends with the test's patience.
fn in_time(config: &mut CoordinatorConfig) {
    config.limits.request_timeout = PATIENCE;
}

const MIXED: [(&str, v1::Role); 2] = [("a", v1::Role::Mixed), ("b", v1::Role::Mixed)];

#[tokio::test]
async fn decode_lost_amid_a_half_matched_stop_string_is_gone_on_from() {
    let roles = [("p", v1::Role::Prefill), ("d0", v1::Role::Decode), ("d1", v1::Role::Decode)];
    for stream in [true, false] {
        let (cluster, [mut prefill, d0, d1]) = Cluster::start(roles, in_time).await;
        let mut decodes = [d0, d1];
        let mut body = json!({"stop": "END", "max_tokens": 9, "stream": stream});
        if stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        let response = cluster.chat(body);
        let first = prefill.dispatch().await;
        let [d0, d1] = &mut decodes;
        let (at, taken) = either(d0, d1).await;
        assert_eq!((&first.generated_tokens, &taken.generated_tokens), (&vec![], &vec![]));
        prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
        decodes[at].tokens(taken.leg, 1, "bE");
        consumed(&cluster, 3).await;
        decodes[at].kill().await;

        let again = prefill.dispatch().await;
        let other = &mut decodes[1 - at];
        let resumed = other.dispatch().await;
        for dispatch in [&again, &resumed] {
            assert_eq!(dispatch.prompt_tokens, first.prompt_tokens);
            assert_eq!(dispatch.generated_tokens, bytes("abE"));
            assert_eq!(dispatch.sampling, first.sampling, "the seed and all limits are the same");
        }
        let transfer = |dispatch: &v1::Dispatch| match &dispatch.work {
            Some(Work::Prefill(work)) => work.transfer_id.clone(),
            other => panic!("{other:?}"),
        };
        assert_ne!(transfer(&first), transfer(&again), "an attempt has a transfer of its own");
        let (placings, _) = cluster.service.roster.list()[0].placings();
        let because = placings.iter().map(|placing| placing.because.as_ref().map(|error| error.code));
        assert_eq!(because.collect::<Vec<_>>(), [None, Some(ErrorCode::InstanceLost)]);
        // Now all of the prompt is cached, which is the request's own doing.
        prefill.hand_on(again.leg, 3, "N", 16);
        other.tokens(resumed.leg, 4, "Dx");
        assert_eq!(other.cancelled().await.reason, "stop_string");

        let body = response.await.expect("ends").text().await.expect("a body");
        let usage = json!({"prompt_tokens": 18, "completion_tokens": 5, "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 5}});
        if stream {
            let events = events(&body);
            assert_eq!(chat_text(&events), "ab");
            assert!(!body.contains("error") && body.contains(r#""finish_reason":"stop""#), "{body}");
            let last: Value = serde_json::from_str(events[events.len() - 2]).expect("is JSON");
            assert_eq!(last["usage"], usage);
        } else {
            let answer: Value = serde_json::from_str(&body).expect("is JSON");
            assert_eq!(answer["choices"][0]["message"]["content"], "ab");
            assert_eq!(answer["usage"], usage);
        }
        assert_eq!(migrations(&cluster, ErrorCode::InstanceLost).await.as_deref(), Some("1"));
        let metrics = cluster.get("/metrics").await.text().await.expect("a body");
        let pauses = "baton_coordinator_migration_pause_seconds_count{model=\"tiny\"} 1";
        assert!(metrics.lines().any(|line| line == pauses), "{metrics}");
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn who_is_said_to_be_lost_is_not_asked_again_while_others_are_there() {
    let roles = [("p0", v1::Role::Prefill), ("p1", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut p0, mut p1, mut decode]) = Cluster::start(roles, in_time).await;
    for _ in 0..4 {
        let response = cluster.chat(json!({"max_tokens": 3}));
        let (at, first) = either(&mut p0, &mut p1).await;
        let (silent, other) = if at == 0 { (&mut p0, &mut p1) } else { (&mut p1, &mut p0) };
        let taken = decode.dispatch().await;
        decode.fail(taken.leg, ErrorCode::InstanceLost);
        assert_eq!(silent.cancelled().await.leg, first.leg);
        let again = other.dispatch().await;
        let resumed = decode.dispatch().await;
        other.finish(again.leg, 0, "a", FinishReason::HandedOff);
        decode.finish(resumed.leg, 1, "bc", FinishReason::Length);
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    assert_eq!(migrations(&cluster, ErrorCode::InstanceLost).await, None, "none of them had begun");
    cluster.at_rest().await;
}

#[tokio::test]
async fn tokens_repeated_or_on_their_way_are_told_once_with_their_log_probabilities() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, in_time).await;
    let response = cluster.chat(json!({"logprobs": true, "max_tokens": 5}));
    let scores = |text: &str| -> Vec<v1::TokenLogprobs> {
        let score = |byte| v1::TokenLogprobs { logprob: -f32::from(byte), ..v1::TokenLogprobs::default() };
        text.bytes().map(score).collect()
    };
    let (at, first) = either(&mut a, &mut b).await;
    let (lost, other) = if at == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
    // Damage is told by one that lives: another is asked all the same.
    lost.scored(first.leg, 0, "ab", scores("ab"), None);
    lost.fail(first.leg, ErrorCode::KvDamaged);
    let resumed = other.dispatch().await;
    assert_eq!(resumed.generated_tokens, bytes("ab"));
    other.scored(resumed.leg, 1, "bcd", scores("bcd"), None);
    other.scored(resumed.leg, 4, "e", scores("e"), None);
    other.finish(resumed.leg, 5, "", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["message"]["content"], &choice["finish_reason"]),
        (&json!("abcde"), &json!("length"))
    );
    let told: Vec<_> = choice["logprobs"]["content"]
        .as_array()
        .expect("log probabilities")
        .iter()
        .map(|token| (token["token"].as_str().unwrap_or_default(), token["logprob"].as_f64()))
        .collect();
    let expected = ["a", "b", "c", "d", "e"].map(|token| (token, Some(-f64::from(token.as_bytes()[0]))));
    assert_eq!(told, expected);
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    assert_eq!(migrations(&cluster, ErrorCode::KvDamaged).await.as_deref(), Some("1"));
    cluster.at_rest().await;
}

#[tokio::test]
async fn of_several_choices_those_that_have_not_ended_go_on_each_by_itself() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, in_time).await;
    let response = cluster.chat(json!({"n": 4, "seed": 7, "max_tokens": 4}));
    let (at, first) = either(&mut a, &mut b).await;
    let (lost, other) = if at == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
    lost.of_choice((first.leg, 0), 0, "x", Some(FinishReason::Stop));
    lost.of_choice((first.leg, 1), 0, "yz", None);
    lost.of_choice((first.leg, 2), 0, "1234", None);
    consumed(&cluster, 1 + 2 + 4).await;
    lost.kill().await;
    // Choice 2 has all of its tokens already; nothing has come of choice 3.
    for (seed, generated, rest) in [(8, "yz", "w"), (10, "", "v")] {
        let resumed = other.dispatch().await;
        let sampling = resumed.sampling.as_ref().expect("sampling");
        assert_eq!((sampling.seed, sampling.choices, sampling.max_tokens), (seed, 1, 4));
        assert_eq!(resumed.generated_tokens, bytes(generated));
        other.of_choice((resumed.leg, 0), generated.len() as u32, rest, Some(FinishReason::Stop));
    }
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    let expected = [("x", "stop"), ("yzw", "stop"), ("1234", "length"), ("v", "stop")];
    for (index, (text, end)) in expected.into_iter().enumerate() {
        let choice = &answer["choices"][index];
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(text), &json!(end)));
    }
    assert_eq!(answer["usage"]["completion_tokens"], 1 + 3 + 4 + 1);
    cluster.at_rest().await;
    assert!(other.is_quiet(), "nothing else was sent, or cancelled");
}

/// An instance's fault costs the model's budget one attempt, whatever it was at; ten are saved up for a quiet model.
#[tokio::test]
async fn one_fault_is_one_attempt_for_all_choices() {
    let (cluster, [mut a, mut b]) = Cluster::start(MIXED, in_time).await;
    let response = cluster.chat(json!({"n": 16, "max_tokens": 2}));
    let (at, first) = either(&mut a, &mut b).await;
    let (bad, other) = if at == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
    (0..16).for_each(|choice| bad.of_choice((first.leg, choice), 0, "x", None));
    consumed(&cluster, 16).await;
    bad.fail(first.leg, ErrorCode::Internal);
    for _ in 0..16 {
        let resumed = other.dispatch().await;
        other.of_choice((resumed.leg, 0), 1, "y", Some(FinishReason::Length));
    }
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 16);
    assert!(choices.iter().all(|choice| choice["message"]["content"] == "xy"), "{answer}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn an_answer_that_lacks_only_its_end_is_not_sent_anywhere() {
    for (text, end) in [("ab\0", "stop"), ("abc", "length")] {
        let (cluster, [mut a, mut b]) = Cluster::start(MIXED, in_time).await;
        let response = cluster.chat(json!({"max_tokens": 3}));
        let (at, first) = either(&mut a, &mut b).await;
        let (lost, other) = if at == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        lost.tokens(first.leg, 0, text);
        consumed(&cluster, 3).await;
        lost.kill().await;
        let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
        assert_eq!(answer["choices"][0]["message"]["content"], text.trim_end_matches('\0'));
        assert_eq!(answer["choices"][0]["finish_reason"], end);
        cluster.at_rest().await;
        assert!(other.is_quiet());
    }
}

#[tokio::test]
async fn refusals_cost_nothing_but_time() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        in_time(config);
        config.carry.patience = PATIENCE;
    })
    .await;
    let response = cluster.chat(json!({"max_tokens": 4, "stream": true}));
    for (generated, code) in [("", ErrorCode::Unavailable), ("ab", ErrorCode::QueueFull)] {
        for _ in 0..4 {
            let refused = mixed.dispatch().await;
            assert_eq!(refused.generated_tokens, bytes(generated));
            mixed.fail(refused.leg, code);
        }
        let begun = mixed.dispatch().await;
        mixed.tokens(begun.leg, generated.len() as u32, if generated.is_empty() { "ab" } else { "c" });
        // It drains, and its time is over: that is no refusal.
        mixed.fail(begun.leg, ErrorCode::Unavailable);
    }
    let last = mixed.dispatch().await;
    mixed.finish(last.leg, 3, "d", FinishReason::Length);
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "abcd");
    assert!(!body.contains("error"), "{body}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn the_patience_for_refusals_begins_anew_with_each_attempt_that_serves() {
    let patience = Duration::from_millis(200);
    let (cluster, [a, b]) = Cluster::start(MIXED, |config| {
        in_time(config);
        config.carry.patience = patience;
        config.carry.move_after = Duration::ZERO;
    })
    .await;
    let mut both = [a, b];
    let response = cluster.chat(json!({"max_tokens": 100, "stream": true}));
    let [a, b] = &mut both;
    let (at, refused) = either(a, b).await;
    both[at].fail(refused.leg, ErrorCode::Unavailable);
    let [a, b] = &mut both;
    let (at, begun) = either(a, b).await;
    both[at].tokens(begun.leg, 0, "ab");
    consumed(&cluster, 2).await;
    tokio::time::sleep(patience * 2).await;
    // It drains, so that the answer leaves, and the other refuses it at first.
    both[at].say(Answer::Role(v1::RoleChange {
        role: v1::Role::Mixed.into(),
        epoch: 1,
        phase: v1::Phase::Draining.into(),
    }));
    both[at].tokens(begun.leg, 2, "c");
    let refused = both[1 - at].dispatch().await;
    both[1 - at].fail(refused.leg, ErrorCode::Unavailable);
    let last = both[1 - at].dispatch().await;
    assert_eq!(last.generated_tokens, bytes("abc"));
    both[1 - at].finish(last.leg, 3, "d", FinishReason::Stop);
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "abcd");
    assert!(!body.contains("error"), "{body}");
}

#[tokio::test]
async fn whoever_keeps_a_request_for_long_has_not_refused_it() {
    let patience = Duration::from_millis(500);
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        in_time(config);
        config.carry.patience = patience;
    })
    .await;
    let response = cluster.chat(json!({"max_tokens": 3}));
    let refused = mixed.dispatch().await;
    mixed.fail(refused.leg, ErrorCode::Unavailable);
    // It waits there, and nothing of it is computed before the instance drains.
    let kept = mixed.dispatch().await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    mixed.fail(kept.leg, ErrorCode::Unavailable);
    let again = mixed.dispatch().await;
    mixed.finish(again.leg, 0, "abc", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    // Refused again and again it is told so.
    let response = cluster.chat(json!({"max_tokens": 3}));
    let began = std::time::Instant::now();
    while began.elapsed() < patience * 2 {
        let Ok(refused) = tokio::time::timeout(patience, mixed.dispatch()).await else { break };
        mixed.fail(refused.leg, ErrorCode::Unavailable);
    }
    assert_eq!(response.await.expect("ends").status(), 503);
}

#[tokio::test]
async fn time_that_runs_out_while_another_place_is_looked_for_is_what_is_told() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        config.limits.request_timeout = Duration::from_millis(300);
        config.carry.patience = PATIENCE;
    })
    .await;
    let response = cluster.chat(json!({"max_tokens": 3}));
    mixed.dispatch().await;
    mixed.kill().await;
    let response = response.await.expect("ends");
    assert_eq!((response.status().as_u16(), response.headers().get("retry-after")), (504, None));
    let body: Value = response.json().await.expect("is JSON");
    assert_eq!(body["error"]["code"], "deadline_exceeded");
}

#[tokio::test]
async fn attempts_that_bring_nothing_and_failures_in_all_are_bounded() {
    let error_of = |body: &str| -> Value {
        let events = events(body);
        serde_json::from_str::<Value>(events.last().expect("events")).expect("is JSON")["error"]["code"]
            .clone()
    };
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], in_time).await;
    // A token, then nothing twice.
    let response = cluster.chat(json!({"stream": true}));
    for text in ["a", "", ""] {
        let dispatch = mixed.dispatch().await;
        mixed.tokens(dispatch.leg, 0, text);
        mixed.fail(dispatch.leg, ErrorCode::HandoffFailed);
    }
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!((chat_text(&events(&body)).as_str(), error_of(&body)), ("a", json!("handoff_failed")));
    cluster.at_rest().await;
    // A token, then lost with an instance four times.
    let response = cluster.chat(json!({"stream": true}));
    for text in ["a", "", "", "", ""] {
        let dispatch = mixed.dispatch().await;
        mixed.tokens(dispatch.leg, 0, text);
        mixed.fail(dispatch.leg, ErrorCode::InstanceLost);
    }
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!((chat_text(&events(&body)).as_str(), error_of(&body)), ("a", json!("instance_lost")));
    cluster.at_rest().await;
    // Each brings one more, and fails.
    let response = cluster.chat(json!({"stream": true}));
    for position in 0..8 {
        let dispatch = mixed.dispatch().await;
        mixed.tokens(dispatch.leg, position, "x");
        mixed.fail(dispatch.leg, ErrorCode::InstanceLost);
    }
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!((chat_text(&events(&body)).as_str(), error_of(&body)), ("xxxxxxxx", json!("instance_lost")));
    cluster.at_rest().await;
    assert!(mixed.is_quiet());
}
