//! The part of a service's configuration that every process has, under the key `process`, and what a configuration
//! type must offer to [`crate::run`].

use std::{path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// How long running work may take once the process was asked to stop, of services that say nothing else.
const DRAIN: Duration = Duration::from_secs(30);

/// What every process has: threads, logs, traces and the bounds of a shutdown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessConfig {
    /// Threads that run asynchronous work; 0 = one for each core, in a coordinator one for two, in a server one for four, since
    /// its compute threads take the cores.
    pub worker_threads: usize,
    pub log: LogConfig,
    pub otlp: OtlpConfig,
    pub shutdown: ShutdownConfig,
}

/// What is written to standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// How each line is written.
    pub format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives as in `info,baton_server=debug`. The environment
    /// variable `BATON_LOG` wins over it.
    pub level: String,
    /// A file whose directives win over the level for as long as it holds any; it is looked at every two seconds. Empty =
    /// none.
    pub level_file: PathBuf,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people.
    #[default]
    Human,
    /// JSON objects, for machines.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: "info".to_owned(), level_file: PathBuf::new() }
    }
}

/// Traces, and where they go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OtlpConfig {
    /// Where traces go (OTLP over gRPC), as in `http://127.0.0.1:4317`. Empty = traces are not exported.
    pub endpoint: String,
    /// Certificates (PEM) of who signs the collector's, for an endpoint that begins with https://.
    pub ca_file: PathBuf,
    /// Share of new traces that are sampled. A trace begun by the caller keeps the caller's choice.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub sample_ratio: f64,
}

impl Default for OtlpConfig {
    fn default() -> Self {
        Self { endpoint: String::new(), ca_file: PathBuf::new(), sample_ratio: 1.0 }
    }
}

/// How the process ends.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownConfig {
    /// How long running work may take to finish once the process was asked to stop. Empty = 30 s; of a coordinator as
    /// long as any of its requests may take: `limits.linger`, `limits.request_timeout` and 10 s.
    #[serde(with = "crate::duration::option")]
    #[schemars(schema_with = "crate::duration::option::schema")]
    pub drain: Option<Duration>,
}

/// A value that the types allow and the service does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}`: {expected}")]
pub struct Invalid {
    /// Dotted key.
    pub key: String,
    /// What was expected, as in "expected a power of two, not 12".
    pub expected: String,
}

impl Invalid {
    pub fn new(key: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { key: key.into(), expected: expected.into() }
    }
}

/// Something that is not served, and so has no key.
#[derive(Debug, Clone, Copy)]
pub struct Unserved {
    /// The last part of its keys, of which only letters count, in small ones.
    pub keys: &'static [&'static str],
    /// The tables that such a key is looked for in, by the first part of it; empty = at the top.
    pub tables: &'static [&'static str],
    /// Why there is none.
    pub why: &'static str,
}

impl Unserved {
    /// Whether a dotted key, however it is spelt, is for this.
    pub(crate) fn is_meant_by(&self, key: &str) -> bool {
        let (table, _) = key.split_once('.').unwrap_or_default();
        let last = key.rsplit('.').next().unwrap_or_default();
        let letters: String = last.chars().filter(char::is_ascii_alphabetic).collect();
        self.tables.contains(&table) && self.keys.contains(&letters.to_ascii_lowercase().as_str())
    }
}

/// A service's whole configuration: nested structs with `#[serde(deny_unknown_fields, default)]` and a `process` key.
/// Their doc comments are what users read of them: see [`crate::reference`].
pub trait ServiceConfig:
    DeserializeOwned + Serialize + JsonSchema + Default + Clone + Send + 'static
{
    /// A configuration file to begin with (TOML), as the reference shows it.
    const EXAMPLE: &'static str;
    /// What operators of other systems look for.
    const UNSERVED: &'static [Unserved] = &[];

    fn process(&self) -> &ProcessConfig;

    /// For how many of the machine's cores there is one thread of asynchronous work, if `process.worker_threads` leaves
    /// that open.
    fn cores_per_worker(&self) -> usize {
        1
    }

    /// How long running work may take once the process was asked to stop, if `process.shutdown.drain` leaves that open.
    fn default_drain(&self) -> Duration {
        DRAIN
    }

    /// How long running work may take once the process was asked to stop.
    fn drain(&self) -> Duration {
        self.process().shutdown.drain.unwrap_or_else(|| self.default_drain())
    }

    /// Checks what types cannot say. Runs at start, before anything is opened.
    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

impl ProcessConfig {
    /// Checks what types cannot say.
    pub fn validate(&self) -> Result<(), Invalid> {
        if !(0.0..=1.0).contains(&self.otlp.sample_ratio) {
            let expected = format!("expected 0 to 1, not {}", self.otlp.sample_ratio);
            return Err(Invalid::new("process.otlp.sample_ratio", expected));
        }
        match (self.otlp.endpoint.starts_with("https://"), self.otlp.ca_file.as_os_str().is_empty()) {
            (true, true) => {
                let expected = "expected a file: `endpoint` begins with https://";
                return Err(Invalid::new("process.otlp.ca_file", expected));
            }
            (false, false) => {
                let expected = "expected an address that begins with https://, as `ca_file` is given";
                return Err(Invalid::new("process.otlp.endpoint", expected));
            }
            _ => {}
        }
        if let Err(error) = crate::telemetry::check_level(&self.log.level) {
            let expected = format!(
                "expected error, warn, info, debug, trace or directives as in `info,baton_server=debug`, not `{}` ({error})",
                self.log.level
            );
            return Err(Invalid::new("process.log.level", expected));
        }
        Ok(())
    }
}
