//! Slices of a transfer: runs of them, sets of them, and the tally that both sides must agree on.

use crc_fast::{CrcAlgorithm, Digest, checksum};

/// How many layers and blocks a transfer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct Shape {
    pub(crate) layers: u32,
    pub(crate) blocks: u32,
}

impl Shape {
    pub(crate) fn slices(self) -> usize {
        self.layers as usize * self.blocks as usize
    }

    pub(crate) fn contains(self, run: SliceRun) -> bool {
        run.layer < self.layers
            && run.count > 0
            && run.first.checked_add(run.count).is_some_and(|end| end <= self.blocks)
    }

    fn index(self, layer: u32, block: u32) -> usize {
        layer as usize * self.blocks as usize + block as usize
    }
}

/// Consecutive blocks of one layer. Block numbers are indices into the transfer's block list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct SliceRun {
    pub(crate) layer: u32,
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl SliceRun {
    pub(crate) fn blocks(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }
}

/// What a frame may do with the slices it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Write them; every claim is closed by `landed`, `damaged` or `interrupted`.
    Write,
    /// Pass over the payload: the same slices are here already, or the transfer is over.
    Skip,
    /// The frame broke the protocol; the transfer is aborted. Pass over the payload.
    Refused,
}

/// A set of slices of one shape.
#[derive(Debug, Clone)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct SliceSet {
    shape: Shape,
    words: Vec<u64>,
}

impl SliceSet {
    pub(crate) fn new(shape: Shape) -> Self {
        Self { shape, words: vec![0; shape.slices().div_ceil(64)] }
    }

    pub(crate) fn contains(&self, layer: u32, block: u32) -> bool {
        let at = self.shape.index(layer, block);
        self.words[at / 64] >> (at % 64) & 1 == 1
    }

    /// Adds a slice of the shape; says whether it was new.
    pub(crate) fn insert(&mut self, layer: u32, block: u32) -> bool {
        let at = self.shape.index(layer, block);
        let (word, bit) = (&mut self.words[at / 64], 1u64 << (at % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// Count, bytes and checksum of the slices moved so far. The checksum is an XOR over the slices of the CRC32C of (layer,
/// block index, slice CRC32C), so the order in which they moved does not matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct Tally {
    pub(crate) slices: u64,
    pub(crate) bytes: u64,
    pub(crate) checksum: u32,
}

impl Tally {
    pub(crate) fn add(&mut self, layer: u32, block: u32, slice_crc: u32, bytes: u64) {
        let mut record = [0; 12];
        record[..4].copy_from_slice(&layer.to_le_bytes());
        record[4..8].copy_from_slice(&block.to_le_bytes());
        record[8..].copy_from_slice(&slice_crc.to_le_bytes());
        self.slices += 1;
        self.bytes += bytes;
        self.checksum ^= crc32c(&record);
    }
}

/// CRC32C (Castagnoli), as in iSCSI.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The CRC32C of bytes that come in pieces.
#[derive(Debug)]
pub(crate) struct Crc32c(Digest);

impl Crc32c {
    pub(crate) fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    pub(crate) fn add(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// That of everything added since the last time.
    pub(crate) fn take(&mut self) -> u32 {
        self.0.finalize_reset() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_castagnoli() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283); // the catalogue's check value of CRC-32/ISCSI
        let mut pieces = Crc32c::new();
        for _ in 0..2 {
            b"123456789".chunks(4).for_each(|piece| pieces.add(piece));
            assert_eq!(pieces.take(), 0xE306_9283);
        }
    }

    #[test]
    fn tally_ignores_order_and_sees_every_field() {
        let of = |records: &[(u32, u32, u32)]| {
            let mut tally = Tally::default();
            records.iter().for_each(|&(layer, block, crc)| tally.add(layer, block, crc, 10));
            tally
        };
        assert_eq!(of(&[(0, 1, 7), (1, 0, 8)]), of(&[(1, 0, 8), (0, 1, 7)]));
        let base = of(&[(1, 2, 3)]);
        for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)] {
            assert_ne!(base.checksum, of(&[other]).checksum, "{other:?}");
        }
    }

    #[test]
    fn runs_that_wrap_are_outside() {
        let shape = Shape { layers: 2, blocks: 3 };
        assert!(shape.contains(SliceRun { layer: 1, first: 0, count: 3 }));
        for (layer, first, count) in [(2, 0, 1), (0, 3, 1), (0, 2, 2), (0, 0, 0), (0, u32::MAX, 2)] {
            assert!(!shape.contains(SliceRun { layer, first, count }));
        }
    }
}
