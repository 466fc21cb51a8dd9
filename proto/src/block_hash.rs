//! Names of KV blocks by what is in them, the same on every instance and coordinator of a cluster.
//!
//! A block's K and V depend on the model, the way it is stored and every token up to the block's end, so that is what
//! its hash covers: a chain from a root over model revision, KV layout and adapter, one link for each full block. The first
//! byte counts the blocks of the chain, so that who has but the name knows at which place of its chain the block is.
//! Computed by the engine for what it caches; sent in `KvEvents`; computed by whoever wants to know who caches a prompt.

use std::fmt;

use bytes::Bytes;
use sha2::{Digest, Sha256, block_api::compress256};

use crate::IdError;

/// Tokens that one compression of SHA-256 takes in: 64 bytes.
const TOKENS_AT_ONCE: usize = 16;
/// The second half of the chaining value that a block's hash begins with; the first is the hash before it.
const DOMAIN: &[u8; 16] = b"baton kv block 2";

/// 120 bits behind the block's place in its chain, from 0, modulo 256: no two prompts share one by chance, and nobody finds
/// one that shares another's, so that a hash that is equal stands for blocks that are.
///
/// A chain is built as SHA-256 is (Merkle and Damgård), from its compression function, once for each 16 tokens: what comes in is
/// the hash before, how many tokens follow, and the tokens. To hash each block as a message of its own, with what was before
/// it and padding, takes two. All that differs goes in through the compression function, from a chaining value that is a hash
/// itself; no way is known to find what shares another's 120 bits but to try 2^120 times, or 2^60 for two of one's own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    pub const BYTES: usize = 16;

    /// The start of every chain of one model. `layout_fingerprint` is that of `baton-kvtransfer`'s `KvLayout`, which
    /// covers the model's revision; `adapter` is empty as long as there are none.
    pub fn root(layout_fingerprint: &str, adapter: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"baton kv root\0");
        for part in [layout_fingerprint, adapter] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice(&hash.finalize()[..Self::BYTES]);
        bytes[0] = u8::MAX;
        Self(bytes)
    }

    /// The hash of the block that follows this one (or the root) and holds `tokens`.
    pub fn child(&self, tokens: &[u32]) -> Self {
        let (words, _) = self.0.as_chunks();
        let (domain, _) = DOMAIN.as_chunks();
        let mut state = [0; 8];
        let from = words.iter().chain(domain).map(|word| u32::from_be_bytes(*word));
        state.iter_mut().zip(from).for_each(|(state, word)| *state = word);
        // Tokens of 0 at the end are told from none.
        state[7] ^= tokens.len() as u32;
        let (whole, rest) = tokens.as_chunks::<TOKENS_AT_ONCE>();
        let mut take = |tokens: &[u32; TOKENS_AT_ONCE]| {
            let mut bytes = [0; 4 * TOKENS_AT_ONCE];
            let (places, _) = bytes.as_chunks_mut();
            places.iter_mut().zip(tokens).for_each(|(place, token)| *place = token.to_le_bytes());
            compress256(&mut state, &[bytes]);
        };
        whole.iter().for_each(&mut take);
        if !rest.is_empty() || whole.is_empty() {
            let mut last = [0; TOKENS_AT_ONCE];
            last[..rest.len()].copy_from_slice(rest);
            take(&last);
        }
        let mut bytes = [0; Self::BYTES];
        let (places, _) = bytes.as_chunks_mut();
        places.iter_mut().zip(state).for_each(|(place, word)| *place = word.to_be_bytes());
        bytes[0] = self.0[0].wrapping_add(1);
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Its first 64 bits, the lowest byte first, which is its place: enough to guess by.
    pub fn key(&self) -> u64 {
        let [low @ .., _, _, _, _, _, _, _, _] = self.0;
        u64::from_le_bytes(low)
    }

    /// As messages have several: one behind the other.
    pub fn to_wire<'a>(hashes: impl IntoIterator<Item = &'a Self>) -> Bytes {
        let hashes = hashes.into_iter();
        let mut bytes = Vec::with_capacity(hashes.size_hint().0 * Self::BYTES);
        hashes.for_each(|hash| bytes.extend_from_slice(&hash.0));
        bytes.into()
    }

    /// Back again, in their order.
    pub fn from_wire(bytes: &[u8]) -> Result<impl ExactSizeIterator<Item = Self>, IdError> {
        let (hashes, rest) = bytes.as_chunks();
        if rest.is_empty() {
            Ok(hashes.iter().map(|hash| Self(*hash)))
        } else {
            Err(IdError::BlockHashesLength(bytes.len()))
        }
    }
}

