//! A prompt's token ids, shared and on the wire: 4 bytes each, little-endian, one behind the other. All legs of a request send
//! the same memory, and who takes it copies it once. A varint for each would cost more than all else of a dispatch.

use std::{ops::Deref, sync::Arc};

use bytes::Bytes;

use crate::IdError;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens(Arc<Vec<u32>>);

impl Tokens {
    /// As `Dispatch.prompt_tokens` has them: where memory is little-endian, too, they are not copied.
    pub fn to_wire(&self) -> Bytes {
        if cfg!(target_endian = "little") {
            return Bytes::from_owner(InMemory(self.clone()));
        }
        self.iter().flat_map(|token| token.to_le_bytes()).collect()
    }
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

/// The bytes that they are in memory.
struct InMemory(Tokens);

impl AsRef<[u8]> for InMemory {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Deref for Tokens {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.0
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(mut tokens: Vec<u32>) -> Self {
        tokens.shrink_to_fit();
        Self(tokens.into())
    }
}

impl From<&[u32]> for Tokens {
    fn from(tokens: &[u32]) -> Self {
        tokens.to_vec().into()
    }
}

impl<const N: usize> From<[u32; N]> for Tokens {
    fn from(tokens: [u32; N]) -> Self {
        tokens.to_vec().into()
    }
}

impl FromIterator<u32> for Tokens {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        tokens.into_iter().collect::<Vec<_>>().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_four_bytes_each_with_the_lowest_first() {
        let tokens = Tokens::from([0, 1, 258, 0x8000_0000, u32::MAX]);
        let wire = tokens.to_wire();
        assert_eq!(wire[4..12], [1, 0, 0, 0, 2, 1, 0, 0]);
        assert_eq!(from_wire(&wire), Ok(tokens.to_vec()));
        assert_eq!((Tokens::default().to_wire(), from_wire(&[])), (Bytes::new(), Ok(vec![])));
        for odd in [1, 2, 3, 17] {
            assert_eq!(from_wire(&wire[..odd]), Err(IdError::TokensLength(odd)));
        }
    }

    #[test]
    fn what_is_on_the_wire_is_the_same_memory_and_outlives_the_prompt() {
        let tokens: Tokens = (0..1000).collect();
        let at = tokens.as_ptr().cast();
        let (first, second) = (tokens.to_wire(), tokens.to_wire());
        assert_eq!([first.as_ptr(), second.as_ptr()], [at; 2]);
        drop(tokens);
        assert_eq!(from_wire(&first), from_wire(&second));
        assert_eq!(from_wire(&first).map(|tokens| tokens[999]), Ok(999));
    }
}
