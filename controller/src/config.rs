//! What an operator can set, checked at start.

use std::time::Duration;

use baton_process::{
    Invalid, Listen, ProcessConfig, ServiceConfig, TlsConfig, access::AdminConfig, duration,
};
use baton_proto::RolePolicy;
use baton_registry::EtcdSettings;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod kubernetes;

pub use kubernetes::{KubernetesConfig, ScaledGroup};

/// The controller decides which instance prefills and which decodes, and keeps the cluster's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ControllerConfig {
    /// This controller's name among the controllers of a cluster. Empty = the host's name.
    pub controller_id: String,
    /// Where servers, coordinators and `baton ctl` reach it (gRPC).
    pub listen: Listen,
    /// Host that others are told to reach it at; empty = the address that is listened on.
    pub advertise_host: String,
    /// Where `/metrics`, `/health` and `/readiness` are served (HTTP).
    pub metrics_listen: Listen,
    pub store: StoreConfig,
    pub leader: LeaderConfig,
    pub sessions: SessionConfig,
    pub roles: RoleConfig,
    pub health: HealthConfig,
    pub congestion: CongestionConfig,
    pub admin: AdminConfig,
    pub ascend: AscendConfig,
    pub kubernetes: KubernetesConfig,
    pub tls: TlsConfig,
    pub process: ProcessConfig,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            controller_id: String::new(),
            listen: Listen::address("127.0.0.1", 7100),
            advertise_host: String::new(),
            metrics_listen: Listen::address("127.0.0.1", 7101),
            store: StoreConfig::default(),
            leader: LeaderConfig::default(),
            sessions: SessionConfig::default(),
            roles: RoleConfig::default(),
            health: HealthConfig::default(),
            congestion: CongestionConfig::default(),
            admin: AdminConfig::default(),
            ascend: AscendConfig::default(),
            kubernetes: KubernetesConfig::default(),
            tls: TlsConfig::default(),
            process: ProcessConfig::default(),
        }
    }
}

/// Who keeps the state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// This controller, in memory, and it serves the state to coordinators. For a single controller.
    #[default]
    Embedded,
    /// An etcd, which several controllers share and so stand by for one another.
    Etcd,
}

/// Where the cluster's state is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Who keeps the state.
    pub kind: StoreKind,
    pub etcd: EtcdSettings,
}

/// Which of several controllers leads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LeaderConfig {
    /// How long a leader may be silent before another controller takes over. At least 2s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub ttl: Duration,
    /// How long what the leader said of instances outlives it in the store. At least `leader.ttl`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub records_ttl: Duration,
}

impl Default for LeaderConfig {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(3), records_ttl: Duration::from_secs(60) }
    }
}

/// How instances report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SessionConfig {
    /// How often an instance reports. At least 10ms.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub beat: Duration,
    /// How long an instance may be silent before its registration ends. At least twice `sessions.beat`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub lease: Duration,
    /// Instances at a time; more are refused.
    #[schemars(range(min = 1))]
    pub max_instances: usize,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self { beat: Duration::from_secs(1), lease: Duration::from_secs(6), max_instances: 10_000 }
    }
}

/// What is known of Ascend servers beside their own reports.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AscendConfig {
    /// `global_ranktable.json` as Huawei's tools write it, read again when it changes: how many NPUs the server at an
    /// address has. Empty = what servers report counts.
    pub ranktable_file: String,
}

