//! The coordinator's configuration: one nested struct, checked at start.

mod limits;
mod model;
mod placement;

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use baton_process::{
    HttpsConfig, Invalid, Listen, ProcessConfig, ServiceConfig, TlsConfig, access::AdminConfig, duration,
    listen,
};
use baton_proto::{CoordinatorId, MODEL_NAME_BYTES_MOST, MODEL_NAMES_MOST, MODELS_MOST};
use baton_registry::EtcdSettings;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use limits::LimitsConfig;
pub use model::{GenerationConfig, ModelConfig};
pub use placement::{PlacementConfig, PolicyName};

/// Beyond `limits.request_timeout`, for what is said last: a request's end, or its error.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Answers that one request may have at most: each has a bit in the set of those that a leg still works at.
pub const CHOICES_MOST: u32 = 128;
/// What is kept of a prompt of a byte: a token, of 4 bytes, and its part of a KV block's name, and as much again is left to others.
const PROMPT_BYTES_OF_BODY: usize = 8;

/// The coordinator is the entry of a cluster: it serves the OpenAI API and schedules requests on prefill and decode
/// instances.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorConfig {
    /// Name of this coordinator among others, as in `coordinator-0`. Of several of one name operators see the one that was
    /// started last.
    pub id: String,
    /// Where clients are served (HTTP, or HTTPS by `https`).
    pub listen: Listen,
    /// Where `/metrics`, `/health` and `/readiness` are served (HTTP). Empty = at `listen`, which has the last two in any
    /// case.
    #[serde(with = "listen::option")]
    #[schemars(with = "String")]
    pub metrics_listen: Option<Listen>,
    /// Where operators are served (gRPC: RequestAdmin, health, reflection).
    pub admin_listen: Listen,
    /// Host that clients and operators reach this coordinator at, for the controller to show; empty = the address that is
    /// listened on.
    pub advertise_host: String,
    pub https: HttpsConfig,
    pub store: StoreConfig,
    /// What is served: at least one model, a table `[[models]]` each. As one setting: `--set 'models=[{path = "a.gguf",
    /// names = ["a"]}]'`, or `--model PATH` for each.
    #[schemars(length(max = MODELS_MOST))]
    pub models: Vec<ModelConfig>,
    /// The directory under which all files of models have to lie, wherever links lead. Empty = anywhere.
    pub model_root: PathBuf,
    pub api_keys: ApiKeysConfig,
    pub limits: LimitsConfig,
    pub text: TextConfig,
    pub placement: PlacementConfig,
    pub fleet: FleetConfig,
    pub carry: CarryConfig,
    pub admin: AdminConfig,
    pub tls: TlsConfig,
    pub process: ProcessConfig,
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        Self {
            id: "coordinator-0".into(),
            listen: Listen::address("127.0.0.1", 8000),
            metrics_listen: None,
            admin_listen: Listen::address("127.0.0.1", 8001),
            advertise_host: String::new(),
            https: HttpsConfig::default(),
            store: StoreConfig::default(),
            models: Vec::new(),
            model_root: PathBuf::new(),
            api_keys: ApiKeysConfig::default(),
            limits: LimitsConfig::default(),
            text: TextConfig::default(),
            placement: PlacementConfig::default(),
            fleet: FleetConfig::default(),
            carry: CarryConfig::default(),
            admin: AdminConfig::default(),
            tls: TlsConfig::default(),
            process: ProcessConfig::default(),
        }
    }
}

/// Where the cluster's state is read: exactly one of the two.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// `host:port` of a controller that embeds the store. Empty = etcd is used.
    pub controller: String,
    pub etcd: EtcdSettings,
}

/// Who may send requests, by [API keys](../../README.md#api-keys). Without a file and without the store: everybody who can
/// reach `listen`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ApiKeysConfig {
    /// A TOML file with a table `[[keys]]` for each API key, read again when it changes. Empty = none; without
    /// `api_keys.store` too, everybody who can reach `listen` is let in.
    pub file: String,
    /// Whether the API keys are those in etcd, as `baton ctl key` makes them. Needs `store.etcd.endpoints`, as a controller
    /// that embeds the store forgets what is in it.
    pub store: bool,
    /// How many coordinators share the keys, until the controller has said how many there are: each grants its part of what a
    /// key may.
    pub coordinators: NonZeroU32,
}

impl Default for ApiKeysConfig {
    fn default() -> Self {
        Self { file: String::new(), store: false, coordinators: NonZeroU32::MIN }
    }
}

/// How prompts become tokens.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TextConfig {
    /// Most memory for pieces of long prompts and their tokens, of all models together: what comes again, as the turns of a
    /// chat do, is looked up instead of tokenised. 0 = everything is tokenised.
    pub cache_bytes: usize,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self { cache_bytes: 64 << 20 }
    }
}

