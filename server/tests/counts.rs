//! What an instance counts of itself, for whoever judges its health: its own failures count, and what clients do does
//! not.

mod support;

use std::{sync::atomic::Ordering, time::Duration};

use baton_proto::{ErrorCode, v1};
use baton_server::{
    engine::load::{Done, Transferred},
    role::Role,
};
use support::{Attached, Instance, PATIENCE, Pair, Request, Shape, whole};

fn done(instance: &Instance) -> Done {
    instance.load.borrow().done
}

fn whole_and_broken(whole: u64, broken: u64) -> Transferred {
    Transferred { whole, broken }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_model_fails_to_compute_is_counted() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let faults = mixed.faults.clone();
    for (leg, fault) in [(1, &faults.error), (2, &faults.panic), (3, &faults.nan)] {
        fault.store(true, Ordering::Relaxed);
        coordinator.dispatch(leg, &Request::greedy(9, 5), whole()).await;
        assert_eq!(coordinator.until_end(leg).await.failed(), ErrorCode::Internal);
        mixed.until_idle().await;
        assert_eq!(done(&mixed).failed, leg);
    }
    coordinator.dispatch(4, &Request::greedy(9, 5), whole()).await;
    coordinator.until_end(4).await.finished();
    mixed.until_idle().await;
    let done = done(&mixed);
    assert_eq!((done.failed, done.requests), (3, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_a_full_queue_and_time_that_is_up_are_nobodys_failure() {
    let shape = Shape { max_waiting: 1, max_sequences: 1, ..Shape::default() };
    let mut mixed = Instance::start("m", Role::Mixed, shape).await;
    let mut coordinator = Attached::to(&mixed).await;
    mixed.faults.batch_micros.store(20_000, Ordering::Relaxed);
    let out_of_vocabulary = Request { prompt: vec![9999], ..Request::greedy(1, 5) };
    coordinator.dispatch(1, &out_of_vocabulary, whole()).await;
    coordinator.until_end(1).await.failed();
    coordinator.dispatch(2, &Request::greedy(9, 200), whole()).await;
    coordinator.until_tokens(2, 1).await;
    for leg in [3, 4] {
        coordinator.dispatch(leg, &Request::greedy(9, 5), whole()).await;
    }
    assert_eq!(coordinator.until_end(4).await.failed(), ErrorCode::QueueFull);
    coordinator.cancel(3).await;
    coordinator.until_end(3).await.finished();
    let in_a_hurry = Request { timeout_millis: 40, ..Request::greedy(9, 200) };
    coordinator.dispatch(5, &in_a_hurry, whole()).await;
    assert_eq!(coordinator.until_end(5).await.failed(), ErrorCode::DeadlineExceeded);
    coordinator.cancel(2).await;
    coordinator.until_end(2).await.finished();
    mixed.until_idle().await;
    assert_eq!(done(&mixed).failed, 0);
}

/// Waits until more prompt tokens are computed than the instance had computed before.
async fn until_it_computes(instance: &Instance, before: Done) {
    let mut load = instance.load.clone();
    let computes = load.wait_for(|load| load.done.prefill_tokens > before.prefill_tokens);
    tokio::time::timeout(PATIENCE, computes).await.expect("it computes").expect("an engine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_request_is_no_failure_in_any_phase() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    pair.prefill.faults.batch_micros.store(20_000, Ordering::Relaxed);
    pair.decode.faults.batch_micros.store(5_000, Ordering::Relaxed);
    // On both sides while prefill computes; on both once decode does; on decode alone, which tells prefill.
    for (leg, decodes, both) in [(1, false, true), (2, true, true), (3, false, false)] {
        // Of its own length, so that no earlier one's cache is of use.
        let request = Request::greedy(100 + leg as u32, 100);
        let before = done(&pair.prefill);
        pair.dispatch(leg, &request).await;
        if decodes {
            pair.to_decode.until_tokens(leg, 3).await;
        } else {
            until_it_computes(&pair.prefill, before).await;
        }
        if both {
            pair.to_prefill.cancel(leg).await;
        }
        pair.to_decode.cancel(leg).await;
        assert_eq!(pair.to_decode.until_end(leg).await.finished(), v1::FinishReason::Cancelled);
        pair.to_prefill.until_end(leg).await;
        pair.until_idle().await;
    }
    let (prefill, decode) = (done(&pair.prefill), done(&pair.decode));
    assert_eq!((prefill.failed, decode.failed), (0, 0));
    assert_eq!((prefill.outgoing.broken, decode.incoming.broken), (0, 0));
    assert!(prefill.outgoing.whole >= 1 && decode.incoming.whole >= 1, "the second was handed on");
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_are_counted_by_direction_and_by_whether_they_came_whole() {
    let through_the_wire = Shape { wire: true, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), through_the_wire).await;
    let request = Request::greedy(90, 10);
    pair.dispatch(1, &request).await;
    assert_eq!(pair.completion(1).await, request.expected());
    pair.decode.faults.wire.store(1, Ordering::Relaxed);
    let damaged = Request::greedy(91, 10);
    pair.dispatch(2, &damaged).await;
    assert_eq!(pair.to_decode.until_end(2).await.failed(), ErrorCode::KvDamaged);
    pair.to_prefill.until_end(2).await.failed();
    pair.until_idle().await;
    let (prefill, decode) = (done(&pair.prefill), done(&pair.decode));
    assert_eq!((prefill.outgoing, prefill.incoming), (whole_and_broken(1, 1), Transferred::default()));
    assert_eq!((decode.incoming, decode.outgoing), (whole_and_broken(1, 1), Transferred::default()));
    assert_eq!((prefill.failed, decode.failed), (0, 0), "nobody failed to compute anything");
}

#[tokio::test(flavor = "multi_thread")]
async fn work_is_shown_before_a_step_and_progress_with_every_layer_of_it() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    mixed.faults.batch_micros.store(400_000, Ordering::Relaxed);
    coordinator.dispatch(1, &Request::greedy(9, 2), whole()).await;
    let mut load = mixed.load.clone();
    let begun = load.wait_for(|load| load.occupancy.running == 1);
    let begun = *tokio::time::timeout(PATIENCE, begun).await.expect("it is shown").expect("an engine");
    assert_eq!((begun.done.progress, begun.done.prompts), (0, 0), "the first step is still under way");
    coordinator.until_end(1).await.finished();
    mixed.until_idle().await;
    let steps = 2;
    assert_eq!(done(&mixed).progress, steps * u64::from(support::model::LAYERS + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_of_one_kind_are_timed_and_mixed_or_failed_ones_are_not() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    mixed.faults.batch_micros.store(5_000, Ordering::Relaxed);
    coordinator.dispatch(1, &Request::greedy(9, 5), whole()).await;
    coordinator.until_end(1).await.finished();
    mixed.until_idle().await;
    let timed = done(&mixed).timed;
    // One step for the prompt, then one for each token but the first, which the prompt's step brings.
    assert_eq!((timed.prefill_tokens, timed.decode_steps, timed.decode_sequences), (9, 4, 4));
    assert_eq!(timed.context_tokens, 10 + 11 + 12 + 13);
    assert!(
        timed.prefill >= Duration::from_millis(5) && timed.decode >= Duration::from_millis(20),
        "{timed:?}"
    );

    mixed.faults.error.store(true, Ordering::Relaxed);
    coordinator.dispatch(2, &Request::greedy(11, 5), whole()).await;
    coordinator.until_end(2).await.failed();
    mixed.until_idle().await;
    assert_eq!(done(&mixed).timed, timed, "a step that failed is timed");

    // The second prompt is computed in a step that decodes the first, whenever it comes.
    coordinator.dispatch(3, &Request::greedy(13, 40), whole()).await;
    coordinator.until_tokens(3, 1).await;
    coordinator.dispatch(4, &Request::greedy(15, 3), whole()).await;
    coordinator.until_end(4).await.finished();
    coordinator.until_end(3).await.finished();
    mixed.until_idle().await;
    let after = done(&mixed);
    assert_eq!(after.timed.prefill_tokens, timed.prefill_tokens + 13);
    assert_eq!(after.prefill_tokens, after.timed.prefill_tokens + 15, "what failed is not counted");
    assert_eq!(after.timed.decode_steps + 1, after.decode_steps, "the one step that did both is not timed");
    // 39 steps of the first, two of which decode the second too; one is not timed.
    assert_eq!(after.timed.decode_sequences - timed.decode_sequences, 39 + 2 - 1);
}
