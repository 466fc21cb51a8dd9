//! What a coordinator counts. Registered once at start, held by whoever counts.

use std::{sync::Arc, time::Duration};

use baton_proto::Band;
use baton_schedule::board::Way;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry, Unit},
};

use crate::{admit::Refusal, fleet::CancelReason};

mod keys;

pub use keys::{KeyMetrics, KeyRefusalLabels, TenantMetrics};

/// A request that has ended: the route, and `200`, the name of the error's code, or `client_gone`; and the name of the
/// model, empty if it was refused before that was known.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    pub route: &'static str,
    pub code: String,
    pub model: Arc<str>,
}

/// A model that is served, by its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    pub model: Arc<str>,
}

/// Those of a model that came with keys of one band.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BandLabels {
    pub model: Arc<str>,
    pub band: &'static str,
}

/// Why a leg was cancelled, or a request refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    pub reason: &'static str,
}

/// The label set of one reason.
pub fn reason(reason: &'static str) -> ReasonLabel {
    ReasonLabel { reason }
}

/// Which of two or more kinds.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    pub kind: &'static str,
}

/// The label set of one kind.
pub fn kind(kind: &'static str) -> KindLabel {
    KindLabel { kind }
}

/// Why an answer went on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MigrationLabels {
    pub reason: &'static str,
    pub model: Arc<str>,
}

/// A prompt that was given to instances, and [how](Way).
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PlacementLabels {
    pub model: Arc<str>,
    pub way: &'static str,
}

/// Prompts that were given to instances, those of requests that go on elsewhere too.
pub type Placements = Family<PlacementLabels, Counter>;

/// Requests refused for want of room or time, by what there was none of: a [`Refusal`]'s name.
pub type Refusals = Family<ReasonLabel, Counter>;

type Histograms = Family<ModelLabel, Histogram>;

/// All of them.
#[derive(Debug)]
pub struct Metrics {
    pub requests: Family<RequestLabels, Counter>,
    /// All of `requests`, for the controller; not shown.
    pub ended: Counter,
    /// Of them, those that failed by no fault of the client; not shown.
    pub failed: Counter,
    /// Requests of all models that are served and that wait, for the controller; not shown.
    pub in_flight: Gauge,
    pub queued: Gauge,
    pub refusals: Refusals,
    pub placements: Placements,
    /// Of `limits.max_held_body_bytes`, in bytes.
    pub body_reserved: Gauge,
    /// Of `limits.max_held_prompt_bytes`, in bytes.
    pub prompt_reserved: Gauge,
    pub cancels: Family<ReasonLabel, Counter>,
    pub legs_lost: Counter,
    /// Times that an instance was left out for its faults, and how many are.
    pub breaker_openings: Counter,
    pub open_breakers: Gauge,
    /// For how long the list of instances has not been the store's.
    fleet_stale: Gauge,
    /// Blocks that the prefix index remembers.
    cached_blocks: Gauge,
    /// What instances say of their caches: `snapshot`, `change`, `resumed`.
    pub cache_events: Family<KindLabel, Counter>,
    /// Why something of that was missed, or not believed.
    pub cache_gaps: Family<ReasonLabel, Counter>,
    /// By whose key requests came.
    pub keys: KeyMetrics,
    by_model: ByModel,
}

/// What is counted of each model.
#[derive(Debug)]
struct ByModel {
    ready: Family<ModelLabel, Gauge>,
    in_flight: Family<ModelLabel, Gauge>,
    queued: Family<ModelLabel, Gauge>,
    queued_by_band: Family<BandLabels, Gauge>,
    queue_wait: Histograms,
    time_to_first_token: Histograms,
    time_per_output_token: Histograms,
    end_to_end: Histograms,
    in_time: Family<ModelLabel, Counter>,
    prompt_tokens: Family<ModelLabel, Counter>,
    cached_tokens: Family<ModelLabel, Counter>,
    generation_tokens: Family<ModelLabel, Counter>,
    request_prompt_tokens: Histograms,
    request_generation_tokens: Histograms,
    migrations: Family<MigrationLabels, Counter>,
    migration_pause: Histograms,
    hand_ons: Family<ModelLabel, Counter>,
    not_placed_again: Family<ModelLabel, Counter>,
}

/// Those of one model, looked up once.
#[derive(Debug)]
pub struct ModelMetrics {
    pub label: ModelLabel,
    /// 1 = it can be served now.
    pub ready: Gauge,
    pub in_flight: Gauge,
    pub queued: Gauge,
    /// Of those, by the band of their API keys: interactive, standard, batch.
    pub queued_by_band: [Gauge; 3],
    pub queue_wait: Histogram,
    /// The same of all models together.
    pub all_in_flight: Gauge,
    pub all_queued: Gauge,
    pub all_refusals: Refusals,
    pub time_to_first_token: Histogram,
    pub time_per_output_token: Histogram,
    pub end_to_end: Histogram,
    /// Answers that met their targets.
    pub in_time: Counter,
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub generation_tokens: Counter,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    migrations: Family<MigrationLabels, Counter>,
    /// Of answers that were begun and went on elsewhere: from the failure to the next token.
    pub migration_pause: Histogram,
    /// Of those that migrated the ones whose instance, which drains, was asked for their cache.
    pub hand_ons: Counter,
    /// Requests that were not placed again though it might have helped.
    pub not_placed_again: Counter,
}

