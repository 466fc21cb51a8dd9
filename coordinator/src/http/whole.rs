//! The body of an answer that is written at once and long: given to its connection as the client reads.
//!
//! What the connection has not taken is here, with the memory that is counted for it, until it has, or until the request's
//! deadline. A short answer is the connection's at once.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    http::{StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use futures::Stream;
use parking_lot::Mutex;

use super::reply::json_response;
use crate::{
    admit::{UnreadBytes, body::FREE_BYTES},
    serve::Service,
    stream::{Streaming, Unread},
};

/// A connection is given so much at a time.
const SLICE_BYTES: usize = 64 << 10;

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
#[error("the client did not read the answer by the request's deadline")]
struct Late;

/// What is to be read.
enum Rest {
    Bytes { bytes: Bytes, _held: UnreadBytes },
    Late,
    Read,
}

#[derive(Clone)]
struct Whole(Arc<Mutex<Rest>>);

impl Unread for Mutex<Rest> {
    fn expire(&self) {
        let mut rest = self.lock();
        if matches!(*rest, Rest::Bytes { .. }) {
            *rest = Rest::Late;
        }
    }
}

impl Stream for Whole {
    type Item = Result<Bytes, Late>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut rest = self.0.lock();
        let (slice, last) = match &mut *rest {
            Rest::Read => return Poll::Ready(None),
            Rest::Late => return Poll::Ready(Some(Err(Late))),
            Rest::Bytes { bytes, .. } => {
                let slice = bytes.split_to(bytes.len().min(SLICE_BYTES));
                // A connection that keeps it is not to keep all of the answer with it.
                (Bytes::copy_from_slice(&slice), bytes.is_empty())
            }
        };
        if last {
            *rest = Rest::Read;
        }
        Poll::Ready(Some(Ok(slice)))
    }
}

/// What is kept of it, which is no more than is counted: its buffer has grown by doubling.
fn kept(json: Vec<u8>) -> Bytes {
    json.into_boxed_slice().into()
}

/// Gives `json`, the whole answer of a request that has been read.
pub(super) fn respond(service: &Service, streaming: Streaming, json: Vec<u8>) -> Response {
    let length = json.len();
    let Some(deadline) = streaming.deadline().filter(|_| length > FREE_BYTES) else {
        return json_response(StatusCode::OK, json);
    };
    let tenant = streaming.tenant();
    let held = service.gate.unread(streaming.into_ticket(), &tenant, length);
    let whole = Whole(Arc::new(Mutex::new(Rest::Bytes { bytes: kept(json), _held: held })));
    service.overdue.watch(&whole.0, deadline);
    let mut response = json_response(StatusCode::OK, Body::from_stream(whole));
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_an_answer_has_no_spare_room() {
        let mut json = Vec::with_capacity(3 << 20);
        json.resize(2 << 20, b'x');
        let kept = kept(json).try_into_mut().expect("it is nobody else's");
        assert_eq!((kept.len(), kept.capacity()), (2 << 20, 2 << 20));
    }
}
