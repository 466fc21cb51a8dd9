//! A request on a pair, as its legs' mailbox tells of them.

use std::{pin::pin, task::Poll};

use smallvec::smallvec;
use tokio::task::coop;

use super::*;
use baton_schedule::{
    Settings, Wanted,
    board::Board,
    fleet::{
        Role,
        testing::{ready, spec},
    },
};

/// A request on a pair, as if its legs had been dispatched.
fn generation(deadline: Duration, handoffs: &Arc<Handoffs>) -> Generation {
    generation_on(&Board::new(Duration::from_secs(1), Settings::APART), deadline, handoffs)
}

fn generation_on(board: &Arc<Board>, deadline: Duration, handoffs: &Arc<Handoffs>) -> Generation {
    let (d, p) = (spec("d"), spec("p"));
    board.list(&[d.clone(), p.clone()], Instant::now());
    board.up(&d.id, d.incarnation, ready(Role::Decode));
    board.up(&p.id, p.incarnation, ready(Role::Prefill));
    let booking = board.book(&Wanted::new(10, 10, "r1")).expect("a place");
    Generation {
        choices: smallvec::smallvec![Choice { machine: Machine::apart(10), wait: None }],
        legs: Legs::default(),
        hold: Box::new(Hold { credit: booking.credit, handoff: Some(Handoff::new(handoffs, &p.id, &d.id)) }),
        computed: false,
        taken_up: false,
        mailbox: Arc::new(Mailbox::new(Expected {
            choices: 1,
            max_tokens: 10,
            top_logprobs: None,
            in_batches: false,
        })),
        inbox: VecDeque::new(),
        news: VecDeque::new(),
        failed: None,
        lost: SmallVec::new(),
        served: SmallVec::new(),
        served_told: 0,
        placed: Instant::now(),
        handed_on: false,
        leaving: None,
        deadline: Deadline::new(Instant::now() + deadline),
    }
}

async fn next(generation: &mut Generation) -> Progress {
    let news = |context: &mut Context<'_>| {
        generation.receive(context);
        generation.news().map_or(Poll::Pending, Poll::Ready)
    };
    std::future::poll_fn(news).await
}

#[tokio::test(start_paused = true)]
async fn a_decode_that_says_nothing_after_prefill_was_lost_is_waited_for_in_measure() {
    let lost = ApiError::new(ErrorCode::InstanceLost, "cannot reach the peer's handoff service");
    let first = Output {
        choice: 0,
        first_position: 0,
        tokens: smallvec![7],
        logprobs: vec![],
        cached_tokens: None,
        end: None,
    };
    let failed = || Output::failed(lost.clone());

    let handoffs = Arc::default();
    let counted = || {
        let used = Handoffs::used_since(&handoffs, Instant::now() - Duration::from_secs(60));
        used.iter().map(|link| (link.handoffs, link.failures)).collect::<Vec<_>>()
    };
    let mut silent = generation(Duration::from_secs(600), &handoffs);
    silent.mailbox.deliver(Side::Prefill, first.clone());
    assert_eq!(next(&mut silent).await, Progress::Choice { choice: 0, end: None });
    let began = Instant::now();
    silent.mailbox.deliver(Side::Prefill, failed());
    assert_eq!(next(&mut silent).await, Progress::Failed(lost.clone()));
    assert_eq!(began.elapsed().as_secs(), DECODE_PATIENCE.as_secs());
    assert_eq!(silent.culprit().map(InstanceId::as_str), Some("d"), "as prefill says");

    assert_eq!(counted(), [(0, 1)], "it never got there");

    let mut speaks = generation(Duration::from_secs(600), &handoffs);
    speaks.mailbox.deliver(Side::Prefill, first);
    speaks.mailbox.deliver(Side::Prefill, failed());
    assert_eq!(next(&mut speaks).await, Progress::Choice { choice: 0, end: None });
    speaks.mailbox.deliver(
        Side::Decode,
        Output {
            choice: 0,
            first_position: 1,
            tokens: smallvec![8],
            logprobs: vec![],
            cached_tokens: None,
            end: None,
        },
    );
    assert_eq!(next(&mut speaks).await, Progress::Choice { choice: 0, end: None });
    let later = DECODE_PATIENCE * 2;
    assert!(tokio::time::timeout(later, next(&mut speaks)).await.is_err(), "it goes on");
    let reason = StopReason::Stop;
    let last = LegEnd::Complete { reason, cached_tokens: 0 };
    speaks.mailbox.deliver(
        Side::Decode,
        Output {
            choice: 0,
            first_position: 2,
            tokens: smallvec![9],
            logprobs: vec![],
            cached_tokens: None,
            end: Some(last),
        },
    );
    assert_eq!(
        next(&mut speaks).await,
        Progress::Choice { choice: 0, end: Some(Completed { reason, cached_tokens: 0, outgrown: None }) }
    );
    assert_eq!(counted(), [(1, 1)]);
}

