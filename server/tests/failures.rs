//! A failure ends the requests that it concerns with a clear error, and nothing else: neither the process, nor the
//! requests beside them, nor those that come after and would find what it left in the cache.

mod support;

use std::{fs, path::Path, sync::Arc, sync::atomic::Ordering};

use baton_checkpoint::Checkpoint;
use baton_proto::{ErrorCode, v1};
use baton_runtime::{Executor, LoadOptions};
use baton_server::{
    config::HandoffConfig,
    engine::{scheduler::Limits, sequence::SequenceId, thread::Command},
    role::Role,
};
use support::{Attached, Instance, PATIENCE, Pair, Request, Shape, whole};
use tokio::sync::mpsc::Sender;

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_fails_ends_what_it_computed() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let faults = mixed.faults.clone();
    for (leg, fault) in [(1, &faults.error), (2, &faults.panic), (3, &faults.nan)] {
        // Several chunks, so that blocks have been sealed before the last.
        let request = Request::greedy(70 + leg as u32, 5);
        let cached = mixed.metric("baton_server_kv_blocks_cached");
        fault.store(true, Ordering::Relaxed);
        coordinator.dispatch(leg, &request, whole()).await;
        assert_eq!(coordinator.until_end(leg).await.failed(), ErrorCode::Internal);
        mixed.until_idle().await;
        assert_eq!(
            mixed.metric("baton_server_kv_blocks_cached"),
            cached,
            "something of leg {leg} can be found"
        );
        for again in [100 + leg, 200 + leg] {
            coordinator.dispatch(again, &request, whole()).await;
            assert_eq!(coordinator.until_end(again).await.tokens, request.expected());
        }
        mixed.until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_only_fails_ends_the_engine() {
    let mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    mixed.faults.broken.store(true, Ordering::Relaxed);
    for leg in 1..=16 {
        coordinator.dispatch(leg, &Request::greedy(9, 5), whole()).await;
        assert_eq!(coordinator.until_end(leg).await.failed(), ErrorCode::Internal);
    }
    // The engine's end takes the sender with it; the process ends when its engine does (see `instance`).
    let mut load = mixed.load.clone();
    let ended = tokio::time::timeout(PATIENCE, load.wait_for(|_| false)).await.expect("the engine ends");
    assert!(ended.is_err());
}

/// Each costs the engine more time than it takes to send, so that some always wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_commands_keeps_nobody_from_being_computed() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let flood = |engine: Sender<Command>| {
        let cancel = || Command::Cancel { leg: SequenceId(1 << 40), choices: 0..100, damaged: false };
        async move { while engine.send(cancel()).await.is_ok() {} }
    };
    let floods = [tokio::spawn(flood(mixed.engine.clone())), tokio::spawn(flood(mixed.engine.clone()))];
    let request = Request::greedy(9, 12);
    coordinator.dispatch(1, &request, whole()).await;
    assert_eq!(coordinator.until_end(1).await.tokens, request.expected());
    floods.iter().for_each(tokio::task::JoinHandle::abort);
    mixed.until_idle().await;
}

/// Untied embeddings, so that one token's row is read for that token alone.
const MODEL: &str = "runtime/tests/reference/tiny/hf-f16-ratio3-wide-heads";
/// The token whose embedding is not a number.
const BAD_TOKEN: u32 = 200;

/// The tiny model with a row of its embedding made NaN.
fn model_with_a_nan(directory: &Path) -> Box<dyn Executor> {
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL)).expect("the tiny model") {
        let path = entry.expect("a file").path();
        fs::copy(&path, directory.join(path.file_name().expect("a name"))).expect("a copy");
    }
    let weights = directory.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("the weights");
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("a header");
    let embedding = &header["model.embed_tokens.weight"];
    let number = |value: &serde_json::Value| value.as_u64().expect("a number") as usize;
    let (width, start) = (number(&embedding["shape"][1]), number(&embedding["data_offsets"][0]));
    let row = 8 + header_bytes + start + BAD_TOKEN as usize * width * 2;
    bytes[row..row + width * 2].chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&[0x00, 0x7e]));
    fs::write(&weights, bytes).expect("the weights are written");
    let checkpoint = Checkpoint::open(directory).expect("a model");
    let options = LoadOptions { threads: 1, kv_blocks: 100, max_batch_tokens: 256, ..LoadOptions::default() };
    baton_runtime::load(&checkpoint, &options, &mut |_, _| {}).expect("it loads")
}

