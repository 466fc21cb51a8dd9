//! What becomes of the slices of peers that lay their cache out otherwise: made by [`super::translate`], which tells the rest,
//! and kept with the peer's control stream and with its transfers.

use crate::{
    Slices, TransferError,
    plan::{Descriptor, Expansion},
    session::Cut,
    sync::Mutex,
};

/// Two source blocks may go to one target block: who writes one has its lock. More locks are fewer chance meetings.
const LOCKS: usize = 16;

/// How slices of one layout become this node's.
#[derive(Debug)]
pub(super) struct Translation {
    /// Of the peers' layout.
    fingerprint: String,
    cut: Cut,
    expansion: Expansion,
    writing: [Mutex<()>; LOCKS],
}

impl Translation {
    pub(super) fn new(fingerprint: String, cut: Cut, expansion: Expansion) -> Self {
        Self { fingerprint, cut, expansion, writing: Default::default() }
    }

    /// Whether the peers' layout is the one of this fingerprint.
    pub(super) fn is_from(&self, fingerprint: &str) -> bool {
        self.fingerprint == fingerprint
    }

    pub(super) fn cut(&self) -> Cut {
        self.cut
    }

    /// Carries a slice of the sender's out into the blocks that it has tokens for. `place` says which block of the pool
    /// one of the transfer's is; `None` = it is held.
    pub(super) fn carry_out(
        &self,
        (layer, source_block): (u32, u32),
        prompt_tokens: u32,
        slice: &[u8],
        pool: &Slices,
        place: impl Fn(u32) -> Result<Option<u32>, TransferError>,
    ) -> Result<(), TransferError> {
        let blocks = source_block..source_block.saturating_add(1);
        let mut descriptors = self.expansion.of_blocks(layer, blocks, prompt_tokens).peekable();
        while let Some(first) = descriptors.next() {
            let same = |next: &Descriptor| next.target_block == first.target_block;
            let Some(block) = place(first.target_block)? else {
                while descriptors.next_if(same).is_some() {}
                continue;
            };
            let _alone = self.writing[(layer as usize).wrapping_add(block as usize) % LOCKS].lock();
            let mut target = pool.io_slice_mut(layer, block, 0)?;
            self.expansion.pair().carry_out(&first.action, slice, &mut target)?;
            while let Some(next) = descriptors.next_if(same) {
                self.expansion.pair().carry_out(&next.action, slice, &mut target)?;
            }
        }
        Ok(())
    }
}
