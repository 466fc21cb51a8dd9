//! A frame on a data connection: header and table, and, where the connection itself carries the slices, those.
//!
//! ```text
//! 0   4  magic, says which form              32  4  number of blocks
//! 4   4  layer                               36  4  bytes of one slice
//! 8  16  transfer id                         40  8  zero
//! 24  4  first block index                   48 16  proof (the transfer's key; bytes 0..48, table)
//! 28  4  zero                                64     the table
//! ```
//! Form "BKV2", carried: the table is the CRC32C of each slice (4 bytes); the slices follow, and 4 bytes that say how the
//! frame has ended ([`End`]): "BKE1", or "BKX1" where the sender had to give the slices up on the way and wrote zeros.
//! Form "BKN2", announced: the table is, of each slice, its offset in the sender's region (8 bytes) and its digest (4
//! bytes), and nothing follows.
//! Numbers are little endian. The proof covers everything but the slices, which the sums in the table cover. Nothing in a
//! frame is an address: the receiver computes destinations from its own block list.

use baton_proto::TransferId;

use super::{DataKey, key::PROOF_BYTES};
use crate::session::SliceRun;

/// Bytes before the table.
pub(crate) const HEADER_BYTES: usize = 64;
/// Most slices in a frame, so that a table is at most 48 KiB.
pub(crate) const MAX_FRAME_SLICES: u32 = 4096;

const PROOF_AT: usize = HEADER_BYTES - PROOF_BYTES;

/// What follows the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The slices' sums, then the slices and the frame's end.
    Carried,
    /// Where the slices lie, and their sums.
    Announced,
}

impl Form {
    fn magic(self) -> [u8; 4] {
        match self {
            Self::Carried => *b"BKV2",
            Self::Announced => *b"BKN2",
        }
    }

    /// Bytes of the table for each slice.
    fn entry_bytes(self) -> usize {
        match self {
            Self::Carried => 4,
            Self::Announced => 12,
        }
    }
}

/// Bytes of a carried frame's end.
pub(crate) const END_BYTES: usize = 4;

/// How a carried frame ended. Only slices of a whole one can be damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Every slice was written from its block.
    Whole,
    /// Zeros were written in place of the rest.
    CutShort,
}

impl End {
    pub(crate) fn bytes(self) -> &'static [u8; END_BYTES] {
        match self {
            Self::Whole => b"BKE1",
            Self::CutShort => b"BKX1",
        }
    }

    pub(crate) fn decode(bytes: &[u8; END_BYTES]) -> Result<Self, FrameError> {
        let known = [Self::Whole, Self::CutShort].into_iter().find(|end| end.bytes() == bytes);
        known.ok_or(FrameError::End)
    }
}

/// What a frame says it is about. Nothing of it is believed before [`Header::proven`] has said yes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) form: Form,
    pub(crate) transfer: TransferId,
    pub(crate) run: SliceRun,
    pub(crate) slice_bytes: u32,
}

/// Why bytes are not a frame. The stream cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("not a frame of this protocol version")]
    Magic,
    #[error("a frame that does not end as frames do")]
    End,
    #[error("a frame of {0} slices; at least 1 and at most {MAX_FRAME_SLICES} are allowed")]
    Count(u32),
    #[error("a frame with slices of {found} bytes; they are {expected} here")]
    SliceBytes { expected: u32, found: u32 },
}

impl Header {
    /// Writes header, proof and table into `into`, replacing what it held.
    pub(crate) fn encode(&self, key: &DataKey, table: impl Iterator<Item = Entry>, into: &mut Vec<u8>) {
        into.clear();
        into.extend_from_slice(&self.form.magic());
        into.extend_from_slice(&self.run.layer.to_le_bytes());
        into.extend_from_slice(self.transfer.as_bytes());
        into.extend_from_slice(&self.run.first.to_le_bytes());
        into.extend_from_slice(&[0; 4]);
        into.extend_from_slice(&self.run.count.to_le_bytes());
        into.extend_from_slice(&self.slice_bytes.to_le_bytes());
        into.resize(HEADER_BYTES, 0);
        for Entry { offset, sum } in table {
            if self.form == Form::Announced {
                into.extend_from_slice(&offset.to_le_bytes());
            }
            into.extend_from_slice(&sum.to_le_bytes());
        }
        let proof = key.prove(&[&into[..PROOF_AT], &into[HEADER_BYTES..]]);
        into[PROOF_AT..HEADER_BYTES].copy_from_slice(&proof);
    }

