//! What one request adds to the metrics and the log.
//!
//! Made by [`crate::http`] on arrival; told how far the request is by [`crate::serve`] and [`crate::stream`]. A request
//! dropped before its end counts as the client's leaving, unless a bug drops it.

use std::{sync::Arc, time::Duration};

use baton_process::telemetry::Stages;
use baton_proto::{ApiError, ErrorCode};
use tokio::time::Instant;
use tracing::Span;

use crate::{
    metrics::{Metrics, ModelMetrics, RequestLabels},
    requests::Card,
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

/// See the module. What every token is counted with lies here, the rest apart.
pub struct Report {
    /// `None` until it is known which model is asked.
    counts: Option<Arc<ModelMetrics>>,
    first_token: Option<Instant>,
    last_token: Instant,
    tokens: u32,
    told: bool,
    about: Box<About>,
}

struct About {
    metrics: Arc<Metrics>,
    /// `None` until it is let in.
    card: Option<Arc<Card>>,
    route: &'static str,
    arrived: Instant,
    /// How long the first token, and each later one on average, may take.
    ttft_target: Duration,
    tpot_target: Duration,
    /// What it does now, in traces, and what it has done.
    stage: &'static str,
    stages: Stages,
    /// Open for as long as the request lives.
    span: Span,
}

impl About {
    /// It has come so far that it does something else.
    fn enters(&mut self, stage: &'static str, now: Instant) {
        self.stages.passed(std::mem::replace(&mut self.stage, stage), now.into_std());
    }
}

impl Report {
    pub fn new(metrics: Arc<Metrics>, route: &'static str, arrived: Instant, span: Span) -> Self {
        let about = About {
            metrics,
            card: None,
            route,
            arrived,
            ttft_target: Duration::MAX,
            tpot_target: Duration::MAX,
            stage: "read_body",
            stages: Stages::begin(&span, arrived.into_std()),
            span,
        };
        Self {
            counts: None,
            first_token: None,
            last_token: arrived,
            tokens: 0,
            told: false,
            about: Box::new(about),
        }
    }

    /// In traces, what the request does from now on has this name, until the next of these, or its end.
    pub fn enters(&mut self, stage: &'static str) {
        self.about.enters(stage, Instant::now());
    }

    /// Operators see it from now on.
    pub fn shown(&mut self, card: &Arc<Card>) {
        self.about.card = Some(card.clone());
    }

    /// It is known which model is asked.
    pub fn of_model(&mut self, counts: &Arc<ModelMetrics>) {
        self.counts = Some(counts.clone());
    }

    /// It is known how long the first token, and each later one on average, may take.
    pub fn targets(&mut self, ttft: Duration, tpot: Duration) {
        (self.about.ttft_target, self.about.tpot_target) = (ttft, tpot);
    }

    /// The request is valid and admitted.
    pub fn admitted(&self, prompt_tokens: u32) {
        if let Some(counts) = &self.counts {
            counts.request_prompt_tokens.observe(f64::from(prompt_tokens));
        }
    }

    /// Its legs have been dispatched.
    pub fn dispatched(&self, prompt_tokens: u32) {
        if let Some(counts) = &self.counts {
            counts.prompt_tokens.inc_by(u64::from(prompt_tokens));
        }
    }

    /// The answer has this many tokens now.
    pub fn tokens(&mut self, tokens: u32, now: Instant) {
        if self.first_token.is_none() {
            self.about.enters("stream", now);
            let counts = self.counts.iter();
            counts.for_each(|counts| {
                counts.time_to_first_token.observe((now - self.about.arrived).as_secs_f64())
            });
        }
        if let Some(counts) = &self.counts {
            counts.generation_tokens.inc_by(u64::from(tokens - self.tokens));
        }
        self.first_token.get_or_insert(now);
        self.tokens = tokens;
        self.last_token = now;
    }

    /// The answer is complete and written; its longest choice has `longest` tokens.
    pub fn finished(&mut self, usage: &Usage, longest: u32) {
        let About { arrived, ttft_target, tpot_target, .. } = *self.about;
        if let Some(counts) = &self.counts {
            counts.cached_tokens.inc_by(u64::from(usage.cached_tokens));
            counts.request_generation_tokens.observe(f64::from(self.tokens));
            counts.end_to_end.observe(arrived.elapsed().as_secs_f64());
            let first = self.first_token.unwrap_or(self.last_token);
            let mut in_time = first - arrived <= ttft_target;
            if longest > 1 {
                let later = (self.last_token - first) / (longest - 1);
                counts.time_per_output_token.observe(later.as_secs_f64());
                in_time &= later <= tpot_target;
            }
            counts.in_time.inc_by(in_time.into());
        }
        self.tell("200", false);
        let _entered = self.about.span.enter();
        tracing::debug!(?usage, seconds = arrived.elapsed().as_secs_f64(), "answered");
    }

    /// The request ends with an error. Logged here and nowhere else.
    pub fn failed(&mut self, error: &ApiError) {
        self.tell(error.code.name(), is_ours(error.code));
        self.about.card.iter().for_each(|card| card.failed(error));
        let _entered = self.about.span.enter();
        if error.code.http() >= 500 {
            tracing::warn!(code = error.code.name(), %error, "request failed");
        } else {
            tracing::debug!(code = error.code.name(), %error, "request refused");
        }
    }

    fn tell(&mut self, code: &str, failed: bool) {
        if !std::mem::replace(&mut self.told, true) {
            let About { metrics, stage, stages, route, .. } = &mut *self.about;
            stages.passed_now(stage);
            metrics.ended.inc();
            metrics.failed.inc_by(u64::from(failed));
            let model = self.counts.as_ref().map(|counts| counts.label.model.clone()).unwrap_or_default();
            let labels = RequestLabels { route, code: code.to_owned(), model };
            metrics.requests.get_or_create(&labels).inc();
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.told {
            self.failed(&bug());
        } else {
            self.tell("client_gone", false);
        }
    }
}

/// What is told of a request that met a bug.
pub fn bug() -> ApiError {
    ApiError::new(ErrorCode::Internal, "the request met a bug in the coordinator; its log says where")
}

/// Whether a failure is the cluster's and not the client's: it broke, or it had no room.
fn is_ours(code: ErrorCode) -> bool {
    code.http() >= 500 || code == ErrorCode::QueueFull
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn answers_in_time_are_those_that_meet_both_targets() {
        let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
        let counts = Arc::new(metrics.of_model("m".into()));
        let millis = Duration::from_millis;
        let seen = |first, later, tokens: u32| {
            let before = counts.in_time.get();
            let now = Instant::now();
            let mut report = Report::new(metrics.clone(), "chat", now, Span::none());
            report.of_model(&counts);
            report.targets(millis(1000), millis(50));
            report.tokens(1, now + millis(first));
            report.tokens(tokens, now + millis(first + later));
            report.finished(&Usage::default(), tokens);
            counts.in_time.get() - before
        };
        assert_eq!(seen(1000, 150, 4), 1);
        assert_eq!(seen(1001, 150, 4), 0, "the first token is late");
        assert_eq!(seen(1000, 151, 4), 0, "the later ones are");
        assert_eq!(seen(1000, 0, 1), 1, "one token has none after it");
    }

    #[test]
    fn whom_a_bug_drops_has_not_left() {
        let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
        let report = || Report::new(metrics.clone(), "chat", Instant::now(), Span::none());
        let ended = |code: &str| {
            let labels = RequestLabels { route: "chat", code: code.to_owned(), model: Arc::default() };
            (metrics.requests.get_or_create(&labels).get(), metrics.failed.get())
        };
        drop(report());
        assert_eq!(ended("client_gone"), (1, 0));
        let bug = report();
        let met = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _bug = bug;
            panic!("as the test wants it");
        }));
        assert!(met.is_err());
        assert_eq!((ended("client_gone"), ended("internal_error")), ((1, 1), (1, 1)));
    }
}
