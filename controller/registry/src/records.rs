//! The values in the store, as domain types, and their way to and from the wire.
//!
//! Records are protobuf, so that writers and readers may differ in version: fields are only ever added. The same
//! types serve the controller's session adapter, as an instance's hello carries the same spec.

use std::collections::BTreeMap;

use baton_proto::{IdError, Incarnation, InstanceId, LeaderEpoch, RoleEpoch, v1};
use bytes::Bytes;
use prost::Message;

/// A record or message that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("not a protobuf record: {0}")]
    Decode(String),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field} has the unknown value {value}")]
    UnknownValue { field: &'static str, value: i32 },
    #[error(transparent)]
    Id(#[from] IdError),
}

/// What an instance does for requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Takes no requests.
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
    pub fn from_wire(value: i32) -> Result<Self, RecordError> {
        match v1::Role::try_from(value) {
            Ok(v1::Role::Unspecified | v1::Role::None) => Ok(Self::None),
            Ok(v1::Role::Prefill) => Ok(Self::Prefill),
            Ok(v1::Role::Decode) => Ok(Self::Decode),
            Ok(v1::Role::Mixed) => Ok(Self::Mixed),
            Err(_) => Err(RecordError::UnknownValue { field: "role", value }),
        }
    }
}

/// Where an instance stands with the role it was last assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
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

    pub fn from_wire(value: i32) -> Result<Self, RecordError> {
        match v1::Phase::try_from(value) {
            Ok(v1::Phase::Loading) => Ok(Self::Loading),
            Ok(v1::Phase::Waiting) => Ok(Self::Waiting),
            Ok(v1::Phase::Switching) => Ok(Self::Switching),
            Ok(v1::Phase::Ready) => Ok(Self::Ready),
            Ok(v1::Phase::Draining) => Ok(Self::Draining),
            Ok(v1::Phase::Unspecified) | Err(_) => Err(RecordError::UnknownValue { field: "phase", value }),
        }
    }
}

/// The model an instance runs. Two instances agree only if all fields are equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelIdentity {
    /// What clients say in `model`.
    pub name: String,
    /// Hex digest that covers configuration and weights.
    pub revision: String,
    pub architecture: String,
    pub context_tokens: u32,
    pub vocabulary_size: u32,
}

/// How an instance lays its KV cache out; `baton-kvtransfer` gives the meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayoutSpec {
    /// Equal fingerprints can hand caches over as they are.
    pub fingerprint: String,
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

/// What an instance is; fixed for one incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceSpec {
    pub id: InstanceId,
    pub incarnation: Incarnation,
    /// Prefill and decode are paired within a group.
    pub group: String,
    pub device: String,
    pub device_count: u32,
    pub model: ModelIdentity,
    pub kv_layout: KvLayoutSpec,
    /// host:port of its Inference service.
    pub inference_endpoint: String,
    /// host:port of its Handoff service.
    pub handoff_endpoint: String,
    /// host:port of its /metrics; may be empty.
    pub metrics_endpoint: String,
    pub transports: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// Of the build.
    pub version: String,
}

/// What the leader wants an instance to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredRole {
    pub role: Role,
    pub epoch: RoleEpoch,
    /// For people: why.
    pub reason: String,
    /// Of the leader that decided.
    pub leader_epoch: LeaderEpoch,
}

/// What an instance last said it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObservedStatus {
    pub incarnation: Incarnation,
    pub role: Role,
    pub role_epoch: RoleEpoch,
    pub phase: Phase,
    /// Of the weights, while the phase is loading.
    pub load_permille: u32,
}

/// The controller that leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderRecord {
    pub controller_id: String,
    /// host:port of its gRPC services.
    pub endpoint: String,
}

fn present(value: String, field: &'static str) -> Result<String, RecordError> {
    if value.is_empty() { Err(RecordError::Missing(field)) } else { Ok(value) }
}

impl TryFrom<v1::ModelIdentity> for ModelIdentity {
    type Error = RecordError;
    fn try_from(wire: v1::ModelIdentity) -> Result<Self, RecordError> {
        Ok(Self {
            name: present(wire.name, "model.name")?,
            revision: wire.revision,
            architecture: wire.architecture,
            context_tokens: wire.context_tokens,
            vocabulary_size: wire.vocabulary_size,
        })
    }
}

