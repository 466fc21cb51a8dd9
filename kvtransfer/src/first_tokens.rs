//! The tokens that a transfer carries beside the cache: what the sender has sampled already.

use std::sync::Arc;

use crate::TransferError;

/// The first token of every choice of a completion, by choice.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub struct FirstTokens(Arc<[u32]>);

impl FirstTokens {
    /// Choices of one completion.
    pub const MOST: usize = 128;

    /// 1 to [`Self::MOST`] tokens.
    pub fn new(tokens: &[u32]) -> Result<Self, TransferError> {
        if tokens.is_empty() || tokens.len() > Self::MOST {
            let message = format!("{} first tokens; there must be 1 to {}", tokens.len(), Self::MOST);
            return Err(TransferError::Invalid(message));
        }
        Ok(Self(tokens.into()))
    }

    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }
}

impl From<u32> for FirstTokens {
    fn from(token: u32) -> Self {
        Self(Arc::new([token]))
    }
}
