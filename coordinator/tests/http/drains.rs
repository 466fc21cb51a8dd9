//! Instances that drain, or are given another role: what takes long leaves them at once, and its client notices nothing.

use std::time::Duration;

use baton_coordinator::CoordinatorConfig;
use baton_proto::{ErrorCode, v1};
use serde_json::{Value, json};
use v1::{FinishReason, attach_response::Frame as Answer, dispatch::Work};

use crate::{
    scripted::{Cluster, Instance, PATIENCE, bytes, chat_text, consumed, events},
    stalls::either,
};

/// Everything that is not about to end is worth moving.
pub(crate) fn at_once(config: &mut CoordinatorConfig) {
    config.limits.request_timeout = PATIENCE;
    config.carry.move_after = Duration::ZERO;
}

pub(crate) fn drain(instance: &Instance) {
    let role = instance.role.into();
    instance.say(Answer::Role(v1::RoleChange { role, epoch: 1, phase: v1::Phase::Draining.into() }));
}

/// Whether a leg is to hand on what is cached, and by which transfer.
fn handing_on(dispatch: &v1::Dispatch) -> (bool, Vec<u8>) {
    match &dispatch.work {
        Some(Work::Prefill(work)) => (work.hand_on, work.transfer_id.to_vec()),
        other => panic!("{other:?}"),
    }
}

const ROLES: [(&str, v1::Role); 3] =
    [("p", v1::Role::Prefill), ("d0", v1::Role::Decode), ("d1", v1::Role::Decode)];

#[tokio::test]
async fn a_decode_that_drains_hands_on_what_it_has_to_another_that_goes_on_where_it_was() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, at_once).await;
    let response = cluster.chat(json!({"max_tokens": 6, "stream": true}));
    let first = prefill.dispatch().await;
    let (drained, other, taken) = either(&mut d0, &mut d1).await;
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    drained.tokens(taken.leg, 1, "bc");
    consumed(&cluster, 3).await;
    drain(drained);
    drained.tokens(taken.leg, 3, "d");
    // On one stream, so in this order: it has what it is to hand on when that is asked for.
    let handed = drained.dispatch().await;
    let cancel = drained.cancelled().await;
    assert_eq!((cancel.leg, cancel.reason.as_str()), (taken.leg, "placed_again"));
    let resumed = other.dispatch().await;
    let told = resumed.generated_tokens.clone();
    assert_eq!(told, bytes(&"abcd"[..told.len()]));
    assert_eq!((&handed.generated_tokens, &handed.sampling), (&told, &first.sampling));
    let (hands_on, transfer) = handing_on(&handed);
    let Some(Work::Prefill(to)) = &handed.work else { panic!("{:?}", handed.work) };
    let Some(Work::Decode(from)) = &resumed.work else { panic!("{:?}", resumed.work) };
    assert_eq!((hands_on, to.decode_instance.as_str()), (true, other.id.as_str()));
    assert_eq!((from.transfer_id.to_vec(), from.prefill_instance.as_str()), (transfer, drained.id.as_str()));
    assert_eq!((handing_on(&first).0, handed.role_epoch), (false, taken.role_epoch));
    // It had sent more before it read the cancel.
    drained.tokens(taken.leg, 4, "eX");
    let rest = &"abcdef"[told.len()..];
    drained.finish(handed.leg, told.len() as u32, &rest[..1], FinishReason::HandedOff);
    other.finish(resumed.leg, told.len() as u32 + 1, &rest[1..], FinishReason::Length);
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "abcdef");
    assert!(prefill.is_quiet(), "prefill was asked");
    let metrics = cluster.get("/metrics").await.text().await.expect("a body");
    assert!(metrics.contains("baton_coordinator_migrations_total{reason=\"unavailable\",model=\"tiny\"} 1"));
    assert!(metrics.contains("baton_coordinator_hand_ons_total{model=\"tiny\"} 1"));
    cluster.at_rest().await;
}

#[tokio::test]
async fn who_drains_before_it_has_the_cache_hands_nothing_on() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, at_once).await;
    let response = cluster.chat(json!({"max_tokens": 3, "stream": true}));
    let first = prefill.dispatch().await;
    let (drained, other, taken) = either(&mut d0, &mut d1).await;
    drain(drained);
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    assert_eq!(drained.cancelled().await.leg, taken.leg);
    let (again, resumed) = (prefill.dispatch().await, other.dispatch().await);
    assert_eq!((&resumed.generated_tokens, handing_on(&again).0), (&bytes("a"), false));
    prefill.finish(again.leg, 1, "b", FinishReason::HandedOff);
    other.finish(resumed.leg, 2, "c", FinishReason::Length);
    let body = response.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "abc");
    assert!(drained.is_quiet());
    cluster.at_rest().await;
}