impl From<ModelIdentity> for v1::ModelIdentity {
    fn from(model: ModelIdentity) -> Self {
        Self {
            name: model.name,
            revision: model.revision,
            architecture: model.architecture,
            context_tokens: model.context_tokens,
            vocabulary_size: model.vocabulary_size,
        }
    }
}

impl From<v1::KvLayout> for KvLayoutSpec {
    fn from(wire: v1::KvLayout) -> Self {
        Self {
            fingerprint: wire.fingerprint,
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
    type Error = RecordError;
    fn try_from(wire: v1::InstanceSpec) -> Result<Self, RecordError> {
        Ok(Self {
            id: InstanceId::new(wire.instance_id)?,
            incarnation: Incarnation(wire.incarnation),
            group: wire.group,
            device: wire.device,
            device_count: wire.device_count,
            model: wire.model.ok_or(RecordError::Missing("model"))?.try_into()?,
            kv_layout: wire.kv_layout.ok_or(RecordError::Missing("kv_layout"))?.into(),
            inference_endpoint: present(wire.inference_endpoint, "inference_endpoint")?,
            handoff_endpoint: present(wire.handoff_endpoint, "handoff_endpoint")?,
            metrics_endpoint: wire.metrics_endpoint,
            transports: wire.transports,
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
            group: spec.group,
            device: spec.device,
            device_count: spec.device_count,
            model: Some(spec.model.into()),
            kv_layout: Some(spec.kv_layout.into()),
            inference_endpoint: spec.inference_endpoint,
            handoff_endpoint: spec.handoff_endpoint,
            metrics_endpoint: spec.metrics_endpoint,
            transports: spec.transports,
            labels: spec.labels.into_iter().collect(),
            version: spec.version,
        }
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, RecordError> {
    M::decode(bytes).map_err(|error| RecordError::Decode(error.to_string()))
}

impl InstanceSpec {
    /// As it lies under `instances/`.
    pub fn encode(&self) -> Bytes {
        v1::InstanceRecord { spec: Some(self.clone().into()) }.encode_to_vec().into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        decode::<v1::InstanceRecord>(value)?.spec.ok_or(RecordError::Missing("spec"))?.try_into()
    }
}

impl DesiredRole {
    /// As it lies under `roles/`.
    pub fn encode(&self) -> Bytes {
        v1::RoleRecord {
            role: self.role.to_wire().into(),
            epoch: self.epoch.0,
            reason: self.reason.clone(),
            leader_epoch: self.leader_epoch.0,
        }
        .encode_to_vec()
        .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::RoleRecord>(value)?;
        Ok(Self {
            role: Role::from_wire(wire.role)?,
            epoch: RoleEpoch(wire.epoch),
            reason: wire.reason,
            leader_epoch: LeaderEpoch(wire.leader_epoch),
        })
    }
}

impl ObservedStatus {
    /// As it lies under `status/`.
    pub fn encode(&self) -> Bytes {
        v1::StatusRecord {
            incarnation: self.incarnation.0,
            role: self.role.to_wire().into(),
            role_epoch: self.role_epoch.0,
            phase: self.phase.to_wire().into(),
            load_permille: self.load_permille,
        }
        .encode_to_vec()
        .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::StatusRecord>(value)?;
        Ok(Self {
            incarnation: Incarnation(wire.incarnation),
            role: Role::from_wire(wire.role)?,
            role_epoch: RoleEpoch(wire.role_epoch),
            phase: Phase::from_wire(wire.phase)?,
            load_permille: wire.load_permille,
        })
    }
}

impl LeaderRecord {
    /// As it lies under `leader`.
    pub fn encode(&self) -> Bytes {
        v1::LeaderRecord { controller_id: self.controller_id.clone(), endpoint: self.endpoint.clone() }
            .encode_to_vec()
            .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::LeaderRecord>(value)?;
        Ok(Self { controller_id: present(wire.controller_id, "controller_id")?, endpoint: wire.endpoint })
    }
}
