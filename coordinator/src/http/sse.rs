//! The body of a streamed answer: server-sent events, one write per engine step.
//!
//! Read by the connection's task, as any body; once the head has gone out, and as long as the client takes what is
//! written, by the attachment that brings the tokens, which sends them past that task (see [`Express`] and
//! [`crate::fleet::inline`]). Whoever reads, or asks for its memory ahead, holds `parts`; all find the answer where the others
//! left it.
//!
//! A client that reads slowly keeps what its answer holds, and no longer than until the request's deadline; the answer goes on
//! meanwhile ([`unread`]). What is much to tell, as an echo is or what has gathered, is written in slices as they are read.
//!
//! An answer that has nothing to tell for long, because its prompt is long or because it is looking for another place, is sent
//! a comment now and then, which clients pass over: proxies take a silent connection for a dead one.

mod unread;

use std::{
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use baton_process::{
    http::{CHUNK_HEAD, Express, Sent},
    prefetch::prefetch,
};
use bytes::Bytes;
use futures::{
    Stream,
    task::{ArcWake, AtomicWaker, waker_ref},
};
use parking_lot::Mutex;
use tokio::{
    task::unconstrained,
    time::{Instant, Sleep, sleep},
};

use super::reply::{TEXT_MOST, Voice};
use crate::{
    dispatch::deadline_passed,
    fleet::inline,
    stream::{Delta, Step, Streaming},
};

/// What an answer writes into, before it grows: some events of a token each.
const BUFFER_BYTES: usize = 1 << 10;
/// A connection is given so much at a time. Of a step that has more to tell no other event is written before that is taken.
const SLICE_BYTES: usize = 64 << 10;

/// What is written when there is nothing to tell.
const COMMENT: Bytes = Bytes::from_static(b": waiting\n\n");

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
#[error("the answer met a bug in the coordinator")]
pub(super) struct Bug;

/// Reads the answer as the client reads; dropped by hyper when the client has gone.
pub(super) struct SseBody {
    answer: Arc<Answer>,
    silence: Silence,
}

/// Notices that nothing has been written for long. Of the connection's task alone.
struct Silence {
    /// Zero: it does not.
    after: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Silence {
    /// Ends when nothing has been written for `after`, and no later than twice that. `wrote`: something has been since this
    /// was looked at.
    fn poll(&mut self, context: &mut Context<'_>, wrote: &mut bool) -> Poll<()> {
        if self.after.is_zero() {
            return Poll::Pending;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.after)));
        loop {
            ready!(timer.as_mut().poll(context));
            timer.as_mut().reset(Instant::now() + self.after);
            if !mem::take(wrote) {
                return Poll::Ready(());
            }
        }
    }
}

/// See [`SseBody`].
pub(super) struct Answer {
    parts: Mutex<Parts>,
    /// `None`: every byte goes through the connection's task.
    express: Option<Express>,
    /// The connection's task.
    task: AtomicWaker,
    /// It has been woken by a delivery and has not read yet.
    gathered: AtomicBool,
}

/// Where the rest of an answer comes from.
enum Source {
    Live(Box<Streaming>),
    /// Its client has read too slowly, and is to be told so.
    Late,
    Ended,
}

impl Source {
    /// What it was, to be let go when nothing is locked any more.
    fn end(&mut self) -> Option<Box<Streaming>> {
        match mem::replace(self, Self::Ended) {
            Self::Live(streaming) => Some(streaming),
            Self::Late | Self::Ended => None,
        }
    }
}

struct Parts {
    voice: Voice,
    source: Source,
    /// A step that is not written, or not to its end: what came while the head waited, or nothing was read, and what is long.
    begun: Option<Step>,
    /// What has not been written of each choice, reused from step to step.
    deltas: Vec<Delta>,
    /// Written again at each step, after room for a chunk's head.
    out: Vec<u8>,
    /// Up to where the connection has been given `out`, which is longer than a slice; 0: it is not.
    given: usize,
    /// The answer ends with `out`.
    ends: bool,
    /// Where the text begins in `out`, if it has what each event of text alone begins with: the next is written from there.
    text_at: Option<usize>,
    opened: bool,
    /// Since it was last looked whether anything is.
    wrote: bool,
    /// What `out` has was read past the connection's task, and has not been sent.
    unsent: bool,
    broken: bool,
}

