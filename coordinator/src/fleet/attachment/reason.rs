//! Why the stream to an instance ended, or was not opened, and what is told of an instance without one.

use baton_process::one_line;
use baton_proto::{ApiError, ErrorCode, InstanceId};

/// Why a stream ended or was not opened; for the log only.
#[derive(Debug, thiserror::Error)]
pub(super) enum BreakReason {
    #[error("cannot connect to {endpoint}: {}", one_line(.source))]
    Connect { endpoint: String, source: tonic::transport::Error },
    #[error("no stream: {}", one_line(.0.as_ref()))]
    Attach(#[from] Box<tonic::Status>),
    #[error("no welcome within the time")]
    NoWelcome,
    #[error("the peer did not greet, or is not {expected}: {got}")]
    WrongPeer { expected: InstanceId, got: String },
    #[error("the instance ended the stream")]
    Ended,
    #[error("the instance reads nothing of what it is sent")]
    Deaf,
    #[error("the instance is not wanted any more")]
    Stopped,
    #[error("the instance was restarted or moved")]
    Moved,
    #[error("what it sent met a bug in the coordinator; the log says where")]
    Bug,
}

/// Nothing can be sent to an instance: it has just left, or been lost.
pub fn not_there(instance: &InstanceId) -> ApiError {
    let message = format!("instance {instance} has just left; try again in a moment");
    ApiError::new(ErrorCode::Unavailable, message)
}
