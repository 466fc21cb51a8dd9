//! The process's metrics in Prometheus text form. Services register their own; the process adds what any process has.

use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::{Registry, Unit},
};

use crate::HealthHandle;

/// What `/metrics` answers with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Cheap to clone; all clones share one registry. Metric names begin with `baton_`.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// `service` becomes a label of `baton_build_info`.
    pub fn new(service: &'static str) -> Self {
        let mut registry = Registry::default();
        let labels = Info::new(vec![("service", service), ("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("baton_build", "The running build", labels);
        registry.register_collector(Box::new(ProcessCollector::new()));
        Self { registry: Arc::new(Mutex::new(registry)) }
    }

    /// Registers a service's metrics, once, at start. They keep their own handles (all are cheap clones).
    pub fn register<R>(&self, with: impl FnOnce(&mut Registry) -> R) -> R {
        with(&mut self.registry.lock())
    }

    /// The present values as OpenMetrics text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry.lock()).is_err() {
            // Writing into a String fails only if a metric's own encoding does.
            tracing::error!("a metric cannot be encoded");
        }
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// What `/readiness` says.
impl Collector for HealthHandle {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gauge = ConstGauge::new(i64::from(self.is_ready()));
        let help = "1 while /readiness says that the process can do its work";
        gauge.encode(encoder.encode_descriptor("baton_ready", help, None, gauge.metric_type())?)
    }
}

/// CPU time, memory and open files, read when asked for.
#[derive(Debug)]
struct ProcessCollector {
    started_unix_seconds: f64,
}

impl ProcessCollector {
    fn new() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started_unix_seconds: started.as_secs_f64() }
    }
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name: &str, help: &str, unit: Option<Unit>, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?)
        };
        let started = self.started_unix_seconds;
        gauge(
            "process_start_time",
            "Start of the process since the Unix epoch",
            Some(Unit::Seconds),
            started,
        )?;
        if let Some(bytes) = resident_bytes() {
            gauge("process_resident_memory", "Resident memory", Some(Unit::Bytes), bytes as f64)?;
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            gauge("process_open_fds", "Open file descriptors", None, files.count() as f64)?;
        }
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let cpu = ConstCounter::new(cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9);
        let help = "User and system CPU time";
        cpu.encode(encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), cpu.metric_type())?)
    }
}

/// Resident set of this process, where the system tells it (Linux).
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn renders_the_process_and_what_a_service_registers() {
        let metrics = Metrics::new("test");
        let served: Counter = Counter::default();
        metrics.register(|registry| registry.register("baton_served", "Served", served.clone()));
        served.inc_by(3);
        let health = HealthHandle::default();
        metrics.register(|registry| registry.register_collector(Box::new(health.clone())));
        assert!(metrics.render().contains("baton_ready 0"));
        health.set_ready();
        let text = metrics.render();
        for line in [
            "baton_build_info{service=\"test\"",
            "baton_served_total 3",
            "baton_ready 1",
            "process_cpu_seconds_total ",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let resident = text.lines().find(|line| line.starts_with("process_resident_memory_bytes ")).unwrap();
        let bytes: f64 = resident.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(bytes > 100_000.0, "{resident}");
    }
}
