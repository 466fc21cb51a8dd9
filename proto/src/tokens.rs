//! A prompt's token ids on the wire: 4 bytes each, little-endian, one behind the other. Written once for all legs of a
//! request, which share the bytes, and read with one copy. A varint for each would cost more than all else of a dispatch.

use bytes::Bytes;

use crate::IdError;

const TOKEN_BYTES: usize = size_of::<u32>();

/// As `Dispatch.prompt_tokens` has them.
pub fn to_wire(tokens: &[u32]) -> Bytes {
    let mut bytes = vec![0; tokens.len() * TOKEN_BYTES];
    for (to, token) in bytes.chunks_exact_mut(TOKEN_BYTES).zip(tokens) {
        to.copy_from_slice(&token.to_le_bytes());
    }
    bytes.into()
}

/// Back again; an error unless these are whole ids. Which ids a model has is for others to check.
pub fn from_wire(bytes: &[u8]) -> Result<Vec<u32>, IdError> {
    let (tokens, rest) = bytes.as_chunks();
    if rest.is_empty() {
        Ok(tokens.iter().map(|token| u32::from_le_bytes(*token)).collect())
    } else {
        Err(IdError::TokensLength(bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_four_bytes_each_with_the_lowest_first() {
        let tokens = [0, 1, 258, 0x8000_0000, u32::MAX];
        let wire = to_wire(&tokens);
        assert_eq!(wire[4..12], [1, 0, 0, 0, 2, 1, 0, 0]);
        assert_eq!(from_wire(&wire), Ok(tokens.to_vec()));
        assert_eq!(from_wire(&[]), Ok(vec![]));
        for odd in [1, 2, 3, 17] {
            assert_eq!(from_wire(&wire[..odd]), Err(IdError::TokensLength(odd)));
        }
    }
}
