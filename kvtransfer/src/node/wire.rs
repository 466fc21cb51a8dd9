//! What control messages and statuses carry, as both ends of a control stream write and read it.

use baton_proto::{ApiError, ErrorCode, Protocols, TransferId, v1};
use prost::Message as _;
use tonic::Status;

use crate::TransferError;

/// Versions of the form that control messages, hellos and frames have. A change that an earlier build would not understand is a
/// new one, and the one before it is spoken on for as long as such builds run.
pub const HANDOFF_PROTOCOLS: Protocols =
    if cfg!(feature = "next-protocol") { Protocols::between(2, 2) } else { Protocols::FIRST };

/// The version to speak with a sender that says which it does.
///
/// # Errors
/// `OtherProtocol`: it speaks none that is spoken here; `Protocol`: what it says makes no sense.
pub(super) fn agree(oldest: u32, newest: u32) -> Result<u32, TransferError> {
    let theirs =
        Protocols::from_wire(oldest, newest).map_err(|error| TransferError::Protocol(error.to_string()))?;
    match HANDOFF_PROTOCOLS.common(theirs) {
        Some(common) => Ok(common.newest()),
        None => Err(other(theirs)),
    }
}

/// # Errors
/// `OtherProtocol`: the receiver has chosen a version that is not spoken here.
pub(super) fn check_agreed(version: u32) -> Result<(), TransferError> {
    // Builds that know of the first only do not say it.
    let version = version.max(1);
    let spoken = HANDOFF_PROTOCOLS.contains(version);
    spoken.then_some(()).ok_or_else(|| other(Protocols::between(version, version)))
}

fn other(theirs: Protocols) -> TransferError {
    TransferError::OtherProtocol(format!(
        "the peer speaks {theirs} of the handoff protocol, this node {HANDOFF_PROTOCOLS}; run builds that have one in common"
    ))
}

/// A transfer id as a message carries it; none in hellos.
pub(super) fn wire_id(id: Option<TransferId>) -> bytes::Bytes {
    id.map_or_else(bytes::Bytes::new, |id| bytes::Bytes::copy_from_slice(id.as_bytes()))
}

/// A status that carries the whole error in its details.
pub(super) fn to_status(error: &TransferError) -> Status {
    let error = ApiError::from(error);
    let (code, message) = (error.code.grpc(), error.message.clone());
    Status::with_details(code, message, v1::ErrorDetail::from(error).encode_to_vec().into())
}

/// The error that [`to_status`] put in, or the nearest one for statuses of other origin.
pub(super) fn from_status(status: &Status) -> ApiError {
    if let Ok(detail) = v1::ErrorDetail::decode(status.details())
        && !status.details().is_empty()
    {
        return ApiError::from(detail);
    }
    let code = match status.code() {
        tonic::Code::Unimplemented => ErrorCode::Unsupported,
        tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition => ErrorCode::HandoffFailed,
        _ => ErrorCode::Unavailable,
    };
    ApiError::new(code, status.message())
}
