//! How many answers a request wants.

use baton_proto::{ApiError, ErrorCode};

use super::{
    invalid,
    openai::{Integer, Request},
};

/// One, so far.
pub(super) fn check(request: &Request) -> Result<(), ApiError> {
    match request.n {
        None | Some(Integer(1)) => {}
        Some(Integer(n)) if n < 1 => return Err(invalid("n", &format!("must be at least 1, got {n}"))),
        Some(Integer(_)) => {
            let message = "n: only 1 choice per request is served; send one request per choice";
            return Err(ApiError::new(ErrorCode::Unsupported, message).param("n"));
        }
    }
    match request.best_of {
        None | Some(Integer(1)) => Ok(()),
        Some(Integer(best_of)) => {
            let message = format!("best_of: must be `n`, as no choice is left out, got {best_of}");
            Err(ApiError::new(ErrorCode::Unsupported, message).param("best_of"))
        }
    }
}
