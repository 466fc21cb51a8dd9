//! What is kept for a reader that is away, and when one is woken.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake},
};

use baton_proto::{ApiError, ErrorCode};

use super::*;
use crate::fleet::{StopReason, TokenLogprobs};

struct Counting(AtomicUsize);

impl Wake for Counting {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn output(first_position: u32, tokens: &[u32]) -> Output {
    let (tokens, logprobs) = (tokens.into(), Vec::new());
    Output { choice: 0, first_position, tokens, logprobs, cached_tokens: None, end: None }
}

/// Of a request for so many choices of up to ten thousand tokens.
fn of_choices(choices: u32, in_batches: bool) -> Mailbox {
    Mailbox::new(Expected { choices, max_tokens: 10_000, top_logprobs: None, in_batches })
}

fn take(mailbox: &Mailbox) -> Vec<(Side, Output)> {
    let mut into = VecDeque::new();
    mailbox.take(Waker::noop(), &mut into);
    into.into()
}

#[test]
fn what_follows_on_is_merged() {
    let mailbox = of_choices(1, false);
    assert!(take(&mailbox).is_empty());
    mailbox.deliver(Side::Decode, output(1, &[1]));
    for position in 2..5000 {
        mailbox.deliver(Side::Decode, output(position, &[position]));
    }
    mailbox.deliver(Side::Decode, Output { end: Some(LegEnd::Cancelled), ..output(0, &[]) });
    let got = take(&mailbox);
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].1.tokens.to_vec(), (1..5000).collect::<Vec<_>>());
    assert_eq!(got[0].1.end, Some(LegEnd::Cancelled));
}

#[test]
fn legs_and_gaps_stay_apart() {
    let mailbox = of_choices(1, false);
    mailbox.deliver(Side::Decode, output(1, &[1]));
    mailbox.deliver(Side::Prefill, output(0, &[0]));
    mailbox.deliver(Side::Prefill, output(3, &[3]));
    assert_eq!(take(&mailbox).len(), 3);
}

#[test]
fn choices_that_take_turns_are_merged_each_for_itself() {
    let mailbox = of_choices(3, false);
    for position in 1..1000 {
        for choice in 0..3 {
            mailbox.deliver(Side::Decode, Output { choice, ..output(position, &[position + choice]) });
        }
    }
    let got = take(&mailbox);
    assert_eq!(got.len(), 3);
    for (choice, (_, output)) in (0..).zip(got) {
        assert_eq!((output.choice, output.tokens.len()), (choice, 999));
        assert_eq!(output.tokens[0], 1 + choice);
    }
}

#[test]
fn a_flood_is_bounded_and_blamed_on_who_sent_it() {
    let mailbox = of_choices(1, false);
    for position in 0..DELIVERIES_MOST as u32 {
        mailbox.deliver(Side::Decode, output(position * 2, &[1]));
    }
    assert_eq!(mailbox.inner.lock().flooded, None, "all of it was taken");
    mailbox.deliver(Side::Prefill, output(0, &[1]));
    for position in 0..10_000 {
        mailbox.deliver(Side::Decode, output(position * 2, &[1]));
    }
    let mut got = VecDeque::new();
    assert_eq!(mailbox.take(Waker::noop(), &mut got), Some(Side::Decode));
    assert_eq!(got.len(), DELIVERIES_MOST);
    assert!(got.iter().all(|(_, output)| output.end.is_none()), "its instance has ended nothing");
}

