//! An instance as every service knows it: its role and phase, what it is, how busy it is; and their way to and from the
//! wire. The session, the store's records and the streams of requests all carry these.

use std::collections::BTreeMap;

use crate::{GroupName, IdError, Incarnation, InstanceId, Protocols, v1};

/// A message that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field} has the unknown value {value}")]
    UnknownValue { field: &'static str, value: i32 },
    #[error("{0} is not expected")]
    Unexpected(&'static str),
    #[error("{field} is longer than {most}")]
    TooLong { field: &'static str, most: usize },
    #[error("versions {oldest} to {newest} are none")]
    Versions { oldest: u32, newest: u32 },
    #[error(transparent)]
    Id(#[from] IdError),
}

/// What an instance does for requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Takes no requests: not assigned yet, cordoned, or incompatible.
    #[default]
    None,
    Prefill,
    Decode,
    Mixed,
}

impl Role {
    pub const ALL: [Self; 4] = [Self::None, Self::Prefill, Self::Decode, Self::Mixed];

    /// For logs, labels and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Mixed => "mixed",
        }
    }

    pub fn to_wire(self) -> v1::Role {
        match self {
            Self::None => v1::Role::None,
            Self::Prefill => v1::Role::Prefill,
            Self::Decode => v1::Role::Decode,
            Self::Mixed => v1::Role::Mixed,
        }
    }

    /// "Unspecified", which an instance without a role may send, is none.
    pub fn from_wire(value: i32) -> Result<Self, WireError> {
        match v1::Role::try_from(value) {
            Ok(v1::Role::Unspecified | v1::Role::None) => Ok(Self::None),
            Ok(v1::Role::Prefill) => Ok(Self::Prefill),
            Ok(v1::Role::Decode) => Ok(Self::Decode),
            Ok(v1::Role::Mixed) => Ok(Self::Mixed),
            Err(_) => Err(WireError::UnknownValue { field: "role", value }),
        }
    }
}

/// Where an instance stands with the role it was last assigned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    #[default]
    Loading,
    Waiting,
    Switching,
    Ready,
    Draining,
}

impl Phase {
    pub const ALL: [Self; 5] = [Self::Loading, Self::Waiting, Self::Switching, Self::Ready, Self::Draining];

    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Waiting => "waiting",
            Self::Switching => "switching",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }

    pub fn to_wire(self) -> v1::Phase {
        match self {
            Self::Loading => v1::Phase::Loading,
            Self::Waiting => v1::Phase::Waiting,
            Self::Switching => v1::Phase::Switching,
            Self::Ready => v1::Phase::Ready,
            Self::Draining => v1::Phase::Draining,
        }
    }

    pub fn from_wire(value: i32) -> Result<Self, WireError> {
        match v1::Phase::try_from(value) {
            Ok(v1::Phase::Loading) => Ok(Self::Loading),
            Ok(v1::Phase::Waiting) => Ok(Self::Waiting),
            Ok(v1::Phase::Switching) => Ok(Self::Switching),
            Ok(v1::Phase::Ready) => Ok(Self::Ready),
            Ok(v1::Phase::Draining) => Ok(Self::Draining),
            Ok(v1::Phase::Unspecified) | Err(_) => Err(WireError::UnknownValue { field: "phase", value }),
        }
    }
}

/// The model an instance runs: [the same](Self::is_same) on all that may hand caches to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelIdentity {
    /// What requests to this instance say in `model`: others may call the same model differently.
    pub name: String,
    /// Hex digest that covers configuration and weights.
    pub revision: String,
    pub architecture: String,
    pub vocabulary_size: u32,
}

impl ModelIdentity {
    /// Whether both are one model, whatever they call it; an equivalence.
    pub fn is_same(&self, other: &Self) -> bool {
        let Self { name: _, revision, architecture, vocabulary_size } = self;
        *revision == other.revision
            && *architecture == other.architecture
            && *vocabulary_size == other.vocabulary_size
    }
}

/// How an instance lays its KV cache out; `baton-kvtransfer` gives the meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayoutSpec {
    /// Equal fingerprints can hand caches over as they are.
    pub fingerprint: String,
    /// As said; see [`Self::handover_class`].
    pub class: String,
    pub format: String,
    pub dtype: String,
    pub block_tokens: u32,
    pub layers: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub rope_dim: u32,
    pub tensor_parallel: u32,
    /// Of one block of one layer.
    pub block_bytes: u64,
}

impl KvLayoutSpec {
    /// Equal where caches can be handed over, as they are or mapped on their way: without a change of value, or between
    /// servers that are all set to convert.
    pub fn handover_class(&self) -> &str {
        if self.class.is_empty() { &self.fingerprint } else { &self.class }
    }
}