/// Which instances prefill and which decode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoleConfig {
    /// By what a group is divided.
    pub policy: RolePolicy,
    /// Prefill instances wanted in a group. With `decode` it is also the ratio in which any number is divided.
    #[schemars(range(min = 1))]
    pub prefill: u32,
    /// Decode instances wanted in a group.
    #[schemars(range(min = 1))]
    pub decode: u32,
    /// How long the first instances of a group wait for others before roles are given, unless as many as wanted are
    /// there.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub settle: Duration,
    /// How long a lost instance's role is kept for its return.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub lost_grace: Duration,
    /// How long an instance that has a role may load before the others do without it.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub load_grace: Duration,
    /// How long running requests may take to finish before an instance changes its role.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub drain: Duration,
    /// How long beyond `drain` an instance may take to change its role before it counts as stuck and others go on
    /// without it.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub switch_grace: Duration,
    /// How long the role of an instance that is gone is remembered, for its return under the same name.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub memory: Duration,
    /// Serving instances of a group that may be given another role within `moves_period`. What a group cannot serve
    /// without, and what operators ask for by name, is done all the same.
    #[schemars(range(min = 1))]
    pub moves_most: usize,
    /// The time that `moves_most` is for. At least 1s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub moves_period: Duration,
    pub auto: AutoConfig,
}

/// For `roles.policy = "auto"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AutoConfig {
    /// Wanted mean time from a request's arrival to its first token. At least 1ms.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub ttft: Duration,
    /// Wanted mean time between tokens. At least 1ms.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub tpot: Duration,
    /// How often the division is looked at. At least 1ms.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub every: Duration,
    /// How long a group is left alone after one of its instances was moved.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub pause: Duration,
}

impl Default for AutoConfig {
    fn default() -> Self {
        Self {
            ttft: Duration::from_secs(1),
            tpot: Duration::from_millis(50),
            every: Duration::from_secs(5),
            pause: Duration::from_secs(20),
        }
    }
}

impl Default for RoleConfig {
    fn default() -> Self {
        Self {
            policy: RolePolicy::Ratio,
            auto: AutoConfig::default(),
            prefill: 1,
            decode: 1,
            settle: Duration::from_millis(1500),
            lost_grace: Duration::from_secs(10),
            load_grace: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            switch_grace: Duration::from_secs(30),
            memory: Duration::from_secs(3600),
            moves_most: 4,
            moves_period: Duration::from_secs(60),
        }
    }
}

/// When an instance that is there is not to be used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// Whether instances that do badly are taken out of service for a while.
    pub enabled: bool,
    /// How long an instance may have work and compute nothing. At least 1s, and never taken for
    /// less than three `sessions.beat`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub wedge: Duration,
    /// Which share of an instance's requests may fail by its own fault, or of its handoffs break. More than 0 and less
    /// than 1.
    pub error_share: f64,
    /// How many times as long as its peers' an instance's decode step may take. More than 1.
    pub slow_factor: f64,
    /// How long an instance is out of service the first time. Each further time it is twice as long. At least 1s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub quarantine: Duration,
    /// The longest time out of service; after as long in good health the earlier times are forgotten. At least
    /// `health.quarantine`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub quarantine_most: Duration,
    /// How long an instance that is back in service must do well; otherwise it is out again at once. At
    /// least 1s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub probation: Duration,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            wedge: Duration::from_secs(15),
            error_share: 0.2,
            slow_factor: 4.0,
            quarantine: Duration::from_secs(30),
            quarantine_most: Duration::from_secs(1800),
            probation: Duration::from_secs(120),
        }
    }
}

impl HealthConfig {
    fn validate(&self) -> Result<(), Invalid> {
        let second = Duration::from_secs(1);
        require(self.wedge >= second, "health.wedge", "expected at least 1s")?;
        let share = self.error_share > 0.0 && self.error_share < 1.0;
        require(share, "health.error_share", "expected more than 0 and less than 1")?;
        let factor = self.slow_factor > 1.0 && self.slow_factor.is_finite();
        require(factor, "health.slow_factor", "expected more than 1")?;
        require(self.quarantine >= second, "health.quarantine", "expected at least 1s")?;
        let most = "expected at least `health.quarantine`";
        require(self.quarantine_most >= self.quarantine, "health.quarantine_most", most)?;
        require(self.probation >= second, "health.probation", "expected at least 1s")
    }
}

