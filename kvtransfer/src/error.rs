//! Why a transfer did not happen, and how a peer is told.
//!
//! Every refusal and every abort carries one [`TransferError`]; at the boundary it becomes a [`baton_proto::ApiError`],
//! and [`TransferError::code`] is also the label under which aborts are counted.

use std::time::Duration;

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, PromptDigest, TransferId};

/// Why a transfer was refused or aborted, or a node did not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// What was asked of this node makes no sense; the text names the field.
    #[error("invalid transfer: {0}")]
    Invalid(String),
    /// The peer runs another model, or lays its cache out in a way that cannot be mapped.
    #[error(
        "KV layouts differ: {field} is {ours} here and {theirs} at the peer; both must run the same model, in layouts that are equal or can be mapped"
    )]
    LayoutMismatch { field: &'static str, ours: String, theirs: String },
    /// The layouts could be mapped, but not here.
    #[error("a KV cache with {field} {from} cannot be mapped to one with {field} {to}: {why}")]
    CannotReshard { field: &'static str, from: String, to: String, why: &'static str },
    /// Ids are used once.
    #[error("transfer {0} exists already or has ended; use a fresh transfer id for each attempt")]
    AlreadyExists(TransferId),
    /// A bound of [`Limits`](crate::Limits) is reached.
    #[error("no more than {limit} {what} at a time; try again once one has ended")]
    Limit { what: &'static str, limit: usize },
    /// A message or a stream of another start of the peer than the one meant.
    #[error("instance {instance} was expected as incarnation {expected} and is {found}; it has restarted")]
    StalePeer { instance: InstanceId, expected: Incarnation, found: Incarnation },
    /// Another instance than the one meant.
    #[error("transfer belongs to instance {expected}, not to {found}")]
    WrongPeer { expected: InstanceId, found: InstanceId },
    /// Both sides mean the same transfer, and not the same prompt.
    #[error("the prompts differ: the cache of {expected} was expected, that of {found} is offered")]
    OtherPrompt { expected: PromptDigest, found: PromptDigest },
    /// No control stream could be opened, however often it was tried.
    #[error("cannot reach the peer's handoff service at {endpoint}: {reason}")]
    Unreachable { endpoint: String, reason: String },
    /// The peer wants no stream from this node.
    #[error("the peer refused the control stream: {0}")]
    PeerRefused(ApiError),
    /// The peer knows another secret, or none.
    #[error(
        "the peer does not show that it belongs to this fleet: give both the same handoff secret, or neither one"
    )]
    Unauthenticated,
    /// What rested on a control stream ends with it.
    #[error("the control stream to the peer broke: {0}")]
    LinkLost(String),
    /// The peer was silent for its lease.
    #[error("no sign of life from the peer for {} ms", .silent.as_millis())]
    LeaseExpired { silent: Duration },
    /// The transfer's own deadline, or that of a hello.
    #[error("deadline passed while {waiting_for}")]
    DeadlineExceeded { waiting_for: &'static str },
    /// By the handle's owner.
    #[error("cancelled here: {0}")]
    Cancelled(String),
    /// The sequence had its end before the cache was needed.
    #[error("not needed: {0}")]
    NotNeeded(String),
    /// By [`KvNode::refuse`](crate::KvNode::refuse).
    #[error("refused here: {0}")]
    Refused(ApiError),
    /// With the peer's reason.
    #[error("aborted by the peer: {0}")]
    PeerAborted(ApiError),
    /// Slices that were on a connection when it broke may or may not have arrived.
    #[error("the data connection failed: {0}")]
    DataPath(String),
    /// A slice came other than it was sent: its prompt's blocks are not to be trusted.
    #[error("block {block} of layer {layer} arrived damaged: its checksum does not match")]
    Damaged { layer: u32, block: u32 },
    /// The peer's build speaks another version of the protocol.
    #[error("{0}")]
    OtherProtocol(String),
    /// The peer said what it may not say; the text says what.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// Counts or checksums of the seal differ from what arrived.
    #[error("the seal does not match what arrived: {what} is {expected} in the seal and {found} here")]
    SealMismatch { what: &'static str, expected: u64, found: u64 },
    /// Nothing new is taken.
    #[error("this node is shutting down")]
    ShuttingDown,
    /// The system refused something that a node needs.
    #[error("cannot {what}: {reason}")]
    Io { what: &'static str, reason: String },
}

impl TransferError {
    /// The code peers and clients are told, and the label under which aborts are counted. What one node asks of another is no
    /// client's doing, and so never an invalid argument, unless it is what a peer refused its part of the request for.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::LayoutMismatch { .. } | Self::CannotReshard { .. } | Self::OtherProtocol(_) => {
                ErrorCode::Unsupported
            }
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
            Self::Invalid(_)
            | Self::WrongPeer { .. }
            | Self::OtherPrompt { .. }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_to_blame_for_no_transfer_but_one_that_its_request_ended() {
        let instance = |id: &str| InstanceId::new(id).expect("a good id");
        let own = [
            TransferError::Invalid("the transfer has no offer".into()),
            TransferError::WrongPeer { expected: instance("p"), found: instance("q") },
        ];
        for error in own {
            assert_eq!(error.code(), ErrorCode::HandoffFailed, "{error}");
        }
        let asked = ApiError::new(ErrorCode::InvalidArgument, "n is 300, must be at most 256");
        for error in [TransferError::PeerAborted(asked.clone()), TransferError::Refused(asked)] {
            assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
        }
    }
}
