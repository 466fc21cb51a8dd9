//! What becomes of an answer that its client has not read up to the request's deadline.
//!
//! Called by [`crate::stream::Overdue`]. Nothing is kept but the rest of an event that the client has the beginning of.

use baton_process::http::CHUNK_HEAD;

use super::{Answer, Parts, Source};
use crate::stream::Unread;

/// What each event ends with. There is no end of a line within one.
const EVENT_END: &[u8] = b"\n\n";

impl Unread for Answer {
    fn expire(&self) {
        let late = {
            let mut parts = self.parts.lock();
            let Some(late) = parts.source.end() else { return };
            parts.source = Source::Late;
            (parts.begun, parts.unsent, parts.ends) = (None, false, false);
            parts.deltas = Vec::new();
            parts.leave_event();
            late
        };
        late.expire();
        self.task.wake();
    }
}

impl Parts {
    /// Nothing is given any more but the rest of an event of which the connection has been given the beginning.
    fn leave_event(&mut self) {
        let from = self.given.saturating_sub(EVENT_END.len());
        let end = self.out[from..].windows(EVENT_END.len()).position(|bytes| bytes == EVENT_END);
        let end = end.map_or(self.out.len(), |at| from + at + EVENT_END.len());
        let rest = if self.given == 0 { &[] } else { self.out.get(self.given..end).unwrap_or_default() };
        let given = if rest.is_empty() { 0 } else { CHUNK_HEAD };
        self.out = [&[0; CHUNK_HEAD], rest].concat();
        (self.given, self.text_at) = (given, None);
    }
}