impl SseBody {
    /// Comments are written after so long without anything else; zero: none are.
    pub(super) fn new(
        comment_after: Duration,
        voice: Voice,
        streaming: Streaming,
        deltas: Vec<Delta>,
        begun: Option<Step>,
        express: Option<Express>,
    ) -> Self {
        let out = Vec::with_capacity(BUFFER_BYTES);
        let source = Source::Live(Box::new(streaming));
        let (opened, wrote, unsent, broken) = (false, false, false, false);
        let text_at = None;
        let (given, ends) = (0, false);
        let parts =
            Parts { voice, source, begun, deltas, out, given, ends, text_at, opened, wrote, unsent, broken };
        let (task, gathered) = (AtomicWaker::new(), AtomicBool::new(false));
        let answer = Arc::new(Answer { parts: Mutex::new(parts), express, task, gathered });
        Self { answer, silence: Silence { after: comment_after, timer: None } }
    }

    /// What is to be read in time.
    pub(super) fn answer(&self) -> &Arc<Answer> {
        &self.answer
    }
}

impl Drop for SseBody {
    /// Gives back everything that the request holds: what would wake this answer holds it, too.
    fn drop(&mut self) {
        let left = {
            let mut parts = self.answer.parts.lock();
            parts.unsent = false;
            parts.source.end()
        };
        self.answer.express.iter().for_each(Express::gives);
        drop(left);
    }
}

impl Parts {
    /// Writes what the next step brings to `out`; `None` after the end.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<()>> {
        let step = match (&mut self.source, self.begun.take()) {
            (Source::Ended, _) => return Poll::Ready(None),
            (Source::Late, _) => Step::End(Err(deadline_passed())),
            (Source::Live(_), Some(step)) => step,
            (Source::Live(streaming), None) => match streaming.poll_step(context, &mut self.deltas) {
                Poll::Ready(step) => step,
                // The head has gone out without a token: the opening tells the client that it is being served.
                Poll::Pending if !self.opened => Step::More,
                Poll::Pending => return Poll::Pending,
            },
        };
        self.write(step);
        Poll::Ready(Some(()))
    }

    fn write(&mut self, step: Step) {
        self.wrote = true;
        if let (Step::More, true, [delta]) = (&step, self.opened, &mut *self.deltas)
            && delta.is_text_alone()
            && delta.text.len() <= TEXT_MOST
        {
            return Self::write_text(&self.voice, &mut self.out, &mut self.text_at, delta);
        }
        let out = &mut self.out;
        begin(out);
        self.text_at = None;
        if !mem::replace(&mut self.opened, true) {
            self.voice.opening(out, self.deltas.len());
        }
        for (index, delta) in self.deltas.iter_mut().enumerate() {
            while !delta.is_empty() {
                if out.len() > SLICE_BYTES {
                    self.begun = Some(step);
                    return;
                }
                self.voice.delta(out, index, delta);
            }
        }
        let Step::End(end) = step else { return };
        match end {
            Ok(usage) => {
                self.voice.closing(out, &usage);
                if let Source::Live(streaming) = &mut self.source {
                    streaming.written(&usage);
                }
            }
            Err(error) => self.voice.failure(out, &error),
        }
        // Gives the seat back now, not when the client has read everything, unless that is long.
        self.ends = self.out.len() > SLICE_BYTES;
        if !self.ends {
            drop(self.source.end());
        }
    }

    fn write_text(voice: &Voice, out: &mut Vec<u8>, text_at: &mut Option<usize>, delta: &mut Delta) {
        let at = *text_at.get_or_insert_with(|| {
            begin(out);
            voice.before_text(out);
            out.len()
        });
        out.truncate(at);
        voice.text(out, &delta.text);
        delta.clear();
    }

    /// What the body gives next.
    fn next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Bug>>> {
        if self.broken {
            if let Some(met) = self.source.end() {
                _ = met.broke();
            }
            return Poll::Ready(Some(Err(Bug)));
        }
        if mem::take(&mut self.unsent) || self.given > 0 {
            return Poll::Ready(Some(Ok(self.slice())));
        }
        loop {
            match ready!(self.poll(context)) {
                None => return Poll::Ready(None),
                // A text completion's opening is nothing: wait for more.
                Some(()) if self.out.len() <= CHUNK_HEAD => {}
                Some(()) => return Poll::Ready(Some(Ok(self.slice()))),
            }
        }
    }

    /// The next of what was written last.
    fn slice(&mut self) -> Bytes {
        let from = self.given.max(CHUNK_HEAD);
        let to = self.out.len().min(from + SLICE_BYTES);
        let slice = Bytes::copy_from_slice(self.out.get(from..to).unwrap_or_default());
        self.given = if to < self.out.len() { to } else { 0 };
        if self.given == 0 && from > CHUNK_HEAD {
            (self.out, self.text_at) = (Vec::new(), None);
        }
        if self.given == 0 && mem::take(&mut self.ends) {
            drop(self.source.end());
        }
        slice
    }

    /// Reads past the connection's task.
    fn read_past(&mut self, express: &Express, context: &mut Context<'_>) -> Past {
        if self.broken || self.unsent || self.given > 0 || !express.is_free() {
            return Past::Task;
        }
        // The attachment's task would else count what is polled here as its own work, and make it wait.
        let step = pin!(unconstrained(std::future::poll_fn(|context| self.poll(context)))).poll(context);
        match step {
            Poll::Pending => Past::Nothing,
            Poll::Ready(None) => Past::Task,
            Poll::Ready(Some(())) => {
                self.unsent = true;
                // The connection's task ends the body, and sends the last of it along with that, and what follows in slices.
                let task = matches!(self.source, Source::Ended) || self.out.len() > SLICE_BYTES;
                if task { Past::Task } else { Past::Send }
            }
        }
    }
}

