//! A frame on a TCP data connection: header, CRC table, payload.
//!
//! ```text
//! 0   4  magic "BKV1"                    32  4  number of blocks
//! 4   4  layer                           36  4  bytes of one slice
//! 8  16  transfer id                     40  8  zero
//! 24  4  first block index               48 16  proof: HMAC-SHA256 (data key; bytes 0..48, CRC table), cut to 16 bytes
//! 28  4  zero                            64  4n CRC32C of each slice; then the slices
//! ```
//! Numbers are little endian. The proof covers everything but the payload, which the CRCs in it cover. Nothing in a
//! frame is an address: the receiver computes destinations from its own block list.

use baton_proto::TransferId;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::{session::SliceRun, transport::DataKey};

/// Bytes before the CRC table.
pub(crate) const HEADER_BYTES: usize = 64;
/// Most slices in a frame, so that a CRC table is at most 16 KiB.
pub(crate) const MAX_FRAME_SLICES: u32 = 4096;

const MAGIC: [u8; 4] = *b"BKV1";
const PROOF_AT: usize = 48;

/// What a frame says it carries. Nothing of it is believed before [`Header::proven`] has said yes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) transfer: TransferId,
    pub(crate) run: SliceRun,
    pub(crate) slice_bytes: u32,
}

/// Why bytes are not a frame. The stream cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("not a frame of this protocol version")]
    Magic,
    #[error("a frame of {0} slices; at least 1 and at most {MAX_FRAME_SLICES} are allowed")]
    Count(u32),
    #[error("a frame with slices of {found} bytes; they are {expected} here")]
    SliceBytes { expected: u32, found: u32 },
}

impl Header {
    /// Writes header, proof and CRC table into `into`, replacing what it held.
    pub(crate) fn encode(&self, key: &DataKey, crcs: &[u32], into: &mut Vec<u8>) {
        into.clear();
        into.extend_from_slice(&MAGIC);
        into.extend_from_slice(&self.run.layer.to_le_bytes());
        into.extend_from_slice(self.transfer.as_bytes());
        into.extend_from_slice(&self.run.first.to_le_bytes());
        into.extend_from_slice(&[0; 4]);
        into.extend_from_slice(&self.run.count.to_le_bytes());
        into.extend_from_slice(&self.slice_bytes.to_le_bytes());
        into.resize(HEADER_BYTES, 0);
        crcs.iter().for_each(|crc| into.extend_from_slice(&crc.to_le_bytes()));
        let proof = prover(key, &into[..PROOF_AT], &into[HEADER_BYTES..]).finalize().into_bytes();
        into[PROOF_AT..HEADER_BYTES].copy_from_slice(&proof[..16]);
    }

    /// Reads a header and checks the sizes that the reading of the stream depends on.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], slice_bytes: u32) -> Result<Self, FrameError> {
        if bytes[..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[8..24]);
        let run = SliceRun { layer: word(4), first: word(24), count: word(32) };
        if run.count == 0 || run.count > MAX_FRAME_SLICES {
            return Err(FrameError::Count(run.count));
        }
        if word(36) != slice_bytes {
            return Err(FrameError::SliceBytes { expected: slice_bytes, found: word(36) });
        }
        Ok(Self { transfer: TransferId::from_bytes(id), run, slice_bytes })
    }

    /// Bytes of the CRC table.
    pub(crate) fn table_bytes(&self) -> usize {
        self.run.count as usize * 4
    }

    /// Bytes of the payload.
    pub(crate) fn payload_bytes(&self) -> u64 {
        u64::from(self.run.count) * u64::from(self.slice_bytes)
    }

    /// Whether whoever wrote these bytes has the transfer's key. Takes the same time whatever differs.
    pub(crate) fn proven(key: &DataKey, header: &[u8; HEADER_BYTES], table: &[u8]) -> bool {
        prover(key, &header[..PROOF_AT], table).verify_truncated_left(&header[PROOF_AT..]).is_ok()
    }
}

fn prover(key: &DataKey, header: &[u8], table: &[u8]) -> Hmac<Sha256> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new(&padded(key).into());
    mac.update(header);
    mac.update(table);
    mac
}

/// HMAC's key block: the key, then zeros (RFC 2104), which spares the fallible constructor for other lengths.
fn padded(key: &DataKey) -> [u8; 64] {
    let mut block = [0; 64];
    block[..16].copy_from_slice(key.as_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(layer: u32, first: u32, count: u32) -> Header {
        Header { transfer: TransferId::generate(), run: SliceRun { layer, first, count }, slice_bytes: 24 }
    }

    fn parts(bytes: &[u8]) -> (&[u8; HEADER_BYTES], &[u8]) {
        (bytes[..HEADER_BYTES].try_into().expect("long enough"), &bytes[HEADER_BYTES..])
    }

    #[test]
    fn round_trips_and_every_flipped_bit_is_seen() {
        let (key, header) = (DataKey::generate(), header(3, 4, 2));
        let mut bytes = Vec::new();
        header.encode(&key, &[7, 8], &mut bytes);
        let (head, table) = parts(&bytes);
        assert_eq!(Header::decode(head, 24), Ok(header));
        assert!(Header::proven(&key, head, table));
        assert!(!Header::proven(&DataKey::generate(), head, table));
        for bit in 0..bytes.len() * 8 {
            let mut bent = bytes.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            let (head, table) = parts(&bent);
            assert!(!Header::proven(&key, head, table), "bit {bit}");
        }
    }

    #[test]
    fn proof_is_hmac_sha256() {
        // RFC 4231 has no 16-byte key of ours; case 2's key ("Jefe") is shorter, so compare with the plain definition.
        use sha2::Digest;
        let (key, mut bytes) = (DataKey::generate(), Vec::new());
        header(0, 0, 1).encode(&key, &[9], &mut bytes);
        let pad = |with: u8| padded(&key).map(|byte| byte ^ with);
        let inner = Sha256::new()
            .chain_update(pad(0x36))
            .chain_update(&bytes[..48])
            .chain_update(&bytes[64..])
            .finalize();
        let outer = Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize();
        assert_eq!(bytes[48..64], outer[..16]);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let mut bytes = Vec::new();
        for (count, slice_bytes) in [(0, 24), (MAX_FRAME_SLICES + 1, 24), (1, 25)] {
            Header { slice_bytes, ..header(0, 0, count) }.encode(&DataKey::generate(), &[], &mut bytes);
            assert!(Header::decode(parts(&bytes).0, 24).is_err());
        }
        assert_eq!(Header::decode(&[0; HEADER_BYTES], 24), Err(FrameError::Magic));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::array::uniform32(any::<u8>()), magic: bool) {
            let mut head = [0; HEADER_BYTES];
            head[..32].copy_from_slice(&bytes);
            head[32..].copy_from_slice(&bytes);
            if magic { head[..4].copy_from_slice(&MAGIC); }
            if let Ok(header) = Header::decode(&head, u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])) {
                prop_assert!(header.run.count <= MAX_FRAME_SLICES && header.run.count > 0);
            }
        }
    }
}
