//! The server's configuration: file, `BATON_SERVER__...` variables and flags (see `baton_process::config`).

use std::{collections::BTreeMap, path::PathBuf};

use baton_process::{Invalid, Listen, ProcessConfig, ServiceConfig, TlsConfig, Unserved};
use baton_proto::{GroupName, InstanceId};
use baton_runtime::KvDtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod handoff;

pub(crate) use handoff::CONNECTIONS_PER_PEER;
pub use handoff::HandoffConfig;

/// Most compute threads.
const THREADS_MOST: usize = 1024;
/// Roles that can be taken on without a controller; empty = none.
const ROLES: [&str; 4] = ["", "prefill", "decode", "mixed"];

/// A server is an instance that runs a model: it prefills, decodes, or does both. The defaults suit one small model on one
/// machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Name of this instance in the fleet; a restart keeps it. a-z, 0-9, '-' and '.'.
    pub instance_id: String,
    /// Prefill and decode are paired within a group.
    pub group: GroupName,
    /// Shown by `baton ctl`. `supervisor` names who starts this process again, and only once it has ended: the next one is
    /// let in without waiting for this one's lease. `role` (`prefill`, `decode`, `mixed`) pins it, see
    /// [ctl](../../README.md#operating-baton-ctl).
    pub labels: BTreeMap<String, String>,
    /// host:port of the controllers; any of them will do. Empty = without a controller, with the role of `role`.
    pub controllers: Vec<String>,
    /// The role taken on at once, without waiting for a controller; empty = wait.
    #[schemars(extend("enum" = ROLES))]
    pub role: String,
    /// gRPC: Inference, Handoff, health, reflection.
    pub listen: Listen,
    /// HTTP: `/metrics`, `/health`, `/readiness`.
    pub metrics_listen: Listen,
    /// Where KV caches arrive.
    pub kv_data_listen: Listen,
    /// Host that peers reach this instance at; empty = the address that is listened on.
    pub advertise_host: String,
    pub model: ModelConfig,
    pub runtime: RuntimeConfig,
    pub handoff: HandoffConfig,
    pub tls: TlsConfig,
    pub process: ProcessConfig,
}

/// What is run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A GGUF file, or a Hugging Face directory.
    pub path: PathBuf,
    /// The directory under which all of the model's files have to lie, wherever links lead. Empty = anywhere.
    pub root: PathBuf,
    /// What clients say in `model`; empty = the name in the model's own files.
    pub name: String,
}

/// How the model is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RuntimeConfig {
    /// Compute threads; 0 = one for each core.
    #[schemars(range(max = THREADS_MOST))]
    pub threads: usize,
    /// What the KV cache is kept in. `f32`: exact, as Hugging Face transformers computes on a CPU; `bf16`: half the memory
    /// and half the bytes to hand over; `int8`: a quarter of them and a little more, one scale for each head's key and value
    /// of each token.
    #[schemars(extend("enum" = KvDtype::ALL.map(KvDtype::name)))]
    pub kv_dtype: String,
    /// Whether weights in bf16 are multiplied as they are, in f32. If not, every 32 of them are kept as multiples of 12
    /// bits of one scale, in a fifth less memory, and multiplied in integers, which is faster. Prefill and
    /// decode are paired only if it is the same on both: logits differ a little.
    pub exact_bf16: bool,
    /// Folder of packed copies of weights; empty = none. A model found there is mapped instead of packed, and all
    /// servers of a host and user that run it share its memory; one that is not is packed and written there. Copies not
    /// loaded for 30 days go when another is written.
    pub packed_copies: PathBuf,
    /// Memory of the KV cache. Rounded down to whole blocks.
    pub kv_cache_bytes: u64,
    /// Blocks of the KV cache; not 0 = this instead of `kv_cache_bytes`.
    pub kv_blocks: u32,
    /// Whether requests that begin alike share the KV cache of what they have in common.
    pub prefix_cache: bool,
    /// Most tokens of one step of the engine. At least `runtime.max_sequences` and a block's tokens.
    pub max_batch_tokens: u32,
    /// Most sequences computed at a time.
    #[schemars(range(min = 1))]
    pub max_sequences: u32,
    /// Most sequences that wait; more are refused.
    #[schemars(range(min = 1))]
    pub max_waiting: u32,
    /// Most tokens of prompt and completion together; 0 = what the model was made for.
    pub max_context_tokens: u32,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            instance_id: "server-0".into(),
            group: GroupName::default(),
            labels: BTreeMap::new(),
            controllers: Vec::new(),
            role: String::new(),
            listen: Listen::loopback(),
            metrics_listen: Listen::loopback(),
            kv_data_listen: Listen::loopback(),
            advertise_host: String::new(),
            model: ModelConfig::default(),
            runtime: RuntimeConfig::default(),
            handoff: HandoffConfig::default(),
            tls: TlsConfig::default(),
            process: ProcessConfig::default(),
        }
    }
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            threads: 0,
            kv_dtype: KvDtype::Bf16.name().into(),
            exact_bf16: false,
            packed_copies: PathBuf::new(),
            kv_cache_bytes: 512 << 20,
            kv_blocks: 0,
            prefix_cache: true,
            max_batch_tokens: 512,
            max_sequences: 64,
            max_waiting: 512,
            max_context_tokens: 0,
        }
    }
}