#[tokio::test]
async fn an_answer_that_is_read_in_batches_leaves_a_drain_at_once() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, at_once).await;
    let response = cluster.chat(json!({"max_tokens": 6}));
    let first = prefill.dispatch().await;
    let (drained, other, taken) = either(&mut d0, &mut d1).await;
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    drained.tokens(taken.leg, 1, "b");
    consumed(&cluster, 2).await;
    // Too few to be read at once, and nothing comes behind them.
    drained.tokens(taken.leg, 2, "c");
    drain(drained);
    let (handed, resumed) = (drained.dispatch().await, other.dispatch().await);
    assert_eq!((handing_on(&handed).0, &resumed.generated_tokens), (true, &bytes("abc")));
    assert_eq!(drained.cancelled().await.leg, taken.leg);
    drained.finish(handed.leg, 3, "d", FinishReason::HandedOff);
    other.finish(resumed.leg, 4, "ef", FinishReason::Length);
    let body = response.await.expect("ends").text().await.expect("a body");
    assert!(body.contains("abcdef"), "{body}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_prompt_that_waits_on_an_instance_that_drains_goes_to_another() {
    let roles = [("a", v1::Role::Prefill), ("b", v1::Role::Prefill), ("d", v1::Role::Decode)];
    for stream in [true, false] {
        let (cluster, [mut a, mut b, mut decode]) = Cluster::start(roles, at_once).await;
        let response = cluster.chat(json!({"max_tokens": 3, "stream": stream}));
        let (drained, other, waits) = either(&mut a, &mut b).await;
        let first = decode.dispatch().await;
        drain(drained);
        let cancel = drained.cancelled().await;
        assert_eq!((cancel.leg, cancel.reason.as_str()), (waits.leg, "placed_again"));
        let (computes, generates) = (other.dispatch().await, decode.dispatch().await);
        assert_eq!(decode.cancelled().await.leg, first.leg);
        other.finish(computes.leg, 0, "a", FinishReason::HandedOff);
        decode.finish(generates.leg, 1, "bc", FinishReason::Length);
        let body = response.await.expect("ends").text().await.expect("a body");
        assert!(if stream { chat_text(&events(&body)) == "abc" } else { body.contains("abc") }, "{body}");
        cluster.at_rest().await;
    }
    let (cluster, [mut a, mut b]) = Cluster::start(["a", "b"].map(|id| (id, v1::Role::Mixed)), at_once).await;
    let response = cluster.chat(json!({"max_tokens": 3}));
    let (drained, other, waits) = either(&mut a, &mut b).await;
    drain(drained);
    assert_eq!(drained.cancelled().await.leg, waits.leg);
    let placed = other.dispatch().await;
    other.finish(placed.leg, 0, "abc", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "abc");
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_prompt_stays_with_an_instance_that_drains_if_it_is_soon_done_or_nobody_else_is_there() {
    let two = [("a", v1::Role::Prefill), ("b", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let one = [("a", v1::Role::Prefill), ("b", v1::Role::Decode), ("d", v1::Role::Decode)];
    for (roles, move_after) in [(two, PATIENCE * 100), (one, Duration::ZERO)] {
        let (cluster, [mut a, mut b, mut d]) = Cluster::start(roles, |config| {
            at_once(config);
            config.carry.move_after = move_after;
        })
        .await;
        let response = cluster.chat(json!({"max_tokens": 2}));
        let ((prefill, other, first), taken) = if roles[1].1 == v1::Role::Prefill {
            (either(&mut a, &mut b).await, d.dispatch().await)
        } else {
            let first = a.dispatch().await;
            let (decode, _, taken) = either(&mut b, &mut d).await;
            ((&mut a, decode, first), taken)
        };
        drain(prefill);
        tokio::time::sleep(Duration::from_millis(300)).await;
        prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
        let decode = if roles[1].1 == v1::Role::Prefill { &mut d } else { other };
        decode.finish(taken.leg, 1, "b", FinishReason::Length);
        let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
        assert_eq!(answer["choices"][0]["message"]["content"], "ab");
        assert!(a.is_quiet() && b.is_quiet() && d.is_quiet(), "it was placed again");
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn a_prompt_that_waits_leaves_once_somebody_is_there_who_has_less_to_do() {
    let roles = [("a", v1::Role::Prefill), ("b", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut a, mut b, mut d]) = Cluster::start(roles, at_once).await;
    let response = cluster.chat(json!({"max_tokens": 2}));
    let ((drained, other, first), taken) = (either(&mut a, &mut b).await, d.dispatch().await);
    let busy =
        |tokens| Answer::Load(v1::InstanceLoad { queued_prefill_tokens: tokens, ..Default::default() });
    other.say(busy(1 << 20));
    // The board has heard of it before the other says that it drains.
    tokio::time::sleep(Duration::from_millis(100)).await;
    drain(drained);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(drained.is_quiet() && other.is_quiet() && d.is_quiet(), "it would wait longer there");
    other.say(busy(0));
    tokio::time::sleep(Duration::from_millis(100)).await;
    drained.say(busy(18));
    assert_eq!(drained.cancelled().await.leg, first.leg);
    let (computes, generates) = (other.dispatch().await, d.dispatch().await);
    assert_eq!(d.cancelled().await.leg, taken.leg);
    other.finish(computes.leg, 0, "a", FinishReason::HandedOff);
    d.finish(generates.leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn what_is_not_handed_on_after_all_is_computed_again_and_costs_no_attempt() {
    // It has not the cache, is of an earlier version, or drains no more; or its time is over amid the handoff.
    let refusals = [(ErrorCode::Unavailable, ""), (ErrorCode::StaleEpoch, ""), (ErrorCode::Unavailable, "c")];
    for (code, begun) in refusals {
        let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, at_once).await;
        let response = cluster.chat(json!({"max_tokens": 5, "stream": true}));
        let first = prefill.dispatch().await;
        let (drained, other, taken) = either(&mut d0, &mut d1).await;
        prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
        drained.tokens(taken.leg, 1, "b");
        consumed(&cluster, 2).await;
        drain(drained);
        drained.tokens(taken.leg, 2, "");
        let handed = drained.dispatch().await;
        assert!(handing_on(&handed).0);
        assert_eq!((drained.cancelled().await.leg, &handed.generated_tokens), (taken.leg, &bytes("ab")));
        let in_vain = other.dispatch().await;
        drained.tokens(handed.leg, 2, begun);
        drained.fail(handed.leg, code);
        if !begun.is_empty() {
            other.fail(in_vain.leg, ErrorCode::Cancelled);
        } else {
            assert_eq!(other.cancelled().await.leg, in_vain.leg);
        }
        let so_far = format!("ab{begun}");
        // One attempt fails, as it may.
        let (failing, _) = (prefill.dispatch().await, other.dispatch().await);
        assert_eq!((&failing.generated_tokens, handing_on(&failing).0), (&bytes(&so_far), false));
        prefill.fail(failing.leg, ErrorCode::HandoffFailed);
        other.cancelled().await;
        let (again, resumed) = (prefill.dispatch().await, other.dispatch().await);
        let rest = &"abcde"[so_far.len()..];
        prefill.finish(again.leg, so_far.len() as u32, &rest[..1], FinishReason::HandedOff);
        other.finish(resumed.leg, so_far.len() as u32 + 1, &rest[1..], FinishReason::Length);
        let body = response.await.expect("ends").text().await.expect("a body");
        assert_eq!(chat_text(&events(&body)), "abcde", "{code:?} {begun}");
        assert!(drained.is_quiet(), "it was asked again");
        let metrics = cluster.get("/metrics").await.text().await.expect("a body");
        assert!(metrics.contains("baton_coordinator_open_breakers 0"));
        cluster.at_rest().await;
    }
}

/// All of it has come, and only the word that it is all has not: nothing of it goes elsewhere.
#[tokio::test]
async fn an_answer_that_is_complete_leaves_nobody() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, at_once).await;
    let response = cluster.chat(json!({"max_tokens": 6, "stream": true, "stop_token_ids": [98]}));
    let first = prefill.dispatch().await;
    let (drained, other, taken) = either(&mut d0, &mut d1).await;
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    drained.tokens(taken.leg, 1, "b");
    consumed(&cluster, 2).await;
    drain(drained);
    let cancel = drained.cancelled().await;
    assert_eq!((cancel.leg, cancel.reason.as_str()), (taken.leg, "answer_complete"));
    let body = response.await.expect("ends").text().await.expect("a body");
    assert!(body.contains(r#""finish_reason":"stop""#), "{body}");
    assert!(prefill.is_quiet() && other.is_quiet(), "it was placed again");
    cluster.at_rest().await;
}

#[tokio::test]
async fn of_several_choices_each_is_handed_on_by_itself() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, at_once).await;
    let response = cluster.chat(json!({"n": 3, "seed": 7, "max_tokens": 4}));
    let first = prefill.dispatch().await;
    let (drained, other, taken) = either(&mut d0, &mut d1).await;
    for (choice, token) in [(0, "a"), (1, "x"), (2, "1")] {
        let end = Some(FinishReason::HandedOff);
        prefill.of_choice((first.leg, choice), 0, token, end);
    }
    drained.of_choice((taken.leg, 0), 1, "b", None);
    drained.of_choice((taken.leg, 1), 1, "y", Some(FinishReason::Stop));
    consumed(&cluster, 5).await;
    drain(drained);
    drained.of_choice((taken.leg, 0), 2, "c", None);
    // Nobody reads single tokens of an answer that is not streamed.
    drained.of_choice((taken.leg, 0), 3, "", None);
    for (seed, generated, rest) in [(7, "abc", "d"), (9, "1", "234")] {
        let (handed, resumed) = (drained.dispatch().await, other.dispatch().await);
        let sampling = handed.sampling.as_ref().expect("sampling");
        assert_eq!((sampling.seed, sampling.choices, handing_on(&handed).0), (seed, 1, true));
        // The last of choice 0 may have come while it moved.
        let at = handed.generated_tokens.len();
        assert!(bytes(generated).starts_with(&handed.generated_tokens));
        let all = format!("{generated}{rest}");
        drained.finish(handed.leg, at as u32, &all[at..=at], FinishReason::HandedOff);
        other.finish(resumed.leg, at as u32 + 1, &all[at + 1..], FinishReason::Length);
    }
    assert_eq!(drained.cancelled().await.leg, taken.leg);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    for (index, text) in ["abcd", "xy", "1234"].into_iter().enumerate() {
        assert_eq!(answer["choices"][index]["message"]["content"], text);
    }
    assert_eq!(answer["usage"]["completion_tokens"], 4 + 2 + 4);
    assert!(prefill.is_quiet());
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_mixed_instance_that_drains_hands_on_to_another() {
    let roles = [("a", v1::Role::Mixed), ("b", v1::Role::Mixed)];
    let (cluster, [mut a, mut b]) = Cluster::start(roles, at_once).await;
    let response = cluster.chat(json!({"max_tokens": 4}));
    let (drained, other, taken) = either(&mut a, &mut b).await;
    drained.begin(taken.leg, "ab", 3);
    consumed(&cluster, 2).await;
    drain(drained);
    drained.tokens(taken.leg, 2, "");
    let (handed, resumed) = (drained.dispatch().await, other.dispatch().await);
    assert!(handing_on(&handed).0 && matches!(resumed.work, Some(Work::Decode(_))));
    drained.finish(handed.leg, 2, "c", FinishReason::HandedOff);
    other.finish(resumed.leg, 3, "d", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "abcd");
    // What is handed on was all cached there; the client's request had 3.
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    cluster.at_rest().await;
}

#[tokio::test]
async fn what_nobody_else_can_take_or_is_nearly_done_stays() {
    for (other, move_after) in [(v1::Role::Prefill, Duration::ZERO), (v1::Role::Decode, PATIENCE * 100)] {
        let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode), ("x", other)];
        let (cluster, [mut prefill, mut decode, mut x]) = Cluster::start(roles, |config| {
            at_once(config);
            config.carry.move_after = move_after;
        })
        .await;
        let response = cluster.chat(json!({"max_tokens": 4}));
        let (drained, taken) = if other == v1::Role::Prefill {
            let (prefill, _, first) = either(&mut prefill, &mut x).await;
            prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
            let taken = decode.dispatch().await;
            (&mut decode, taken)
        } else {
            let first = prefill.dispatch().await;
            prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
            let (drained, _, taken) = either(&mut decode, &mut x).await;
            (drained, taken)
        };
        drain(drained);
        drained.tokens(taken.leg, 1, "b");
        // It is asked again after a second.
        tokio::time::sleep(Duration::from_millis(1200)).await;
        drained.tokens(taken.leg, 2, "c");
        drained.finish(taken.leg, 3, "d", FinishReason::Length);
        assert_eq!(response.await.expect("ends").status(), 200, "{other:?}");
        assert!(drained.is_quiet(), "it was cancelled");
        cluster.at_rest().await;
    }
}
