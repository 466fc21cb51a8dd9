//! Instances that drain, or are given another role: what takes long leaves them at once, and its client notices nothing.

use std::time::Duration;

use baton_coordinator::CoordinatorConfig;
use baton_proto::v1;
use serde_json::json;
use v1::{FinishReason, attach_response::Frame as Answer};

use crate::{
    scripted::{Cluster, Instance, PATIENCE, chat_text, events, until},
    stalls::either,
};

/// Everything that is not about to end is worth moving.
fn at_once(config: &mut CoordinatorConfig) {
    config.limits.request_timeout = PATIENCE;
    config.carry.move_after = Duration::ZERO;
}

fn drain(instance: &Instance) {
    let role = instance.role.into();
    instance.say(Answer::Role(v1::RoleChange { role, epoch: 1, phase: v1::Phase::Draining.into() }));
}

#[tokio::test]
async fn an_answer_leaves_a_decode_that_drains_and_goes_on_where_it_was() {
    let roles = [("p", v1::Role::Prefill), ("d0", v1::Role::Decode), ("d1", v1::Role::Decode)];
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(roles, at_once).await;
    // Drained in mid answer, and before the cache has come.
    for before in [false, true] {
        let response = cluster.chat(json!({"max_tokens": 6, "stream": true}));
        let first = prefill.dispatch().await;
        let (drained, other, taken) = either(&mut d0, &mut d1).await;
        if before {
            drain(drained);
        }
        prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
        drained.tokens(taken.leg, 1, "bc");
        if !before {
            until("it is told", || {
                cluster.service.roster.list().iter().any(|card| card.completion_tokens() == 3)
            })
            .await;
            drain(drained);
            drained.tokens(taken.leg, 3, "d");
        }
        let cancel = drained.cancelled().await;
        assert_eq!((cancel.leg, cancel.reason.as_str()), (taken.leg, "placed_again"));
        let (again, resumed) = (prefill.dispatch().await, other.dispatch().await);
        let told = resumed.generated_tokens.clone();
        assert_eq!(told, &b"abcd".map(u32::from)[..told.len()]);
        assert_eq!((&again.generated_tokens, &again.sampling), (&told, &first.sampling));
        // It had sent more before it read the cancel.
        drained.tokens(taken.leg, 3, "dX");
        let rest = &"abcdef"[told.len()..];
        prefill.finish(again.leg, told.len() as u32, &rest[..1], FinishReason::HandedOff);
        other.finish(resumed.leg, told.len() as u32 + 1, &rest[1..], FinishReason::Length);
        let body = response.await.expect("ends").text().await.expect("a body");
        assert_eq!(chat_text(&events(&body)), "abcdef");
        let ready = v1::RoleChange { role: drained.role.into(), epoch: 1, phase: v1::Phase::Ready.into() };
        drained.say(Answer::Role(ready));
        until("both decode again", || {
            let links = &cluster.service.placer.links;
            links.get(&drained.id).is_some_and(|link| !link.drains())
        })
        .await;
    }
    let metrics = cluster.get("/metrics").await.text().await.expect("a body");
    assert!(metrics.contains("baton_coordinator_migrations_total{reason=\"unavailable\",model=\"tiny\"} 2"));
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
