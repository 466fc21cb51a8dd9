//! The prefix cache over real sockets: what was computed once is neither computed nor sent again, the count that clients
//! are told is exact, and nothing of it shows in the tokens. The model is its cache (see `support::model`), so a block
//! that is shared wrongly changes every token after it.

mod support;

use std::sync::Arc;

use baton_server::{config::HandoffConfig, engine::scheduler::Limits, role::Role};
use support::{Attached, Instance, Pair, Request, Shape, model, whole};

/// A prompt of `shared` tokens of a story that many requests begin with, then `own` tokens of its own.
fn prompt(story: u32, shared: u32, own: &[u32]) -> Vec<u32> {
    let begin = (0..shared).map(|i| (i * i * 7 + i * 3 + story * 11) % model::VOCABULARY);
    begin.chain(own.iter().copied()).collect()
}

fn request(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request { prompt, ..Request::greedy(1, max_tokens) }
}

/// Requests one after the other, each with what an instance that served those before has of it.
fn conversation() -> Vec<(Request, u32)> {
    let first = request(prompt(0, 37, &[]), 12);
    let told = first.expected();
    // The last token of a completion is never computed: 48 of the 49 tokens are in the cache.
    let second = request([&first.prompt[..], &told, &[1, 2, 3]].concat(), 9);
    vec![
        (first.clone(), 0),
        (first, 36),
        (request(prompt(0, 22, &[5; 15]), 7), 20),
        (request(prompt(0, 36, &[]), 5), 32),
        (second, 48),
        (request(prompt(1, 37, &[]), 4), 0),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_computed_once_is_not_computed_again() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let (mut hits, mut misses) = (0, 0);
    for (leg, (request, cached)) in (1..).zip(conversation()) {
        coordinator.dispatch(leg, &request, whole()).await;
        let heard = coordinator.until_end(leg).await;
        assert_eq!(heard.tokens, request.expected(), "leg {leg}");
        assert_eq!((heard.cached, heard.cached_tokens()), (Some(cached), cached), "leg {leg}");
        (hits, misses) = (hits + cached, misses + request.prompt.len() as u32 - cached);
    }
    mixed.until_idle().await;
    assert_eq!(mixed.metric("baton_server_prefix_hit_tokens_total"), f64::from(hits));
    assert_eq!(mixed.metric("baton_server_prefix_miss_tokens_total"), f64::from(misses));
    assert_eq!(mixed.metric("baton_server_prefill_tokens_total"), f64::from(misses));
    assert!(mixed.metric("baton_server_kv_blocks_cached") > 0.0);
    assert_eq!(mixed.metric("baton_server_kv_blocks_used"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_decode_holds_is_not_sent() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    // Prefill never sees completions, decode does: of the fifth it holds 12 of 13 blocks, prefill 9.
    let cached = [0, 36, 20, 32, 36, 0];
    let sent_blocks = [10, 1, 10 - 5, 0, 1, 10];
    let mut sent_before = 0.0;
    for (index, (request, _)) in conversation().into_iter().enumerate() {
        let leg = index as u64 + 1;
        pair.dispatch(leg, &request).await;
        assert_eq!(pair.completion(leg).await, request.expected(), "leg {leg}");
        let (prefill, decode) = (pair.to_prefill.until_end(leg).await, pair.to_decode.until_end(leg).await);
        assert_eq!((prefill.cached_tokens(), decode.cached_tokens()), (cached[index], 0), "leg {leg}");
        assert_eq!((prefill.cached, decode.cached), (Some(cached[index]), None), "leg {leg}");
        pair.until_idle().await;
        let sent = pair.prefill.metric("baton_server_transfer_slices_out_total");
        assert_eq!(sent - sent_before, f64::from(model::LAYERS * sent_blocks[index]), "leg {leg}");
        sent_before = sent;
    }
    let held = 9 + 5 + 9 + 12;
    assert_eq!(pair.decode.metric("baton_server_handoff_held_blocks_total"), f64::from(held));
    assert_eq!(pair.decode.metric("baton_server_prefill_tokens_total"), 0.0, "decode computed a prompt");
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_overlap_come_out_right_while_blocks_are_scarce() {
    let prefill = Shape { blocks: 60, ..Shape::default() };
    let decode = Shape { blocks: 40, ..Shape::default() };
    let mut pair = Pair::start(prefill, decode).await;
    let requests: Vec<Request> = (0..60u32)
        .map(|i| {
            let own: Vec<u32> = (0..i % 7).map(|k| (k * 5 + i) % model::VOCABULARY).collect();
            let prompt = prompt(i % 3, 3 + (i * 13) % 50, &own);
            let priority = (i % 4) as i32 - 2;
            Request { prompt, priority, ..Request::sampled(1, 2 + (i * 7) % 40, u64::from(i)) }
        })
        .collect();
    for (first, wave) in requests.chunks(20).enumerate() {
        let legs = (1 + first as u64 * 20..).zip(wave);
        for (leg, request) in legs.clone() {
            pair.dispatch(leg, request).await;
        }
        for (leg, request) in legs {
            assert_eq!(pair.completion(leg).await, request.expected(), "leg {leg}");
        }
    }
    pair.until_idle().await;
    for (instance, name) in [
        (&pair.prefill, "prefix_hit_tokens"),
        (&pair.prefill, "kv_blocks_evicted"),
        (&pair.decode, "handoff_held_blocks"),
        (&pair.decode, "kv_blocks_evicted"),
        (&pair.decode, "preemptions"),
    ] {
        assert!(instance.metric(&format!("baton_server_{name}_total")) > 0.0, "{name} did not happen");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_turned_off() {
    let faults = Arc::default();
    let executor = Box::new(model::HashModel::new(100, Arc::clone(&faults)));
    let limits = Limits {
        max_batch_tokens: 32,
        max_sequences: 8,
        max_waiting: 8,
        context_tokens: model::CONTEXT_TOKENS,
        block_tokens: model::BLOCK_TOKENS,
        prefix_cache: false,
    };
    let mut mixed =
        Instance::over("m", Role::Mixed, executor, limits, HandoffConfig::default(), faults).await;
    let mut coordinator = Attached::to(&mixed).await;
    let request = request(prompt(0, 30, &[]), 5);
    for leg in [1, 2] {
        coordinator.dispatch(leg, &request, whole()).await;
        let heard = coordinator.until_end(leg).await;
        assert_eq!((heard.tokens.clone(), heard.cached_tokens()), (request.expected(), 0));
    }
    mixed.until_idle().await;
    assert_eq!(mixed.metric("baton_server_kv_blocks_cached"), 0.0);
}
