//! Requests that look for another place, over a board and attachments that the tests set up.

use baton_process::telemetry::TraceContext;
use baton_proto::RequestId;
use baton_schedule::{
    Settings,
    board::Board,
    fleet::{
        Load, Role,
        testing::{ready, spec},
    },
};

use super::*;
use crate::{
    config::LimitsConfig,
    fleet::{attachment::standing::standing, keeper::Attachments},
    metrics::{Metrics, PlacementLabels},
    models::Models,
    place::{Booked, tests::placer},
    prepare::{
        Endpoint, parse, prepare,
        tests::{LIMITS, served},
    },
};

const CARRY: CarryConfig =
    CarryConfig { move_after: Duration::from_secs(5), patience: Duration::from_secs(5) };

/// Two instances that serve everything, of which `a` is idle and `b` busy, and nobody's stream stands but those of `attachments`.
struct Two {
    placer: Arc<Placer>,
    model: Arc<Model>,
    assignment: Assignment,
}

fn two(attachments: Attachments) -> Two {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (a, b) = (spec("a"), spec("b"));
    board.list(&[a.clone(), b.clone()], Instant::now());
    for spec in [&a, &b] {
        board.up(&spec.id, spec.incarnation, ready(Role::Mixed));
    }
    board.load(&b.id, Load { queued_prefill_tokens: 100_000, ..Load::default() });
    let placer = Arc::new(placer(board, attachments));
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let models = Models::new(vec![served()], &LimitsConfig::default(), &metrics).expect("one model");
    let model = models.iter().next().expect("a model").clone();
    let request = parse(br#"{"model": "tiny", "prompt": "hi"}"#).expect("is JSON");
    let mut prepared = prepare(&model.served, Endpoint::Text, &request, LIMITS, 1).expect("is good");
    let assignment = Assignment {
        request: RequestId::adopt("r"),
        trace: TraceContext::default(),
        prompt: prepared.prompts.remove(0),
        generated: Arc::default(),
        priority: 0,
        wanted: Instant::now(),
        deadline: Instant::now() + Duration::from_secs(600),
        in_batches: false,
    };
    Two { placer, model, assignment }
}

#[tokio::test(start_paused = true)]
async fn who_cannot_be_asked_is_not_asked_again_and_costs_no_attempt() {
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let id = spec("b").id;
    let (attachment, _frames) = standing(id.clone(), metrics);
    let Two { placer, model, assignment } = two(Attachments::of([(id.clone(), attachment)]));
    let booked = placer.book(&model.served, assignment.asked(), &[], Among::All);
    let refused = placer.start(booked.expect("a place"), assignment.clone()).err().expect("it has no stream");
    assert_eq!((refused.instance.as_str(), refused.error.code), ("a", ErrorCode::Unavailable));

    let mut attempts =
        Attempts::new(placer.clone(), CARRY, model.clone(), Arc::default(), assignment.clone());
    for _ in 0..2 * FAILURES_MOST {
        assert!(attempts.again(refused.clone().into()).is_ok(), "nothing was tried");
    }
    // Whoever comes without a word of who refused it finds out by itself.
    let mut attempts = Attempts::new(placer, CARRY, model, Arc::default(), assignment);
    let failure = Failure { culprit: None, ..refused.into() };
    let began = Instant::now();
    let again = attempts.again(failure).expect("a refusal");
    let placed = attempts.replacing(again).await;
    let (generation, _) = placed.expect("the other one takes it");
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    drop(generation);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_sent_leaves_the_trial_to_the_next() {
    let a = spec("a").id;
    let (attachment, _frames) =
        standing(a.clone(), baton_process::Metrics::new("coordinator").register(Metrics::register));
    for (attachments, sent) in
        [(Attachments::default(), false), (Attachments::of([(a.clone(), attachment)]), true)]
    {
        let Two { placer, model, assignment } = two(attachments);
        placer.breakers.stuck(&a, Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        let book = || placer.book(&model.served, assignment.asked(), &[], Among::All).expect("a place");
        let on = |booked: &Booked| booked.booking.credit.pair().prefill.to_string();
        let (trial, next) = (book(), book());
        assert_eq!([on(&trial), on(&next)], ["a", "b"], "one is let through");
        drop((trial, next));
        let trial = book();
        assert_eq!(on(&trial), "a", "the first was not sent");
        assert_eq!(placer.start(trial, assignment.clone()).is_ok(), sent);
        assert_eq!(on(&book()), if sent { "b" } else { "a" });
        let labels = PlacementLabels { model: model.served.name.clone(), way: "mixed" };
        let counted = placer.placements.get_or_create(&labels).get();
        assert_eq!(counted, u64::from(sent), "of four bookings only what was sent");
    }
}

#[tokio::test(start_paused = true)]
async fn where_nobody_can_be_sent_anything_a_request_asks_more_and_more_seldom() {
    let Two { placer, model, assignment } = two(Attachments::default());
    let booked = placer.book(&model.served, assignment.asked(), &[], Among::All);
    let refused = placer.start(booked.expect("a place"), assignment.clone()).err().expect("it has no stream");
    let mut attempts = Attempts::new(placer, CARRY, model, Arc::default(), assignment);
    let again = attempts.again(refused.into()).expect("a refusal");
    let (mut replacing, mut tries, began) = (attempts.replacing(again), 0, Instant::now());
    let counted = std::future::poll_fn(|context| {
        tries += 1;
        replacing.poll_unpin(context)
    });
    let error = counted.await.err().expect("nobody is there");
    assert_eq!((error.code, began.elapsed().as_secs()), (ErrorCode::Unavailable, CARRY.patience.as_secs()));
    // Eight times until it waits for a second, and then for no less than half a second.
    assert!((10..=24).contains(&tries), "{tries} tries");
}

#[tokio::test(start_paused = true)]
async fn a_fault_that_all_prompts_of_a_request_meet_takes_one_of_the_budget_and_its_end_is_counted_once() {
    let Two { placer, model, assignment } = two(Attachments::default());
    let share = Arc::default();
    let attempts =
        || Attempts::new(placer.clone(), CARRY, model.clone(), Arc::clone(&share), assignment.clone());
    let mut prompts: Vec<_> = (0..20).map(|_| attempts()).collect();
    let mut fail = |lasted| {
        let error = ApiError::new(ErrorCode::Internal, "a batch failed");
        let failure = Failure { error, culprit: None, begun: true, lasted };
        prompts.iter_mut().filter_map(|attempts| attempts.again(failure.clone()).ok()).count()
    };
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(fail(Duration::from_millis(500)), 20);
    let mut left = 0;
    while model.retry_budget.lock().take(Instant::now()) {
        left += 1;
    }
    assert_eq!(left, 9);
    // Others are placed, and meet the next one.
    tokio::time::advance(Duration::from_millis(50)).await;
    assert_eq!(fail(Duration::ZERO), 0);
    assert_eq!(model.counts.not_placed_again.get(), 1);
}
