//! Where the legs of one request deliver, and its reader picks up.
//!
//! Written by the attachments' tasks, read by [`crate::dispatch`]. A delivery never waits: one slow client must
//! not hold up the stream that carries everybody else's tokens. It is bounded all the same: what follows on
//! from the last delivery of the same choice of the same leg is appended to it, so a reader that is away
//! costs four bytes a token (some 200 with log probabilities) and no more than twice what the request may
//! generate. What goes beyond its last token, or comes again and again, or in more than [`DELIVERIES_MOST`]
//! pieces that do not follow on, is a flood: nothing more is taken and [`Mailbox::take`] says whose fault it
//! is. That is no end of the leg: its instance works on until it is told to stop.

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

/// What a request's legs may bring.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    pub choices: u32,
    /// Of each choice, with those that it goes on from.
    pub max_tokens: u32,
    /// So many of the likeliest tokens are told with each one's score; `None`: scores are not wanted.
    pub top_logprobs: Option<u32>,
    /// Of tokens that only go on from earlier ones, the reader is woken for many at a time.
    pub in_batches: bool,
}

impl Expected {
    /// Whether an output has only what the request may generate, with no more scores than tokens.
    fn has_room_for(&self, output: &Output) -> bool {
        let end = u64::from(output.first_position) + output.tokens.len() as u64;
        (output.tokens.is_empty() || end <= u64::from(self.max_tokens))
            && output.logprobs.len() <= output.tokens.len()
    }

    /// Leaves of an output's scores what was asked for.
    fn cut(&self, output: &mut Output) {
        let Some(most) = self.top_logprobs else {
            output.logprobs = Vec::new();
            return;
        };
        for scored in &mut output.logprobs {
            if scored.top.len() > most as usize {
                scored.top.truncate(most as usize);
                scored.top.shrink_to_fit();
            }
        }
    }
}

#[derive(Debug)]
struct Inner {
    deliveries: VecDeque<(Side, Output)>,
    most: usize,
    /// Tokens that lie here, and may.
    tokens: usize,
    tokens_most: usize,
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
        let of = |side: Side| -> usize {
            let own = self.deliveries.iter().filter(|(by, _)| *by == side);
            own.map(|(_, output)| 1 + output.tokens.len()).sum()
        };
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
    expected: Expected,
    inner: Mutex<Inner>,
}

impl Mailbox {
    /// For a request.
    pub fn new(expected: Expected) -> Self {
        let choices = expected.choices.max(1) as usize;
        let inner = Inner {
            deliveries: VecDeque::new(),
            most: DELIVERIES_MOST * choices,
            tokens: 0,
            tokens_most: choices.saturating_mul(expected.max_tokens as usize).saturating_mul(2),
            flooded: None,
            reader: None,
            told: false,
            batch: if expected.in_batches { BATCH * choices } else { 1 },
            unread: 0,
            first_token: None,
            taken_up: None,
        };
        Self { expected, inner: Mutex::new(inner) }
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
        if !output.logprobs.is_empty() {
            self.expected.cut(&mut output);
        }
        let mut inner = self.inner.lock();
        if !self.expected.has_room_for(&output) {
            inner.flooded = inner.flooded.or(Some(side));
            return inner.wake();
        }
        let first = inner.note_time(side, &output);
        inner.unread += output.tokens.len();
        inner.tokens += output.tokens.len();
        let complete = matches!(output.end, Some(LegEnd::Complete { .. }));
        let can_wait =
            !first && output.end.is_none() && !output.tokens.is_empty() && inner.unread < inner.batch;
        let full = inner.deliveries.len() >= inner.most;
        let repeats = inner.tokens > inner.tokens_most;
        let same = |(of, other): &&mut (Side, Output)| *of == side && other.choice == output.choice;
        match inner.deliveries.iter_mut().rev().find(same) {
            // The request is lost with it, so that the other leg's last word matters no more.
            _ if repeats => inner.flooded = inner.flooded.or(inner.fullest()),
            Some((_, last)) if follows_on(last, &output) => {
                last.tokens.extend_from_slice(&output.tokens);
                last.logprobs.append(&mut output.logprobs);
                last.end = output.end;
            }
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
    /// it to hear of more. Tells the leg whose instance has sent so much, or so disorderly, that something was not taken.
    pub fn take(&self, reader: &Waker, into: &mut VecDeque<(Side, Output)>) -> Option<Side> {
        debug_assert!(into.is_empty());
        let mut inner = self.inner.lock();
        mem::swap(&mut inner.deliveries, into);
        (inner.unread, inner.tokens, inner.told) = (0, 0, false);
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
mod tests;