/// When a group counts as congested.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CongestionConfig {
    /// Longest time that what a group has queued may take to prefill. 0 = its target for the time to the first token.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub wait: Duration,
    /// How long it must take longer before congestion is raised, and less than half of that before it is cleared.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub after: Duration,
}

impl Default for CongestionConfig {
    fn default() -> Self {
        Self { wait: Duration::ZERO, after: Duration::from_secs(10) }
    }
}

fn require(holds: bool, key: &str, expected: &str) -> Result<(), Invalid> {
    if holds { Ok(()) } else { Err(Invalid::new(key, expected)) }
}

impl ServiceConfig for ControllerConfig {
    const EXAMPLE: &'static str = r#"listen = "*:7100"
advertise_host = "10.0.0.5"
metrics_listen = "*:7101"

[store]
kind = "etcd"
etcd.endpoints = ["10.0.0.2:2379", "10.0.0.3:2379", "10.0.0.4:2379"]

[roles]
prefill = 1
decode = 3
"#;

    fn process(&self) -> &ProcessConfig {
        &self.process
    }

    fn validate(&self) -> Result<(), Invalid> {
        let (sessions, roles) = (&self.sessions, &self.roles);
        require(roles.prefill > 0, "roles.prefill", "expected at least 1")?;
        require(roles.decode > 0, "roles.decode", "expected at least 1")?;
        require(roles.moves_most > 0, "roles.moves_most", "expected at least 1")?;
        let period = roles.moves_period >= Duration::from_secs(1);
        require(period, "roles.moves_period", "expected at least 1s")?;
        for (key, time) in [
            ("roles.auto.ttft", roles.auto.ttft),
            ("roles.auto.tpot", roles.auto.tpot),
            ("roles.auto.every", roles.auto.every),
        ] {
            require(time >= Duration::from_millis(1), key, "expected at least 1ms")?;
        }
        require(sessions.max_instances > 0, "sessions.max_instances", "expected at least 1")?;
        require(sessions.beat >= Duration::from_millis(10), "sessions.beat", "expected at least 10ms")?;
        let lease = "expected at least twice `sessions.beat`, so that one late report ends no registration";
        require(sessions.lease >= sessions.beat * 2, "sessions.lease", lease)?;
        self.health.validate()?;
        self.kubernetes.validate()?;
        self.tls.validate()?;
        require(self.leader.ttl >= Duration::from_secs(2), "leader.ttl", "expected at least 2s")?;
        let records = "expected at least `leader.ttl`, so that the next leader finds what this one knew";
        require(self.leader.records_ttl >= self.leader.ttl, "leader.records_ttl", records)?;
        let etcd = &self.store.etcd;
        let named = self.store.kind == StoreKind::Embedded || !etcd.endpoints.is_empty();
        require(named, "store.etcd.endpoints", "expected host:port of at least one etcd member")?;
        etcd.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_meant_of_health_is_refused_by_its_key() {
        type Change = fn(&mut HealthConfig);
        let cases: [(&str, Change); 8] = [
            ("health.wedge", |health| health.wedge = Duration::from_millis(999)),
            ("health.error_share", |health| health.error_share = 0.0),
            ("health.error_share", |health| health.error_share = 1.0),
            ("health.error_share", |health| health.error_share = f64::NAN),
            ("health.slow_factor", |health| health.slow_factor = 1.0),
            ("health.quarantine", |health| health.quarantine = Duration::ZERO),
            ("health.quarantine_most", |health| health.quarantine_most = Duration::from_secs(29)),
            ("health.probation", |health| health.probation = Duration::ZERO),
        ];
        assert!(ControllerConfig::default().validate().is_ok());
        for (key, change) in cases {
            let mut config = ControllerConfig::default();
            change(&mut config.health);
            assert_eq!(config.validate().expect_err("it is refused").key, key);
        }
    }
}
