//! Reads a request's body, within a size, a time and the memory that all bodies share. What has come of a long one is
//! tokenised while the rest is on its way ([`crate::prepare::Ahead`]).

use std::time::Duration;

use axum::{
    body::{Body as Incoming, BodyDataStream},
    http::{
        HeaderMap, Version,
        header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT},
        request::Parts,
    },
};
use baton_proto::{ApiError, ErrorCode};
use futures::StreamExt;
use tokio::time::timeout;

use crate::{
    admit::{Body, Ticket},
    keys::{Caller, Tenant},
    prepare::AHEAD_FROM_BYTES,
    serve::Service,
};

/// So much of a body that is refused is read on, and thrown away: many clients only look for the answer once they have sent
/// all.
const DISCARD_MOST: usize = 64 << 20;
/// The same of whoever has not been let in.
const DISCARD_OF_STRANGERS_MOST: usize = 8 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Why a body is not taken.
enum Unread {
    /// Before any of it was read.
    Unasked(ApiError),
    /// In its midst.
    Refused(ApiError),
    Broken(ApiError),
}

/// The whole body, or the error that tells its limit. A body that is refused gives its room back before the rest of
/// it is thrown away.
pub(super) async fn read(
    service: &Service,
    tenant: &Tenant,
    ticket: Ticket,
    headers: &HeaderMap,
    body: Incoming,
) -> Result<Body, ApiError> {
    let (limits, gate) = (&service.limits, &service.gate);
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut chunks = body.into_data_stream();
    let reading = async {
        plain(headers).map_err(Unread::Unasked)?;
        taken(service, tenant, ticket, announced, &mut chunks).await
    };
    let error = match timeout(limits.body_timeout, reading).await {
        Ok(Ok(whole)) => return Ok(whole),
        // The client asks before it sends.
        Ok(Err(Unread::Unasked(error))) if headers.contains_key(EXPECT) => return Err(error),
        Ok(Err(Unread::Unasked(error) | Unread::Refused(error))) => error,
        Ok(Err(Unread::Broken(error))) => return Err(error),
        Err(_) => return Err(gate.late_body(limits.body_timeout)),
    };
    discard(&mut chunks, DISCARD_MOST).await;
    Err(error)
}

async fn taken(
    service: &Service,
    tenant: &Tenant,
    ticket: Ticket,
    announced: Option<usize>,
    chunks: &mut BodyDataStream,
) -> Result<Body, Unread> {
    let most = service.limits.max_body_bytes;
    if announced.is_some_and(|bytes| bytes > most) {
        return Err(Unread::Unasked(over(most)));
    }
    let mut ahead = None;
    let body = service.gate.body(ticket, announced, tenant, || service.may_outrank(tenant));
    let mut whole = body.map_err(Unread::Unasked)?;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| {
            let message = format!("the request body broke off: {error}");
            Unread::Broken(ApiError::new(ErrorCode::InvalidArgument, message))
        })?;
        if whole.len() + chunk.len() > most {
            return Err(Unread::Refused(over(most)));
        }
        whole.push(&chunk).map_err(Unread::Refused)?;
        let more_comes = announced.is_none_or(|bytes| whole.len() < bytes);
        if more_comes && whole.len() >= AHEAD_FROM_BYTES {
            let ahead = ahead.get_or_insert_with(|| service.ahead(&whole));
            while ahead.as_mut().is_some_and(|(ahead, _)| ahead.read(&whole)) {
                tokio::task::yield_now().await;
            }
        }
    }
    whole.complete();
    Ok(whole)
}

/// Before an answer that does not depend on the body, of which nothing has been read. Who asks before they send is not asked
/// for anything, and over HTTP/2 a stream can be answered while its other way is open.
pub(super) async fn leave_unread(head: &Parts, body: Incoming) {
    let known = head.extensions.get::<Caller>().is_some();
    turn_away(head, body, if known { DISCARD_MOST } else { DISCARD_OF_STRANGERS_MOST }).await;
}

/// The same where nobody is known any more.
pub(super) async fn leave_all_unread(head: &Parts, body: Incoming) {
    turn_away(head, body, DISCARD_MOST).await;
}

async fn turn_away(head: &Parts, body: Incoming, most: usize) {
    if head.version < Version::HTTP_2 && !head.headers.contains_key(EXPECT) {
        discard(&mut body.into_data_stream(), most).await;
    }
}

/// Reads what a client is sending, within bounds: one whose connection is closed before may not see its answer.
async fn discard(chunks: &mut BodyDataStream, most: usize) {
    let discard = async {
        let mut left = most;
        while let Some(Ok(chunk)) = chunks.next().await {
            match left.checked_sub(chunk.len()) {
                Some(rest) => left = rest,
                None => break,
            }
        }
    };
    let _ = timeout(DISCARD_TIME, discard).await;
}

/// Bodies are taken as they are: what a compressed one becomes is not within its limit.
fn plain(headers: &HeaderMap) -> Result<(), ApiError> {
    match headers.get(CONTENT_ENCODING).filter(|value| *value != "identity") {
        None => Ok(()),
        Some(value) => {
            let message = format!(
                "the request body comes in the encoding {value:?}, which is not taken: send it as it is"
            );
            Err(ApiError::new(ErrorCode::UnsupportedMediaType, message))
        }
    }
}

fn over(most: usize) -> ApiError {
    ApiError::new(ErrorCode::PayloadTooLarge, format!("the request body is over the limit of {most} bytes"))
}
