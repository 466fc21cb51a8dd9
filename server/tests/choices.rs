//! Several choices to one prompt: computed and handed over once, each what a request of its own would have given.

mod support;

use baton_proto::{ErrorCode, v1};
use baton_server::{engine::load::Load, role::Role};
use support::{Attached, Instance, Pair, Request, Shape, apart, model, whole};
use v1::FinishReason;

fn of(choices: u32, request: Request) -> Request {
    let sampling = v1::Sampling { choices, ..request.sampling };
    Request { sampling, ..request }
}

/// What each choice said in all.
async fn completions(pair: &mut Pair, leg: u64, choices: u32) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for choice in 0..choices {
        let first = pair.to_prefill.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
        assert_eq!((first.first_position, first.tokens.len()), (Some(0), 1));
        if first.finished() != FinishReason::HandedOff {
            pair.to_decode.cancel_choice(leg, choice).await;
            pair.to_decode.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
            all.push(first.tokens);
            continue;
        }
        let rest = pair.to_decode.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
        rest.finished();
        all.push([first.tokens, rest.tokens].concat());
    }
    all
}

fn expected(request: &Request) -> Vec<Vec<u32>> {
    (0..request.sampling.choices).map(|choice| request.of_choice(choice).expected()).collect()
}

/// Prompts that end within a block, at its border, and one token beyond it.
fn requests() -> Vec<Request> {
    let sampled = [(5, 12), (8, 20), (33, 7), (100, 30), (7, 2)];
    let sampled = sampled.map(|(p, m)| of(3, Request::sampled(p, m, u64::from(p * m))));
    sampled.into_iter().chain([of(2, Request::greedy(9, 8)), of(1, Request::sampled(6, 6, 6))]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_choice_is_what_a_request_with_its_seed_gives_apart_and_on_one_instance() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    for (leg, request) in (1..).zip(requests()) {
        pair.dispatch(leg, &request).await;
        coordinator.dispatch(leg, &request, whole()).await;
    }
    for (leg, request) in (1..).zip(requests()) {
        let expected = expected(&request);
        assert_eq!(completions(&mut pair, leg, request.sampling.choices).await, expected, "apart, leg {leg}");
        for (choice, expected) in (0..).zip(expected) {
            let heard = coordinator.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
            assert_eq!(heard.tokens, expected, "on one instance, leg {leg}, choice {choice}");
        }
    }
    pair.until_idle().await;
    mixed.until_idle().await;
    let requests = requests().len() as f64;
    assert_eq!(pair.prefill.metric("baton_server_transfers_out_total"), requests, "a prompt crossed twice");
    let prompts: u32 = self::requests().iter().map(|request| request.prompt.len() as u32).sum();
    let computed = |instance: &Instance| instance.metric("baton_server_prefill_tokens_total");
    assert_eq!(computed(&pair.decode), 0.0, "decode computed a prompt");
    assert!(computed(&pair.prefill) <= f64::from(prompts), "a prompt was computed twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_that_end_with_their_first_token_let_the_others_hand_over() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let mut request = of(3, Request::sampled(9, 12, 3));
    let firsts: Vec<u32> = expected(&request).iter().map(|tokens| tokens[0]).collect();
    assert!(firsts[1] != firsts[0] && firsts[1] != firsts[2], "the test wants another seed: {firsts:?}");
    request.sampling.stop_token_ids = vec![firsts[1]];
    pair.dispatch(1, &request).await;
    assert_eq!(completions(&mut pair, 1, 3).await, expected(&request));
    pair.until_idle().await;
    // Every choice: nothing is handed over.
    let transfers = pair.prefill.metric("baton_server_transfers_out_total");
    request.sampling.stop_token_ids = firsts;
    pair.dispatch(2, &request).await;
    assert_eq!(completions(&mut pair, 2, 3).await, expected(&request));
    pair.until_idle().await;
    assert_eq!(pair.prefill.metric("baton_server_transfers_out_total"), transfers);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_choice_is_cancelled_in_any_phase_and_the_others_go_on() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let request = of(3, Request::sampled(60, 40, 5));
    // Before anything has happened, after the first token, and while it is decoded.
    for (leg, after) in [(1, None), (2, Some(0)), (3, Some(5))] {
        let (prefill, decode) = apart(&pair.prefill, &pair.decode);
        pair.to_decode.dispatch(leg, &request, decode).await;
        if after.is_none() {
            pair.to_decode.cancel_choice(leg, 1).await;
        }
        pair.to_prefill.dispatch(leg, &request, prefill).await;
        if let Some(count) = after {
            pair.to_prefill.until_of_choice(leg, 1, |heard| !heard.tokens.is_empty()).await;
            pair.to_decode.until_of_choice(leg, 1, |heard| heard.tokens.len() >= count).await;
        }
        pair.to_prefill.cancel_choice(leg, 1).await;
        pair.to_decode.cancel_choice(leg, 1).await;
        for attached in [&mut pair.to_decode, &mut pair.to_prefill] {
            attached.until_of_choice(leg, 1, |heard| heard.end.is_some()).await;
        }
        for choice in [0, 2] {
            let first = pair.to_prefill.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
            let rest = pair.to_decode.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
            let tokens = [first.tokens, rest.tokens].concat();
            assert_eq!(tokens, request.of_choice(choice).expected(), "leg {leg}, choice {choice}");
        }
        pair.until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scarce_blocks_change_no_token_of_any_choice() {
    let shape = Shape { blocks: 24, ..Shape::default() };
    let mut mixed = Instance::start("m", Role::Mixed, shape).await;
    let mut coordinator = Attached::to(&mixed).await;
    let requests: Vec<Request> =
        (0..5).map(|i| of(3, Request::sampled(10 + i, 30 + i, u64::from(i) * 9))).collect();
    for (leg, request) in (1..).zip(&requests) {
        coordinator.dispatch(leg, request, whole()).await;
    }
    for (leg, request) in (1..).zip(&requests) {
        for (choice, expected) in (0..).zip(expected(request)) {
            let heard = coordinator.until_of_choice(leg, choice, |heard| heard.end.is_some()).await;
            assert_eq!(heard.tokens, expected, "leg {leg}, choice {choice}");
        }
    }
    assert!(mixed.preemptions() > 0, "the test did not make blocks scarce");
    mixed.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_the_models_own_on_both_sides_of_a_handoff() {
    let mut pair = Pair::start(Shape::default(), Shape::default()).await;
    let mut request = of(2, Request::sampled(20, 8, 11));
    request.sampling.top_logprobs = Some(3);
    request.sampling.logit_bias = vec![v1::LogitBias { token: 5, bias: 3.0 }];
    pair.dispatch(1, &request).await;
    for choice in 0..2 {
        let first = pair.to_prefill.until_of_choice(1, choice, |heard| heard.end.is_some()).await;
        let rest = pair.to_decode.until_of_choice(1, choice, |heard| heard.end.is_some()).await;
        let tokens = [first.tokens, rest.tokens].concat();
        assert_eq!(tokens, request.of_choice(choice).expected());
        let logprobs = [first.logprobs, rest.logprobs].concat();
        assert_eq!(logprobs.len(), tokens.len());
        let mut before = request.prompt.clone();
        for (token, told) in tokens.into_iter().zip(logprobs) {
            let logits: Vec<f64> =
                model::reference_logits(&before).iter().map(|&logit| logit.into()).collect();
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let naive = |token: u32| logits[token as usize] - sum.ln();
            assert!((f64::from(told.logprob) - naive(token)).abs() < 1e-4, "token {token}");
            assert_eq!(told.top_tokens.len(), 3);
            for (&token, &logprob) in told.top_tokens.iter().zip(&told.top_logprobs) {
                assert!((f64::from(logprob) - naive(token)).abs() < 1e-4, "token {token}");
            }
            before.push(token);
        }
    }
    pair.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leg_that_is_refused_is_ended_for_each_of_its_choices() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let mut request = Request::greedy(9, 5);
    (request.sampling.choices, request.sampling.top_p) = (3, -1.0);
    coordinator.dispatch(1, &request, whole()).await;
    for choice in 0..3 {
        let heard = coordinator.until_of_choice(1, choice, |heard| heard.end.is_some()).await;
        assert_eq!(heard.failed(), ErrorCode::InvalidArgument, "choice {choice}");
    }
    mixed.until_idle().await;
}

/// The sequences of a leg's choices are numbered on from its own, and so are those of whoever comes next.
#[tokio::test(flavor = "multi_thread")]
async fn a_choice_that_a_leg_has_not_is_cancelled_of_nobody_else() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let (mut one, mut other) = (Attached::to(&mixed).await, Attached::to(&mixed).await);
    let (long, choices) = (Request::greedy(9, 400), of(2, Request::sampled(200, 30, 5)));
    one.dispatch(1, &long, whole()).await;
    one.until_tokens(1, 1).await;
    // Until its prompt is computed, in seven steps, one sequence stands for both choices.
    mixed.faults.batch_micros.store(20_000, std::sync::atomic::Ordering::Relaxed);
    other.dispatch(1, &choices, whole()).await;
    let mut load = mixed.load.clone();
    let all = |load: &Load| load.occupancy.running + load.occupancy.waiting == 3;
    load.wait_for(all).await.expect("the engine runs");
    for choice in [1, 2, 3, u32::MAX] {
        one.cancel_choice(1, choice).await;
    }
    one.cancel_choice(1, 0).await;
    assert_eq!(one.until_end(1).await.finished(), FinishReason::Cancelled);
    for (choice, expected) in (0..).zip(expected(&choices)) {
        let heard = other.until_of_choice(1, choice, |heard| heard.end.is_some()).await;
        assert_eq!((heard.finished(), heard.tokens), (FinishReason::Length, expected), "choice {choice}");
    }
    mixed.until_idle().await;
}
