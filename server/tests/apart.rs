//! Two instances in one process, over loopback: prefill on one, decode on the other.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_proto::{ErrorCode, v1};
use baton_server::role::{Phase, Role};
use support::{Attached, Instance, Pair, Request, Shape, apart, whole};

fn requests() -> Vec<Request> {
    let greedy = [(1, 5), (4, 9), (5, 2), (37, 12), (100, 30), (200, 56)].map(|(p, m)| Request::greedy(p, m));
    let sampled =
        [(1, 5), (8, 20), (33, 7), (150, 40)].map(|(p, m)| Request::sampled(p, m, u64::from(p * m)));
    greedy.into_iter().chain(sampled).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_instance_computes_what_the_model_defines() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    for (leg, request) in (1..).zip(requests()) {
        coordinator.dispatch(leg, &request, whole()).await;
    }
    for (leg, request) in (1..).zip(requests()) {
        let heard = coordinator.until_end(leg).await;
        assert_eq!(heard.tokens, request.expected(), "leg {leg}");
        assert_eq!((heard.first_position, heard.finished()), (Some(0), v1::FinishReason::Length));
    }
    mixed.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn apart_is_token_for_token_what_one_instance_gives() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    for (leg, request) in (1..).zip(requests()) {
        pair.dispatch(leg, &request).await;
    }
    for (leg, request) in (1..).zip(requests()) {
        assert_eq!(pair.completion(leg).await, request.expected(), "leg {leg}");
    }
    pair.until_idle().await;
    let transfers = requests().len() as f64;
    assert_eq!(pair.prefill.metric("baton_server_transfers_out_total"), transfers);
    assert_eq!(pair.decode.metric("baton_server_transfers_in_total"), transfers);
    assert_eq!(pair.decode.metric("baton_server_prefill_tokens_total"), 0.0, "decode computed a prompt");
    assert_eq!(pair.decode.metric("baton_server_kv_blocks_used"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_ends_it_on_either_side() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let completion = Request::greedy(9, 20).expected();
    for (leg, at) in [(1, 0), (2, 7)] {
        let mut request = Request::greedy(9, 20);
        request.sampling.stop_token_ids = vec![completion[at]];
        pair.dispatch(leg, &request).await;
        let first = pair.to_prefill.until_end(leg).await;
        if at == 0 {
            assert_eq!((first.finished(), &first.tokens[..]), (v1::FinishReason::Stop, &completion[..1]));
            // The prefill leg has ended the transfer, which nobody needed; the decode leg learns that from it.
            pair.prefill.until_idle().await;
            let withdrawn = r#"baton_server_transfers_aborted_total{direction="out",reason="not_needed"}"#;
            assert_eq!(pair.prefill.metric(withdrawn), 1.0);
            pair.to_decode.cancel(leg).await;
            let _ = pair.to_decode.until_end(leg).await;
        } else {
            let rest = pair.to_decode.until_end(leg).await;
            let all = [first.tokens, rest.tokens.clone()].concat();
            assert_eq!((rest.finished(), all), (v1::FinishReason::Stop, request.expected()));
        }
    }
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_of_one_token_needs_no_decode() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let request = Request::greedy(30, 1);
    pair.dispatch(1, &request).await;
    let first = pair.to_prefill.until_end(1).await;
    assert_eq!((first.finished(), first.tokens), (v1::FinishReason::Length, request.expected()));
    pair.to_decode.cancel(1).await;
    let _ = pair.to_decode.until_end(1).await;
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leg_that_waits_goes_on_when_the_one_before_it_cannot_begin() {
    let one_at_a_time = Shape { max_sequences: 1, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), one_at_a_time).await;
    let held = "baton_server_transfer_offers_held";
    pair.decode.faults.batch_micros.store(20_000, Ordering::Relaxed);
    pair.dispatch(1, &Request::greedy(20, 200)).await;
    pair.to_prefill.until_end(1).await;
    pair.to_decode.until_tokens(1, 1).await;
    // The second leg's offer is over before the leg is there: its transfer cannot begin.
    let (prefill, decode) = apart(&pair.prefill, &pair.decode);
    pair.to_prefill.dispatch(2, &Request::greedy(40, 5), prefill).await;
    pair.decode.until_metric(held, |held| held == 1.0).await;
    pair.to_prefill.cancel(2).await;
    pair.to_prefill.until_end(2).await;
    pair.decode.until_metric(held, |held| held == 0.0).await;
    pair.to_decode.dispatch(2, &Request::greedy(40, 5), decode).await;
    let third = Request { timeout_millis: 20_000, ..Request::greedy(41, 5) };
    pair.dispatch(3, &third).await;
    pair.decode.until_metric(held, |held| held == 1.0).await;
    pair.decode.load.wait_for(|load| load.occupancy.waiting == 2).await.expect("it runs");
    pair.to_decode.cancel(1).await;
    pair.to_decode.until_end(2).await;
    assert_eq!(pair.completion(3).await, third.expected());
    pair.to_decode.until_end(1).await;
    pair.until_idle().await;
}

/// When a client goes away.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// Decode waits for a transfer that nobody will offer.
    OnlyDecode,
    /// Prefill offers a transfer that nobody expects.
    OnlyPrefill,
    AtOnce,
    FirstToken,
    Decoding(usize),
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_in_any_phase_frees_every_block_on_both_sides() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    // Slow enough that a prompt of 120 tokens is still being computed when it is cancelled at once.
    pair.prefill.faults.batch_micros.store(2000, Ordering::Relaxed);
    pair.decode.faults.batch_micros.store(500, Ordering::Relaxed);
    let moments = [
        Moment::OnlyDecode,
        Moment::OnlyPrefill,
        Moment::AtOnce,
        Moment::FirstToken,
        Moment::Decoding(1),
        Moment::Decoding(9),
    ];
    for (leg, moment) in (1..).zip(moments) {
        let request = Request::greedy(120, 100);
        let (prefill, decode) = apart(&pair.prefill, &pair.decode);
        if !matches!(moment, Moment::OnlyDecode) {
            pair.to_prefill.dispatch(leg, &request, prefill).await;
        }
        if !matches!(moment, Moment::OnlyPrefill) {
            pair.to_decode.dispatch(leg, &request, decode).await;
        }
        match moment {
            Moment::OnlyDecode => {
                pair.decode.load.wait_for(|load| load.occupancy.waiting == 1).await.expect("it runs");
            }
            Moment::OnlyPrefill => drop(pair.to_prefill.until_tokens(leg, 1).await),
            Moment::AtOnce => {}
            Moment::FirstToken => drop(pair.to_prefill.until_tokens(leg, 1).await),
            Moment::Decoding(count) => drop(pair.to_decode.until_tokens(leg, count).await),
        }
        pair.to_prefill.cancel(leg).await;
        pair.to_decode.cancel(leg).await;
        if !matches!(moment, Moment::OnlyDecode) {
            pair.to_prefill.until_end(leg).await;
        }
        if !matches!(moment, Moment::OnlyPrefill) {
            pair.to_decode.until_end(leg).await;
        }
        pair.until_idle().await;
        // What was left behind would spoil the next one.
        let next = Request::greedy(40, 10);
        pair.dispatch(1000 + leg, &next).await;
        assert_eq!(pair.completion(1000 + leg).await, next.expected(), "after {moment:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_cancels_its_legs_and_no_others() {
    let Pair { mut prefill, mut decode, to_prefill, to_decode } =
        Pair::start(Shape::default(), Shape::default()).await;
    decode.faults.batch_micros.store(1000, Ordering::Relaxed);
    let mut other = Attached::to(&decode).await;
    let kept = Request::greedy(20, 100);
    other.dispatch(1, &kept, whole()).await;
    let mut pair = Pair { prefill, decode, to_prefill, to_decode };
    for leg in 1..5 {
        pair.dispatch(leg, &Request::greedy(60, 150)).await;
    }
    pair.to_decode.until_tokens(1, 3).await;
    Pair { prefill, decode, .. } = pair;
    assert_eq!(other.until_end(1).await.tokens, kept.expected());
    prefill.until_idle().await;
    decode.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fewer_blocks_than_wanted_still_complete_everything() {
    let shape = Shape { blocks: 24, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), shape).await;
    let requests: Vec<Request> = (0..12).map(|i| Request::sampled(10 + i, 30 + i, u64::from(i))).collect();
    for (leg, request) in (1..).zip(&requests) {
        pair.dispatch(leg, request).await;
    }
    for (leg, request) in (1..).zip(&requests) {
        assert_eq!(pair.completion(leg).await, request.expected(), "leg {leg}");
    }
    assert!(pair.decode.preemptions() > 0, "the test did not make blocks scarce");
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn opposite_orders_on_full_pools_do_not_wait_for_each_other() {
    let prefill = Shape { blocks: 2, ..Shape::default() };
    let mut pair = Pair::start(prefill, Shape { blocks: 3, ..Shape::default() }).await;
    let request = Request::greedy(8, 4);
    let legs = [1, 2].map(|leg| (leg, apart(&pair.prefill, &pair.decode)));
    for (leg, (_, decode)) in legs.iter().rev() {
        pair.to_decode.dispatch(*leg, &request, decode.clone()).await;
    }
    pair.decode.load.wait_for(|load| load.occupancy.waiting == 2).await.expect("it runs");
    for (leg, (prefill, _)) in &legs {
        pair.to_prefill.dispatch(*leg, &request, prefill.clone()).await;
    }
    for leg in [1, 2] {
        assert_eq!(pair.completion(leg).await, request.expected(), "leg {leg}");
    }
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_leg_that_is_refused_ends_its_prefill_leg() {
    let shape = Shape { blocks: 8, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), shape).await;
    pair.dispatch(1, &Request::greedy(40, 10)).await;
    assert_eq!(pair.to_decode.until_end(1).await.failed(), ErrorCode::KvExhausted);
    assert_eq!(pair.to_prefill.until_end(1).await.failed(), ErrorCode::KvExhausted);
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_prefill_ends_the_decode_leg() {
    let Pair { prefill, mut decode, to_prefill, mut to_decode } = {
        let pair = Pair::start(Shape::default(), Shape::default()).await;
        pair.prefill.faults.batch_micros.store(20_000, Ordering::Relaxed);
        pair.dispatch(1, &Request::greedy(200, 10)).await;
        pair
    };
    // Before the first slice, decode knows nothing of prefill, and it is the coordinator who notices its death.
    decode.until_metric("baton_server_transfer_slices_in_total", |slices| slices > 0.0).await;
    drop((to_prefill, prefill));
    to_decode.until_end(1).await.failed();
    decode.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_decode_ends_the_prefill_leg() {
    let Pair { mut prefill, decode, mut to_prefill, to_decode } = {
        let pair = Pair::start(Shape::default(), Shape::default()).await;
        pair.prefill.faults.batch_micros.store(20_000, Ordering::Relaxed);
        pair.dispatch(1, &Request::greedy(200, 10)).await;
        pair
    };
    prefill.load.wait_for(|load| load.occupancy.sending == 1).await.expect("it runs");
    drop((to_decode, decode));
    let heard = to_prefill.until_end(1).await;
    heard.failed();
    prefill.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_leg_that_waits() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let request = Request { timeout_millis: 50, ..Request::greedy(20, 5) };
    let (_, decode) = apart(&pair.prefill, &pair.decode);
    pair.to_decode.dispatch(1, &request, decode).await;
    assert_eq!(pair.to_decode.until_end(1).await.failed(), ErrorCode::DeadlineExceeded);
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_changed_refuses_and_is_announced() {
    let pair = Pair::start(Shape::default(), Shape::default()).await;
    let mut coordinator = pair.to_decode;
    pair.decode.role.send_modify(|view| view.phase = Phase::Draining);
    coordinator.dispatch(1, &Request::greedy(4, 4), whole()).await;
    assert_eq!(coordinator.until_end(1).await.failed(), ErrorCode::Unavailable);
    pair.decode.role.send_modify(|view| (view.phase, view.epoch.0) = (Phase::Ready, 99));
    coordinator.dispatch(2, &Request::greedy(4, 4), whole()).await;
    assert_eq!(coordinator.until_end(2).await.failed(), ErrorCode::StaleEpoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_used_twice_breaks_the_stream() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    mixed.faults.batch_micros.store(5000, Ordering::Relaxed);
    let coordinator = Attached::to(&mixed).await;
    coordinator.dispatch(1, &Request::greedy(20, 100), whole()).await;
    coordinator.dispatch(1, &Request::greedy(20, 100), whole()).await;
    tokio::time::timeout(Duration::from_secs(10), coordinator.requests.closed())
        .await
        .expect("the stream breaks");
    mixed.until_idle().await;
}
