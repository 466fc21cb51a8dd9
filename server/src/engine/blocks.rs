//! Who owns which block of the KV pool.
//!
//! Called by the scheduler only. Ownership is in the types: a [`BlockList`] cannot be copied, comes from
//! [`BlockManager::extend`] alone and goes back through [`BlockManager::release`] alone, so a block cannot be freed
//! twice. Blocks carry reference counts, so that one block may later stand in several lists.

use std::collections::VecDeque;

use baton_runtime::BlockId;

/// The blocks of one sequence, in the order of its tokens.
#[derive(Debug, Default)]
pub struct BlockList(Vec<BlockId>);

impl BlockList {
    pub fn as_slice(&self) -> &[BlockId] {
        &self.0
    }

    /// Number of blocks.
    pub fn count(&self) -> u32 {
        self.0.len() as u32
    }
}

/// Allocates the blocks of one pool.
#[derive(Debug)]
pub struct BlockManager {
    block_tokens: u32,
    /// How many lists hold each block; 0 = free.
    references: Vec<u32>,
    /// Free blocks, the longest free first: a block stays intact as long as possible after its release.
    free: VecDeque<BlockId>,
}

impl BlockManager {
    /// All of `blocks` blocks of `block_tokens` tokens, free.
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        Self { block_tokens, references: vec![0; blocks as usize], free: (0..blocks).map(BlockId).collect() }
    }

    pub fn total(&self) -> u32 {
        self.references.len() as u32
    }

    /// Tokens that all blocks together hold.
    pub fn total_tokens(&self) -> u32 {
        self.total().saturating_mul(self.block_tokens)
    }

    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// Makes `list` hold at least `tokens` tokens. Takes nothing when not all of the blocks needed are free.
    #[must_use]
    pub fn extend(&mut self, list: &mut BlockList, tokens: u32) -> bool {
        let missing = self.blocks_for(tokens).saturating_sub(list.count()) as usize;
        if missing > self.free.len() {
            return false;
        }
        for block in self.free.drain(..missing) {
            self.references[block.0 as usize] = 1;
            list.0.push(block);
        }
        true
    }

    /// Gives every block of `list` back.
    pub fn release(&mut self, list: BlockList) {
        for block in list.0 {
            let references = &mut self.references[block.0 as usize];
            debug_assert!(*references > 0, "block {} is free already", block.0);
            *references -= 1;
            if *references == 0 {
                self.free.push_back(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn takes_all_or_nothing() {
        let mut blocks = BlockManager::new(3, 16);
        let mut list = BlockList::default();
        assert!(!blocks.extend(&mut list, 49));
        assert_eq!((blocks.free(), list.count()), (3, 0));
        assert!(blocks.extend(&mut list, 33));
        assert!(blocks.extend(&mut list, 48));
        assert_eq!((blocks.free(), list.count()), (0, 3));
        blocks.release(list);
        assert_eq!(blocks.free(), 3);
    }

    proptest! {
        #[test]
        fn no_block_has_two_owners_and_none_is_lost(
            steps in prop::collection::vec((0usize..6, 0u32..200, any::<bool>()), 1..200),
        ) {
            let mut blocks = BlockManager::new(20, 8);
            let mut lists: Vec<BlockList> = (0..6).map(|_| BlockList::default()).collect();
            for (which, tokens, release) in steps {
                if release {
                    blocks.release(std::mem::take(&mut lists[which]));
                } else {
                    let before = lists[which].count();
                    let fits = blocks.extend(&mut lists[which], tokens);
                    prop_assert_eq!(lists[which].count(), if fits { before.max(tokens.div_ceil(8)) } else { before });
                }
                let held: Vec<u32> = lists.iter().flat_map(|list| list.as_slice()).map(|block| block.0).collect();
                let distinct: HashSet<u32> = held.iter().copied().chain(blocks.free.iter().map(|b| b.0)).collect();
                prop_assert_eq!(held.len() as u32 + blocks.free(), blocks.total());
                prop_assert_eq!(distinct.len() as u32, blocks.total());
            }
        }
    }
}
