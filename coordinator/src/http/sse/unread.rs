//! What becomes of an answer while its client takes nothing of it.
//!
//! Called by [`crate::stream::Overdue`], again and again. What has come is taken in and not written: so it is counted, ends at
//! its stop strings, leaves an instance that drains, and is no more than the answer may have. Once the request's deadline has
//! passed nothing is kept but the rest of an event that the client has the beginning of.

use std::{
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
};

use baton_process::http::{CHUNK_HEAD, Express};
use futures::task::waker_ref;
use tokio::task::unconstrained;

use super::{Answer, Parts, Source};
use crate::stream::{Step, Unread};

/// What each event ends with. There is no end of a line within one.
const EVENT_END: &[u8] = b"\n\n";

impl Unread for Answer {
    fn advance(self: Arc<Self>) {
        // Whatever comes is sent as it comes.
        if self.express.as_ref().is_some_and(Express::is_free) {
            return;
        }
        // Or somebody reads it right now.
        let Some(mut parts) = self.parts.try_lock() else { return };
        let waker = waker_ref(&self);
        let gather = || parts.gather(&mut Context::from_waker(&waker));
        // A bug ends this answer, and no other.
        let gathered = catch_unwind(AssertUnwindSafe(gather)).unwrap_or_else(|_| {
            parts.broken = true;
            true
        });
        drop(parts);
        if gathered {
            self.task.wake();
        }
    }

    fn expire(&self) {
        let late = {
            let mut parts = self.parts.lock();
            let Some(late) = parts.source.end() else { return };
            (parts.begun, parts.unsent) = (None, false);
            parts.deltas = Vec::new();
            let to_the_end = parts.leave_event();
            // Who has the beginning of the last event gets the rest, and no error behind it.
            if !(mem::take(&mut parts.ends) && to_the_end) {
                parts.source = Source::Late;
            }
            late
        };
        late.expire();
        self.task.wake();
    }
}

impl Parts {
    /// Takes in what has come. True: there is something to write.
    fn gather(&mut self, context: &mut Context<'_>) -> bool {
        let (Source::Live(streaming), None | Some(Step::More)) = (&mut self.source, &self.begun) else {
            return false;
        };
        if self.ends || self.broken {
            return false;
        }
        // The sweep's task would else count what is polled here as its own work, and make it wait.
        let step = std::future::poll_fn(|context| streaming.poll_step(context, &mut self.deltas));
        match pin!(unconstrained(step)).poll(context) {
            Poll::Ready(step) => {
                self.begun = Some(step);
                true
            }
            Poll::Pending => false,
        }
    }

    /// Nothing is given any more but the rest of an event of which the connection has been given the beginning. True: that is all
    /// that was left.
    fn leave_event(&mut self) -> bool {
        let from = self.given.saturating_sub(EVENT_END.len());
        let end = self.out[from..].windows(EVENT_END.len()).position(|bytes| bytes == EVENT_END);
        let end = end.map_or(self.out.len(), |at| from + at + EVENT_END.len());
        let rest = if self.given == 0 { &[] } else { self.out.get(self.given..end).unwrap_or_default() };
        let (given, is_all) = if rest.is_empty() { (0, false) } else { (CHUNK_HEAD, end == self.out.len()) };
        self.out = [&[0; CHUNK_HEAD], rest].concat();
        (self.given, self.text_at) = (given, None);
        is_all
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::RequestId;

    use super::*;
    use crate::{
        http::reply::Voice,
        prepare::{Endpoint, Shape, tests::served},
    };

    #[test]
    fn of_what_is_not_given_the_rest_of_a_begun_event_stays() {
        let shape = Shape { endpoint: Endpoint::Chat, stream: true, include_usage: false, logprobs: false };
        let events = b"data: a\n\ndata: [DONE]\n\n";
        let first = b"data: a\n\n".len();
        for given in 0..events.len() {
            let mut parts = Parts {
                voice: Voice::new(&served(), shape, &RequestId::adopt("r")),
                source: Source::Ended,
                begun: None,
                deltas: Vec::new(),
                out: [&[0; CHUNK_HEAD], &events[..]].concat(),
                given: if given == 0 { 0 } else { CHUNK_HEAD + given },
                ends: true,
                text_at: None,
                opened: true,
                wrote: false,
                unsent: false,
                broken: false,
            };
            let is_all = parts.leave_event();
            let rest = match given {
                0 => &[],
                _ if given <= first => &events[given..first],
                _ => &events[given..],
            };
            assert_eq!((&parts.out[CHUNK_HEAD..], is_all), (rest, given > first), "{given} bytes given");
            assert_eq!(parts.given > 0, !rest.is_empty(), "{given} bytes given");
        }
    }
}
