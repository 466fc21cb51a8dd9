//! Which answers of a connection are on their way: from the head of a request to the last of its answer's bytes.
//!
//! [`crate::http`] and [`crate::grpc`] tell by it a connection that carries nothing from one whose answer takes long.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::{sync::watch, time::timeout};

/// Handed to HTTP/2 at a time. It waits for its client only between two pieces: a body given as one would count as sent
/// while most of it still waits.
const PIECE_BYTES: usize = 16 << 10;

/// Counts the answers of one connection. Clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Underway(watch::Sender<usize>);

impl Underway {
    /// One more, until the turn is dropped.
    pub(crate) fn begin(&self) -> Turn {
        self.0.send_modify(|answers| *answers += 1);
        Turn(self.0.clone())
    }

    /// Returns once nothing has been on its way for this long.
    pub(crate) async fn nothing_for(&self, time: Duration) {
        let mut answers = self.0.subscribe();
        // The sender is here: neither wait can fail.
        while answers.wait_for(|answers| *answers == 0).await.is_ok() {
            if timeout(time, answers.changed()).await.is_err() {
                return;
            }
        }
    }

    /// Returns once something has been on its way for this long, while nothing has begun or ended.
    pub(crate) async fn same_for(&self, time: Duration) {
        let mut answers = self.0.subscribe();
        while answers.wait_for(|answers| *answers > 0).await.is_ok() {
            if timeout(time, answers.changed()).await.is_err() {
                return;
            }
        }
    }
}

/// One answer on its way.
#[derive(Debug)]
pub(crate) struct Turn(watch::Sender<usize>);

impl Turn {
    /// Lasts as long as the body does.
    pub(crate) fn carry(self, body: Body) -> Carried {
        Carried { body, rest: Bytes::new(), _turn: self }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.send_modify(|answers| *answers -= 1);
    }
}

/// A body in small pieces, on its way until it is dropped.
#[derive(Debug)]
pub(crate) struct Carried {
    body: Body,
    /// Of the last frame, what has not been given yet.
    rest: Bytes,
    _turn: Turn,
}

impl HttpBody for Carried {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(context))
                .map(|frame| frame.map(Frame::into_data))
            {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        let length = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(hint.lower().saturating_add(rest));
        hint
    }
}
