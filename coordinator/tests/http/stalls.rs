//! Instances that hold their streams and answer, and do not get on with what they were given.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use baton_coordinator::CoordinatorConfig;
use baton_proto::v1;
use parking_lot::Mutex;
use serde_json::json;
use tokio_util::task::AbortOnDropHandle;
use v1::{FinishReason, attach_response::Frame as Answer};

use crate::scripted::{Cluster, Instance, PATIENCE, chat_text, events, until};

const ROLES: [(&str, v1::Role); 3] =
    [("p", v1::Role::Prefill), ("d0", v1::Role::Decode), ("d1", v1::Role::Decode)];
/// From when an instance computes nothing until its requests are to be elsewhere; three seconds are allowed for.
const MOVED_WITHIN: Duration = Duration::from_secs(5);

/// Tells an instance's load several times a second.
struct Beats {
    load: Arc<Mutex<v1::InstanceLoad>>,
    _task: AbortOnDropHandle<()>,
}

impl Beats {
    fn of(instance: &Instance, load: v1::InstanceLoad) -> Self {
        let load = Arc::new(Mutex::new(load));
        let (told, say) = (load.clone(), instance.voice());
        let tell = async move {
            loop {
                say(Answer::Load(*told.lock()));
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        Self { load, _task: AbortOnDropHandle::new(tokio::spawn(tell)) }
    }
}

/// A request that nobody answers ends with the test's patience.
fn in_time(config: &mut CoordinatorConfig) {
    config.limits.request_timeout = PATIENCE;
    config.limits.placement_timeout = PATIENCE;
    config.carry.patience = PATIENCE;
}

/// It runs a sequence, and has taken in all that it was sent.
fn runs(progress: u64) -> v1::InstanceLoad {
    v1::InstanceLoad { progress, running_sequences: 1, seen_leg: Some(u64::MAX), ..Default::default() }
}

/// The one of two that is sent something first, the other, and what.
pub(crate) async fn either<'a>(
    a: &'a mut Instance,
    b: &'a mut Instance,
) -> (&'a mut Instance, &'a mut Instance, v1::Dispatch) {
    tokio::select! {
        dispatch = a.dispatch() => (a, b, dispatch),
        dispatch = b.dispatch() => (b, a, dispatch),
    }
}

#[tokio::test]
async fn what_a_stuck_instance_has_goes_on_elsewhere_and_nothing_more_comes_to_it_until_it_gets_on() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, in_time).await;
    // Two answers on it: one that was begun, and one whose cache is on its way.
    let begun = cluster.chat(json!({"max_tokens": 4, "stream": true}));
    let first = prefill.dispatch().await;
    let (stuck, well, taken) = either(&mut d0, &mut d1).await;
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    stuck.tokens(taken.leg, 1, "b");
    until("it is told", || cluster.service.roster.list().iter().any(|card| card.completion_tokens() == 2))
        .await;
    let beats = Beats::of(stuck, runs(7));
    let since = Instant::now();

    let cancel = stuck.cancelled().await;
    assert_eq!((cancel.leg, cancel.reason.as_str(), cancel.choice), (taken.leg, "stuck", None));
    let (again, resumed) = (prefill.dispatch().await, well.dispatch().await);
    let moved = since.elapsed();
    assert!(moved > Duration::from_secs(3) && moved < MOVED_WITHIN, "after {moved:?}");
    assert_eq!(resumed.generated_tokens, b"ab".map(u32::from));
    prefill.finish(again.leg, 2, "c", FinishReason::HandedOff);
    well.finish(resumed.leg, 3, "d", FinishReason::Length);
    let body = begun.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "abcd");

    // It stays left out for longer than a breaker that is open for the first time would keep it.
    let mut served = async |other: &mut Instance| {
        let response = cluster.chat(json!({"max_tokens": 2}));
        let (p, d) = (prefill.dispatch().await, other.dispatch().await);
        prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
        other.finish(d.leg, 1, "b", FinishReason::Length);
        assert_eq!(response.await.expect("ends").status(), 200);
    };
    let until_then = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until_then {
        served(well).await;
    }
    assert!(stuck.is_quiet(), "it was given a request though it is stuck");
    // What it says after all comes too late. It is tried again once it gets on.
    stuck.tokens(taken.leg, 2, "xy");
    *beats.load.lock() = v1::InstanceLoad { running_sequences: 0, ..runs(8) };
    let metrics = async || cluster.get("/metrics").await.text().await.expect("a body");
    assert!(metrics().await.contains("baton_coordinator_open_breakers 1"));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let busy = v1::InstanceLoad { running_sequences: 50, ..runs(1) };
    well.say(Answer::Load(busy));
    tokio::time::sleep(Duration::from_millis(100)).await;
    served(stuck).await;
    assert!(metrics().await.contains("baton_coordinator_open_breakers 0"));
    cluster.at_rest().await;
}

