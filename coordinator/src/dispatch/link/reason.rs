//! Why the stream to an instance ended, or was not opened.

use baton_process::one_line;
use baton_proto::InstanceId;

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
}
