//! A decode instance that drains hands the cache of what it generates on to another: the completion is the one that would
//! have come, and next to nothing is computed again. What it has not got it refuses.

mod support;

use std::sync::atomic::Ordering;

use baton_proto::{ErrorCode, v1};
use baton_server::role::{Phase, Role};
use support::{Attached, Heard, Instance, Pair, Request, Shape, handed_on, model};
use v1::FinishReason;

const PREFILLED: &str = "baton_server_prefill_tokens_total";

/// A pair and another decode instance, that of the pair draining.
struct Draining {
    pair: Pair,
    other: Instance,
    to_other: Attached,
}

impl Draining {
    async fn start(shape: Shape) -> Self {
        let pair = Pair::start(Shape { blocks: 1000, ..Shape::default() }, shape).await;
        let other = Instance::start("e", Role::Decode, Shape { blocks: 1000, ..Shape::default() }).await;
        let to_other = Attached::to(&other).await;
        Self { pair, other, to_other }
    }

    fn drain(&self) {
        self.pair.decode.role.send_modify(|view| view.phase = Phase::Draining);
    }

    fn end_drain(&self) {
        self.pair.decode.role.send_modify(|view| view.phase = Phase::Ready);
    }

    /// Asks to hand `request`, as far as it has come, on under another number.
    async fn hand_on(&self, leg: u64, request: &Request) {
        let (from, to) = handed_on(&self.pair.decode, &self.other);
        self.to_other.dispatch(leg, request, to).await;
        self.pair.to_decode.dispatch(leg, request, from).await;
    }

    async fn until_idle(&mut self) {
        self.pair.until_idle().await;
        self.other.until_idle().await;
    }
}