impl RuntimeConfig {
    pub fn kv_dtype(&self) -> Result<KvDtype, Invalid> {
        KvDtype::ALL.into_iter().find(|dtype| dtype.name() == self.kv_dtype).ok_or_else(|| {
            Invalid::new("runtime.kv_dtype", format!("expected f32, bf16 or int8, not {}", self.kv_dtype))
        })
    }

    /// Blocks of `block_bytes` bytes over all layers.
    pub fn blocks(&self, block_bytes: u64) -> Result<u32, Invalid> {
        if self.kv_blocks > 0 {
            return Ok(self.kv_blocks);
        }
        match u32::try_from(self.kv_cache_bytes / block_bytes.max(1)) {
            Ok(blocks) if blocks > 0 => Ok(blocks),
            _ => {
                let expected = format!("expected at least {block_bytes}, one block of this model's KV cache");
                Err(Invalid::new(
                    "runtime.kv_cache_bytes",
                    format!("{expected}, not {}", self.kv_cache_bytes),
                ))
            }
        }
    }

    /// Checks what depends on the size of a block.
    pub fn check_batch(&self, block_tokens: u32) -> Result<(), Invalid> {
        let least = self.max_sequences.saturating_add(block_tokens);
        if self.max_batch_tokens < least {
            let expected = format!(
                "expected at least {least}, a token for each of {} sequences and a block of {block_tokens} for prompts, not {}",
                self.max_sequences, self.max_batch_tokens
            );
            return Err(Invalid::new("runtime.max_batch_tokens", expected));
        }
        Ok(())
    }
}

/// Where keys of an engine are looked for.
const TABLES: &[&str] = &["", "runtime", "model"];
/// Restrictions of prefill and decode apart for which other systems have keys, and that nothing else here tells of.
const UNSERVED: &[Unserved] = &[
    Unserved {
        keys: &["device", "devices", "devicetype", "deviceids", "npudeviceids", "npus", "gpus"],
        tables: TABLES,
        why: "a server computes on the processors of its machine, and there is no device to choose",
    },
    Unserved {
        keys: &[
            "adapter",
            "adapters",
            "lora",
            "loras",
            "loraadapters",
            "loramodules",
            "enablelora",
            "maxloras",
        ],
        tables: TABLES,
        why: "adapters (LoRA) are not served: merge them into the model",
    },
    Unserved {
        keys: &[
            "speculative",
            "speculativeconfig",
            "speculationgamma",
            "numspeculativetokens",
            "paralleldecoding",
            "pluginparams",
        ],
        tables: TABLES,
        why: "a sequence is decoded token by token: neither parallel nor speculative decoding is served",
    },
    Unserved {
        keys: &[
            "dp",
            "dataparallelsize",
            "multinode",
            "multinodesinferenabled",
            "nnodes",
            "nodes",
            "pipelineparallelsize",
            "pp",
            "tensorparallel",
            "tensorparallelsize",
            "tp",
            "tpsize",
            "worldsize",
        ],
        tables: TABLES,
        why: "an instance is one process on one machine: for more throughput start more instances",
    },
];

impl ServiceConfig for ServerConfig {
    const UNSERVED: &'static [Unserved] = UNSERVED;
    const EXAMPLE: &'static str = r#"instance_id = "server-0"
controllers = ["10.0.0.5:7100"]
listen = "10.0.0.7:7200"
metrics_listen = "10.0.0.7:7201"
kv_data_listen = "10.0.0.7:7202"

[model]
path = "/models/Qwen3-8B"

[runtime]
kv_cache_bytes = 8589934592
"#;