/// Only room for a chunk's head.
fn begin(out: &mut Vec<u8>) {
    out.clear();
    out.resize(CHUNK_HEAD, 0);
}

/// What is to be done about an answer that was read past its connection's task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Past {
    Nothing,
    Send,
    /// That task has something to do.
    Task,
}

impl inline::Reader for Answer {
    fn prefetch(&self, depth: usize) {
        let Some(parts) = self.parts.try_lock() else { return };
        let Source::Live(streaming) = &parts.source else { return };
        if depth == 0 {
            prefetch(&**streaming);
            prefetch(parts.out.as_slice());
            prefetch(parts.deltas.as_slice());
            self.express.iter().for_each(|express| express.prefetch(false));
        } else {
            streaming.prefetch(depth > 1);
            if depth == 1 {
                parts.deltas.iter().take(1).for_each(|delta| prefetch(delta.text.as_bytes()));
                self.express.iter().for_each(|express| express.prefetch(true));
            }
        }
    }

    fn read(self: Arc<Self>) -> bool {
        self.gathered.store(false, Ordering::Release);
        let past = match (&self.express, self.parts.try_lock()) {
            (Some(express), Some(mut parts)) => {
                let waker = waker_ref(&self);
                let read = || parts.read_past(express, &mut Context::from_waker(&waker));
                // A bug ends this answer, and nothing else that the attachment carries.
                catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
                    parts.broken = true;
                    Past::Task
                })
            }
            // Its task reads, and may have looked before this came; or another attachment asks for memory ahead.
            _ => Past::Task,
        };
        if past == Past::Task {
            self.task.wake();
        }
        past == Past::Send
    }

    fn send(&self) {
        let (Some(express), Some(mut parts)) = (&self.express, self.parts.try_lock()) else {
            // The body gives it, whoever has hold of it now.
            return self.task.wake();
        };
        // Or the body has given it meanwhile.
        if !parts.unsent {
            return;
        }
        let sent = express.send(&mut parts.out);
        parts.unsent = sent == Sent::No;
        drop(parts);
        if sent != Sent::Whole {
            self.task.wake();
        }
    }
}

impl ArcWake for Answer {
    fn wake_by_ref(answer: &Arc<Self>) {
        // It reads after this, whoever has it read.
        if answer.gathered.swap(true, Ordering::AcqRel) {
            return;
        }
        if !inline::woken(answer) {
            answer.gathered.store(false, Ordering::Release);
            answer.task.wake();
        }
    }
}

impl Stream for SseBody {
    type Item = Result<Bytes, Bug>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { answer, silence } = &mut *self;
        let mut comment = |parts: &mut Parts, context: &mut Context<'_>| {
            silence.poll(context, &mut parts.wrote).map(|()| Some(Ok(COMMENT)))
        };
        answer.task.register(context.waker());
        let Some(express) = &answer.express else {
            let parts = &mut *answer.parts.lock();
            let next = parts.next(context);
            return if next.is_pending() { comment(parts, context) } else { next };
        };
        let parts = &mut *answer.parts.lock();
        let waker = waker_ref(answer);
        let mut next = parts.next(&mut Context::from_waker(&waker));
        if next.is_pending() {
            next = comment(parts, context);
        }
        if next.is_pending() {
            express.waits();
        } else {
            express.gives();
        }
        next
    }
}