async fn instance_with_a_nan(id: &str, role: Role) -> Instance {
    let directory = tempfile::tempdir().expect("a directory");
    let executor = model_with_a_nan(directory.path());
    let limits = Limits {
        max_batch_tokens: 256,
        max_sequences: 16,
        max_waiting: 64,
        context_tokens: executor.shape().context_tokens,
        block_tokens: executor.kv_pool().layout().block_tokens,
        prefix_cache: true,
    };
    Instance::over(id, role, executor, limits, HandoffConfig::default(), Arc::default()).await
}

/// 40 tokens of one beginning, of which the last but one may be the bad one.
fn prompt(bad: bool, own: u32) -> Request {
    let mut prompt: Vec<u32> = (0..40).map(|i| (i * 31 + 7) % 190).collect();
    (prompt[36], prompt[38]) = (own, if bad { BAD_TOKEN } else { 150 });
    Request { prompt, ..Request::greedy(1, 4) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nan_in_the_weights_ends_only_requests_that_meet_it() {
    let prefill = instance_with_a_nan("p", Role::Prefill).await;
    let decode = instance_with_a_nan("d", Role::Decode).await;
    let mixed = instance_with_a_nan("m", Role::Mixed).await;
    let (to_prefill, to_decode) = (Attached::to(&prefill).await, Attached::to(&decode).await);
    let mut alone = Attached::to(&mixed).await;
    let mut pair = Pair { prefill, decode, to_prefill, to_decode };

    let mut expected = Vec::new();
    for leg in 1..=12 {
        let bad = leg % 3 == 0;
        alone.dispatch(leg, &prompt(bad, leg as u32), whole()).await;
        let heard = alone.until_end(leg).await;
        assert_eq!(bad, heard.end.as_ref().is_some_and(support::is_failure), "leg {leg}");
        expected.push(heard.tokens);
    }
    // All at once, so that they share batches. The legs that fail on prefill never come to decode.
    for leg in 1..=12 {
        pair.dispatch(leg, &prompt(leg % 3 == 0, leg as u32)).await;
    }
    for leg in 1..=12 {
        if leg % 3 == 0 {
            assert_eq!(pair.to_prefill.until_end(leg).await.failed(), ErrorCode::Internal);
            // As a coordinator does: prefill may have failed before it could offer anything.
            pair.to_decode.cancel(leg).await;
            pair.to_decode.until_end(leg).await;
        } else {
            assert_eq!(pair.completion(leg).await, expected[leg as usize - 1], "leg {leg}");
        }
    }
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_slice_ends_its_request_and_is_never_found_in_the_cache() {
    let through_the_wire = Shape { wire: true, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), through_the_wire).await;
    let request = Request::greedy(90, 10);
    // With it both sides hold the first blocks.
    let start = Request { prompt: request.prompt[..60].to_vec(), ..Request::greedy(60, 2) };
    pair.dispatch(1, &start).await;
    assert_eq!(pair.completion(1).await, start.expected());
    pair.until_idle().await;
    let cached =
        |pair: &Pair| [&pair.prefill, &pair.decode].map(|side| side.metric("baton_server_kv_blocks_cached"));
    assert!(cached(&pair).iter().all(|&blocks| blocks > 0.0));
    pair.decode.faults.wire.store(1, Ordering::Relaxed);
    pair.dispatch(2, &request).await;
    assert_eq!(pair.to_decode.until_end(2).await.failed(), ErrorCode::KvDamaged);
    assert_eq!(pair.to_prefill.until_end(2).await.failed(), ErrorCode::KvDamaged);
    pair.until_idle().await;
    assert_eq!(pair.decode.faults.wire.load(Ordering::Relaxed), 0, "nothing was damaged");
    assert_eq!(cached(&pair), [0.0, 0.0], "its prompt's blocks are in quarantine on both sides");
    let held = pair.decode.metric("baton_server_handoff_held_blocks_total");
    pair.dispatch(3, &request).await;
    assert_eq!(pair.completion(3).await, request.expected());
    assert_eq!(
        pair.decode.metric("baton_server_handoff_held_blocks_total"),
        held,
        "all of it was sent again"
    );
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shares_a_damaged_prompt_is_computed_again_and_nothing_behind_it_is_found() {
    let through_the_wire = Shape { wire: true, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), through_the_wire).await;
    let story = Request::greedy(40, 1).prompt;
    let with = |own: u32, max_tokens| {
        let prompt = story.iter().copied().chain((0..9).map(|i| (own * 17 + i) % 60)).collect();
        Request { prompt, ..Request::greedy(1, max_tokens) }
    };
    let (earlier, running, damaged, later) = (with(0, 5), with(1, 150), with(2, 5), with(3, 5));
    pair.dispatch(1, &earlier).await;
    assert_eq!(pair.completion(1).await, earlier.expected());
    pair.decode.faults.batch_micros.store(5000, Ordering::Relaxed);
    pair.dispatch(2, &running).await;
    pair.to_decode.until_tokens(2, 3).await;
    pair.decode.faults.wire.store(3, Ordering::Relaxed);
    pair.dispatch(3, &damaged).await;
    assert_eq!(pair.to_decode.until_end(3).await.failed(), ErrorCode::KvDamaged);
    pair.decode.faults.batch_micros.store(0, Ordering::Relaxed);
    assert_eq!(pair.completion(2).await, running.expected());
    let computed = pair.decode.metric("baton_server_prefill_tokens_total");
    assert!(computed >= running.prompt.len() as f64, "decode went on over what is in doubt");
    pair.until_idle().await;
    assert_eq!(pair.prefill.metric("baton_server_kv_blocks_cached"), 0.0);
    // The story is there again, what came after it is not.
    pair.dispatch(4, &later).await;
    assert_eq!(pair.completion(4).await, later.expected());
    pair.dispatch(5, &earlier).await;
    assert_eq!(pair.completion(5).await, earlier.expected());
    assert_eq!(pair.to_prefill.until_end(5).await.cached_tokens(), 40);
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_its_coordinator_calls_damaged_is_never_found_again() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let request = Request::greedy(90, 10);
    pair.dispatch(1, &request).await;
    assert_eq!(pair.completion(1).await, request.expected());
    pair.until_idle().await;
    let cached = |pair: &Pair| pair.prefill.metric("baton_server_kv_blocks_cached");
    assert!(cached(&pair) > 0.0);
    // Decode has told the coordinator, which cancels before prefill hears of it from decode.
    let (prefill, _) = support::apart(&pair.prefill, &pair.decode);
    pair.to_prefill.dispatch(2, &request, prefill).await;
    pair.to_prefill.until_tokens(2, 1).await;
    let cancel = v1::Cancel { leg: 2, reason: "test".into(), damaged: true, ..Default::default() };
    pair.to_prefill.cancel_with(cancel).await;
    pair.until_idle().await;
    assert_eq!(cached(&pair), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_damaged_slice_among_many_requests_fails_one_of_them() {
    let through_the_wire = Shape { wire: true, ..Shape::default() };
    let mut pair = Pair::start(Shape::default(), through_the_wire).await;
    let requests: Vec<Request> = (0..6).map(|i| Request::greedy(80 + i, 20)).collect();
    pair.decode.faults.wire.store(2, Ordering::Relaxed);
    for (leg, request) in (11..).zip(&requests) {
        pair.dispatch(leg, request).await;
    }
    let mut failed = 0;
    for (leg, request) in (11..).zip(&requests) {
        if support::is_failure(&pair.to_decode.until_end(leg).await.end.expect("an end")) {
            failed += 1;
        } else {
            assert_eq!(pair.completion(leg).await, request.expected(), "leg {leg}");
        }
    }
    assert_eq!(failed, 1);
    pair.until_idle().await;
}
