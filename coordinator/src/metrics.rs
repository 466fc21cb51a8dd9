//! What a coordinator counts. Registered once at start, held by whoever counts.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// A request that has ended: the route, and `200`, the name of the error's code, or `client_gone`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    pub route: &'static str,
    pub code: String,
}

/// Why a leg was cancelled, or an answer went on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    pub reason: &'static str,
}

/// The label set of one reason.
pub fn reason(reason: &'static str) -> ReasonLabel {
    ReasonLabel { reason }
}

/// All of them.
#[derive(Debug)]
pub struct Metrics {
    pub requests: Family<RequestLabels, Counter>,
    /// All of `requests`, for the controller; not shown.
    pub ended: Counter,
    /// Of them, those that failed by no fault of the client; not shown.
    pub failed: Counter,
    pub in_flight: Gauge,
    pub queued: Gauge,
    pub time_to_first_token: Histogram,
    pub time_per_output_token: Histogram,
    pub end_to_end: Histogram,
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub generation_tokens: Counter,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    pub cancels: Family<ReasonLabel, Counter>,
    pub legs_lost: Counter,
    /// By the name of the error's code.
    pub migrations: Family<ReasonLabel, Counter>,
}

const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const TOKENS: [f64; 12] =
    [1.0, 8.0, 32.0, 128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0, 131072.0];

impl Metrics {
    /// Makes them and has them shown.
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let seconds = || Histogram::new(SECONDS);
        let tokens = || Histogram::new(TOKENS);
        let metrics = Self {
            requests: Family::default(),
            ended: Counter::default(),
            failed: Counter::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            time_to_first_token: seconds(),
            time_per_output_token: seconds(),
            end_to_end: seconds(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            request_prompt_tokens: tokens(),
            request_generation_tokens: tokens(),
            cancels: Family::default(),
            legs_lost: Counter::default(),
            migrations: Family::default(),
        };
        metrics.show(registry);
        Arc::new(metrics)
    }

    fn show(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("baton_coordinator");
        registry.register(
            "requests",
            "Requests answered, by route and status or error",
            self.requests.clone(),
        );
        registry.register("in_flight", "Requests being served", self.in_flight.clone());
        registry.register("queued", "Requests waiting to be prepared or served", self.queued.clone());
        let seconds = [
            ("time_to_first_token", "From arrival to the first token", &self.time_to_first_token),
            ("time_per_output_token", "Mean of a request's later tokens", &self.time_per_output_token),
            ("e2e_request_latency", "From arrival to the end", &self.end_to_end),
        ];
        for (name, help, histogram) in seconds {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        let counters = [
            ("prompt_tokens", "Prompt tokens of dispatched requests", &self.prompt_tokens),
            ("cached_prompt_tokens", "Of those, taken from prefix caches", &self.cached_tokens),
            ("generation_tokens", "Tokens generated", &self.generation_tokens),
            ("legs_lost", "Legs that ended because an instance's stream broke", &self.legs_lost),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        registry.register("request_prompt_tokens", "Prompt length", self.request_prompt_tokens.clone());
        registry.register(
            "request_generation_tokens",
            "Completion length",
            self.request_generation_tokens.clone(),
        );
        registry.register("cancelled_legs", "Legs cancelled, by reason", self.cancels.clone());
        registry.register(
            "migrations",
            "Answers begun on one instance that went on elsewhere, by why it could not finish them",
            self.migrations.clone(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_ask_for_metrics_that_there_are() {
        let rules = include_str!("../../deploy/alerts/baton.rules.yaml");
        let metrics = baton_process::Metrics::new("coordinator");
        metrics.register(Metrics::register);
        let exported = metrics.render();
        let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let asked: Vec<_> = words.filter(|word| word.starts_with("baton_coordinator_")).collect();
        assert!(!asked.is_empty());
        for metric in asked {
            let family = metric.trim_end_matches("_total");
            assert!(exported.contains(&format!("# TYPE {family} ")), "nobody exports {metric}");
        }
    }
}
