//! An open connection to a controller or coordinator: it adds who asks to every call, and says what a failed one means.

use baton_process::one_line;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use super::{error::CtlError, output::visible};

/// Adds who asks to every call.
#[derive(Debug, Clone, Default)]
pub(super) struct Bearer(pub(super) Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// An open connection.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) service: &'static str,
    pub(super) address: String,
    pub(super) secure: bool,
    pub(super) token: Token,
    pub(super) channel: InterceptedService<Channel, Bearer>,
}

/// What became of the operator's token on a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    None,
    Shown,
    /// There is one, and nothing says that it is meant for who was reached.
    Withheld,
}

impl Line {
    /// What a failed call means. Only what the other side itself has answered has no source.
    pub(super) fn refused(&self, status: &Status) -> CtlError {
        let (service, address) = (self.service, self.address.clone());
        if let Some(source) = std::error::Error::source(status) {
            return CtlError::Unreachable { service, address, reason: one_line(source) };
        }
        let said = visible(status.message());
        let message = match status.code() {
            Code::Unauthenticated if self.token == Token::Shown => {
                format!(
                    "does not accept the token: {said}; see what --token-file (or BATON_CTL_TOKEN_FILE) holds"
                )
            }
            Code::Unauthenticated if self.token == Token::Withheld => {
                format!(
                    "was not shown the token, as its certificate says no role: {said}; name it with --coordinator if you know it, or say --ca-file FILE"
                )
            }
            Code::Unauthenticated => {
                format!(
                    "does not know who asks: {said}; say so with --token-file FILE or --cert-file FILE (or BATON_CTL_TOKEN_FILE, BATON_CTL_CERT_FILE)"
                )
            }
            Code::PermissionDenied => {
                format!("does not allow this: {said}; ask as somebody who may")
            }
            // Said so by its gRPC server, which has no words for it.
            Code::Unimplemented if said.is_empty() => {
                "is of a version that does not know this: upgrade it".to_owned()
            }
            Code::Unavailable => format!("cannot answer now: {said}"),
            Code::DeadlineExceeded | Code::Cancelled => format!("did not answer in time: {said}; try again"),
            Code::Internal | Code::Unknown | Code::DataLoss => format!("failed: {said}; its log says more"),
            _ => format!("refused: {said}"),
        };
        CtlError::Refused { service, address, message }
    }
}
