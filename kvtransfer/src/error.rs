//! Why a transfer did not happen, and how a peer is told.
//!
//! Every refusal and every abort carries one [`TransferError`]; at the boundary it becomes a [`baton_proto::ApiError`],
//! and [`TransferError::code`] is also the label under which aborts are counted.

use std::time::Duration;

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, PromptDigest, TransferId};

/// Why a transfer was refused or aborted, or a node did not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("invalid transfer: {0}")]
    Invalid(String),
    #[error(
        "KV layouts differ: {field} is {ours} here and {theirs} at the peer; both must run the same model, in layouts that are equal or can be mapped"
    )]
    LayoutMismatch { field: &'static str, ours: String, theirs: String },
    #[error("a KV cache with {field} {from} cannot be mapped to one with {field} {to}: {why}")]
    CannotReshard { field: &'static str, from: String, to: String, why: &'static str },
    #[error("transfer {0} exists already or has ended; use a fresh transfer id for each attempt")]
    AlreadyExists(TransferId),
    #[error("no more than {limit} {what} at a time; try again once one has ended")]
    Limit { what: &'static str, limit: usize },
    #[error("instance {instance} was expected as incarnation {expected} and is {found}; it has restarted")]
    StalePeer { instance: InstanceId, expected: Incarnation, found: Incarnation },
    #[error("transfer belongs to instance {expected}, not to {found}")]
    WrongPeer { expected: InstanceId, found: InstanceId },
    #[error("the prompts differ: the cache of {expected} was expected, that of {found} is offered")]
    OtherPrompt { expected: PromptDigest, found: PromptDigest },
    #[error("cannot reach the peer's handoff service at {endpoint}: {reason}")]
    Unreachable { endpoint: String, reason: String },
    #[error("the peer refused the control stream: {0}")]
    PeerRefused(ApiError),
    #[error(
        "the peer does not show that it belongs to this fleet: give both the same handoff secret, or neither one"
    )]
    Unauthenticated,
    #[error("the control stream to the peer broke: {0}")]
    LinkLost(String),
    #[error("no sign of life from the peer for {} ms", .silent.as_millis())]
    LeaseExpired { silent: Duration },
    #[error("deadline passed while {waiting_for}")]
    DeadlineExceeded { waiting_for: &'static str },
    #[error("cancelled here: {0}")]
    Cancelled(String),
    #[error("not needed: {0}")]
    NotNeeded(String),
    #[error("refused here: {0}")]
    Refused(ApiError),
    #[error("aborted by the peer: {0}")]
    PeerAborted(ApiError),
    #[error("the data connection failed: {0}")]
    DataPath(String),
    #[error("block {block} of layer {layer} arrived damaged: its checksum does not match")]
    Damaged { layer: u32, block: u32 },
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    #[error("the seal does not match what arrived: {what} is {expected} in the seal and {found} here")]
    SealMismatch { what: &'static str, expected: u64, found: u64 },
    #[error("this node is shutting down")]
    ShuttingDown,
    #[error("cannot {what}: {reason}")]
    Io { what: &'static str, reason: String },
}

impl TransferError {
    /// The code peers and clients are told, and the label under which aborts are counted.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Invalid(_) | Self::WrongPeer { .. } => ErrorCode::InvalidArgument,
            Self::LayoutMismatch { .. } | Self::CannotReshard { .. } => ErrorCode::Unsupported,
            Self::AlreadyExists(_) => ErrorCode::AlreadyExists,
            Self::Limit { .. } => ErrorCode::QueueFull,
            Self::StalePeer { .. } => ErrorCode::StaleEpoch,
            Self::Unreachable { .. } | Self::LinkLost(_) | Self::LeaseExpired { .. } => {
                ErrorCode::InstanceLost
            }
            Self::PeerRefused(error) | Self::PeerAborted(error) | Self::Refused(error) => error.code,
            Self::DeadlineExceeded { .. } => ErrorCode::DeadlineExceeded,
            Self::Cancelled(_) => ErrorCode::Cancelled,
            Self::NotNeeded(_) => ErrorCode::NotNeeded,
            Self::OtherPrompt { .. }
            | Self::Unauthenticated
            | Self::DataPath(_)
            | Self::Protocol(_)
            | Self::SealMismatch { .. } => ErrorCode::HandoffFailed,
            Self::Damaged { .. } => ErrorCode::KvDamaged,
            Self::ShuttingDown => ErrorCode::Unavailable,
            Self::Io { .. } => ErrorCode::Internal,
        }
    }
}

impl From<TransferError> for ApiError {
    fn from(error: TransferError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl From<&TransferError> for ApiError {
    fn from(error: &TransferError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
