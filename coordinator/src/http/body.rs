//! Reads a request's body, within a size and a time.

use std::time::Duration;

use axum::{
    body::Body,
    http::{
        HeaderMap,
        header::{CONTENT_LENGTH, EXPECT},
    },
};
use baton_proto::{ApiError, ErrorCode};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::timeout;

/// A body that takes longer is not waited for: it would hold a place in the house.
const TIME_MOST: Duration = Duration::from_secs(60);
/// A body that is too large is read on for this much more, and thrown away: many clients only look for the answer once
/// they have sent all.
const DISCARD_MOST: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);
/// Taken at once for a body that announces its length; one that lies gets no more memory than it sends.
const RESERVE_MOST: usize = 256 << 10;

/// The whole body, or the error that tells its limit.
pub(super) async fn read(headers: &HeaderMap, body: Body, most: usize) -> Result<Bytes, ApiError> {
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut chunks = body.into_data_stream();
    if announced.is_some_and(|bytes| bytes > most) {
        if headers.contains_key(EXPECT) {
            // The client asks before it sends.
            return Err(over(most));
        }
        return Err(too_large(&mut chunks, most).await);
    }
    let reading = async {
        let mut whole = BytesMut::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| {
                ApiError::new(ErrorCode::InvalidArgument, format!("the request body broke off: {error}"))
            })?;
            if whole.len() + chunk.len() > most {
                return Ok(None);
            }
            if whole.is_empty() {
                whole.reserve(announced.unwrap_or(0).min(RESERVE_MOST));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(Some(whole.freeze()))
    };
    match timeout(TIME_MOST, reading).await {
        Ok(Ok(Some(whole))) => Ok(whole),
        Ok(Ok(None)) => Err(too_large(&mut chunks, most).await),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let message = format!("the request body did not arrive within {} s", TIME_MOST.as_secs());
            Err(ApiError::new(ErrorCode::InvalidArgument, message))
        }
    }
}

async fn too_large(chunks: &mut axum::body::BodyDataStream, most: usize) -> ApiError {
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
    over(most)
}

fn over(most: usize) -> ApiError {
    ApiError::new(ErrorCode::PayloadTooLarge, format!("the request body is over the limit of {most} bytes"))
}
