//! What one request with a key takes of the key's limits, and gives back.
//!
//! States: taken on (counted among those at a time; one of the requests a minute is gone, whatever becomes of it) ->
//! admitted (tokens promised: the prompt's and as many as are expected) -> ended, by drop, wherever that happens: what
//! was really used takes the promise's place.

use std::{
    num::NonZeroU32,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use baton_proto::{ApiError, ErrorCode};
use tokio::time::Instant;

use super::{
    Holder, Refusal,
    rate::{Rate, Short},
    tenant::Tenant,
};
use crate::prepare::{Prepared, PreparedPrompt};

/// Of the tokens that a choice may have so many are expected. One that gets more takes it from the next requests.
const EXPECTED_TOKENS_MOST: u32 = 1024;
/// When to try again while too many requests run: how long those take is not known.
const AT_A_TIME_RETRY: Duration = Duration::from_secs(1);

/// Held for as long as the request lives. Without a key it bounds and counts nothing.
#[derive(Debug, Default)]
pub struct Call {
    holder: Option<Arc<Holder>>,
    promised: u64,
    /// At which that was promised, and is settled, whatever the key may by then.
    rate: Option<Rate>,
    prompt_tokens: u32,
    generated_tokens: u32,
}

impl Call {
    /// Takes a request on, or refuses it.
    pub(super) fn begin(holder: Arc<Holder>, now: Instant) -> Result<Self, ApiError> {
        let name = &holder.key.name;
        let running = &holder.meter.running;
        let most = holder.concurrent().map_or(u32::MAX, NonZeroU32::get);
        let begun = running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |running| {
            (running < most).then(|| running.saturating_add(1))
        });
        if begun.is_err() {
            let message = format!("API key {name} has {most} requests running already, as many as it may");
            return Err(holder.refuse(Refusal::Concurrent, message, Some(AT_A_TIME_RETRY)));
        }
        // After that: a refusal because others run is not to use up the minute.
        if let Some(rate) = holder.requests() {
            let taken = holder.meter.requests.lock().take(1, rate, now);
            if let Err(Short::Wait(wait)) = taken {
                running.fetch_sub(1, Ordering::Relaxed);
                let message = format!(
                    "API key {name} has no requests left of {} a minute; try again in {:.1} s",
                    rate.0,
                    wait.as_secs_f64()
                );
                return Err(holder.refuse(Refusal::Requests, message, Some(wait)));
            }
        }
        holder.counts.requests.inc();
        holder.counts.in_flight.inc();
        Ok(Self { holder: Some(holder), ..Self::default() })
    }

    /// Whose it is.
    pub fn tenant(&self) -> Tenant {
        self.holder.as_ref().map(|holder| holder.tenant.clone()).unwrap_or_default()
    }

    /// Promises the tokens that the request is expected to take, or refuses it.
    pub fn admit(&mut self, prepared: &Prepared, now: Instant) -> Result<(), ApiError> {
        let Some(holder) = &self.holder else { return Ok(()) };
        let Some(rate) = holder.tokens() else { return Ok(()) };
        let (name, prompt_tokens) = (&holder.key.name, u64::from(prepared.prompt_tokens()));
        // Of all coordinators: how many they are passes.
        let ever = holder.key.limits.tokens_per_minute.map_or(u64::MAX, |whole| whole.get().into());
        if prompt_tokens >= ever {
            let message = format!(
                "the prompt's {prompt_tokens} tokens are as many as API key {name} may ever use in a minute ({ever}) or \
                 more"
            );
            return Err(holder.refuse(Refusal::Tokens, message, None));
        }
        // What may never be used at once would never be let in: the rest of it is taken when it has been used.
        let most = u64::from(rate.0.get());
        let wanted = (prompt_tokens + expected_tokens(prepared)).min(most);
        if let Err(Short::Wait(wait)) = holder.meter.tokens.lock().promise(wanted, rate, now) {
            let message = format!(
                "the request is taken for {wanted} tokens, of {most} a minute for API key {name}; try again in {:.1} s",
                wait.as_secs_f64()
            );
            return Err(holder.refuse(Refusal::Tokens, message, Some(wait)));
        }
        (self.promised, self.rate) = (wanted, Some(rate));
        Ok(())
    }

    /// Its prompts have been dispatched.
    pub fn dispatched(&mut self, prompt_tokens: u32) {
        self.prompt_tokens = prompt_tokens;
        if let Some(holder) = &self.holder {
            holder.counts.prompt_tokens.inc_by(prompt_tokens.into());
        }
    }

    /// So many more tokens were generated.
    pub fn generated(&mut self, tokens: u32) {
        self.generated_tokens = self.generated_tokens.saturating_add(tokens);
        if let Some(holder) = &self.holder {
            holder.counts.generation_tokens.inc_by(tokens.into());
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let Some(holder) = &self.holder else { return };
        let used = u64::from(self.prompt_tokens) + u64::from(self.generated_tokens);
        let meter = &holder.meter;
        meter.tokens.lock().keep(self.promised, used, self.rate, Instant::now());
        meter.running.fetch_sub(1, Ordering::Relaxed);
        holder.counts.in_flight.dec();
    }
}

/// Of all choices.
fn expected_tokens(prepared: &Prepared) -> u64 {
    let of_prompt = |prompt: &PreparedPrompt| {
        let sampling = &prompt.sampling;
        u64::from(sampling.max_tokens.min(EXPECTED_TOKENS_MOST)) * u64::from(sampling.choices)
    };
    prepared.prompts.iter().map(of_prompt).sum()
}

impl Holder {
    fn refuse(&self, why: Refusal, message: String, wait: Option<Duration>) -> ApiError {
        self.refusals.count(&self.tenant.name, why);
        let error = ApiError::new(ErrorCode::RateLimited, message);
        match wait {
            Some(wait) => error.retry_after(wait),
            None => error,
        }
    }
}