impl TryFrom<&[u8]> for BlockHash {
    type Error = IdError;

    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        bytes.try_into().map(Self).map_err(|_| IdError::BlockHashLength(bytes.len()))
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn everything_that_makes_a_block_changes_its_hash() {
        let roots = [("fp", ""), ("fq", ""), ("fp", "a"), ("f", "p"), ("", "fp")];
        let mut seen: HashSet<BlockHash> = roots.iter().map(|(fp, a)| BlockHash::root(fp, a)).collect();
        let root = BlockHash::root("fp", "");
        let (full, zeros) = ([7; 16], [0; 33]);
        let of_zeros = [1, 2, 15, 16, 17, 32, 33].map(|many| &zeros[..many]);
        let others = [&[1u32, 2][..], &[2, 1], &[1, 3], &[258], &[1, 2, 0], &[], &full, &full[..15]];
        let blocks: Vec<&[u32]> = others.into_iter().chain(of_zeros).collect();
        seen.extend(blocks.iter().map(|tokens| root.child(tokens)));
        seen.extend(blocks.iter().map(|tokens| root.child(&[9, 9]).child(tokens)));
        assert_eq!(seen.len(), roots.len() + 2 * blocks.len());
    }

    /// Instances of different versions must agree. Given by the compression function written out in Python, which was checked
    /// against hashlib.
    #[test]
    fn hashes_stay_what_they_are() {
        let root = BlockHash::root("fp", "");
        assert_eq!(root.to_string(), "ff95f2330be8b4adde6f4d0a2222b376");
        assert_eq!(root.child(&[1, 2, 70_000]).to_string(), "00c7eb47416928bcf5e887e678c3b57b");
        let long: Vec<u32> = (0..37).collect();
        assert_eq!(root.child(&long).to_string(), "00266202ef02da3710ed9fb8b5a13e09");
        let whole: Vec<u32> = (0..16).collect();
        assert_eq!(root.child(&whole).to_string(), "00f0729acb950903aa7dfe46b8be2589");
        let second = root.child(&[1, 2, 70_000]).child(&[3]);
        assert_eq!(second.to_string(), "01cc5529d1eb91862cc84a857b9f59a9");
        assert_eq!(BlockHash::try_from(&root.as_bytes()[..]), Ok(root));
        assert_eq!(BlockHash::try_from(&[0u8; 15][..]), Err(IdError::BlockHashLength(15)));
        assert_eq!(root.key(), 0xadb4_e80b_33f2_95ff);
    }

    #[test]
    fn several_are_one_behind_the_other() {
        let hashes = [0, 1, 2].map(|token| BlockHash::root("fp", "").child(&[token]));
        let wire = BlockHash::to_wire(&hashes);
        assert_eq!(wire[16..32], hashes[1].as_bytes()[..]);
        let read = BlockHash::from_wire(&wire).expect("whole hashes");
        assert!(read.eq(hashes));
        assert_eq!(BlockHash::from_wire(&wire[..40]).err(), Some(IdError::BlockHashesLength(40)));
        assert_eq!(BlockHash::from_wire(&[]).expect("none").len(), 0);
    }
}
