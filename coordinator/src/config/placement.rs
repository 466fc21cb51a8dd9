//! What requests are placed by, as it is configured.

use std::time::Duration;

use baton_process::{Invalid, duration};
use baton_schedule::{Policy, Settings, Targets};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Less would be of no use.
const INDEX_BYTES_LEAST: usize = 1 << 20;
/// More would tell nothing of most prompts.
const INDEX_EVERY_TOKENS_MOST: u32 = 4096;

/// What requests are placed by.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementConfig {
    /// How an instance is chosen.
    pub policy: PolicyName,
    /// With `predicted`: 0 takes the cheapest; above, others are taken as well, by chance, and one that costs this share
    /// more than the cheapest about 0.37 times as often.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub temperature: f64,
    /// A decode instance computes a prompt itself (conditional disaggregation) if it has cached all but so many tokens of it at
    /// most, that is predicted to cost less than to hand its cache over, and its steps are not predicted to take longer than
    /// `tpot_target`; one that is longer only where prefill is predicted to be late with it for what is queued, or failed it. 0 = never.
    pub local_prefill_tokens: u32,
    /// How long it takes until an instance that has just begun to take requests gets as many as others.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub warm_up: Duration,
    /// Until the first token: what is predicted to take longer than this and `ttft_target_per_1k_tokens` costs more.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub ttft_target: Duration,
    /// The same for each 1,024 tokens of the prompt.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub ttft_target_per_1k_tokens: Duration,
    /// From one token to the next: what is predicted to take longer costs more. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub tpot_target: Duration,
    /// Requests wait in the line of their model while every instance would be longer than this until it computed their
    /// prompt, had KV blocks for their answer, or a place for it among those that it decodes; those that are with instances are
    /// not put in order of tenants any more. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub room: Duration,
    /// Most memory for which instances have which KV blocks cached, at 48 bytes a block. Over it a part of the blocks is
    /// forgotten, so that of each prompt less is known.
    #[schemars(range(min = INDEX_BYTES_LEAST))]
    pub index_bytes: usize,
    /// Instances tell of one cached block for about so many tokens, and what is known of a prompt is rounded down to the last
    /// of them: the more, the less processor time a long prompt takes. 0 = every block.
    #[schemars(range(max = INDEX_EVERY_TOKENS_MOST))]
    pub index_every_tokens: u32,
}

/// A rule by which instances are chosen, as it is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PolicyName {
    /// The least time lost, to the request and to others.
    #[default]
    Predicted,
    /// Of two that are drawn the one with fewer sequences.
    PowerOfTwo,
    /// The fewest sequences.
    LeastLoad,
    /// Each in its turn.
    RoundRobin,
}

impl Default for PlacementConfig {
    fn default() -> Self {
        let Settings {
            policy: _,
            temperature,
            local_prefill_tokens,
            warm_up,
            targets,
            room,
            seed: _,
            index_bytes,
            index_every_tokens,
        } = Settings::DEFAULT;
        Self {
            policy: PolicyName::default(),
            temperature,
            local_prefill_tokens,
            warm_up,
            ttft_target: targets.ttft,
            ttft_target_per_1k_tokens: targets.ttft_per_1k_tokens,
            tpot_target: targets.tpot,
            room,
            index_bytes,
            index_every_tokens,
        }
    }
}

impl PlacementConfig {
    /// `seed`: see [`Settings::seed`].
    pub fn settings(&self, seed: u32) -> Settings {
        Settings {
            policy: match self.policy {
                PolicyName::Predicted => Policy::Predicted,
                PolicyName::PowerOfTwo => Policy::PowerOfTwo,
                PolicyName::LeastLoad => Policy::LeastLoad,
                PolicyName::RoundRobin => Policy::RoundRobin,
            },
            temperature: self.temperature,
            local_prefill_tokens: self.local_prefill_tokens,
            warm_up: self.warm_up,
            targets: Targets {
                ttft: self.ttft_target,
                ttft_per_1k_tokens: self.ttft_target_per_1k_tokens,
                tpot: self.tpot_target,
            },
            room: self.room,
            seed,
            index_bytes: self.index_bytes,
            index_every_tokens: self.index_every_tokens,
        }
    }

    pub(super) fn validate(&self) -> Result<(), Invalid> {
        let require = |good: bool, key: &str, expected: &str| {
            if good { Ok(()) } else { Err(Invalid::new(format!("placement.{key}"), expected)) }
        };
        require(self.index_bytes >= INDEX_BYTES_LEAST, "index_bytes", "expected at least 1048576")?;
        let most = INDEX_EVERY_TOKENS_MOST;
        require(self.index_every_tokens <= most, "index_every_tokens", "expected 0 to 4096")?;
        require((0.0..=10.0).contains(&self.temperature), "temperature", "expected 0 to 10")?;
        require(!self.room.is_zero(), "room", "expected more than 0s")?;
        require(!self.tpot_target.is_zero(), "tpot_target", "expected more than 0s")
    }
}