/// How instances are reached and when they are given up.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// For a connection and the instance's welcome on it, and then for the load by which it is placed on; without that it is taken
    /// for idle. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub connect_timeout: Duration,
    /// First pause between attempts to connect; it doubles up to `reconnect_max`. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub reconnect_min: Duration,
    /// Longest pause between attempts to connect. At least `fleet.reconnect_min`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub reconnect_max: Duration,
    /// An instance that answers no HTTP/2 ping for twice this long is lost. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub keep_alive: Duration,
    /// How long an instance may have work and compute nothing, or say nothing and not answer, before its requests go on
    /// elsewhere. One that is slow has longer: eight times what its steps take. At least 2s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub stall: Duration,
    /// How long an instance that the store no longer lists, but whose stream lives, is still used.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub absent_grace: Duration,
    /// How often instances that are gone are cleared away. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub sweep: Duration,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            reconnect_min: Duration::from_millis(50),
            reconnect_max: Duration::from_secs(1),
            keep_alive: Duration::from_secs(5),
            stall: Duration::from_secs(3),
            absent_grace: Duration::from_secs(60),
            sweep: Duration::from_secs(5),
        }
    }
}

/// How requests leave instances.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CarryConfig {
    /// An answer that is expected to take longer yet on an instance that begins to drain, or to change its role, goes on
    /// elsewhere at once, and so does a prompt that is expected to wait there longer; what takes less stays until it is done.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub move_after: Duration,
    /// How long a request whose instance was lost, or failed it, waits for another that can take it. A new request is
    /// refused sooner, by `limits.placement_timeout`: whoever sends it may have another coordinator to ask.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub patience: Duration,
}

impl Default for CarryConfig {
    fn default() -> Self {
        Self { move_after: Duration::from_secs(2), patience: Duration::from_secs(30) }
    }
}

impl ServiceConfig for CoordinatorConfig {
    const EXAMPLE: &'static str = r#"listen = "*:8000"
metrics_listen = "*:8002"

[store]
controller = "10.0.0.5:7100"

[[models]]
path = "/models/Qwen3-8B"
names = ["qwen3-8b"]

[api_keys]
file = "/etc/baton/keys.toml"
"#;

    fn process(&self) -> &ProcessConfig {
        &self.process
    }

    /// A thread more than is needed wakes to find nothing, and what a request needs goes from one core's caches to another's:
    /// with one thread on two cores a request costs a fifth to a quarter less. Long prompts are prepared in
    /// short steps, or on threads of their own.
    fn cores_per_worker(&self) -> usize {
        2
    }

    /// No request is cut before its own deadline, also none that comes when the process has been asked to stop.
    fn default_drain(&self) -> Duration {
        self.limits.linger + self.limits.request_timeout + LAST_WORDS
    }

    fn validate(&self) -> Result<(), Invalid> {
        CoordinatorId::new(self.id.as_str()).map_err(|error| Invalid::new("id", error.to_string()))?;
        let require = |good: bool, key: &str, expected: &str| {
            if good { Ok(()) } else { Err(Invalid::new(key, expected)) }
        };
        require(
            self.store.controller.is_empty() != self.store.etcd.endpoints.is_empty(),
            "store",
            "expected either `controller` (HOST:PORT) or `etcd.endpoints` (a list of HOST:PORT), not both and not neither",
        )?;
        self.store.etcd.validate()?;
        self.tls.validate()?;
        self.https.validate()?;
        require(
            (1..=MODELS_MOST).contains(&self.models.len()),
            "models",
            "expected 1 to 64 models to serve; name them, as in --model FILE",
        )?;
        for (index, model) in self.models.iter().enumerate() {
            let path = "expected a GGUF file or a Hugging Face directory";
            require(!model.path.as_os_str().is_empty(), &format!("models[{index}].path"), path)?;
            let names = format!("models[{index}].names");
            require(model.names.len() <= MODEL_NAMES_MOST, &names, "expected at most 16")?;
            let good = |name: &String| (1..=MODEL_NAME_BYTES_MOST).contains(&name.len());
            require(model.names.iter().all(good), &names, "expected names of 1 to 256 bytes")?;
        }
        require(
            !self.api_keys.store || self.api_keys.file.is_empty(),
            "api_keys",
            "expected either `file` or `store = true`, not both",
        )?;
        // A controller that embeds the store forgets with each restart what is in it.
        require(
            !self.api_keys.store || !self.store.etcd.endpoints.is_empty(),
            "api_keys.store",
            "expected store.etcd.endpoints with it: only etcd keeps keys; use api_keys.file otherwise",
        )?;
        let limits = &self.limits;
        require(limits.max_body_bytes > 0, "limits.max_body_bytes", "expected at least 1")?;
        require(
            limits.max_held_body_bytes >= limits.max_body_bytes,
            "limits.max_held_body_bytes",
            "expected at least limits.max_body_bytes: the largest body must fit",
        )?;
        require(
            limits.max_held_prompt_bytes / PROMPT_BYTES_OF_BODY >= limits.max_body_bytes,
            "limits.max_held_prompt_bytes",
            "expected at least eight times limits.max_body_bytes: the longest prompt must fit",
        )?;
        require(!limits.body_timeout.is_zero(), "limits.body_timeout", "expected more than 0")?;
        require(limits.max_connections > 0, "limits.max_connections", "expected at least 1")?;
        require(limits.max_concurrent > 0, "limits.max_concurrent", "expected at least 1")?;
        require((1..=CHOICES_MOST).contains(&limits.max_choices), "limits.max_choices", "expected 1 to 128")?;
        require(!limits.request_timeout.is_zero(), "limits.request_timeout", "expected more than 0")?;
        self.placement.validate()?;
        let fleet = &self.fleet;
        for (value, key) in [
            (fleet.connect_timeout, "fleet.connect_timeout"),
            (fleet.reconnect_min, "fleet.reconnect_min"),
            (fleet.keep_alive, "fleet.keep_alive"),
            (fleet.sweep, "fleet.sweep"),
        ] {
            require(!value.is_zero(), key, "expected more than 0")?;
        }
        // Loads come once a second.
        require(fleet.stall >= Duration::from_secs(2), "fleet.stall", "expected at least 2s")?;
        require(
            fleet.reconnect_min <= fleet.reconnect_max,
            "fleet.reconnect_max",
            "expected at least fleet.reconnect_min",
        )
    }
}

