//! The one table: error code, gRPC status, HTTP status, OpenAI `type` and `code`.
//!
//! A service's own errors become an [`ApiError`] where they leave it, and nowhere else are statuses chosen.

use std::time::Duration;

use tonic::{Code, Status};

use crate::v1;

/// What kind of failure, as peers and clients are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    InvalidArgument,
    ModelNotFound,
    ContextLengthExceeded,
    PayloadTooLarge,
    QueueFull,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    InstanceLost,
    HandoffFailed,
    StaleEpoch,
    KvExhausted,
    Internal,
    NotFound,
    AlreadyExists,
    Unsupported,
    NotNeeded,
    MethodNotAllowed,
    KvDamaged,
    RequestTimeout,
    InvalidApiKey,
    RateLimited,
    UnsupportedMediaType,
}

struct Row {
    code: ErrorCode,
    wire: v1::ErrorCode,
    grpc: Code,
    http: u16,
    openai_type: &'static str,
    openai_code: &'static str,
}

macro_rules! table {
    ($($code:ident, $grpc:ident, $http:literal, $kind:literal, $name:literal;)*) => {
        &[$(Row {
            code: ErrorCode::$code,
            wire: v1::ErrorCode::$code,
            grpc: Code::$grpc,
            http: $http,
            openai_type: $kind,
            openai_code: $name,
        }),*]
    };
}

#[rustfmt::skip]
const TABLE: &[Row] = table! {
    InvalidArgument,       InvalidArgument,    400, "invalid_request_error", "invalid_value";
    ModelNotFound,         NotFound,           404, "invalid_request_error", "model_not_found";
    ContextLengthExceeded, InvalidArgument,    400, "invalid_request_error", "context_length_exceeded";
    PayloadTooLarge,       ResourceExhausted,  413, "invalid_request_error", "payload_too_large";
    QueueFull,             ResourceExhausted,  429, "rate_limit_error",      "queue_full";
    Unavailable,           Unavailable,        503, "server_error",          "unavailable";
    DeadlineExceeded,      DeadlineExceeded,   504, "server_error",          "deadline_exceeded";
    Cancelled,             Cancelled,          499, "server_error",          "cancelled";
    InstanceLost,          Unavailable,        502, "server_error",          "instance_lost";
    HandoffFailed,         Aborted,            502, "server_error",          "handoff_failed";
    StaleEpoch,            FailedPrecondition, 503, "server_error",          "stale_epoch";
    KvExhausted,           ResourceExhausted,  503, "server_error",          "kv_exhausted";
    Internal,              Internal,           500, "server_error",          "internal_error";
    NotFound,              NotFound,           404, "invalid_request_error", "not_found";
    AlreadyExists,         AlreadyExists,      409, "invalid_request_error", "already_exists";
    Unsupported,           Unimplemented,      400, "invalid_request_error", "unsupported";
    NotNeeded,             Cancelled,          499, "server_error",          "not_needed";
    MethodNotAllowed,      Unimplemented,      405, "invalid_request_error", "method_not_allowed";
    KvDamaged,             Aborted,            502, "server_error",          "kv_damaged";
    RequestTimeout,        DeadlineExceeded,   408, "invalid_request_error", "request_timeout";
    InvalidApiKey,         Unauthenticated,    401, "invalid_request_error", "invalid_api_key";
    RateLimited,           ResourceExhausted,  429, "rate_limit_error",      "rate_limit_exceeded";
    UnsupportedMediaType,  Unimplemented,      415, "invalid_request_error", "unsupported_media_type";
};

