//! What the configuration says of handoffs: how KV caches travel, and which peers are believed.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use baton_kvtransfer::{FleetSecret, TransportConfig};
use baton_process::{Invalid, duration};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Connections over TCP to each peer.
pub(crate) const CONNECTIONS_PER_PEER: usize = 4;
/// What kvtransfer can end a transfer after.
pub(super) const TIMEOUT_MOST: Duration = Duration::from_secs(7 * 24 * 3600);
/// An eighth of it takes a whole frame of a peer's, 1 MiB.
const STAGING_LEAST: u64 = 8 << 20;
/// How KV caches of a CPU may travel, by name.
const TRANSPORTS: [(&str, TransportConfig); 3] = [
    ("shm", TransportConfig::Shm),
    ("rdma", TransportConfig::Rdma),
    ("tcp", TransportConfig::Tcp { connections: CONNECTIONS_PER_PEER }),
];

/// What kvtransfer takes for a lease.
const LEASE_RANGE: RangeInclusive<Duration> = Duration::from_millis(30)..=Duration::from_secs(3600);

fn transport_names() -> [&'static str; TRANSPORTS.len()] {
    TRANSPORTS.map(|(name, _)| name)
}

fn transports_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "array", "items": { "type": "string", "enum": transport_names() } })
}

/// How KV caches [travel](../../README.md#how-kv-caches-travel) between servers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HandoffConfig {
    /// A peer that is silent for this long is given up, with its transfers. A connection to `listen` that has gone silent is
    /// kept for as long, and for ten seconds at least. 30ms to 1h.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub lease: Duration,
    /// Longest life of a transfer, from reserving blocks to release, if its request has no deadline of its own. More than 0s,
    /// and at most 168h.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub timeout: Duration,
    /// How KV caches may travel, the best first: `shm`, copied from the memory of a server of the same host; `rdma`, read by
    /// RoCE cards (libibverbs; all of `runtime.kv_cache_bytes` is taken at once); `tcp`. The first that both servers have
    /// and that works is taken.
    #[schemars(schema_with = "transports_schema")]
    pub transports: Vec<String>,
    /// File with a secret of at least 16 bytes that all servers of the fleet share; who does not show it is given no KV
    /// cache and can send none. Looked at every two seconds: [a secret can be changed](../../README.md#security) while
    /// servers run. Empty = whoever reaches `listen` is believed.
    pub secret_file: PathBuf,
    /// File with the secret before, which is good, too, for servers that know no other yet. It need not exist. Empty = none.
    pub secret_before_file: PathBuf,
    /// Whether a KV cache of another `runtime.kv_dtype` is taken in and converted, bf16 to int8 or the reverse; it is the
    /// receiving server's that counts. Values are rounded, so that completions may differ from those of one server: not
    /// done unless asked for. Servers that have it are paired with others that have it, of either type, and with none
    /// that has it not. Another block size alone changes no value and needs no switch.
    pub convert: bool,
    /// Most servers that this one sends KV caches to, and most that send to it. Over it, one that has no transfers (and, of
    /// those that send to it, has been quiet for 10 s) gives way to the next; else a request is refused. Shared memory takes
    /// 128 peers, whatever this says.
    #[schemars(range(min = 1))]
    pub max_peers: u32,
    /// Most memory for what is on its way in from servers that keep their caches otherwise, until it is mapped; what finds no
    /// room waits. None is taken before there is such a server. A single frame of more than half of it takes the next power
    /// of two.
    #[schemars(range(min = STAGING_LEAST))]
    pub staging_bytes: u64,
}

impl Default for HandoffConfig {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(3),
            timeout: Duration::from_secs(120),
            transports: vec!["shm".into(), "tcp".into()],
            secret_file: PathBuf::new(),
            secret_before_file: PathBuf::new(),
            convert: false,
            max_peers: 1024,
            staging_bytes: 256 << 20,
        }
    }
}

impl HandoffConfig {
    pub(super) fn validate(&self) -> Result<(), Invalid> {
        if !LEASE_RANGE.contains(&self.lease) {
            return Err(Invalid::new("handoff.lease", "expected 30ms to 1h"));
        }
        if self.timeout.is_zero() || self.timeout > TIMEOUT_MOST {
            return Err(Invalid::new("handoff.timeout", "expected more than 0, and no more than 7d"));
        }
        if self.max_peers == 0 {
            return Err(Invalid::new("handoff.max_peers", "expected at least 1"));
        }
        if self.staging_bytes < STAGING_LEAST || usize::try_from(self.staging_bytes).is_err() {
            let expected = format!("expected at least {STAGING_LEAST}, not {}", self.staging_bytes);
            return Err(Invalid::new("handoff.staging_bytes", expected));
        }
        self.transports()?;
        self.secret()?;
        self.secret_before()?;
        Ok(())
    }

    /// The best first.
    pub fn transports(&self) -> Result<Vec<TransportConfig>, Invalid> {
        let invalid = |why: String| Err(Invalid::new("handoff.transports", why));
        let mut found: Vec<TransportConfig> = Vec::new();
        for name in &self.transports {
            let Some((_, config)) = TRANSPORTS.iter().find(|(known, _)| known == name) else {
                return invalid(format!("expected some of {}, not {name}", transport_names().join(", ")));
            };
            if found.contains(config) {
                return invalid(format!("{name} is named twice"));
            }
            found.push(config.clone());
        }
        match found.is_empty() {
            true => invalid(format!("expected at least one of {}", transport_names().join(", "))),
            false => Ok(found),
        }
    }

    /// What the secret's file holds, without white space at its ends.
    pub fn secret(&self) -> Result<Option<FleetSecret>, Invalid> {
        let read = secret_in("handoff.secret_file", &self.secret_file)?;
        match (read, self.secret_file.as_os_str().is_empty()) {
            (None, false) => {
                let why = format!("{} cannot be used: there is nothing in it", self.secret_file.display());
                Err(Invalid::new("handoff.secret_file", why))
            }
            (read, _) => Ok(read),
        }
    }

    /// What the file of the one before holds, if there is any.
    pub fn secret_before(&self) -> Result<Option<FleetSecret>, Invalid> {
        let before = secret_in("handoff.secret_before_file", &self.secret_before_file)?;
        if before.is_some() && self.secret_file.as_os_str().is_empty() {
            let why = "there can be one before only where `handoff.secret_file` names the one that is shown";
            return Err(Invalid::new("handoff.secret_before_file", why));
        }
        Ok(before)
    }
}

/// None: no file is named, or it is not there, or empty.
fn secret_in(key: &'static str, path: &Path) -> Result<Option<FleetSecret>, Invalid> {
    let unusable = |why: String| Invalid::new(key, format!("{} cannot be used: {why}", path.display()));
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => match read.map_err(|error| unusable(error.to_string()))?.trim_ascii() {
            [] => Ok(None),
            secret => FleetSecret::new(secret).map(Some).map_err(|error| unusable(error.to_string())),
        },
    }
}
