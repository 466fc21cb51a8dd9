//! Who holds which block of the KV pool, and which blocks hold what.
//!
//! Called by the scheduler only. A block is in one of three states:
//! ```text
//!          extend                    release (not sealed)
//! free ───────────> held by n lists ────────────────────> free
//!   ^                 ^        │ release (sealed)
//!   │                 │ take   v
//!   └──── evicted ── idle: nobody holds it, but its content can be taken by its hash
//! ```
//! Ownership is in the types: a [`BlockList`] cannot be copied and goes back through [`BlockManager::release`] alone, so
//! a hold cannot be given up twice. A full block whose content is final is *sealed* under its hash (see
//! [`BlockHash`]); from then on it is never written, and other lists may [`take`](BlockManager::take) it while it is held
//! or idle. Idle blocks are room as much as free ones are: when no block is free, the one that was let go longest ago is
//! evicted. A list gives its blocks up from its end, so that of a chain the end is evicted first.

use std::collections::{BTreeMap, HashMap, VecDeque};

use baton_proto::BlockHash;
use baton_runtime::BlockId;

#[cfg(test)]
mod tests;

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

/// What became of the blocks that can be taken by their hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheChange {
    Stored(BlockHash),
    Evicted(BlockHash),
}

/// The start of a chain that can be taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cached {
    pub blocks: u32,
    /// How many of them nobody holds: taking them leaves that much less room.
    pub idle: u32,
}

/// What a list must do before it writes into one of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Nothing: it alone holds the block.
    InPlace,
    /// Copy the old block's content, over all layers, before anything is written: the list holds the new one now.
    Copy { from: BlockId, to: BlockId },
    /// Wait: others hold the block too and there is no room for a copy.
    NoRoom,
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Lists that hold it.
    holders: u32,
    /// Its hash, once it is sealed.
    hash: Option<BlockHash>,
    /// Its place in `idle`, if it is there.
    let_go: u64,
}

/// Allocates the blocks of one pool.
#[derive(Debug)]
pub struct BlockManager {
    block_tokens: u32,
    blocks: Vec<Block>,
    /// Blocks without content, the longest free first.
    free: VecDeque<BlockId>,
    /// Sealed blocks by content.
    sealed: HashMap<BlockHash, BlockId>,
    /// Sealed blocks that nobody holds, by when they were let go.
    idle: BTreeMap<u64, BlockId>,
    releases: u64,
    changes: Vec<CacheChange>,
    evictions: u64,
}

impl BlockManager {
    /// All of `blocks` blocks of `block_tokens` tokens, free.
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        Self {
            block_tokens,
            blocks: vec![Block::default(); blocks as usize],
            free: (0..blocks).map(BlockId).collect(),
            sealed: HashMap::new(),
            idle: BTreeMap::new(),
            releases: 0,
            changes: Vec::new(),
            evictions: 0,
        }
    }

    pub fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Tokens that all blocks together hold.
    pub fn total_tokens(&self) -> u32 {
        self.total().saturating_mul(self.block_tokens)
    }

    /// Blocks that nobody holds, those with content included.
    pub fn room(&self) -> u32 {
        self.free.len() as u32 + self.idle()
    }

    /// Blocks that nobody holds and whose content can be taken.
    pub fn idle(&self) -> u32 {
        self.idle.len() as u32
    }

    /// Blocks whose content was given up for others, since the start.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// How much of the chain `hashes` is here, from its start.
    pub fn find(&self, hashes: &[BlockHash]) -> Cached {
        let mut cached = Cached::default();
        for block in hashes.iter().map_while(|hash| self.sealed.get(hash)) {
            cached.blocks += 1;
            cached.idle += u32::from(self.blocks[block.0 as usize].holders == 0);
        }
        cached
    }

    /// A list that begins with as much of the chain `hashes` as is here.
    pub fn take(&mut self, hashes: &[BlockHash]) -> BlockList {
        let found: Vec<BlockId> = hashes.iter().map_while(|hash| self.sealed.get(hash).copied()).collect();
        found.iter().for_each(|&block| self.hold(block));
        BlockList(found)
    }

    /// A list that shares every block of `list`, the partly filled ones too: see [`Self::write`].
    pub fn fork(&mut self, list: &BlockList) -> BlockList {
        list.0.iter().for_each(|&block| self.hold(block));
        BlockList(list.0.clone())
    }

    /// Makes `list` hold at least `tokens` tokens, in blocks of its own. Takes nothing when there is not room for all.
    #[must_use]
    pub fn extend(&mut self, list: &mut BlockList, tokens: u32) -> bool {
        let missing = self.blocks_for(tokens).saturating_sub(list.count());
        if missing > self.room() {
            return false;
        }
        list.0.extend((0..missing).map_while(|_| self.allocate()));
        true
    }

    /// Makes block `index` of `list`, which is not sealed, the list's own.
    #[must_use]
    pub fn write(&mut self, list: &mut BlockList, index: u32) -> Write {
        let from = list.0[index as usize];
        debug_assert!(self.blocks[from.0 as usize].hash.is_none(), "a sealed block is never written");
        if self.blocks[from.0 as usize].holders == 1 {
            return Write::InPlace;
        }
        let Some(to) = self.allocate() else { return Write::NoRoom };
        list.0[index as usize] = to;
        self.let_go(from);
        Write::Copy { from, to }
    }

    /// Block `index` of `list` is full and final: from now on it can be taken by `hash`. Nothing happens if it can be
    /// already, or if another block holds the same.
    pub fn seal(&mut self, list: &BlockList, index: u32, hash: BlockHash) {
        let id = list.0[index as usize];
        let block = &mut self.blocks[id.0 as usize];
        if block.hash.is_none() && !self.sealed.contains_key(&hash) {
            block.hash = Some(hash);
            self.sealed.insert(hash, id);
            self.changes.push(CacheChange::Stored(hash));
        }
    }

    /// Nobody is to take the blocks of `list` any more: their content is not to be trusted. Who holds them keeps them.
    pub fn distrust(&mut self, list: &BlockList) {
        for &id in &list.0 {
            self.unseal(id);
        }
    }

    /// Gives every block of `list` back.
    pub fn release(&mut self, list: BlockList) {
        list.0.into_iter().rev().for_each(|block| self.let_go(block));
    }

    /// What was stored and evicted since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<CacheChange> {
        std::mem::take(&mut self.changes)
    }

    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.holders == 0 {
            self.idle.remove(&block.let_go);
        }
        block.holders += 1;
    }

    fn let_go(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.holders > 0, "block {} is held by nobody", id.0);
        block.holders -= 1;
        if block.holders > 0 {
        } else if block.hash.is_some() {
            self.releases += 1;
            block.let_go = self.releases;
            self.idle.insert(block.let_go, id);
        } else {
            self.free.push_back(id);
        }
    }

    /// A block without content, which its caller is the first to hold.
    fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop_front() {
            Some(id) => id,
            None => {
                let (_, id) = self.idle.pop_first()?;
                self.unseal(id);
                self.evictions += 1;
                id
            }
        };
        self.blocks[id.0 as usize].holders = 1;
        Some(id)
    }

    fn unseal(&mut self, id: BlockId) {
        if let Some(hash) = self.blocks[id.0 as usize].hash.take() {
            self.sealed.remove(&hash);
            self.changes.push(CacheChange::Evicted(hash));
        }
    }
}
