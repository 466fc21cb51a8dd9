//! HMAC-SHA256: how the ends of a control stream, and of a data connection, show that they have a key.

use hmac::{Hmac, KeyInit};
use sha2::{Digest, Sha256};

/// Bytes that SHA-256 takes at a time, and HMAC for its key.
const BLOCK_BYTES: usize = 64;

/// A MAC over nothing yet. A key of any length will do (RFC 2104: shorter ones are followed by zeros, longer ones hashed);
/// filled in here, which spares the fallible constructor for them.
pub(crate) fn keyed(key: &[u8]) -> Hmac<Sha256> {
    let mut block = [0; BLOCK_BYTES];
    match block.get_mut(..key.len()) {
        Some(start) => start.copy_from_slice(key),
        None => block[..32].copy_from_slice(&Sha256::digest(key)),
    }
    <Hmac<Sha256> as KeyInit>::new(&block.into())
}

#[cfg(test)]
mod tests {
    use hmac::Mac;

    use super::*;

    #[test]
    fn is_that_of_the_constructor_for_keys_of_any_length() {
        for len in [0, 1, 16, 63, 64, 65, 200] {
            let key = vec![0xA7; len];
            let expected = <Hmac<Sha256> as KeyInit>::new_from_slice(&key).expect("any length");
            let ours = keyed(&key).chain_update(b"text").finalize().into_bytes();
            assert_eq!(ours, expected.chain_update(b"text").finalize().into_bytes(), "{len} bytes");
        }
    }
}