/// What an instance is; fixed for one incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceSpec {
    pub id: InstanceId,
    pub incarnation: Incarnation,
    /// Prefill and decode are paired within a group.
    pub group: GroupName,
    pub device: String,
    pub device_count: u32,
    pub model: ModelIdentity,
    /// Longest sequence that it takes: no part of what the model is, as it follows from this one's KV pool too.
    pub context_tokens: u32,
    pub kv_layout: KvLayoutSpec,
    /// host:port of its Inference service.
    pub inference_endpoint: String,
    /// host:port of its Handoff service.
    pub handoff_endpoint: String,
    /// host:port of its /metrics; may be empty.
    pub metrics_endpoint: String,
    pub transports: Vec<String>,
    /// Of the protocol by which caches are handed over: those of a pair have one in common.
    pub handoff_protocols: Protocols,
    pub labels: BTreeMap<String, String>,
    /// Of the build.
    pub version: String,
}

/// Pairs of a token and one before it, where `tokens` are computed that end `whole` tokens of a prompt: what attention
/// looks at, as `InstanceLoad` counts it.
pub fn attention_pairs(tokens: u64, whole: u64) -> u64 {
    tokens.saturating_mul(whole.max(tokens).saturating_sub(tokens / 2))
}

/// How busy an instance says it is; counts over all coordinators' requests. 0 for rates not yet measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InstanceLoad {
    pub running_sequences: u32,
    pub waiting_sequences: u32,
    /// Of prompts, still to be computed; those that a prefix cache holds are not among them.
    pub queued_prefill_tokens: u64,
    pub kv_blocks_total: u32,
    pub kv_blocks_free: u32,
    pub prefill_tokens_per_second: u64,
    pub decode_step_micros: u64,
    pub outgoing_transfers: u32,
    pub incoming_transfers: u32,
    /// Prompts computed to their end; this and what follows since the process started.
    pub prefilled_requests: u64,
    /// Tokens of prompts computed; those that a prefix cache held are not among them.
    pub prefilled_tokens: u64,
    /// Tokens of completions; each request's first is not among them.
    pub decoded_tokens: u64,
    /// Steps that decoded.
    pub decode_steps: u64,
    /// Completions that came to their end.
    pub finished_requests: u64,
    /// Tokens of these completions.
    pub finished_tokens: u64,
    /// Most sequences that it decodes at a time; no count, unlike those before and after it.
    pub max_sequences: u32,
    /// Ended by a fault of this instance, not of the client or of a peer.
    pub failed_requests: u64,
    /// KV caches handed on whole, and received whole.
    pub finished_transfers_out: u64,
    pub finished_transfers_in: u64,
    /// KV caches that were not handed on, or received, whole, though nobody cancelled them.
    pub failed_transfers_out: u64,
    pub failed_transfers_in: u64,
    /// Layers and steps computed: stands still only while nothing is computed.
    pub progress: u64,
    /// Taken on to be prefilled here.
    pub accepted_requests: u64,
    /// Tokens of their prompts; those that a prefix cache holds are among them.
    pub accepted_prompt_tokens: u64,
    /// Completions that they ask for.
    pub accepted_choices: u64,
    /// How long the steps took that only decoded and of which nothing failed; this and what follows 0 if not said.
    pub decode_micros: u64,
    /// How many they were.
    pub timed_decode_steps: u64,
    /// Sequences in these steps, summed over them.
    pub decode_sequences: u64,
}

fn present(value: String, field: &'static str) -> Result<String, WireError> {
    if value.is_empty() { Err(WireError::Missing(field)) } else { Ok(value) }
}

impl TryFrom<v1::ModelIdentity> for ModelIdentity {
    type Error = WireError;
    fn try_from(wire: v1::ModelIdentity) -> Result<Self, WireError> {
        Ok(Self {
            name: present(wire.name, "model.name")?,
            revision: wire.revision,
            architecture: wire.architecture,
            vocabulary_size: wire.vocabulary_size,
        })
    }
}

impl From<v1::KvLayout> for KvLayoutSpec {
    fn from(wire: v1::KvLayout) -> Self {
        Self {
            fingerprint: wire.fingerprint,
            class: wire.handover_class,
            format: wire.format,
            dtype: wire.dtype,
            block_tokens: wire.block_tokens,
            layers: wire.layers,
            kv_heads: wire.kv_heads,
            head_dim: wire.head_dim,
            rope_dim: wire.rope_dim,
            tensor_parallel: wire.tensor_parallel,
            block_bytes: wire.block_bytes,
        }
    }
}

impl From<KvLayoutSpec> for v1::KvLayout {
    fn from(layout: KvLayoutSpec) -> Self {
        Self {
            fingerprint: layout.fingerprint,
            handover_class: layout.class,
            format: layout.format,
            dtype: layout.dtype,
            block_tokens: layout.block_tokens,
            layers: layout.layers,
            kv_heads: layout.kv_heads,
            head_dim: layout.head_dim,
            rope_dim: layout.rope_dim,
            tensor_parallel: layout.tensor_parallel,
            block_bytes: layout.block_bytes,
        }
    }
}