/// By when, counted from the shutdown, requests have to have ended: a little before the process has, so that what is cut
/// off then still gets its error.
pub(crate) fn last_requests(config: &CoordinatorConfig) -> Duration {
    let drain = config.drain();
    drain - (drain / 10).min(LAST_WORDS / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> CoordinatorConfig {
        let mut config = CoordinatorConfig::default();
        config.store.controller = "127.0.0.1:9000".into();
        config.models = vec![ModelConfig { path: "model.gguf".into(), ..ModelConfig::default() }];
        config
    }

    #[test]
    fn a_drain_that_is_not_set_covers_every_request() {
        let mut config = good();
        config.limits.request_timeout = Duration::from_secs(3600);
        assert!(last_requests(&config) >= config.limits.linger + config.limits.request_timeout);
        config.process.shutdown.drain = Some(Duration::from_secs(20));
        assert_eq!(
            (config.drain(), last_requests(&config)),
            (Duration::from_secs(20), Duration::from_secs(18))
        );
    }

    #[test]
    fn what_types_cannot_say_is_checked_with_its_key() {
        assert!(good().validate().is_ok());
        type Change = fn(&mut CoordinatorConfig);
        let cases: [(&str, Change); 28] = [
            ("id", |c| c.id = "Upper".into()),
            ("store", |c| c.store.controller.clear()),
            ("store", |c| c.store.etcd.endpoints.push("127.0.0.1:2379".into())),
            ("store.etcd.password_file", |c| c.store.etcd.user = "baton".into()),
            ("https.cert_file", |c| c.https.key_file = "key".into()),
            ("https.cert_file", |c| c.https.client_ca_file = "ca".into()),
            ("https.key_file", |c| c.https.cert_file = "crt".into()),
            ("models", |c| c.models.clear()),
            ("models", |c| c.models = vec![c.models[0].clone(); 65]),
            ("models[1].path", |c| c.models.push(ModelConfig::default())),
            ("models[0].names", |c| c.models[0].names = vec![String::new()]),
            ("models[0].names", |c| c.models[0].names = (0..17).map(|n| n.to_string()).collect()),
            ("api_keys", |c| {
                c.api_keys = ApiKeysConfig { file: "f".into(), store: true, ..c.api_keys.clone() }
            }),
            ("api_keys.store", |c| c.api_keys.store = true),
            ("limits.max_held_body_bytes", |c| c.limits.max_body_bytes = c.limits.max_held_body_bytes + 1),
            ("limits.max_held_prompt_bytes", |c| {
                c.limits.max_held_prompt_bytes = PROMPT_BYTES_OF_BODY * c.limits.max_body_bytes - 1
            }),
            ("limits.body_timeout", |c| c.limits.body_timeout = Duration::ZERO),
            ("limits.max_concurrent", |c| c.limits.max_concurrent = 0),
            ("limits.max_choices", |c| c.limits.max_choices = 0),
            ("limits.max_choices", |c| c.limits.max_choices = 129),
            ("placement.temperature", |c| c.placement.temperature = f64::NAN),
            ("placement.tpot_target", |c| c.placement.tpot_target = Duration::ZERO),
            ("placement.room", |c| c.placement.room = Duration::ZERO),
            ("placement.index_bytes", |c| c.placement.index_bytes = (1 << 20) - 1),
            ("placement.index_every_tokens", |c| c.placement.index_every_tokens = 4097),
            ("fleet.keep_alive", |c| c.fleet.keep_alive = Duration::ZERO),
            ("fleet.stall", |c| c.fleet.stall = Duration::from_millis(1999)),
            ("fleet.reconnect_max", |c| c.fleet.reconnect_max = Duration::ZERO),
        ];
        for (key, change) in cases {
            let mut config = good();
            change(&mut config);
            assert_eq!(config.validate().expect_err(key).key, key);
        }
    }
}
