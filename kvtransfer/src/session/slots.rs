//! Which slices of an accepted transfer are claimed, and what has landed. Used by the receiver's session.

use super::slices::{Claim, Shape, SliceRun, SliceSet, Tally};
use crate::TransferError;

/// Per-slice account of an accepted transfer.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, Hash))]
pub(super) struct Slots {
    shape: Shape,
    held: Vec<bool>,
    claimed: SliceSet,
    /// CRC32C that the claiming frame named, by slice.
    crcs: Vec<u32>,
    landed: Tally,
    expected: u64,
}

impl Slots {
    pub(super) fn new(shape: Shape, held_indices: &[u32]) -> Self {
        let mut held = vec![false; shape.blocks as usize];
        held_indices.iter().for_each(|&block| held[block as usize] = true);
        let missing = held.iter().filter(|&&held| !held).count() as u64;
        Self {
            shape,
            held,
            claimed: SliceSet::new(shape),
            crcs: vec![0; shape.slices()],
            landed: Tally::default(),
            expected: missing * u64::from(shape.layers),
        }
    }

    /// Slices that must arrive.
    pub(super) fn expected(&self) -> u64 {
        self.expected
    }

    /// Those that have.
    pub(super) fn landed(&self) -> Tally {
        self.landed
    }

    /// A claimed slice is in its block.
    pub(super) fn land(&mut self, layer: u32, block: u32, bytes: u64) {
        let crc = *self.crc(layer, block);
        self.landed.add(layer, block, crc, bytes);
    }

    fn crc(&mut self, layer: u32, block: u32) -> &mut u32 {
        &mut self.crcs[layer as usize * self.shape.blocks as usize + block as usize]
    }

    /// Claims a run for a frame that names these CRC32Cs; an error means that the frame broke the protocol.
    pub(super) fn claim(&mut self, run: SliceRun, crcs: &[u32]) -> Result<Claim, TransferError> {
        let refuse = |what: &str| Err(TransferError::Protocol(format!("{what}: {run:?}")));
        if !self.shape.contains(run) || crcs.len() != run.count as usize {
            return refuse("a frame names slices outside the transfer");
        }
        if run.blocks().any(|block| self.held[block as usize]) {
            return refuse("a frame carries a block that this side holds already");
        }
        let seen = run.blocks().filter(|&block| self.claimed.contains(run.layer, block)).count();
        if seen == 0 {
            for (block, &crc) in run.blocks().zip(crcs) {
                self.claimed.insert(run.layer, block);
                *self.crc(run.layer, block) = crc;
            }
            return Ok(Claim::Write);
        }
        let same = run.blocks().zip(crcs).all(|(block, &crc)| *self.crc(run.layer, block) == crc);
        if seen == run.count as usize && same {
            return Ok(Claim::Skip);
        }
        refuse("a frame repeats slices with other content")
    }
}
