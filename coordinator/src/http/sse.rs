//! The body of a streamed answer: server-sent events, one write per engine step.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures::Stream;

use super::reply::Voice;
use crate::{
    dispatch::deadline_passed,
    stream::{Piece, Place, Step},
};

/// What an answer writes into, before it grows: some events of a token each.
const BUFFER_BYTES: usize = 2 << 10;
/// An event of one token fits.
const EVENT_BYTES: usize = 384;

/// Reads the answer as the client reads; dropped by hyper when the client has gone.
pub(super) struct SseBody {
    voice: Voice,
    /// `None` once the answer has ended; emptied from elsewhere if the client reads too slowly.
    place: Option<Place>,
    /// What came while the head waited.
    first: Option<Step>,
    /// What has not been written of each choice, reused from step to step.
    pieces: Vec<Piece>,
    /// Written from its beginning again once all that was written has been sent.
    out: BytesMut,
    opened: bool,
}

impl SseBody {
    pub(super) fn new(voice: Voice, place: Place, pieces: Vec<Piece>, first: Option<Step>) -> Self {
        let out = BytesMut::with_capacity(BUFFER_BYTES);
        Self { voice, place: Some(place), first, pieces, out, opened: false }
    }

    fn write(&mut self, step: Step) -> Bytes {
        let out = &mut self.out;
        if out.capacity() < EVENT_BYTES {
            out.reserve(BUFFER_BYTES);
        }
        if !std::mem::replace(&mut self.opened, true) {
            self.voice.opening(out, self.pieces.len());
        }
        for (index, piece) in self.pieces.iter_mut().enumerate() {
            self.voice.piece(out, index, piece);
        }
        match step {
            Step::More => {}
            Step::End(end) => {
                match end {
                    Ok(usage) => self.voice.closing(out, &usage),
                    Err(error) => self.voice.failure(out, &error),
                }
                // Gives the seat back now, not when the client has read everything.
                if let Some(place) = self.place.take() {
                    let ended = place.lock().take();
                    drop(ended);
                }
            }
        }
        self.out.split().freeze()
    }
}

impl Stream for SseBody {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let body = &mut *self;
        let Some(place) = &body.place else { return Poll::Ready(None) };
        let step = match body.first.take() {
            Some(step) => step,
            None => match place.lock().as_mut().map(|held| held.poll_step(context, &mut body.pieces)) {
                Some(Poll::Ready(step)) => step,
                // The head has gone out without a token: the opening tells the client that it is being served.
                Some(Poll::Pending) if !body.opened => Step::More,
                Some(Poll::Pending) => return Poll::Pending,
                None => Step::End(Err(deadline_passed())),
            },
        };
        let bytes = body.write(step);
        // A text completion's opening is nothing: wait for more.
        if bytes.is_empty() {
            return self.poll_next(context);
        }
        Poll::Ready(Some(Ok(bytes)))
    }
}
