//! Requests that look for a place, over a board and links that the tests set up.

use std::time::Duration;

use baton_proto::RequestId;
use baton_schedule::fleet::{
    Load, Role, Spec,
    testing::{ready, spec},
};

use super::*;
use crate::{
    config::LimitsConfig,
    dispatch::standing,
    models::Models,
    prepare::{
        Endpoint, parse, prepare,
        tests::{LIMITS, served},
    },
};

#[tokio::test(start_paused = true)]
async fn all_prompts_together_wait_no_longer_than_one() {
    let patience = Duration::from_secs(5);
    let board = Board::new(Duration::from_secs(60));
    let (small, large) = (Spec { context_tokens: 8, ..spec("a") }, spec("b"));
    board.list(&[small.clone(), large.clone()], Instant::now());
    let links = Arc::default();
    let (served, handoffs) = (served(), Arc::default());
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let breakers = Arc::new(Breakers::new(&metrics));
    let placer = Placer {
        board: board.clone(),
        links,
        handoffs,
        metrics,
        breakers,
        placement_timeout: patience,
        carry_patience: patience,
        move_after: patience,
    };
    let body = r#"{"model": "tiny", "prompt": ["short", "one that only the large one holds"]}"#;
    let request = parse(body.as_bytes()).expect("is JSON");
    let prepared = prepare(&served, Endpoint::Text, &request, LIMITS, 1).expect("is good");
    // The first prompt waits for most of the time, the second for what is left.
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        board.up(&small.id, small.incarnation, ready(Role::Mixed));
    });
    let began = Instant::now();
    let hour = began + Duration::from_secs(3600);
    assert!(matches!(placer.book(&served, &prepared.prompts, hour).await, Err(NoPlace::NoInstance)));
    assert_eq!(began.elapsed(), patience);
    let soon = Instant::now() + Duration::from_secs(1);
    assert!(placer.book(&served, &prepared.prompts, soon).await.is_err());
    assert_eq!(began.elapsed(), patience + Duration::from_secs(1), "nor past the request's own deadline");
}

/// Two instances that serve everything, of which `a` is idle and `b` busy, and nobody's stream stands but those of `links`.
struct Two {
    placer: Arc<Placer>,
    model: Arc<Model>,
    assignment: Assignment,
}

fn two(links: Links) -> Two {
    let board = Board::new(Duration::from_secs(60));
    let (a, b) = (spec("a"), spec("b"));
    board.list(&[a.clone(), b.clone()], Instant::now());
    for spec in [&a, &b] {
        board.up(&spec.id, spec.incarnation, ready(Role::Mixed));
    }
    board.load(&b.id, Load { queued_prefill_tokens: 100_000, ..Load::default() });
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let models = Models::new(vec![served()], &LimitsConfig::default(), &metrics).expect("one model");
    let model = models.iter().next().expect("a model").clone();
    let request = parse(br#"{"model": "tiny", "prompt": "hi"}"#).expect("is JSON");
    let prepared = prepare(&model.served, Endpoint::Text, &request, LIMITS, 1).expect("is good");
    let prompt = &prepared.prompts[0];
    let assignment = Assignment {
        request: RequestId::adopt("r"),
        traceparent: String::new(),
        prompt: prompt.tokens.clone(),
        chains: prompt.chains.clone(),
        generated: Arc::default(),
        sampling: prompt.sampling.clone(),
        priority: 0,
        wanted: Instant::now(),
        deadline: Instant::now() + Duration::from_secs(600),
        in_batches: false,
    };
    let patience = Duration::from_secs(5);
    let (links, breakers) = (Arc::new(links), Arc::new(Breakers::new(&metrics)));
    let placer = Arc::new(Placer {
        board,
        links,
        handoffs: Arc::default(),
        metrics,
        breakers,
        placement_timeout: patience,
        carry_patience: patience,
        move_after: patience,
    });
    Two { placer, model, assignment }
}

#[tokio::test(start_paused = true)]
async fn who_cannot_be_asked_is_not_asked_again_and_costs_no_attempt() {
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let id = spec("b").id;
    let (link, _frames) = standing(id.clone(), metrics);
    let Two { placer, model, assignment } = two(Links::of([(id.clone(), link)]));
    let (whole, among) = (Whole::of_assignment(&assignment), Among::All);
    let booking = placer.book_now(&model.served, whole, &assignment.sampling, &[], among);
    let refused =
        placer.start(booking.expect("a place"), assignment.clone()).err().expect("it has no stream");
    assert_eq!((refused.instance.as_str(), refused.error.code), ("a", ErrorCode::Unavailable));

    let mut attempts = Attempts::new(placer.clone(), model.clone(), assignment.clone());
    for _ in 0..2 * FAILURES_MOST {
        assert!(attempts.again(refused.clone().into()).is_ok(), "nothing was tried");
    }
    // Whoever comes without a word of who refused it finds out by itself.
    let mut attempts = Attempts::new(placer, model, assignment);
    let failure = Failure { culprit: None, ..refused.into() };
    let began = Instant::now();
    let placed = attempts.again(failure).expect("a refusal").await;
    let (generation, _) = placed.expect("the other one takes it");
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    drop(generation);
}
