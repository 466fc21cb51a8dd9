//! What the server shows of itself to Prometheus. Registered once, by [`crate::serving`] and, of roles, by
//! [`crate::instance`]; every name begins with `baton_server_`.

use std::time::Duration;

use baton_kvtransfer::{Direction, KvNode, TransportStats};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use tokio::sync::watch;

use crate::{
    engine::{
        scheduler::Occupancy,
        sequence::{FinishReason, LegEnd},
        step::StepStats,
    },
    role::RoleView,
};

/// Prefix of every metric here.
const PREFIX: &str = "baton_server";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstanceLabels {
    instance_id: String,
    group: String,
    role: &'static str,
    phase: &'static str,
}

/// Shows who this is and what it does, at the time of each scrape: what `instance`, an address, does not say.
#[derive(Debug)]
pub struct RoleMetrics {
    instance_id: String,
    group: String,
    role: watch::Receiver<RoleView>,
}

impl RoleMetrics {
    pub fn register(
        registry: &mut Registry,
        instance_id: String,
        group: String,
        role: watch::Receiver<RoleView>,
    ) {
        registry.register_collector(Box::new(Self { instance_id, group, role }));
    }
}

impl Collector for RoleMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let view = *self.role.borrow();
        let labels = InstanceLabels {
            instance_id: self.instance_id.clone(),
            group: self.group.clone(),
            role: view.role.name(),
            phase: view.phase.name(),
        };
        let (name, help) = (format!("{PREFIX}_role"), "1, with who this instance is and what it does");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    /// "stop", "length", "handed_off", "cancelled", or the code of an error.
    outcome: &'static str,
}

type StepTimes = Family<KindLabel, Histogram, fn() -> Histogram>;

/// Metrics that the engine's thread keeps up to date. Clones share their values.
#[derive(Debug, Clone)]
pub struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    leaving: Gauge,
    blocks_capacity: Gauge,
    blocks_free: Gauge,
    blocks_used: Gauge,
    queued_prefill_tokens: Gauge,
    prefill_tokens: Counter,
    decode_tokens: Counter,
    steps: StepTimes,
    preemptions: Counter,
    blocks_cached: Gauge,
    evictions: Counter,
    prefix_hit_tokens: Counter,
    prefix_miss_tokens: Counter,
    held_blocks: Counter,
    legs: Family<OutcomeLabel, Counter>,
    joins: Histogram,
}

/// 0.25 ms to about 8 s.
fn step_times() -> Histogram {
    Histogram::new(exponential_buckets(0.00025, 2.0, 16))
}