impl TryFrom<v1::InstanceSpec> for InstanceSpec {
    type Error = WireError;
    fn try_from(wire: v1::InstanceSpec) -> Result<Self, WireError> {
        let model = wire.model.ok_or(WireError::Missing("model"))?;
        Ok(Self {
            id: InstanceId::new(wire.instance_id)?,
            incarnation: Incarnation(wire.incarnation),
            group: GroupName::new(wire.group)?,
            device: wire.device,
            device_count: wire.device_count,
            context_tokens: model.context_tokens,
            model: model.try_into()?,
            kv_layout: wire.kv_layout.ok_or(WireError::Missing("kv_layout"))?.into(),
            inference_endpoint: present(wire.inference_endpoint, "inference_endpoint")?,
            handoff_endpoint: present(wire.handoff_endpoint, "handoff_endpoint")?,
            metrics_endpoint: wire.metrics_endpoint,
            transports: wire.transports,
            handoff_protocols: Protocols::from_wire(
                wire.handoff_protocol_oldest,
                wire.handoff_protocol_newest,
            )?,
            labels: wire.labels.into_iter().collect(),
            version: wire.version,
        })
    }
}

impl From<InstanceSpec> for v1::InstanceSpec {
    fn from(spec: InstanceSpec) -> Self {
        Self {
            instance_id: spec.id.into(),
            incarnation: spec.incarnation.0,
            group: spec.group.into(),
            device: spec.device,
            device_count: spec.device_count,
            model: Some(v1::ModelIdentity {
                name: spec.model.name,
                revision: spec.model.revision,
                architecture: spec.model.architecture,
                context_tokens: spec.context_tokens,
                vocabulary_size: spec.model.vocabulary_size,
            }),
            kv_layout: Some(spec.kv_layout.into()),
            inference_endpoint: spec.inference_endpoint,
            handoff_endpoint: spec.handoff_endpoint,
            metrics_endpoint: spec.metrics_endpoint,
            transports: spec.transports,
            handoff_protocol_oldest: spec.handoff_protocols.oldest(),
            handoff_protocol_newest: spec.handoff_protocols.newest(),
            labels: spec.labels.into_iter().collect(),
            version: spec.version,
        }
    }
}

impl From<v1::InstanceLoad> for InstanceLoad {
    fn from(wire: v1::InstanceLoad) -> Self {
        Self {
            running_sequences: wire.running_sequences,
            waiting_sequences: wire.waiting_sequences,
            queued_prefill_tokens: wire.queued_prefill_tokens,
            kv_blocks_total: wire.kv_blocks_total,
            kv_blocks_free: wire.kv_blocks_free,
            prefill_tokens_per_second: wire.prefill_tokens_per_second,
            decode_step_micros: wire.decode_step_micros,
            outgoing_transfers: wire.outgoing_transfers,
            incoming_transfers: wire.incoming_transfers,
            prefilled_requests: wire.prefilled_requests,
            prefilled_tokens: wire.prefilled_tokens,
            decoded_tokens: wire.decoded_tokens,
            decode_steps: wire.decode_steps,
            finished_requests: wire.finished_requests,
            finished_tokens: wire.finished_tokens,
            max_sequences: wire.max_sequences,
            failed_requests: wire.failed_requests,
            finished_transfers_out: wire.finished_transfers_out,
            finished_transfers_in: wire.finished_transfers_in,
            failed_transfers_out: wire.failed_transfers_out,
            failed_transfers_in: wire.failed_transfers_in,
            progress: wire.progress,
            accepted_requests: wire.accepted_requests,
            accepted_prompt_tokens: wire.accepted_prompt_tokens,
            accepted_choices: wire.accepted_choices,
            decode_micros: wire.decode_micros,
            timed_decode_steps: wire.timed_decode_steps,
            decode_sequences: wire.decode_sequences,
        }
    }
}

impl From<InstanceLoad> for v1::InstanceLoad {
    fn from(load: InstanceLoad) -> Self {
        Self {
            running_sequences: load.running_sequences,
            waiting_sequences: load.waiting_sequences,
            queued_prefill_tokens: load.queued_prefill_tokens,
            kv_blocks_total: load.kv_blocks_total,
            kv_blocks_free: load.kv_blocks_free,
            prefill_tokens_per_second: load.prefill_tokens_per_second,
            decode_step_micros: load.decode_step_micros,
            outgoing_transfers: load.outgoing_transfers,
            incoming_transfers: load.incoming_transfers,
            prefilled_requests: load.prefilled_requests,
            prefilled_tokens: load.prefilled_tokens,
            decoded_tokens: load.decoded_tokens,
            decode_steps: load.decode_steps,
            finished_requests: load.finished_requests,
            finished_tokens: load.finished_tokens,
            max_sequences: load.max_sequences,
            failed_requests: load.failed_requests,
            finished_transfers_out: load.finished_transfers_out,
            finished_transfers_in: load.finished_transfers_in,
            failed_transfers_out: load.failed_transfers_out,
            failed_transfers_in: load.failed_transfers_in,
            progress: load.progress,
            accepted_requests: load.accepted_requests,
            accepted_prompt_tokens: load.accepted_prompt_tokens,
            accepted_choices: load.accepted_choices,
            decode_micros: load.decode_micros,
            timed_decode_steps: load.timed_decode_steps,
            decode_sequences: load.decode_sequences,
            // The rest is for coordinators, and they have it from the servers themselves.
            ..Self::default()
        }
    }
}
