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
//!
//! The content of a block follows from all those before it in its chain. So when the content of a list is in doubt, so is
//! that of every block whose chain begins with the same first block, since it may have been computed from the list's. All
//! of them are unsealed, and a list that holds any of them is not [trusted](BlockManager::trusts): it seals nothing more.

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
    /// What it is sealed under, once it is.
    seal: Option<Seal>,
    /// Its content is in doubt; not so of a block that nobody holds.
    distrusted: bool,
    /// Its place in `idle`, if it is there.
    let_go: u64,
}

/// Names the content of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seal {
    hash: BlockHash,
    /// The hash of the first block of its chain.
    first: BlockHash,
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
    /// How many blocks are distrusted.
    distrusted: u32,
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
            distrusted: 0,
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
        debug_assert!(self.blocks[from.0 as usize].seal.is_none(), "a sealed block is never written");
        if self.blocks[from.0 as usize].holders == 1 {
            return Write::InPlace;
        }
        let Some(to) = self.allocate() else { return Write::NoRoom };
        list.0[index as usize] = to;
        if self.blocks[from.0 as usize].distrusted {
            self.doubt(to);
        }
        self.let_go(from);
        Write::Copy { from, to }
    }

    /// Block `index` of `list` is full and final: from now on it can be taken by its hash, the one at `index` of the list's
    /// chain `hashes`. Nothing happens if it can be already, if another block holds the same, or if the list is not trusted.
    pub fn seal(&mut self, list: &BlockList, index: u32, hashes: &[BlockHash]) {
        let (id, index) = (list.0[index as usize], index as usize);
        let seal = Seal { hash: hashes[index], first: hashes[0] };
        let taken = self.blocks[id.0 as usize].seal.is_some() || self.sealed.contains_key(&seal.hash);
        if !taken && self.trusts(list) {
            self.blocks[id.0 as usize].seal = Some(seal);
            self.sealed.insert(seal.hash, id);
            self.changes.push(CacheChange::Stored(seal.hash));
        }
    }

    /// The content of `list`, whose chain is `hashes`, is in doubt. From now on nobody can take it, nor what may have been
    /// computed from it. Who holds any of that keeps it.
    pub fn distrust(&mut self, list: &BlockList, hashes: &[BlockHash]) {
        list.0.iter().for_each(|&id| self.doubt(id));
        for id in (0..self.total()).map(BlockId) {
            let block = self.blocks[id.0 as usize];
            if block.seal.is_none_or(|seal| Some(&seal.first) != hashes.first()) {
                continue;
            }
            self.unseal(id);
            if block.holders > 0 {
                self.doubt(id);
            } else {
                self.idle.remove(&block.let_go);
                self.free.push_back(id);
            }
        }
    }

    /// Whether nothing is known against the content of `list`.
    pub fn trusts(&self, list: &BlockList) -> bool {
        self.distrusted == 0 || list.0.iter().all(|id| !self.blocks[id.0 as usize].distrusted)
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
        } else if block.seal.is_some() {
            self.releases += 1;
            block.let_go = self.releases;
            self.idle.insert(block.let_go, id);
        } else {
            self.distrusted -= u32::from(std::mem::take(&mut block.distrusted));
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

    fn doubt(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        self.distrusted += u32::from(!std::mem::replace(&mut block.distrusted, true));
    }

    fn unseal(&mut self, id: BlockId) {
        if let Some(Seal { hash, .. }) = self.blocks[id.0 as usize].seal.take() {
            self.sealed.remove(&hash);
            self.changes.push(CacheChange::Evicted(hash));
        }
    }
}
