//! Reads a request's body, within a size, a time and the memory that all bodies share.

use std::time::Duration;

use axum::{
    body::{Body as Incoming, BodyDataStream},
    http::{
        HeaderMap,
        header::{CONTENT_LENGTH, EXPECT},
    },
};
use baton_proto::{ApiError, ErrorCode};
use futures::StreamExt;
use tokio::time::timeout;

use crate::{
    admit::{Body, Gate, Ticket},
    config::LimitsConfig,
};

/// A body that is refused for its size is read on for this much more, and thrown away: many clients only look for the
/// answer once they have sent all.
const DISCARD_MOST: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Why a body is not taken.
enum Unread {
    /// Before any of it was read.
    Unasked(ApiError),
    /// In its midst.
    Refused(ApiError),
    Broken(ApiError),
}

/// The whole body, or the error that tells its limit. A body that is refused gives its ticket back before the rest of
/// it is thrown away.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    limits: &LimitsConfig,
    (gate, ticket): (&Gate, Ticket),
) -> Result<(Body, Ticket), ApiError> {
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut chunks = body.into_data_stream();
    let reading = timeout(limits.body_timeout, taken(announced, &mut chunks, gate, limits.max_body_bytes));
    let error = match reading.await {
        Ok(Ok(whole)) => return Ok((whole, ticket)),
        // The client asks before it sends.
        Ok(Err(Unread::Unasked(error))) if headers.contains_key(EXPECT) => return Err(error),
        Ok(Err(Unread::Unasked(error) | Unread::Refused(error))) => error,
        Ok(Err(Unread::Broken(error))) => return Err(error),
        Err(_) => return Err(gate.late_body(limits.body_timeout)),
    };
    drop(ticket);
    discard(&mut chunks).await;
    Err(error)
}

async fn taken(
    announced: Option<usize>,
    chunks: &mut BodyDataStream,
    gate: &Gate,
    most: usize,
) -> Result<Body, Unread> {
    if announced.is_some_and(|bytes| bytes > most) {
        return Err(Unread::Unasked(over(most)));
    }
    let mut whole = gate.body(announced).map_err(Unread::Unasked)?;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| {
            let message = format!("the request body broke off: {error}");
            Unread::Broken(ApiError::new(ErrorCode::InvalidArgument, message))
        })?;
        if whole.len() + chunk.len() > most {
            return Err(Unread::Refused(over(most)));
        }
        whole.push(&chunk).map_err(Unread::Refused)?;
    }
    whole.complete();
    Ok(whole)
}

async fn discard(chunks: &mut BodyDataStream) {
    let discard = async {
        let mut left = DISCARD_MOST;
        while let Some(Ok(chunk)) = chunks.next().await {
            match left.checked_sub(chunk.len()) {
                Some(rest) => left = rest,
                None => break,
            }
        }
    };
    let _ = timeout(DISCARD_TIME, discard).await;
}

fn over(most: usize) -> ApiError {
    ApiError::new(ErrorCode::PayloadTooLarge, format!("the request body is over the limit of {most} bytes"))
}
