//! What control messages and statuses carry, as both ends of a control stream write and read it.

use baton_proto::{ApiError, ErrorCode, TransferId, v1};
use prost::Message as _;
use tonic::Status;

use crate::TransferError;

/// Which form control messages, hellos and frames have. To be raised with every change that an earlier build would not
/// understand.
pub(super) const PROTOCOL: u32 = 1;

/// # Errors
/// `OtherProtocol`: the peer's build speaks another one.
pub(super) fn check_protocol(theirs: u32) -> Result<(), TransferError> {
    if theirs == PROTOCOL {
        return Ok(());
    }
    let message = format!(
        "the peer speaks version {theirs} of the handoff protocol, this node version {PROTOCOL}; run builds that speak the same"
    );
    Err(TransferError::OtherProtocol(message))
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
        tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition => ErrorCode::InvalidArgument,
        _ => ErrorCode::Unavailable,
    };
    ApiError::new(code, status.message())
}