#[tokio::test(start_paused = true)]
async fn a_handoff_is_timed_by_what_came_in_and_not_by_when_it_was_read() {
    let pause = Duration::from_millis(7);
    let mailbox = of_choices(1, false);
    mailbox.deliver(Side::Prefill, output(0, &[1]));
    assert_eq!(mailbox.handoff_time(), None);
    // That a leg has failed is no sign of a cache.
    let lost = Output::failed(ApiError::new(ErrorCode::InstanceLost, "lost"));
    mailbox.deliver(Side::Decode, lost);
    assert_eq!(mailbox.handoff_time(), None);
    tokio::time::advance(pause).await;
    mailbox.deliver(Side::Decode, output(1, &[2]));
    tokio::time::advance(pause).await;
    mailbox.deliver(Side::Prefill, output(0, &[1]));
    mailbox.deliver(Side::Decode, output(2, &[3]));
    assert_eq!(mailbox.handoff_time(), Some(pause));

    let overtaken = of_choices(1, false);
    overtaken.deliver(Side::Decode, output(1, &[2]));
    tokio::time::advance(pause).await;
    overtaken.deliver(Side::Prefill, output(0, &[1]));
    assert_eq!(overtaken.handoff_time(), None);
}

#[test]
fn a_reader_of_batches_is_woken_for_what_is_news_and_for_many_tokens() {
    let counting = Arc::new(Counting(AtomicUsize::new(0)));
    let waker = Waker::from(counting.clone());
    let mailbox = of_choices(1, true);
    // Whether it was woken, of each delivery.
    let woken = |side, output| {
        mailbox.take(&waker, &mut VecDeque::new());
        let before = counting.0.load(Ordering::Relaxed);
        mailbox.deliver(side, output);
        counting.0.load(Ordering::Relaxed) > before
    };
    assert!(woken(Side::Prefill, output(0, &[0])));
    assert!(woken(Side::Decode, output(1, &[1])));
    assert!(!woken(Side::Decode, output(2, &[2])));
    assert!(woken(Side::Decode, Output { end: Some(LegEnd::Cancelled), ..output(0, &[]) }));
    assert!(woken(Side::Decode, output(3, &[3; BATCH])));

    let many = of_choices(1, true);
    many.deliver(Side::Whole, output(0, &[0]));
    assert_eq!(take(&many).len(), 1);
    many.take(&waker, &mut VecDeque::new());
    let before = counting.0.load(Ordering::Relaxed);
    for position in 1..=BATCH as u32 {
        assert_eq!(counting.0.load(Ordering::Relaxed), before, "{position}");
        many.deliver(Side::Whole, output(position, &[position]));
    }
    assert_eq!(counting.0.load(Ordering::Relaxed), before + 1);

    // Of three choices two end, and so much is waited for as of one; that prefill is done ends none.
    let (choices, done) = (of_choices(3, true), LegEnd::HandedOff { cached_tokens: 0 });
    let complete = LegEnd::Complete { reason: StopReason::Stop, cached_tokens: 0 };
    for end in [done, complete.clone(), complete] {
        choices.deliver(Side::Whole, Output { end: Some(end), ..output(0, &[0]) });
    }
    choices.take(&waker, &mut VecDeque::new());
    let before = counting.0.load(Ordering::Relaxed);
    choices.deliver(Side::Whole, output(1, &[1; BATCH - 1]));
    assert_eq!(counting.0.load(Ordering::Relaxed), before);
    choices.deliver(Side::Whole, output(BATCH as u32, &[1]));
    assert_eq!(counting.0.load(Ordering::Relaxed), before + 1);
}

#[test]
fn who_does_not_look_is_woken_once_and_let_go_with_the_box() {
    let counting = Arc::new(Counting(AtomicUsize::new(0)));
    let waker = Waker::from(counting.clone());
    let mailbox = of_choices(1, false);
    for round in 1..3 {
        mailbox.take(&waker, &mut VecDeque::new());
        (0..5).for_each(|position| mailbox.deliver(Side::Whole, output(position, &[1])));
        assert_eq!(counting.0.load(Ordering::Relaxed), round);
    }
    drop((mailbox, waker));
    assert_eq!(Arc::strong_count(&counting), 1);
}

