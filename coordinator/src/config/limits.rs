//! How much clients may ask for, and how long things may take.

use std::time::Duration;

use baton_process::duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::CHOICES_MOST;

/// What one client, and all of a model's together, may ask for.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Largest request body.
    #[schemars(range(min = 1))]
    pub max_body_bytes: usize,
    /// Memory for the bodies of all requests together, from arrival until they are tokenised, beyond the 16 KiB that each
    /// request may take in any case; what does not fit is refused with 429. A tenant of API keys that holds some of it already is
    /// given more for another only up to eight times what others are left. At least `max_body_bytes`.
    pub max_held_body_bytes: usize,
    /// Memory for what is kept of the prompts of all requests together, from when they are tokenised until they are answered: 4
    /// bytes for each token, 8 for each KV block by each way in which instances name them, the text with `echo` once, and for
    /// each choice once more and as long as JSON has it, 8 bytes for each entry of `logit_bias`, and 3 bytes for each of a
    /// stop string and the longest twice for each choice; and for log probabilities until they are written, as many as are
    /// asked for (of a chat without `max_tokens` that is the context's rest): 96 bytes for each token of the answers, and 8
    /// for each alternative, and unless they are streamed 100 more for each of both; beyond 16 KiB of each request. What does
    /// not fit is refused with 429; of API keys those of the band `standard` leave an eighth to others, those of `batch` a
    /// quarter, and tenants share it as they do `max_held_body_bytes`.
    /// Whole answers longer than that are counted, too, until their clients have read them. At least eight times
    /// `max_body_bytes`.
    pub max_held_prompt_bytes: usize,
    /// How long a body may take to arrive before its request is refused with 408. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub body_timeout: Duration,
    /// Connections of clients at once. Of more, each has the place of a [stranger's](../../README.md#security), by which no
    /// request has been let in yet, or waits to be taken. Fewer where the process may not open 1,024 files beside them
    /// (half of what it may open, if that is more).
    #[schemars(range(min = 1))]
    pub max_connections: usize,
    /// Requests of a model served at once; more wait, and hold up no other model's.
    #[schemars(range(min = 1))]
    pub max_concurrent: usize,
    /// Requests of a model that wait at once; of more, one is refused with 429: the last that came, or one that gives way to it.
    pub max_queued: usize,
    /// How long a request waits, for a core to prepare it, or for a seat and an instance with room, before it is refused
    /// with 429; at once if those before it are predicted to take longer.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub queue_timeout: Duration,
    /// How long a request waits for an instance that can take it, while one restarts, say, before it is refused with
    /// 503.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub placement_timeout: Duration,
    /// From arrival to the last token. More than 0s.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub request_timeout: Duration,
    /// A streamed answer that has had nothing to tell for so long is sent a comment, which clients pass over, so that no proxy
    /// takes the connection for dead. 0s = none is.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub stream_comment_after: Duration,
    /// How long clients are still let in once the process was asked to stop, and is not ready any more: until whoever sends
    /// them here has noticed. It is a part of `process.shutdown.drain`.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub linger: Duration,
    /// Most tokens of one answer; also what is taken of a chat that does not say. 0 = the context's rest.
    pub max_completion_tokens: u32,
    /// Most answers one request may ask for, `n` times its prompts.
    #[schemars(range(min = 1, max = CHOICES_MOST))]
    pub max_choices: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_held_body_bytes: 256 << 20,
            max_held_prompt_bytes: 2 << 30,
            body_timeout: Duration::from_secs(60),
            max_connections: 16_384,
            max_concurrent: 10_240,
            max_queued: 1024,
            queue_timeout: Duration::from_secs(30),
            placement_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(600),
            stream_comment_after: Duration::from_secs(15),
            linger: Duration::from_secs(5),
            max_completion_tokens: 0,
            max_choices: 32,
        }
    }
}
