//! The real model, handed over between two instances. `BATON_TEST_MODEL` names it: the GGUF file of
//! SmolLM2-135M-Instruct.

mod support;

use std::{path::PathBuf, sync::Arc};

use baton_checkpoint::Checkpoint;
use baton_runtime::{Executor, KvDtype, LoadOptions};
use baton_server::{config::HandoffConfig, engine::scheduler::Limits, role::Role};
use support::{Attached, Instance, Pair, Request, model::Faults, whole};

/// Prompts of 1 to 400 tokens, several chunks and blocks, some ending at a block's border.
const PROMPTS: [u32; 6] = [1, 15, 16, 33, 128, 400];
const MAX_TOKENS: u32 = 16;

fn load(kv_dtype: KvDtype, kv_blocks: u32) -> Box<dyn Executor> {
    let path = std::env::var_os("BATON_TEST_MODEL").map(PathBuf::from).expect(
        "set BATON_TEST_MODEL to the GGUF file of SmolLM2-135M-Instruct; `./deploy/run test` fetches it",
    );
    let checkpoint = Checkpoint::open(&path).expect("the test model");
    let options = LoadOptions { kv_dtype, kv_blocks, max_batch_tokens: 128, ..LoadOptions::default() };
    baton_runtime::load(&checkpoint, &options, &mut |_, _| {}).expect("the test model loads")
}

async fn instance(id: &str, role: Role, kv_dtype: KvDtype) -> Instance {
    instance_of(id, role, load(kv_dtype, 200)).await
}

async fn instance_of(id: &str, role: Role, executor: Box<dyn Executor>) -> Instance {
    instance_with(id, role, executor, HandoffConfig::default()).await
}

async fn instance_with(
    id: &str,
    role: Role,
    executor: Box<dyn Executor>,
    handoff: HandoffConfig,
) -> Instance {
    let limits = Limits {
        max_batch_tokens: 128,
        max_sequences: 16,
        max_waiting: 64,
        context_tokens: 2048,
        block_tokens: executor.kv_pool().layout().block_tokens,
        prefix_cache: true,
    };
    Instance::over(id, role, executor, limits, handoff, Arc::new(Faults::default())).await
}

fn requests() -> Vec<Request> {
    let prompt = |length: u32| (0..length).map(|i| (i * i * 31 + i * 17 + length) % 40_000 + 100).collect();
    let greedy = PROMPTS.map(|length| Request { prompt: prompt(length), ..Request::greedy(1, MAX_TOKENS) });
    let sampled = PROMPTS.map(|length| {
        let request = Request::sampled(1, MAX_TOKENS, u64::from(length));
        Request { prompt: prompt(length), ..request }
    });
    greedy.into_iter().chain(sampled).collect()
}

async fn apart_equals_whole(kv_dtype: KvDtype) {
    let prefill = instance("p", Role::Prefill, kv_dtype).await;
    let decode = instance("d", Role::Decode, kv_dtype).await;
    let (to_prefill, to_decode) = (Attached::to(&prefill).await, Attached::to(&decode).await);
    // Of its own, so that the others have nothing in their caches.
    let mixed = instance("m", Role::Mixed, kv_dtype).await;
    let mut alone = Attached::to(&mixed).await;
    let mut pair = Pair { prefill, decode, to_prefill, to_decode };

    // One at a time on one instance: nothing else is in the batch.
    let mut expected = Vec::new();
    for (leg, request) in (1..).zip(requests()) {
        alone.dispatch(leg, &request, whole()).await;
        expected.push(alone.until_end(leg).await.tokens);
    }
    assert!(expected.iter().all(|tokens| tokens.len() == MAX_TOKENS as usize));
    // All at once, apart; then again, with what both have of them in their caches by then.
    for round in [0, 100] {
        for (leg, request) in (round + 1..).zip(requests()) {
            pair.dispatch(leg, &request).await;
        }
        for (leg, expected) in (round + 1..).zip(&expected) {
            assert_eq!(&pair.completion(leg).await, expected, "leg {leg}");
        }
        pair.until_idle().await;
    }
    assert_eq!(pair.to_prefill.until_end(112).await.cached_tokens(), 384);
    // A prompt that goes on from a completion, computed on the instance that decoded it and on one that has not.
    let last = requests().remove(5);
    let prompt = [&last.prompt[..], &expected[5], &[7, 8, 9]].concat();
    let more = Request { prompt, ..last };
    let mut answers = Vec::new();
    for (coordinator, cached) in [(&mut alone, 400), (&mut Attached::to(&pair.decode).await, 400)] {
        coordinator.dispatch(200, &more, whole()).await;
        let heard = coordinator.until_end(200).await;
        assert_eq!(heard.cached_tokens(), cached);
        answers.push(heard.tokens);
    }
    pair.dispatch(300, &more).await;
    assert_eq!(pair.completion(300).await, answers[0]);
    assert_eq!(answers[1], answers[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn apart_is_token_for_token_what_one_instance_gives() {
    apart_equals_whole(KvDtype::F32).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_it_is_with_a_cache_of_half_precision() {
    apart_equals_whole(KvDtype::Bf16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_it_is_with_a_cache_of_bytes() {
    apart_equals_whole(KvDtype::Int8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_sequences_go_on_as_if_nothing_had_happened() {
    // Each comes to seven blocks; eleven are too few for two of them.
    let request = |seed: u64| {
        let prompt = (0..40).map(|i| (i * 37 + seed as u32 * 1009) % 40_000 + 100).collect();
        Request { prompt, ..Request::sampled(1, 60, seed) }
    };
    let mut told = Vec::new();
    for blocks in [200, 11] {
        let mut mixed = instance_of("m", Role::Mixed, load(KvDtype::Bf16, blocks)).await;
        let mut coordinator = Attached::to(&mixed).await;
        for leg in 1..4 {
            coordinator.dispatch(leg, &request(leg), whole()).await;
        }
        for leg in 1..4 {
            told.push(coordinator.until_end(leg).await.tokens);
        }
        mixed.until_idle().await;
        assert_eq!(mixed.preemptions() > 0, blocks == 11, "{blocks} blocks");
    }
    assert_eq!(told[..3], told[3..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_converted_on_its_way_makes_sense_to_the_model() {
    for (ours, theirs) in [(KvDtype::Bf16, KvDtype::Int8), (KvDtype::Int8, KvDtype::Bf16)] {
        let handoff = HandoffConfig { convert: true, ..HandoffConfig::default() };
        let prefill = instance("p", Role::Prefill, ours).await;
        let decode = instance_with("d", Role::Decode, load(theirs, 200), handoff).await;
        let (to_prefill, to_decode) = (Attached::to(&prefill).await, Attached::to(&decode).await);
        let mixed = instance("m", Role::Mixed, ours).await;
        let mut alone = Attached::to(&mixed).await;
        let mut pair = Pair { prefill, decode, to_prefill, to_decode };
        let (mut agreed, mut all) = (0, 0);
        for (leg, request) in (1..).zip(requests()) {
            pair.dispatch(leg, &request).await;
            let tokens = pair.completion(leg).await;
            alone.dispatch(leg, &request, whole()).await;
            let expected = alone.until_end(leg).await.tokens;
            assert_eq!((tokens.len(), tokens[0]), (expected.len(), expected[0]));
            agreed += tokens.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            all += expected.len();
        }
        pair.until_idle().await;
        // Rounding chooses another token sooner or later, after half of them here; a cache of other values does at once,
        // and only the first is the same then, which is prefill's: one of sixteen.
        assert!(agreed * 4 > all, "{ours:?} to {theirs:?}: {agreed} of {all} tokens");
    }
}