    /// Reads the header of a frame of `form` and checks the sizes that the reading of the stream depends on.
    pub(crate) fn decode(
        bytes: &[u8; HEADER_BYTES],
        form: Form,
        slice_bytes: u32,
    ) -> Result<Self, FrameError> {
        if bytes[..4] != form.magic() {
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
        Ok(Self { form, transfer: TransferId::from_bytes(id), run, slice_bytes })
    }

    /// Checks that it is of slices as the transfer has them, whichever peer's connection it came over.
    pub(crate) fn check_slices(&self, of_transfer: u64) -> Result<(), FrameError> {
        match u32::try_from(of_transfer) {
            Ok(of_transfer) if of_transfer == self.slice_bytes => Ok(()),
            of_transfer => {
                let expected = of_transfer.unwrap_or(u32::MAX);
                Err(FrameError::SliceBytes { expected, found: self.slice_bytes })
            }
        }
    }

    /// Bytes of the table.
    pub(crate) fn table_bytes(&self) -> usize {
        self.run.count as usize * self.form.entry_bytes()
    }

    /// Bytes of the slices.
    pub(crate) fn payload_bytes(&self) -> u64 {
        u64::from(self.run.count) * u64::from(self.slice_bytes)
    }

    /// Whether whoever wrote these bytes has the transfer's key.
    pub(crate) fn proven(key: &DataKey, header: &[u8; HEADER_BYTES], table: &[u8]) -> bool {
        let (head, proof) = header.split_at(PROOF_AT);
        key.proves(&[head, table], proof)
    }

    /// The entries of this header's table.
    pub(crate) fn entries<'a>(&self, table: &'a [u8]) -> impl Iterator<Item = Entry> + use<'a> {
        table.chunks_exact(self.form.entry_bytes()).map(|entry| {
            let (offset, sum) = entry.split_at(entry.len() - 4);
            let mut wide = [0; 8];
            wide[..offset.len()].copy_from_slice(offset);
            let sum = u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]);
            Entry { offset: u64::from_le_bytes(wide), sum }
        })
    }
}

/// What a table says of one slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it starts in the sender's region, in bytes; 0 in frames that carry it.
    pub(crate) offset: u64,
    pub(crate) sum: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(form: Form, layer: u32, first: u32, count: u32) -> Header {
        Header {
            form,
            transfer: TransferId::generate(),
            run: SliceRun { layer, first, count },
            slice_bytes: 24,
        }
    }

    fn parts(bytes: &[u8]) -> (&[u8; HEADER_BYTES], &[u8]) {
        (bytes[..HEADER_BYTES].try_into().expect("long enough"), &bytes[HEADER_BYTES..])
    }

    fn entries(form: Form) -> Vec<Entry> {
        let offset = |at| if form == Form::Announced { at } else { 0 };
        vec![Entry { offset: offset(1 << 40), sum: 7 }, Entry { offset: offset(48), sum: u32::MAX }]
    }

    #[test]
    fn round_trips_and_every_flipped_bit_is_seen() {
        for form in [Form::Carried, Form::Announced] {
            let (key, header) = (DataKey::generate(), header(form, 3, 4, 2));
            let mut bytes = Vec::new();
            header.encode(&key, entries(form).into_iter(), &mut bytes);
            let (head, table) = parts(&bytes);
            assert_eq!(Header::decode(head, form, 24), Ok(header));
            assert_eq!(table.len(), header.table_bytes());
            assert_eq!(header.entries(table).collect::<Vec<_>>(), entries(form));
            assert!(Header::proven(&key, head, table));
            assert!(!Header::proven(&DataKey::generate(), head, table));
            for bit in 0..bytes.len() * 8 {
                let mut bent = bytes.clone();
                bent[bit / 8] ^= 1 << (bit % 8);
                let (head, table) = parts(&bent);
                assert!(!Header::proven(&key, head, table), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_frame_of_the_other_form_and_sizes_out_of_range_are_refused() {
        let mut bytes = Vec::new();
        for (form, count, slice_bytes) in [
            (Form::Carried, 0, 24),
            (Form::Carried, MAX_FRAME_SLICES + 1, 24),
            (Form::Carried, 1, 25),
            (Form::Announced, 1, 24),
        ] {
            let header = Header { slice_bytes, ..header(form, 0, 0, count) };
            header.encode(&DataKey::generate(), std::iter::empty(), &mut bytes);
            assert!(Header::decode(parts(&bytes).0, Form::Carried, 24).is_err());
        }
        assert_eq!(Header::decode(&[0; HEADER_BYTES], Form::Carried, 24), Err(FrameError::Magic));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::array::uniform32(any::<u8>()), form: bool) {
            let form = if form { Form::Carried } else { Form::Announced };
            let mut head = [0; HEADER_BYTES];
            head[..32].copy_from_slice(&bytes);
            head[32..].copy_from_slice(&bytes);
            head[..4].copy_from_slice(&form.magic());
            let slice_bytes = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            if let Ok(header) = Header::decode(&head, form, slice_bytes) {
                prop_assert!(header.run.count <= MAX_FRAME_SLICES && header.run.count > 0);
            }
        }
    }
}