#[test]
fn the_reader_is_woken() {
    let mailbox = Arc::new(of_choices(1, false));
    let runtime = tokio::runtime::Builder::new_multi_thread().build().expect("a runtime");
    let reader = mailbox.clone();
    let got = runtime.spawn(async move {
        let mut into = VecDeque::new();
        let take = |context: &mut Context<'_>| {
            reader.take(context.waker(), &mut into);
            if into.is_empty() { Poll::Pending } else { Poll::Ready(()) }
        };
        std::future::poll_fn(take).await;
        into.len()
    });
    mailbox.deliver(Side::Whole, output(0, &[1]));
    assert_eq!(runtime.block_on(got).expect("the reader ends"), 1);
}

#[test]
fn an_instance_that_streams_without_end_costs_no_more_than_the_request_may_generate() {
    let expected = Expected { choices: 1, max_tokens: 1000, top_logprobs: None, in_batches: false };
    let last = LegEnd::Complete { reason: StopReason::Length, cached_tokens: 0 };
    let lying = |mailbox: &Mailbox| -> usize {
        mailbox.inner.lock().deliveries.iter().map(|(_, output)| output.tokens.len()).sum()
    };
    let mut into = VecDeque::new();

    let endless = Mailbox::new(expected);
    for position in 0..5000 {
        endless.deliver(Side::Whole, output(position, &[1]));
    }
    assert_eq!(lying(&endless), 1000);
    assert_eq!(endless.take(Waker::noop(), &mut into), Some(Side::Whole));
    let far = Mailbox::new(expected);
    far.deliver(Side::Decode, output(u32::MAX, &[1, 2]));
    assert_eq!((lying(&far), far.take(Waker::noop(), &mut VecDeque::new())), (0, Some(Side::Decode)));

    // Again and again from the first on.
    let repeats = Mailbox::new(expected);
    repeats.deliver(Side::Prefill, output(0, &[1]));
    for _ in 0..60 {
        repeats.deliver(Side::Decode, output(0, &[1; 1000]));
    }
    assert!(lying(&repeats) <= 2000, "{}", lying(&repeats));
    assert_eq!(repeats.take(Waker::noop(), &mut VecDeque::new()), Some(Side::Decode));

    // All of what was asked for, with its end, is taken.
    let whole = Mailbox::new(expected);
    whole.deliver(Side::Prefill, output(0, &[1]));
    whole.deliver(Side::Decode, output(0, &[1; 1000]));
    whole.deliver(Side::Decode, Output { end: Some(last), ..output(1000, &[]) });
    into.clear();
    assert_eq!((whole.take(Waker::noop(), &mut into), into.len()), (None, 2));
}

#[test]
fn no_more_scores_are_kept_than_were_asked_for() {
    let scored = |tokens: &[u32], scores: usize, top: usize| {
        let scored = TokenLogprobs { logprob: -1.0, top: vec![(1, -1.0); top] };
        Output { logprobs: vec![scored; scores], ..output(0, tokens) }
    };
    let kept = |top_logprobs, output: Output| {
        let mailbox = Mailbox::new(Expected { choices: 1, max_tokens: 10, top_logprobs, in_batches: false });
        mailbox.deliver(Side::Whole, output);
        let mut into = VecDeque::new();
        let flooded = mailbox.take(Waker::noop(), &mut into).is_some();
        let kept = into.pop_front().map(|(_, output)| output.logprobs).unwrap_or_default();
        (flooded, kept.iter().map(|scored| scored.top.len()).collect::<Vec<_>>())
    };
    assert_eq!(kept(None, scored(&[1, 2], 2, 1000)), (false, vec![]));
    assert_eq!(kept(None, scored(&[], 1000, 1)), (false, vec![]));
    assert_eq!(kept(Some(2), scored(&[1, 2], 2, 1000)), (false, vec![2, 2]));
    assert_eq!(kept(Some(2), scored(&[1], 1, 1)), (false, vec![1]));
    assert_eq!(kept(Some(0), scored(&[1], 1, 1)), (false, vec![0]));
    // Those that no token has would be without end.
    assert_eq!(kept(Some(0), scored(&[], 1000, 0)), (true, vec![]));
}
