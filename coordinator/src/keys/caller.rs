//! Who sends a request, and what their key's limits leave them, as the headers of an answer say it.

use std::{sync::Arc, time::Duration};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use baton_proto::ApiError;
use tokio::time::Instant;

use super::{Call, Holder, rate::Level};

const LIMIT_REQUESTS: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const REMAINING_REQUESTS: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RESET_REQUESTS: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");
const LIMIT_TOKENS: HeaderName = HeaderName::from_static("x-ratelimit-limit-tokens");
const REMAINING_TOKENS: HeaderName = HeaderName::from_static("x-ratelimit-remaining-tokens");
const RESET_TOKENS: HeaderName = HeaderName::from_static("x-ratelimit-reset-tokens");

/// Somebody who has been let in: by a key, or because none is asked for. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Caller(pub(super) Option<Arc<Holder>>);

impl Caller {
    /// Takes a request on, within the key's limits.
    pub fn call(&self, now: Instant) -> Result<Call, ApiError> {
        match &self.0 {
            Some(holder) => Call::begin(holder.clone(), now),
            None => Ok(Call::default()),
        }
    }

    /// The key's name; empty without one.
    pub fn key_name(&self) -> Arc<str> {
        self.0.as_ref().map(|holder| holder.name.clone()).unwrap_or_default()
    }

    /// Adds how the key's limits stand, of those that it has.
    pub fn tell(&self, headers: &mut HeaderMap, now: Instant) {
        let Some(holder) = &self.0 else { return };
        if let Some(rate) = holder.requests() {
            let level = holder.meter.requests.lock().level(rate, now);
            add(headers, [LIMIT_REQUESTS, REMAINING_REQUESTS, RESET_REQUESTS], level);
        }
        if let Some(rate) = holder.tokens() {
            let level = holder.meter.tokens.lock().level(rate, now);
            add(headers, [LIMIT_TOKENS, REMAINING_TOKENS, RESET_TOKENS], level);
        }
    }
}

fn add(headers: &mut HeaderMap, [limit, remaining, reset]: [HeaderName; 3], level: Level) {
    headers.insert(limit, level.limit.into());
    headers.insert(remaining, level.remaining.into());
    if let Ok(value) = HeaderValue::try_from(openai_duration(level.reset)) {
        headers.insert(reset, value);
    }
}

/// As OpenAI writes it: `20ms`, `7.66s`, `6m0s`.
fn openai_duration(time: Duration) -> String {
    // Rounded up, so that nobody comes too early.
    let millis = time.as_nanos().div_ceil(1_000_000);
    match (millis / 60_000, millis % 60_000) {
        (0, 0..1000) => format!("{millis}ms"),
        (0, _) => format!("{}s", millis as f64 / 1000.0),
        (minutes, rest) => format!("{minutes}m{}s", rest.div_ceil(1000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_clients_know_them() {
        for (micros, text) in
            [(0, "0ms"), (19_001, "20ms"), (7_660_000, "7.66s"), (60_000_000, "1m0s"), (125_100_000, "2m6s")]
        {
            assert_eq!(openai_duration(Duration::from_micros(micros)), text);
        }
    }
}
