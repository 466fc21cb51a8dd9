//! A completion that another instance has begun goes on as if nothing had happened: the same tokens at the same
//! positions, whole and apart, wherever it was cut.

mod support;

use baton_proto::{ErrorCode, v1};
use baton_server::role::Role;
use support::{Attached, Instance, Pair, Request, Shape, model, whole};
use v1::FinishReason;

/// Greedy and sampled (with penalties); prompts that end within a block, at its border, and one token beyond it.
fn requests() -> Vec<Request> {
    let greedy = [(1, 9), (8, 14), (37, 12), (100, 30)].map(|(p, m)| Request::greedy(p, m));
    let sampled =
        [(1, 9), (8, 20), (33, 11), (150, 40)].map(|(p, m)| Request::sampled(p, m, u64::from(p * m)));
    greedy.into_iter().chain(sampled).collect()
}

/// Each request after its first token, within a block, around a block's border, and before its last token.
fn cuts() -> Vec<(Request, usize)> {
    let cuts = |request: &Request| [1, 3, 4, 5, 7, request.sampling.max_tokens as usize - 1];
    requests().iter().flat_map(|request| cuts(request).map(|cut| (request.after(cut), cut))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_on_one_instance_is_what_it_would_have_been() {
    // Blocks are scarce as well: what is preempted goes on once more.
    for blocks in [200, 64] {
        let shape = Shape { blocks, max_waiting: 256, ..Shape::default() };
        let mut mixed = Instance::start("m", Role::Mixed, shape).await;
        let mut coordinator = Attached::to(&mixed).await;
        for (leg, (request, _)) in (1..).zip(cuts()) {
            coordinator.dispatch(leg, &request, whole()).await;
        }
        for (leg, (request, cut)) in (1..).zip(cuts()) {
            let heard = coordinator.until_end(leg).await;
            assert_eq!(heard.tokens, request.expected()[cut..], "leg {leg}, after {cut} tokens");
            let Some(v1::leg_output::End::Finished(end)) = &heard.end else { panic!("{:?}", heard.end) };
            let told = (heard.first_position, end.prompt_tokens, end.completion_tokens, end.reason());
            let (prompt, all) = (request.prompt.len() as u32, request.sampling.max_tokens);
            assert_eq!(told, (Some(cut as u32), prompt, all, FinishReason::Length), "leg {leg}");
            assert!(end.cached_tokens <= prompt);
        }
        mixed.until_idle().await;
        assert_eq!(mixed.preemptions() > 0, blocks == 64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_with_prefill_and_decode_apart_is_what_it_would_have_been() {
    // Room for all that run: what is preempted for want of it is computed again.
    let shape = || Shape { blocks: 1000, max_waiting: 256, ..Shape::default() };
    let mut pair = Pair::start(shape(), shape()).await;
    for (leg, (request, _)) in (1..).zip(cuts()) {
        pair.dispatch(leg, &request).await;
    }
    for (leg, (request, cut)) in (1..).zip(cuts()) {
        let (expected, at) = (request.expected(), cut as u32);
        let first = pair.to_prefill.until_end(leg).await;
        assert_eq!((first.first_position, &first.tokens[..]), (Some(at), &expected[cut..=cut]), "leg {leg}");
        if cut + 1 == expected.len() {
            assert_eq!(first.finished(), FinishReason::Length, "leg {leg}");
            pair.to_decode.cancel(leg).await;
            pair.to_decode.until_end(leg).await;
            continue;
        }
        assert_eq!(first.finished(), FinishReason::HandedOff, "leg {leg}");
        let rest = pair.to_decode.until_end(leg).await;
        assert_eq!(
            (rest.first_position, &rest.tokens[..]),
            (Some(at + 1), &expected[cut + 1..]),
            "leg {leg}"
        );
        assert_eq!(rest.finished(), FinishReason::Length);
    }
    pair.until_idle().await;
    let computed = pair.decode.metric("baton_server_prefill_tokens_total");
    assert_eq!((pair.decode.preemptions(), computed), (0, 0.0), "decode computed a prompt");
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_least_lengths_and_log_probabilities_count_from_the_beginning() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let mut request = Request::sampled(9, 40, 5);
    request.sampling.top_logprobs = Some(2);
    // A token that would come sooner than it may.
    request.sampling.stop_token_ids = vec![request.expected()[3]];
    request.sampling.min_tokens = 6;
    coordinator.dispatch(1, &request, whole()).await;
    let undisturbed = coordinator.until_end(1).await;
    assert_eq!(undisturbed.tokens, request.expected());
    assert!(undisturbed.tokens.len() > 6);
    for (leg, cut) in [(2, 1), (3, 3), (4, 5)] {
        coordinator.dispatch(leg, &request.after(cut), whole()).await;
        let heard = coordinator.until_end(leg).await;
        assert_eq!(heard.tokens, undisturbed.tokens[cut..], "after {cut}");
        assert_eq!(heard.logprobs, undisturbed.logprobs[cut..], "after {cut}");
        assert_eq!(heard.finished(), undisturbed.finished());
    }
    mixed.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_bounds_prompt_and_all_of_the_completion() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let request = Request::greedy(model::CONTEXT_TOKENS - 8, 100);
    coordinator.dispatch(1, &request.after(7), whole()).await;
    let heard = coordinator.until_end(1).await;
    assert_eq!((heard.finished(), &heard.tokens[..]), (FinishReason::Length, &request.expected()[7..]));
    coordinator.dispatch(2, &request.after(8), whole()).await;
    assert_eq!(coordinator.until_end(2).await.failed(), ErrorCode::ContextLengthExceeded);
    // More than the pool holds.
    let mut small = Instance::start("s", Role::Mixed, Shape { blocks: 4, ..Shape::default() }).await;
    let mut coordinator = Attached::to(&small).await;
    coordinator.dispatch(1, &Request::greedy(10, 100).after(7), whole()).await;
    assert_eq!(coordinator.until_end(1).await.failed(), ErrorCode::KvExhausted);
    mixed.until_idle().await;
    small.until_idle().await;
}