    fn process(&self) -> &ProcessConfig {
        &self.process
    }

    /// The compute threads take them all. A step's tokens and slices come in bursts, which one thread works through
    /// sooner than several that wake each other.
    fn cores_per_worker(&self) -> usize {
        4
    }

    fn validate(&self) -> Result<(), Invalid> {
        InstanceId::new(self.instance_id.as_str())
            .map_err(|error| Invalid::new("instance_id", error.to_string()))?;
        if self.model.path.as_os_str().is_empty() {
            return Err(Invalid::new("model.path", "expected a GGUF file or a Hugging Face directory"));
        }
        if !ROLES.contains(&self.role.as_str()) {
            let expected = format!("expected prefill, decode, mixed or nothing, not {}", self.role);
            return Err(Invalid::new("role", expected));
        }
        if self.controllers.is_empty() && self.role.is_empty() {
            return Err(Invalid::new("controllers", "expected host:port of a controller, or set `role`"));
        }
        self.tls.validate()?;
        self.runtime.kv_dtype()?;
        let positive = [
            ("runtime.max_sequences", self.runtime.max_sequences),
            ("runtime.max_waiting", self.runtime.max_waiting),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err(Invalid::new(key, "expected at least 1"));
        }
        if self.runtime.threads > THREADS_MOST {
            let expected = format!("expected 0 (one for each core) to {THREADS_MOST}");
            return Err(Invalid::new("runtime.threads", expected));
        }
        self.handoff.validate()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn valid() -> ServerConfig {
        let mut config = ServerConfig::default();
        config.model.path = "/m".into();
        config.controllers = vec!["127.0.0.1:1".into()];
        config
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(valid().validate(), Ok(()));
        type Change = fn(&mut ServerConfig);
        let cases: [(&str, Change); 19] = [
            ("instance_id", |c| c.instance_id = "A".into()),
            ("model.path", |c| c.model.path = PathBuf::new()),
            ("role", |c| c.role = "both".into()),
            ("controllers", |c| c.controllers.clear()),
            ("runtime.kv_dtype", |c| c.runtime.kv_dtype = "int3".into()),
            ("runtime.max_sequences", |c| c.runtime.max_sequences = 0),
            ("runtime.threads", |c| c.runtime.threads = 1025),
            ("handoff.lease", |c| c.handoff.lease = Duration::from_millis(10)),
            ("handoff.lease", |c| c.handoff.lease = Duration::from_secs(3601)),
            ("handoff.timeout", |c| c.handoff.timeout = Duration::ZERO),
            ("handoff.timeout", |c| c.handoff.timeout = handoff::TIMEOUT_MOST * 2),
            ("handoff.max_peers", |c| c.handoff.max_peers = 0),
            ("handoff.staging_bytes", |c| c.handoff.staging_bytes = (8 << 20) - 1),
            ("handoff.transports", |c| c.handoff.transports = vec!["udp".into()]),
            ("handoff.transports", |c| c.handoff.transports = vec!["tcp".into(); 2]),
            ("handoff.transports", |c| c.handoff.transports.clear()),
            ("handoff.secret_file", |c| c.handoff.secret_file = "/does/not/exist".into()),
            ("handoff.secret_file", |c| c.handoff.secret_file = "/dev/null".into()),
            ("handoff.secret_before_file", |c| c.handoff.secret_before_file = "/proc/version".into()),
        ];
        for (key, change) in cases {
            let mut config = valid();
            change(&mut config);
            assert_eq!(config.validate().expect_err(key).key, key);
        }
    }

    #[test]
    fn blocks_come_from_bytes_or_are_given() {
        let mut runtime = RuntimeConfig { kv_cache_bytes: 1000, ..RuntimeConfig::default() };
        assert_eq!(runtime.blocks(300), Ok(3));
        assert_eq!(runtime.blocks(1001).expect_err("too small").key, "runtime.kv_cache_bytes");
        runtime.kv_blocks = 7;
        assert_eq!(runtime.blocks(300), Ok(7));
        runtime.max_batch_tokens = runtime.max_sequences + 15;
        assert!(runtime.check_batch(15).is_ok());
        assert!(runtime.check_batch(16).is_err());
    }
}