impl EngineMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            running: Gauge::default(),
            waiting: Gauge::default(),
            leaving: Gauge::default(),
            blocks_capacity: Gauge::default(),
            blocks_free: Gauge::default(),
            blocks_used: Gauge::default(),
            queued_prefill_tokens: Gauge::default(),
            prefill_tokens: Counter::default(),
            decode_tokens: Counter::default(),
            steps: Family::new_with_constructor(step_times),
            preemptions: Counter::default(),
            blocks_cached: Gauge::default(),
            evictions: Counter::default(),
            prefix_hit_tokens: Counter::default(),
            prefix_miss_tokens: Counter::default(),
            held_blocks: Counter::default(),
            legs: Family::default(),
            joins: step_times(),
        };
        let m = &metrics;
        let registry = registry.sub_registry_with_prefix(PREFIX);
        let help = "From the moment that a prompt's cache is whole until the step that goes on from it, seen by decode";
        registry.register("join_seconds", help, m.joins.clone());
        registry.register("sequences_running", "Sequences in the batch", m.running.clone());
        registry.register("sequences_waiting", "Sequences that wait to be computed", m.waiting.clone());
        registry.register("sequences_leaving", "Sequences held for their transfer alone", m.leaving.clone());
        registry.register("kv_blocks_capacity", "KV blocks in all", m.blocks_capacity.clone());
        registry.register("kv_blocks_free", "KV blocks that nobody holds", m.blocks_free.clone());
        registry.register("kv_blocks_used", "KV blocks that sequences hold", m.blocks_used.clone());
        let help = "Prompt tokens accepted and still to be computed, those that the cache has not among them";
        registry.register("queued_prefill_tokens", help, m.queued_prefill_tokens.clone());
        registry.register("prefill_tokens", "Prompt tokens computed", m.prefill_tokens.clone());
        registry.register("decode_tokens", "Generated tokens computed", m.decode_tokens.clone());
        registry.register("step_seconds", "Time of one engine step by what was in it", m.steps.clone());
        registry.register(
            "preemptions",
            "Sequences whose blocks were taken for others",
            m.preemptions.clone(),
        );
        let help = "KV blocks that nobody holds and whose content can be used again";
        registry.register("kv_blocks_cached", help, m.blocks_cached.clone());
        let help = "Cached KV blocks that were given up for others";
        registry.register("kv_blocks_evicted", help, m.evictions.clone());
        let help = "Tokens of prompts that were in the prefix cache";
        registry.register("prefix_hit_tokens", help, m.prefix_hit_tokens.clone());
        let help = "Tokens of prompts that were not in the prefix cache";
        registry.register("prefix_miss_tokens", help, m.prefix_miss_tokens.clone());
        let help = "KV blocks of handed over caches that decode held already, so that they were not sent";
        registry.register("handoff_held_blocks", help, m.held_blocks.clone());
        registry.register("legs", "Legs that ended, by outcome", m.legs.clone());
        metrics
    }

    /// After each step; `stats` is `None` if nothing was computed.
    pub fn observe(&self, occupancy: &Occupancy, stats: Option<&StepStats>) {
        self.running.set(occupancy.running.into());
        self.waiting.set(occupancy.waiting.into());
        self.leaving.set(occupancy.leaving.into());
        self.blocks_capacity.set(occupancy.blocks_total.into());
        self.blocks_free.set(occupancy.blocks_free.into());
        self.blocks_used.set((occupancy.blocks_total - occupancy.blocks_free).into());
        self.queued_prefill_tokens.set(occupancy.queued_prefill_tokens.try_into().unwrap_or(i64::MAX));
        self.blocks_cached.set(occupancy.blocks_cached.into());
        let counts = &occupancy.counts;
        let counters = [
            (&self.preemptions, counts.preemptions),
            (&self.evictions, counts.evictions),
            (&self.prefix_hit_tokens, counts.prefix_hit_tokens),
            (&self.prefix_miss_tokens, counts.prefix_miss_tokens),
            (&self.held_blocks, counts.held_blocks),
        ];
        for (counter, now) in counters {
            counter.inc_by(now - counter.get());
        }
        let Some(stats) = stats else { return };
        self.prefill_tokens.inc_by(stats.prefill_tokens.into());
        self.decode_tokens.inc_by(stats.decode_tokens.into());
        let kind = match (stats.prefill_tokens, stats.decode_tokens) {
            (_, 0) => "prefill",
            (0, _) => "decode",
            _ => "both",
        };
        self.steps.get_or_create(&KindLabel { kind }).observe(stats.took.as_secs_f64());
    }

    /// A step goes on from a cache that was whole this long ago.
    pub fn joined(&self, waited: Duration) {
        self.joins.observe(waited.as_secs_f64());
    }

    /// Counts a leg's end.
    pub fn ended(&self, end: Option<&LegEnd>) {
        let outcome = match end {
            None => return,
            Some(LegEnd::Finished { reason, .. }) => match reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::HandedOff => "handed_off",
                FinishReason::Cancelled => "cancelled",
            },
            Some(LegEnd::Failed(error)) => error.code.name(),
        };
        self.legs.get_or_create(&OutcomeLabel { outcome }).inc();
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AbortLabels {
    direction: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TransportLabel {
    transport: &'static str,
}

/// Shows a node's counters at the time of each scrape.
#[derive(Debug)]
pub struct TransferMetrics {
    node: KvNode,
}

impl TransferMetrics {
    pub fn register(registry: &mut Registry, node: KvNode) {
        registry.register_collector(Box::new(Self { node }));
    }
}

impl Collector for TransferMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.node.stats();
        let gauges = [
            ("transfers_in_active", "KV caches being received", stats.incoming_active),
            ("transfers_out_active", "KV caches being sent", stats.outgoing_active),
            ("transfer_offers_held", "Offers that no request has asked for yet", stats.held_offers),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            let name = format!("{PREFIX}_{name}");
            gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            ("transfers_in", "KV caches received whole", stats.incoming_completed),
            ("transfers_out", "KV caches handed on", stats.outgoing_completed),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            let name = format!("{PREFIX}_{name}");
            counter.encode(encoder.encode_descriptor(&name, help, None, counter.metric_type())?)?;
        }
        type Of = fn(&TransportStats) -> u64;
        let by_transport: [(_, _, Of); 8] = [
            ("bytes_in", "Bytes of KV caches received", |one| one.bytes_received),
            ("bytes_out", "Bytes of KV caches sent", |one| one.bytes_sent),
            ("slices_in", "Slices of KV caches received", |one| one.slices_received),
            ("slices_out", "Slices of KV caches sent", |one| one.slices_sent),
            ("slices_damaged", "Slices that arrived other than they were sent", |one| one.damaged),
            ("interruptions", "Runs of slices that did not arrive wholly", |one| one.interrupted),
            ("paths_opened", "Data paths opened to peers", |one| one.opened),
            ("paths_failed", "Data paths to peers that could not be opened", |one| one.failed),
        ];
        for (name, help, of) in by_transport {
            let name = format!("{PREFIX}_transfer_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for one in &stats.by_transport {
                let labels = TransportLabel { transport: one.kind.name() };
                ConstCounter::new(of(one)).encode(family.encode_family(&labels)?)?;
            }
        }
        let name = format!("{PREFIX}_transfers_aborted");
        let help = "KV caches that did not arrive, by direction and reason";
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (direction, code, count) in stats.aborted {
            let direction = match direction {
                Direction::Incoming => "in",
                Direction::Outgoing => "out",
            };
            let labels = AbortLabels { direction, reason: code.name() };
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Times of handoffs as this instance sees them.
#[derive(Debug, Clone)]
pub struct HandoffMetrics {
    /// Prefill side: from the last layer until decode has taken the cache over.
    ready_to_released: Histogram,
    /// Decode side: from the acceptance until the cache is whole.
    accepted_to_sealed: Histogram,
}

impl HandoffMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self { ready_to_released: step_times(), accepted_to_sealed: step_times() };
        let registry = registry.sub_registry_with_prefix(PREFIX);
        let help = "From the last layer of a prompt until decode has its cache, seen by prefill";
        registry.register("handoff_seconds", help, metrics.ready_to_released.clone());
        let help = "From accepting a transfer until its cache is whole, seen by decode";
        registry.register("receive_seconds", help, metrics.accepted_to_sealed.clone());
        metrics
    }

    pub fn handed_off(&self, ready_to_released: Duration) {
        self.ready_to_released.observe(ready_to_released.as_secs_f64());
    }

    pub fn received(&self, accepted_to_sealed: Duration) {
        self.accepted_to_sealed.observe(accepted_to_sealed.as_secs_f64());
    }
}
