//! The name of a whole prompt, by which the two sides of a KV transfer know that they mean the same one.
//!
//! [`crate::BlockHash`] names blocks as one layout cuts them; a prompt that is handed over between instances of different
//! layouts has other blocks on either side, and its last block is seldom full. This covers every token, and the tokens
//! alone: that both run the same model is settled when they meet.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::IdError;

/// SHA-256 of a prompt's tokens.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PromptDigest([u8; 32]);

impl PromptDigest {
    pub const BYTES: usize = 32;

    /// Of a prompt's tokens, all of them, in order.
    pub fn of(tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"baton kv prompt\0");
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }

    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl TryFrom<&[u8]> for PromptDigest {
    type Error = IdError;

    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        bytes.try_into().map(Self).map_err(|_| IdError::PromptDigestLength(bytes.len()))
    }
}

impl fmt::Display for PromptDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PromptDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PromptDigest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_token_and_their_order_count() {
        let prompts = [&[1u32, 2][..], &[2, 1], &[1, 3], &[1], &[1, 2, 0], &[258], &[]];
        let seen: HashSet<_> = prompts.iter().map(|tokens| PromptDigest::of(tokens)).collect();
        assert_eq!(seen.len(), prompts.len());
    }

    /// Instances of different versions must agree; Python's hashlib gave this.
    #[test]
    fn digests_stay_what_they_are() {
        let digest = PromptDigest::of(&[1, 2, 70_000]);
        assert_eq!(digest.to_string(), "b470594c571fb0b669e67d5dbcd944d0ed334129779384d0073a0cd4f7084e5d");
        assert_eq!(PromptDigest::try_from(&digest.as_bytes()[..]), Ok(digest));
        assert_eq!(PromptDigest::try_from(&[0u8; 31][..]), Err(IdError::PromptDigestLength(31)));
    }
}