const SECONDS: [f64; 19] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0,
    120.0, 600.0,
];
const TOKENS: [f64; 12] =
    [1.0, 8.0, 32.0, 128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0, 131072.0];
/// Why messages about a KV cache are missed or not believed; shown as 0 from the start, as [`Refusal`]s and
/// [`CancelReason`]s are.
const CACHE_GAPS: [&str; 6] = ["stream", "gap", "restart", "lagged", "nonsense", "dialects"];

/// A metric that is shown under this name.
fn shown<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

fn bytes(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let metric = Gauge::default();
    registry.register_with_unit(name, help, Unit::Bytes, metric.clone());
    metric
}

fn seconds(registry: &mut Registry, name: &str, help: &str) -> Histograms {
    let metric = Histograms::new_with_constructor(|| Histogram::new(SECONDS));
    registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
    metric
}

fn tokens(registry: &mut Registry, name: &str, help: &str) -> Histograms {
    let metric = Histograms::new_with_constructor(|| Histogram::new(TOKENS));
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// Makes them and has them shown.
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let to = registry.sub_registry_with_prefix("baton_coordinator");
        let metrics = Self {
            requests: shown(to, "requests", "Requests answered, by route, status or error, and model"),
            ended: Counter::default(),
            failed: Counter::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            refusals: shown(
                to,
                "refusals",
                "Requests refused, by what there was none of: room in the house, in their model's line, bytes for their \
                 bodies, memory for their prompts and log probabilities; or by what took too long: their wait, the backlog before them, their \
                 body",
            ),
            placements: shown(
                to,
                "placements",
                "Prompts given to instances, again too, by how the work is shared (apart, handed_on by one that drains, or all on \
                 one of this role) and model",
            ),
            body_reserved: bytes(to, "body_reserved", "Reserved of limits.max_held_body_bytes"),
            prompt_reserved: bytes(to, "prompt_reserved", "Reserved of limits.max_held_prompt_bytes"),
            cancels: shown(to, "cancelled_legs", "Legs cancelled, by reason"),
            legs_lost: shown(
                to,
                "legs_lost",
                "Legs that ended because an instance's stream broke, or it did not get on with them",
            ),
            breaker_openings: shown(
                to,
                "breaker_openings",
                "Times that an instance was left out because it failed what it was given",
            ),
            open_breakers: shown(
                to,
                "open_breakers",
                "Instances that are left out, or on trial, because they failed what they were given",
            ),
            fleet_stale: shown(
                to,
                "fleet_stale_seconds",
                "For how long the list of instances has been the last that was read, as the state store cannot be; 0: it is \
                 current",
            ),
            cached_blocks: shown(
                to,
                "cached_blocks",
                "KV blocks that instances are known to have, each counted once",
            ),
            cache_events: shown(
                to,
                "cache_events",
                "Messages of instances about their KV caches, by kind: a whole snapshot, a change, that it goes on (resumed)",
            ),
            cache_gaps: shown(
                to,
                "cache_gaps",
                "Times that messages about a KV cache were missed or not believed, by reason",
            ),
            keys: KeyMetrics::register(to),
            by_model: ByModel::register(to),
        };
        for why in Refusal::ALL {
            drop(metrics.refusals.get_or_create(&reason(why.name())));
        }
        for why in CancelReason::ALL {
            drop(metrics.cancels.get_or_create(&reason(why.name())));
        }
        for why in CACHE_GAPS {
            drop(metrics.cache_gaps.get_or_create(&reason(why)));
        }
        Arc::new(metrics)
    }

    /// Those of the model of this name, which are shown from now on.
    pub fn of_model(&self, name: Arc<str>) -> ModelMetrics {
        for way in Way::ALL {
            drop(self.placements.get_or_create(&PlacementLabels { model: name.clone(), way: way.name() }));
        }
        let (by_model, label) = (&self.by_model, ModelLabel { model: name });
        ModelMetrics {
            ready: by_model.ready.get_or_create_owned(&label),
            in_flight: by_model.in_flight.get_or_create_owned(&label),
            queued: by_model.queued.get_or_create_owned(&label),
            queued_by_band: [Band::Interactive, Band::Standard, Band::Batch].map(|band| {
                let labels = BandLabels { model: label.model.clone(), band: band.name() };
                by_model.queued_by_band.get_or_create_owned(&labels)
            }),
            queue_wait: by_model.queue_wait.get_or_create_owned(&label),
            all_in_flight: self.in_flight.clone(),
            all_queued: self.queued.clone(),
            all_refusals: self.refusals.clone(),
            time_to_first_token: by_model.time_to_first_token.get_or_create_owned(&label),
            time_per_output_token: by_model.time_per_output_token.get_or_create_owned(&label),
            end_to_end: by_model.end_to_end.get_or_create_owned(&label),
            in_time: by_model.in_time.get_or_create_owned(&label),
            prompt_tokens: by_model.prompt_tokens.get_or_create_owned(&label),
            cached_tokens: by_model.cached_tokens.get_or_create_owned(&label),
            generation_tokens: by_model.generation_tokens.get_or_create_owned(&label),
            request_prompt_tokens: by_model.request_prompt_tokens.get_or_create_owned(&label),
            request_generation_tokens: by_model.request_generation_tokens.get_or_create_owned(&label),
            migrations: by_model.migrations.clone(),
            migration_pause: by_model.migration_pause.get_or_create_owned(&label),
            hand_ons: by_model.hand_ons.get_or_create_owned(&label),
            not_placed_again: by_model.not_placed_again.get_or_create_owned(&label),
            label,
        }
    }

    /// For so long the list of instances has not been the store's; zero: it is.
    pub fn show_fleet_stale(&self, stale: Duration) {
        self.fleet_stale.set(i64::try_from(stale.as_secs()).unwrap_or(i64::MAX));
    }

    /// So many blocks the prefix index remembers now.
    pub fn show_cached_blocks(&self, blocks: usize) {
        self.cached_blocks.set(i64::try_from(blocks).unwrap_or(i64::MAX));
    }

    /// Requests that wait before their model is known.
    pub fn queued_of_any_model(&self) -> Gauge {
        self.by_model.queued.get_or_create_owned(&ModelLabel { model: "".into() })
    }
}

