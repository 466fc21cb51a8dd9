//! Everything that crosses a process boundary: the protobuf contracts, the newtypes of the ids in them, what every
//! service knows of an instance, of a coordinator and of an API key, the hashes of KV blocks and prompts, how prompts and
//! messages are written, and the one table of error codes.
//!
//! The services talk in [`v1`] types at their edges only: adapters turn them into domain types (`TryFrom`) on the way
//! in and back on the way out. Contracts, a gRPC service each: `Inference`, `Handoff`, `KvCache`, `Control`, `Store`,
//! `FleetAdmin`, `RequestAdmin`; their files are under `protos/baton/v1`.

mod api_key;
mod block_hash;
mod codec;
mod coordinator;
mod error;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
mod ids;
mod instance;
mod intent;
mod prompt_digest;
mod protocols;
mod sieve;
pub mod tokens;

pub use api_key::{API_KEYS_MOST, ApiKey, Band, KeyHash, KeyLimits};
pub use block_hash::BlockHash;
pub use coordinator::{
    CoordinatorBeat, CoordinatorSpec, LINKS_MOST, LinkUse, MODEL_NAME_BYTES_MOST, MODEL_NAMES_MOST,
    MODELS_MOST, ServedModel,
};
pub use error::{ApiError, ErrorCode};
pub use ids::{
    ApiKeyName, CoordinatorId, GroupName, IdError, Incarnation, InstanceId, LeaderEpoch, LegId, RequestId,
    RoleEpoch, TenantName, TransferId,
};
pub use instance::{
    InstanceLoad, InstanceSpec, KvLayoutSpec, ModelIdentity, Phase, Role, WireError, attention_pairs,
};
pub use intent::{Cordoned, Intent, Pinned, RolePolicy, Targets};
pub use prompt_digest::PromptDigest;
pub use protocols::Protocols;
pub use sieve::Sieve;
pub use tokens::Tokens;

/// Types and services generated from `protos/baton/v1/*.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/baton.v1.rs"));
}

/// Metadata of the status with which a controller that does not lead refuses a session: host:port of the one that does.
pub const LEADER_METADATA: &str = "baton-leader";

/// The encoded `FileDescriptorSet` of all contracts, for gRPC server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/baton.v1.fds"));
