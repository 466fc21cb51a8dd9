//! Where the legs of one request deliver, and its reader picks up.
//!
//! Written by the attachments' tasks, read by [`crate::dispatch`]. A delivery never waits: one slow client must
//! not hold up the stream that carries everybody else's tokens. It is bounded all the same: what follows on
//! from the last delivery of the same choice of the same leg is appended to it, so a reader that is away
//! costs four bytes a token (some 200 with log probabilities) and no more than the request may generate;
//! beyond [`DELIVERIES_MOST`] pieces that do not follow on, nothing more is taken and [`Mailbox::take`] says whose
//! fault it is. That is no end of the leg: its instance works on until it is told to stop.

use std::{collections::VecDeque, mem, task::Waker, time::Duration};

use baton_process::prefetch::prefetch_at;
use baton_schedule::Side;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::leg::{LegEnd, Output};

/// Deliveries that may lie in the box for each choice. In order, they merge: only a peer that breaks the contract comes
/// near it.
const DELIVERIES_MOST: usize = 64;
/// Tokens that are told, and read, at a time, where nobody sees them before.
pub const BATCH_TOKENS: u32 = 32;
/// A reader who takes them in batches is woken once so many tokens have come for each choice.
const BATCH: usize = BATCH_TOKENS as usize;

/// Of a reader, at most what is touched when it is woken and reads.
const READER_BYTES: usize = 288;
const READER_COUNTS: usize = 16;

#[derive(Debug)]
struct Inner {
    deliveries: VecDeque<(Side, Output)>,
    most: usize,
    /// The leg that has filled the box, once something found no room.
    flooded: Option<Side>,
    /// Woken by what comes, from when it was last looked. Kept: whoever reads is nearly always the same.
    reader: Option<Waker>,
    /// Something has come since it last looked: it is told nothing more until it does.
    told: bool,
    /// So many tokens that only go on from earlier ones wake the reader.
    batch: usize,
    /// Tokens since the reader was last woken, or would have been, or looked.
    unread: usize,
    /// When prefill's token came, or that of a leg alone.
    first_token: Option<Instant>,
    /// When decode showed that it has the cache.
    taken_up: Option<Instant>,
}

impl Inner {
    /// Who has left the most of what lies here.
    fn fullest(&self) -> Option<Side> {
        let of = |side: Side| self.deliveries.iter().filter(|(by, _)| *by == side).count();
        [Side::Whole, Side::Prefill, Side::Decode].into_iter().max_by_key(|&side| of(side))
    }

    /// Once until the reader looks: one whose client takes nothing is not woken with each token.
    fn wake(&mut self) {
        if !mem::replace(&mut self.told, true)
            && let Some(reader) = &self.reader
        {
            reader.wake_by_ref();
        }
    }

    /// The clock is read twice for a request. True: it is the side's first word.
    fn note_time(&mut self, side: Side, output: &Output) -> bool {
        let first = match side {
            Side::Whole | Side::Prefill => &mut self.first_token,
            Side::Decode => &mut self.taken_up,
        };
        let is_first = first.is_none() && output.generates();
        if is_first {
            *first = Some(Instant::now());
        }
        is_first
    }
}

/// The box of one request.
#[derive(Debug)]
pub struct Mailbox {
    inner: Mutex<Inner>,
}

impl Mailbox {
    /// For a request of so many choices. `in_batches`: of tokens that only go on from earlier ones, the reader is woken
    /// for many at a time.
    pub fn new(choices: u32, in_batches: bool) -> Self {
        let most = DELIVERIES_MOST * choices.max(1) as usize;
        let deliveries = VecDeque::new();
        let (reader, flooded) = (None, None);
        let (first_token, taken_up) = (None, None);
        let batch = if in_batches { BATCH * choices.max(1) as usize } else { 1 };
        let (told, unread) = (false, 0);
        let inner = Inner { deliveries, most, flooded, reader, told, batch, unread, first_token, taken_up };
        Self { inner: Mutex::new(inner) }
    }

    /// From prefill's token to decode's first word, as they came in, however late they are read; if both came, in
    /// that order.
    pub fn handoff_time(&self) -> Option<Duration> {
        let inner = self.inner.lock();
        inner.taken_up?.checked_duration_since(inner.first_token?)
    }

    /// Has the processor fetch what a delivery touches beside the box: where it is put, and who is woken.
    pub(super) fn prefetch(&self) {
        let inner = self.inner.lock();
        prefetch_at(inner.deliveries.as_slices().0.as_ptr().cast(), size_of::<(Side, Output)>());
        if let Some(reader) = &inner.reader {
            // Counted in front of it is who holds it.
            prefetch_at(reader.data().cast::<u8>().wrapping_sub(READER_COUNTS), READER_BYTES);
        }
    }