impl ByModel {
    fn register(to: &mut Registry) -> Self {
        Self {
            ready: shown(to, "model_ready", "Whether a request for the model can be served"),
            in_flight: shown(to, "in_flight", "Requests being served"),
            queued: shown(to, "queued", "Requests waiting to be served; without a model, to be prepared"),
            queued_by_band: shown(
                to,
                "queued_by_band",
                "Requests waiting in a model's line, by the band of their API keys",
            ),
            queue_wait: seconds(to, "queue_wait", "From being prepared to being placed"),
            time_to_first_token: seconds(to, "time_to_first_token", "From arrival to the first token"),
            time_per_output_token: seconds(to, "time_per_output_token", "Mean of a request's later tokens"),
            end_to_end: seconds(to, "e2e_request_latency", "From arrival to the end"),
            in_time: shown(
                to,
                "requests_in_time",
                "Requests answered with their first token, and the later ones on average, within placement.ttft_target and \
                 .tpot_target",
            ),
            prompt_tokens: shown(to, "prompt_tokens", "Prompt tokens of dispatched requests"),
            cached_tokens: shown(to, "cached_prompt_tokens", "Of those, taken from prefix caches"),
            generation_tokens: shown(to, "generation_tokens", "Tokens generated"),
            request_prompt_tokens: tokens(to, "request_prompt_tokens", "Prompt length"),
            request_generation_tokens: tokens(to, "request_generation_tokens", "Completion length"),
            migrations: shown(
                to,
                "migrations",
                "Answers begun on one instance that went on elsewhere, by why it could not finish them, and model",
            ),
            migration_pause: seconds(
                to,
                "migration_pause",
                "Of answers that were begun and went on elsewhere, from the failure to the next token",
            ),
            hand_ons: shown(
                to,
                "hand_ons",
                "Answers that left an instance which drains and was asked to hand their KV cache on, by model",
            ),
            not_placed_again: shown(
                to,
                "retry_budget_exhausted",
                "Requests not placed again after an instance's fault, for want of budget, by model",
            ),
        }
    }
}

impl ModelMetrics {
    /// An answer that had begun went on elsewhere, for the reason of this name.
    pub fn migrated(&self, reason: &'static str) {
        let labels = MigrationLabels { reason, model: self.label.model.clone() };
        self.migrations.get_or_create(&labels).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_ask_for_metrics_that_there_are() {
        let rules = include_str!("../../deploy/alerts/baton.rules.yaml");
        let metrics = baton_process::Metrics::new("coordinator");
        let own = metrics.register(Metrics::register);
        // What nobody has asked yet has no series.
        let labels = RequestLabels { route: "r", code: "200".into(), model: "m".into() };
        let _shown = (own.requests.get_or_create(&labels).inc(), own.of_model("m".into()));
        let exported = metrics.render();
        let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let asked: Vec<_> = words.filter(|word| word.starts_with("baton_coordinator_")).collect();
        assert!(!asked.is_empty());
        for metric in asked {
            let series = ["_total", "_count", "_sum", "_bucket"];
            let family = series.iter().find_map(|end| metric.strip_suffix(end)).unwrap_or(metric);
            assert!(exported.contains(&format!("# TYPE {family} ")), "nobody exports {metric}");
        }
    }
}
