//! The keys of the data plane, agreed on over an authenticated control stream and shown by proofs.

use std::fmt;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::mac;

/// Bytes of a proof: HMAC-SHA256, cut.
pub(crate) const PROOF_BYTES: usize = 16;

/// The key of one link's data connections, or of one transfer's frames. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct DataKey([u8; 16]);

impl DataKey {
    pub(crate) fn generate() -> Self {
        Self(rand::random())
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub(crate) fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// What shows that whoever wrote these parts, one after the other, has the key.
    pub(crate) fn prove(&self, parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
        let mut proof = [0; PROOF_BYTES];
        proof.copy_from_slice(&self.over(parts).finalize().into_bytes()[..PROOF_BYTES]);
        proof
    }

    /// Whether `proof` is that of these parts. Takes the same time whatever differs.
    pub(crate) fn proves(&self, parts: &[&[u8]], proof: &[u8]) -> bool {
        proof.len() == PROOF_BYTES && self.over(parts).verify_truncated_left(proof).is_ok()
    }

    fn over(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = mac::keyed(&self.0);
        parts.iter().for_each(|part| mac.update(part));
        mac
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_hmac_sha256_cut_to_16_bytes() {
        use sha2::Digest;
        let key = DataKey::generate();
        let pad = |with: u8| {
            let mut block = [with; 64];
            block.iter_mut().zip(key.as_bytes()).for_each(|(byte, key)| *byte ^= key);
            block
        };
        let inner = Sha256::new().chain_update(pad(0x36)).chain_update(b"ab").chain_update(b"c").finalize();
        let outer = Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize();
        let proof = key.prove(&[b"ab", b"c"]);
        assert_eq!(proof, outer[..16]);
        assert!(key.proves(&[b"abc"], &proof) && !key.proves(&[b"abd"], &proof));
        assert!(!key.proves(&[b"abc"], &proof[..15]) && !key.proves(&[b"abc"], &[]));
        assert!(!DataKey::generate().proves(&[b"abc"], &proof));
        assert_eq!(format!("{key:?}"), "DataKey(..)");
    }
}