/// So it is for a coordinator that was cut off from all: whoever asks it waits, rather than lose one attempt after another.
#[tokio::test]
async fn where_all_are_stuck_requests_wait_until_one_gets_on() {
    let (cluster, [mut only]) = Cluster::start([("m", v1::Role::Mixed)], in_time).await;
    let begun = cluster.chat(json!({"max_tokens": 2, "stream": true}));
    let first = only.dispatch().await;
    only.tokens(first.leg, 0, "a");
    let beats = Beats::of(&only, runs(7));
    assert_eq!(only.cancelled().await.leg, first.leg);
    let waits = cluster.chat(json!({"max_tokens": 1}));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(only.is_quiet(), "it was given something though it is stuck");
    *beats.load.lock() = v1::InstanceLoad { running_sequences: 0, ..runs(8) };
    for _ in 0..2 {
        let dispatch = only.dispatch().await;
        let at = dispatch.generated_tokens.len() as u32;
        only.finish(dispatch.leg, at, "b", FinishReason::Length);
    }
    let body = begun.await.expect("ends").text().await.expect("a body");
    assert_eq!(chat_text(&events(&body)), "ab");
    assert_eq!(waits.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_stuck_prefill_is_not_waited_for_and_decode_is_not_blamed() {
    let roles = [("p0", v1::Role::Prefill), ("p1", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut p0, mut p1, mut decode]) = Cluster::start(roles, in_time).await;
    let response = cluster.chat(json!({"max_tokens": 2}));
    let (stuck, well, first) = either(&mut p0, &mut p1).await;
    let taken = decode.dispatch().await;
    // Its engine takes nothing in any more.
    let _beats = Beats::of(stuck, v1::InstanceLoad { seen_leg: Some(0), ..Default::default() });
    assert_eq!(stuck.cancelled().await.leg, first.leg);
    assert_eq!(decode.cancelled().await.leg, taken.leg);
    let (again, resumed) = (well.dispatch().await, decode.dispatch().await);
    well.finish(again.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(resumed.leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn who_is_slow_but_gets_on_keeps_what_it_has() {
    let (cluster, [mut prefill, mut d0, mut d1]) = Cluster::start(ROLES, in_time).await;
    let response = cluster.chat(json!({"max_tokens": 2}));
    let first = prefill.dispatch().await;
    let (slow, other, taken) = either(&mut d0, &mut d1).await;
    // A long prompt, a layer of which takes two seconds.
    let beats = Beats::of(&prefill, v1::InstanceLoad { queued_prefill_tokens: 100_000, ..runs(7) });
    // Meanwhile decode has nothing but a cache to wait for.
    let waits = v1::InstanceLoad { waiting_sequences: 1, running_sequences: 0, ..runs(3) };
    let _others = Beats::of(slow, waits);
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        beats.load.lock().progress += 1;
    }
    assert!(prefill.is_quiet() && slow.is_quiet() && other.is_quiet());
    prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
    slow.finish(taken.leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}