impl ErrorCode {
    fn row(self) -> &'static Row {
        TABLE.iter().find(|row| row.code == self).unwrap_or(&TABLE[12])
    }

    /// The HTTP status a client gets.
    pub fn http(self) -> u16 {
        self.row().http
    }

    pub fn grpc(self) -> Code {
        self.row().grpc
    }

    /// The `type` of an OpenAI error body.
    pub fn openai_type(self) -> &'static str {
        self.row().openai_type
    }

    /// The `code` of an OpenAI error body; also the name in logs and metric labels.
    pub fn name(self) -> &'static str {
        self.row().openai_code
    }

    pub fn to_wire(self) -> v1::ErrorCode {
        self.row().wire
    }

    /// A code this build does not know counts as internal.
    pub fn from_wire(wire: v1::ErrorCode) -> Self {
        TABLE.iter().find(|row| row.wire == wire).map_or(Self::Internal, |row| row.code)
    }
}

/// An error as it crosses a boundary: a code, a message that says what to do, and the request field at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub code: ErrorCode,
    pub message: String,
    pub param: Option<String>,
    /// When another try may do, if that is known. It does not cross the wire: whoever answers the client knows it.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// Messages repeat what was sent, which may be all of a body; over HTTP/2 they are headers, whose size is bounded. What
    /// is longer is cut.
    pub const MESSAGE_BYTES_MOST: usize = 2048;

    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: short(message.into()), param: None, retry_after: None }
    }

    /// Says when another try may do.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Names the request field at fault.
    pub fn param(mut self, field: impl Into<String>) -> Self {
        self.param = Some(short(field.into()));
        self
    }
}

/// At most [`ApiError::MESSAGE_BYTES_MOST`] of it, whole characters, and a sign where it was cut.
fn short(mut text: String) -> String {
    const CUT: &str = "...";
    if text.len() > ApiError::MESSAGE_BYTES_MOST {
        let fits = (0..=ApiError::MESSAGE_BYTES_MOST - CUT.len()).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(fits.unwrap_or(0));
        text.push_str(CUT);
    }
    text
}

impl From<ApiError> for v1::ErrorDetail {
    fn from(error: ApiError) -> Self {
        Self {
            code: error.code.to_wire().into(),
            message: error.message,
            param: error.param.unwrap_or_default(),
        }
    }
}

impl From<v1::ErrorDetail> for ApiError {
    fn from(detail: v1::ErrorDetail) -> Self {
        Self {
            code: ErrorCode::from_wire(detail.code()),
            param: (!detail.param.is_empty()).then_some(short(detail.param)),
            message: short(detail.message),
            retry_after: None,
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        Status::new(error.code.grpc(), error.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wire_code_has_exactly_one_row() {
        for number in 1.. {
            let Ok(wire) = v1::ErrorCode::try_from(number) else {
                assert_eq!(TABLE.len() as i32, number - 1);
                break;
            };
            let rows = TABLE.iter().filter(|row| row.wire == wire).count();
            assert_eq!(rows, 1, "{wire:?}");
            assert_eq!(ErrorCode::from_wire(wire).to_wire(), wire);
        }
        assert_eq!(TABLE[12].code, ErrorCode::Internal);
    }

    #[test]
    fn what_repeats_too_much_of_what_was_sent_is_cut() {
        let long = "é".repeat(5000);
        let error = ApiError::new(ErrorCode::InvalidArgument, long.clone()).param(long.clone());
        let detail = v1::ErrorDetail { message: long.clone(), param: long, ..Default::default() };
        for text in [error.message, error.param.expect("is named"), ApiError::from(detail).message] {
            assert!(text.len() <= ApiError::MESSAGE_BYTES_MOST && text.ends_with("é..."), "{text}");
        }
        let fits = "x".repeat(ApiError::MESSAGE_BYTES_MOST);
        assert_eq!(ApiError::new(ErrorCode::Internal, fits.clone()).message, fits);
    }

    #[test]
    fn detail_round_trips() {
        let error =
            ApiError::new(ErrorCode::InvalidArgument, "temperature must be 0 to 2").param("temperature");
        assert_eq!(ApiError::from(v1::ErrorDetail::from(error.clone())), error);
    }
}