/// By the time that a loss is read the instance may be back, and look well.
#[tokio::test(start_paused = true)]
async fn who_is_lost_here_is_to_blame_and_of_whom_another_says_it() {
    let error = ApiError::new(ErrorCode::InstanceLost, "gone");
    let first = || Output { tokens: smallvec![7], end: None, ..Output::failed(error.clone()) };
    let (lost, said) = (Output::lost(error.clone()), Output::failed(error.clone()));
    for (side, end, begun, to_blame) in [
        (Side::Prefill, &lost, false, "p"),
        (Side::Prefill, &said, false, "d"),
        (Side::Decode, &lost, false, "d"),
        (Side::Decode, &said, false, "p"),
        // Decode stays silent.
        (Side::Prefill, &lost, true, "p"),
        (Side::Prefill, &said, true, "d"),
    ] {
        let mut failing = generation(Duration::from_secs(600), &Arc::default());
        if begun {
            failing.mailbox.deliver(Side::Prefill, first());
            assert!(matches!(next(&mut failing).await, Progress::Choice { end: None, .. }));
        }
        failing.mailbox.deliver(side, end.clone());
        assert_eq!(next(&mut failing).await, Progress::Failed(error.clone()));
        assert_eq!(failing.culprit().map(InstanceId::as_str), Some(to_blame), "{side:?} {end:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_is_kept_though_a_turn_is_over() {
    let mut late = generation(Duration::from_secs(5), &Arc::default());
    let began = Instant::now();
    let used_up = |context: &mut Context<'_>| {
        while coop::has_budget_remaining() {
            _ = pin!(coop::consume_budget()).poll(context);
        }
        late.receive(context);
        Poll::Ready(())
    };
    std::future::poll_fn(used_up).await;
    let ended = tokio::time::timeout(Duration::from_secs(60), next(&mut late)).await;
    assert!(matches!(ended, Ok(Progress::Failed(_))), "{ended:?}");
    assert_eq!(began.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn how_long_answers_are_is_learnt_of_those_that_a_stop_string_ends_too() {
    let board = Board::new(Duration::from_secs(1), Settings::APART);
    let mut stopped = generation_on(&board, Duration::from_secs(600), &Arc::default());
    let expected = || board.expected_tokens("r1");
    let before = expected();
    let token = || Output {
        choice: 0,
        first_position: 0,
        tokens: smallvec![1],
        logprobs: vec![],
        cached_tokens: None,
        end: None,
    };
    stopped.mailbox.deliver(Side::Prefill, token());
    assert_eq!(next(&mut stopped).await, Progress::Choice { choice: 0, end: None });
    assert_eq!(expected(), before);
    assert_eq!(stopped.stop(0).reason, StopReason::Stop);
    let learnt = expected();
    assert!(learnt < before, "{learnt} of {before}");
    // Nothing is learnt of it twice.
    stopped.stop(0);
    assert_eq!(expected(), learnt);
    let mut ended = generation_on(&board, Duration::from_secs(600), &Arc::default());
    let end = LegEnd::Complete { reason: StopReason::Stop, cached_tokens: 0 };
    ended.mailbox.deliver(Side::Prefill, Output { end: Some(end), ..token() });
    assert!(matches!(next(&mut ended).await, Progress::Choice { end: Some(_), .. }));
    let learnt = expected();
    ended.stop(0);
    assert_eq!(expected(), learnt, "its end has been heard");
}