    /// Of what lies there.
    pub fn last_token(&self) -> Option<u32> {
        self.inner.lock().deliveries.back()?.1.tokens.last().copied()
    }

    /// Leaves what a leg brought.
    pub fn deliver(&self, side: Side, mut output: Output) {
        let mut inner = self.inner.lock();
        let first = inner.note_time(side, &output);
        inner.unread += output.tokens.len();
        let complete = matches!(output.end, Some(LegEnd::Complete { .. }));
        let can_wait =
            !first && output.end.is_none() && !output.tokens.is_empty() && inner.unread < inner.batch;
        let full = inner.deliveries.len() >= inner.most;
        let same = |(of, other): &&mut (Side, Output)| *of == side && other.choice == output.choice;
        match inner.deliveries.iter_mut().rev().find(same) {
            Some((_, last)) if follows_on(last, &output) => {
                last.tokens.extend_from_slice(&output.tokens);
                last.logprobs.append(&mut output.logprobs);
                last.end = output.end;
            }
            // The request is lost with it, so that the other leg's last word matters no more.
            _ if full => inner.flooded = inner.flooded.or(inner.fullest()),
            _ => inner.deliveries.push_back((side, output)),
        }
        if complete {
            // Only of choices that go on so much is waited for.
            inner.batch = inner.batch.saturating_sub(BATCH).max(1);
        }
        if can_wait && inner.flooded.is_none() {
            return;
        }
        inner.unread = 0;
        inner.wake();
    }

    /// Has the reader look, though nothing has come.
    pub fn wake(&self) {
        self.inner.lock().wake();
    }

    /// Swaps what lies there into `into`, which must be empty. The first that comes after that wakes `reader`, who must take
    /// it to hear of more. Tells the leg whose instance has sent so much out of order that something was not taken.
    pub fn take(&self, reader: &Waker, into: &mut VecDeque<(Side, Output)>) -> Option<Side> {
        debug_assert!(into.is_empty());
        let mut inner = self.inner.lock();
        mem::swap(&mut inner.deliveries, into);
        (inner.unread, inner.told) = (0, false);
        match &mut inner.reader {
            Some(before) => before.clone_from(reader),
            vacant => *vacant = Some(reader.clone()),
        }
        inner.flooded
    }
}

fn follows_on(last: &Output, next: &Output) -> bool {
    last.end.is_none()
        && (next.tokens.is_empty()
            || (!last.tokens.is_empty()
                && u64::from(last.first_position) + last.tokens.len() as u64
                    == u64::from(next.first_position)))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::{Context, Poll, Wake},
    };

    use baton_proto::{ApiError, ErrorCode};

    use super::*;
    use crate::fleet::StopReason;

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

    fn take(mailbox: &Mailbox) -> Vec<(Side, Output)> {
        let mut into = VecDeque::new();
        mailbox.take(Waker::noop(), &mut into);
        into.into()
    }

    #[test]
    fn what_follows_on_is_merged() {
        let mailbox = Mailbox::new(1, false);
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
        let mailbox = Mailbox::new(1, false);
        mailbox.deliver(Side::Decode, output(1, &[1]));
        mailbox.deliver(Side::Prefill, output(0, &[0]));
        mailbox.deliver(Side::Prefill, output(3, &[3]));
        assert_eq!(take(&mailbox).len(), 3);
    }

    #[test]
    fn choices_that_take_turns_are_merged_each_for_itself() {
        let mailbox = Mailbox::new(3, false);
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
        let mailbox = Mailbox::new(1, false);
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
        let mailbox = Mailbox::new(1, false);
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

        let overtaken = Mailbox::new(1, false);
        overtaken.deliver(Side::Decode, output(1, &[2]));
        tokio::time::advance(pause).await;
        overtaken.deliver(Side::Prefill, output(0, &[1]));
        assert_eq!(overtaken.handoff_time(), None);
    }

    #[test]
    fn a_reader_of_batches_is_woken_for_what_is_news_and_for_many_tokens() {
        let counting = Arc::new(Counting(AtomicUsize::new(0)));
        let waker = Waker::from(counting.clone());
        let mailbox = Mailbox::new(1, true);
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

        let many = Mailbox::new(1, true);
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
        let (choices, done) = (Mailbox::new(3, true), LegEnd::HandedOff { cached_tokens: 0 });
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
        let mailbox = Mailbox::new(1, false);
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
        let mailbox = Arc::new(Mailbox::new(1, false));
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
}