/// The tokens of a leg, where the prompt's first token came from prefill.
fn so_far(first: &Heard, rest: &Heard) -> usize {
    first.tokens.len() + rest.tokens.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_is_what_it_would_have_been_and_a_block_at_most_is_computed_again() {
    // Prompts and completions that end within a block, at its border, and one token beyond it.
    let scored = |mut request: Request| {
        request.sampling.top_logprobs = Some(2);
        request
    };
    let greedy = [(1, 60), (8, 60), (37, 60)].map(|(p, m)| Request::greedy(p, m));
    let sampled = [(4, 60), (33, 60), (150, 60)].map(|(p, m)| scored(Request::sampled(p, m, u64::from(p))));
    let requests: Vec<_> = greedy.into_iter().chain(sampled).collect();
    let mut of = Draining::start(Shape { blocks: 1000, ..Shape::default() }).await;
    // Slow enough that none has ended when it is cancelled.
    of.pair.decode.faults.batch_micros.store(3000, Ordering::Relaxed);
    // It is asked before the old leg is cancelled, as coordinators do, and after that.
    for (turn, (request, cut)) in (1..).zip(requests.iter().flat_map(|of| (2..9).map(move |cut| (of, cut)))) {
        of.end_drain();
        let (leg, next, expected) = (2 * turn, 2 * turn + 1, request.expected());
        of.pair.dispatch(leg, request).await;
        let first = of.pair.to_prefill.until_end(leg).await;
        let told = of.pair.to_decode.until_tokens(leg, cut - 1).await;
        of.drain();
        let at = so_far(&first, &told);
        assert!(at < expected.len(), "it was too fast");
        let before = of.pair.decode.metric(PREFILLED);
        if turn % 2 == 0 {
            of.hand_on(next, &request.after(at)).await;
            of.pair.to_decode.cancel(leg).await;
        } else {
            of.pair.to_decode.cancel(leg).await;
            of.pair.to_decode.until_end(leg).await;
            of.hand_on(next, &request.after(at)).await;
        }
        let one = of.pair.to_decode.until_end(next).await;
        let rest = of.to_other.until_end(next).await;
        assert_eq!(one.finished(), FinishReason::HandedOff);
        assert_eq!((one.first_position, rest.first_position), (Some(at as u32), Some(at as u32 + 1)));
        let all = [&first.tokens[..], &told.tokens, &one.tokens, &rest.tokens].concat();
        assert_eq!(all, expected, "turn {turn}");
        let scored: usize = [&first, &told, &one, &rest].iter().map(|heard| heard.logprobs.len()).sum();
        assert_eq!(scored, if request.sampling.top_logprobs.is_some() { expected.len() } else { 0 });
        let again = of.pair.decode.metric(PREFILLED) - before;
        let uncached = (request.prompt.len() + at - 1) % model::BLOCK_TOKENS as usize + 1;
        assert_eq!(again, uncached as f64, "turn {turn}: {} + {at}", request.prompt.len());
    }
    of.until_idle().await;
    assert_eq!(of.other.metric(PREFILLED), 0.0, "the other computed some of it");
    let prompts: usize = requests.iter().map(|request| request.prompt.len()).sum();
    assert!(of.pair.prefill.metric(PREFILLED) <= prompts as f64 * 7.0, "prefill was asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_choices_is_handed_on_by_itself() {
    let mut of = Draining::start(Shape { blocks: 1000, ..Shape::default() }).await;
    of.pair.decode.faults.batch_micros.store(3000, Ordering::Relaxed);
    let mut request = Request::sampled(21, 60, 5);
    request.sampling.choices = 3;
    of.pair.dispatch(1, &request).await;
    let mut told = Vec::new();
    for choice in 0..3 {
        let first = of.pair.to_prefill.until_of_choice(1, choice, |heard| heard.end.is_some()).await;
        let rest = of.pair.to_decode.until_of_choice(1, choice, |heard| heard.tokens.len() > 5).await;
        told.push([first.tokens, rest.tokens].concat());
    }
    of.drain();
    let before = of.pair.decode.metric(PREFILLED);
    for (choice, told) in (0..3).zip(&told) {
        let own = Request { generated: told.clone(), ..request.of_choice(choice) };
        of.hand_on(10 + u64::from(choice), &own).await;
    }
    of.pair.to_decode.cancel(1).await;
    for (choice, told) in (0..3).zip(told) {
        let leg = 10 + u64::from(choice);
        let one = of.pair.to_decode.until_end(leg).await;
        let rest = of.to_other.until_end(leg).await;
        let all = [told, one.tokens, rest.tokens].concat();
        assert_eq!(all, request.of_choice(choice).expected(), "choice {choice}");
    }
    let again = of.pair.decode.metric(PREFILLED) - before;
    assert!(again <= f64::from(3 * model::BLOCK_TOKENS), "{again} tokens were computed again");
    of.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_refused_and_nothing_is_left_of_it() {
    let mut of = Draining::start(Shape::default()).await;
    of.drain();
    let request = Request::greedy(40, 30);
    // Nobody has computed it here.
    of.hand_on(1, &request.after(9)).await;
    assert_eq!(of.pair.to_decode.until_end(1).await.failed(), ErrorCode::Unavailable);
    of.to_other.cancel(1).await;
    of.to_other.until_end(1).await;
    // All but a block and a token is there: that is one token too many.
    of.end_drain();
    of.pair.dispatch(2, &request).await;
    of.pair.to_prefill.until_end(2).await;
    of.pair.to_decode.until_end(2).await;
    of.drain();
    let mut longer = request.clone();
    longer.prompt.extend(request.expected());
    let there = longer.prompt.len() - 1;
    let block = model::BLOCK_TOKENS as usize;
    let full = there / block * block;
    for (leg, tokens) in [(3, full + block + 1), (4, full + block)] {
        let mut asked = longer.clone();
        asked.prompt.resize(tokens, 1);
        of.hand_on(leg, &asked).await;
        let heard = of.pair.to_decode.until_end(leg).await;
        if leg == 4 {
            let rest = of.to_other.until_end(leg).await;
            assert_eq!([heard.tokens, rest.tokens].concat(), asked.expected());
        } else {
            assert_eq!(heard.failed(), ErrorCode::Unavailable);
            of.to_other.cancel(leg).await;
            of.to_other.until_end(leg).await;
        }
    }
    of.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_drain_ends_what_is_being_handed_on() {
    let mut of = Draining::start(Shape::default()).await;
    of.pair.decode.faults.batch_micros.store(3000, Ordering::Relaxed);
    let request = Request::greedy(40, 60);
    of.pair.dispatch(1, &request).await;
    let first = of.pair.to_prefill.until_end(1).await;
    let told = of.pair.to_decode.until_tokens(1, 4).await;
    of.drain();
    // Nobody takes it up: its transfer waits for that.
    let at = so_far(&first, &told);
    let (from, _) = handed_on(&of.pair.decode, &of.other);
    of.pair.to_decode.dispatch(2, &request.after(at), from).await;
    of.pair.to_decode.cancel(1).await;
    of.pair.to_decode.until_tokens(2, 1).await;
    let over = baton_proto::ApiError::new(ErrorCode::Unavailable, "its time is over");
    let fail_all = baton_server::engine::thread::Command::FailAll(over);
    of.pair.decode.engine.send(fail_all).await.expect("it runs");
    assert_eq!(of.pair.to_decode.until_end(2).await.failed(), ErrorCode::Unavailable);
    of.until_idle().await;
}
