//! Logs on standard error, and traces over OTLP when an endpoint is configured.

use std::{io::IsTerminal, time::Duration};

use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{
    SpanExporter, WithExportConfig, WithTonicConfig,
    tonic_types::transport::{Certificate, ClientTlsConfig},
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracerProvider},
};
use tokio_util::task::AbortOnDropHandle;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{LogFormat, OtlpConfig, ProcessConfig, ProcessError};

mod context;
mod level;
mod stages;

pub use context::TraceContext;
pub(crate) use level::check as check_level;
pub use stages::Stages;

/// Overrides `process.log.level` of any Baton process.
pub const LOG_VARIABLE: &str = "BATON_LOG";

/// Longest wait for the last traces to leave when a process ends.
const FLUSH: Duration = Duration::from_secs(2);

/// Keeps the exporter of traces, and who follows the file that says the level; `stop` sends what is left, and ends that.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    traces: Option<SdkTracerProvider>,
    _level: Option<AbortOnDropHandle<()>>,
}

impl Telemetry {
    /// Installs the process's subscriber. Needs a tokio runtime when traces are exported, or a file says the level.
    pub(crate) fn start(service: &'static str, config: &ProcessConfig) -> Result<Self, ProcessError> {
        let setup = |what| move |source| ProcessError::Setup { what, source };
        let (filter, level) = level::start(config)?;
        let traces = exporter(service, config).map_err(setup("OTLP export"))?;
        let spans = traces.as_ref().map(|provider| {
            let tracer = stages::TRACER.get_or_init(|| provider.tracer("baton"));
            tracing_opentelemetry::layer().with_tracer(tracer.clone()).with_filter(trace_filter())
        });
        // A reader of our logs that went away must not take us along: what cannot be written is dropped in silence.
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
        let log = match config.log.format {
            LogFormat::Human => log.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed(),
            LogFormat::Json => {
                log.json().flatten_event(true).with_current_span(true).with_filter(filter).boxed()
            }
        };
        let installed = tracing_subscriber::registry().with(log).with(spans).try_init();
        installed.map_err(|error| setup("logging")(error.into()))?;
        Ok(Self { traces, _level: level })
    }

    /// Sends what traces are left, for a bounded time.
    pub(crate) fn stop(self) {
        if let Some(provider) = &self.traces
            && let Err(error) = provider.shutdown_with_timeout(FLUSH)
        {
            tracing::warn!(%error, "the last traces could not be exported");
        }
    }
}

/// Spans of ours (a directive covers every target that begins with it) at info and above; the libraries' own
/// would drown them, and those of the exporter would feed it.
fn trace_filter() -> EnvFilter {
    EnvFilter::new("off,baton=info")
}

fn exporter(
    service: &'static str,
    config: &ProcessConfig,
) -> Result<Option<SdkTracerProvider>, Box<dyn std::error::Error + Send + Sync>> {
    let OtlpConfig { endpoint, ca_file, .. } = &config.otlp;
    if endpoint.is_empty() {
        return Ok(None);
    }
    let mut exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint);
    if !ca_file.as_os_str().is_empty() {
        let read = std::fs::read(ca_file);
        let ca = read.map_err(|error| format!("process.otlp.ca_file: {}: {error}", ca_file.display()))?;
        exporter = exporter.with_tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)));
    }
    let exporter = exporter.build()?;
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource =
        Resource::builder().with_service_name(format!("baton-{service}")).with_attribute(version).build();
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.otlp.sample_ratio)));
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(sampler)
        .with_resource(resource);
    Ok(Some(provider.build()))
}
