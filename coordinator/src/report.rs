//! What one request adds to the metrics and the log.
//!
//! Made by [`crate::http`] on arrival; told how far the request is by [`crate::serve`] and [`crate::stream`]. A request
//! dropped before its end counts as the client's leaving.

use std::sync::Arc;

use baton_process::telemetry::Stages;
use baton_proto::{ApiError, ErrorCode};
use tokio::time::Instant;
use tracing::Span;

use crate::{
    keys::Call,
    metrics::{Metrics, ModelMetrics, RequestLabels},
    prepare::Prepared,
};

/// Token counts as clients are told them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Of all choices together.
    pub completion_tokens: u32,
    /// Of the prompt, taken from a prefix cache.
    pub cached_tokens: u32,
}

/// See the module.
pub struct Report {
    metrics: Arc<Metrics>,
    /// What it takes of its key's limits.
    call: Call,
    /// `None` until it is known which model is asked.
    counts: Option<Arc<ModelMetrics>>,
    route: &'static str,
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    tokens: u32,
    told: bool,
    stages: Stages,
    /// Open for as long as the request lives.
    span: Span,
}

impl Report {
    pub fn new(metrics: Arc<Metrics>, route: &'static str, arrived: Instant, span: Span) -> Self {
        Self {
            metrics,
            call: Call::default(),
            counts: None,
            route,
            arrived,
            first_token: None,
            last_token: arrived,
            tokens: 0,
            told: false,
            stages: Stages::begin(&span, arrived.into_std()),
            span,
        }
    }

    /// In traces, what the request did since the last of these, or since it came, has this name.
    pub fn passed(&mut self, stage: &'static str) {
        self.stages.passed_now(stage);
    }

    /// It came with a key, and is within what that may.
    pub fn called(&mut self, call: Call) {
        self.call = call;
    }

    /// It is known how many tokens it may take: within what its key may, or it is refused.
    pub fn charge(&mut self, prepared: &Prepared) -> Result<(), ApiError> {
        self.call.admit(prepared, Instant::now())
    }

    /// It is known which model is asked.
    pub fn of_model(&mut self, counts: &Arc<ModelMetrics>) {
        self.counts = Some(counts.clone());
    }

    /// The request is valid and admitted.
    pub fn admitted(&self, prompt_tokens: u32) {
        if let Some(counts) = &self.counts {
            counts.request_prompt_tokens.observe(f64::from(prompt_tokens));
        }
    }

    /// Its legs have been dispatched.
    pub fn dispatched(&mut self, prompt_tokens: u32) {
        self.call.dispatched(prompt_tokens);
        if let Some(counts) = &self.counts {
            counts.prompt_tokens.inc_by(u64::from(prompt_tokens));
        }
    }

    /// The answer has this many tokens now.
    pub fn tokens(&mut self, tokens: u32, now: Instant) {
        self.call.generated(tokens - self.tokens);
        if self.first_token.is_none() {
            self.stages.passed("first_token", now.into_std());
        }
        if let Some(counts) = &self.counts {
            if self.first_token.is_none() {
                counts.time_to_first_token.observe((now - self.arrived).as_secs_f64());
            }
            counts.generation_tokens.inc_by(u64::from(tokens - self.tokens));
        }
        self.first_token.get_or_insert(now);
        self.tokens = tokens;
        self.last_token = now;
    }

    /// The answer is complete; its longest choice has `longest` tokens.
    pub fn finished(&mut self, usage: &Usage, longest: u32) {
        if let Some(counts) = &self.counts {
            counts.cached_tokens.inc_by(u64::from(usage.cached_tokens));
            counts.request_generation_tokens.observe(f64::from(self.tokens));
            counts.end_to_end.observe(self.arrived.elapsed().as_secs_f64());
            if let (Some(first), 2..) = (self.first_token, longest) {
                let later = (self.last_token - first).as_secs_f64() / f64::from(longest - 1);
                counts.time_per_output_token.observe(later);
            }
        }
        self.passed("stream");
        self.tell("200", false);
        let _entered = self.span.enter();
        tracing::debug!(?usage, seconds = self.arrived.elapsed().as_secs_f64(), "answered");
    }

    /// The request ends with an error. Logged here and nowhere else.
    pub fn failed(&mut self, error: &ApiError) {
        self.tell(error.code.name(), is_ours(error.code));
        let _entered = self.span.enter();
        if error.code.http() >= 500 {
            tracing::warn!(code = error.code.name(), %error, "request failed");
        } else {
            tracing::debug!(code = error.code.name(), %error, "request refused");
        }
    }

    fn tell(&mut self, code: &str, failed: bool) {
        if !std::mem::replace(&mut self.told, true) {
            self.metrics.ended.inc();
            self.metrics.failed.inc_by(u64::from(failed));
            let model = self.counts.as_ref().map(|counts| counts.label.model.clone()).unwrap_or_default();
            let labels = RequestLabels { route: self.route, code: code.to_owned(), model };
            self.metrics.requests.get_or_create(&labels).inc();
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.tell("client_gone", false);
    }
}

/// Whether a failure is the cluster's and not the client's: it broke, or it had no room.
fn is_ours(code: ErrorCode) -> bool {
    code.http() >= 500 || code == ErrorCode::QueueFull
}
