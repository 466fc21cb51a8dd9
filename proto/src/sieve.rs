//! Which of the blocks that an instance has cached a coordinator is told of.
//!
//! What a prompt's cache is worth is known well enough by one block for some dozens of tokens, and taking in what instances
//! store and evict is most of what a long prompt costs a coordinator. Which blocks are told follows from their names, so
//! that every instance tells the same ones and a coordinator knows of each prompt which these are. Names begin with the
//! block's place in its chain: told are the first and then every so-many-th, every 256th at most.

use crate::BlockHash;

/// Places are counted modulo this.
const ONE_OF_MOST: u32 = 256;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sieve {
    /// Bits that are 0 in what is kept of the name.
    mask: u64,
}

impl Sieve {
    /// Every block is told of.
    pub const ALL: Self = Self { mask: 0 };

    /// Of blocks of so many tokens one for `every_tokens`, rounded to a power of two of blocks that is no more, nor than 256; all
    /// if a block has as many.
    pub fn new(every_tokens: u32, block_tokens: u32) -> Self {
        let one_of = (every_tokens / block_tokens.max(1)).clamp(1, ONE_OF_MOST);
        Self { mask: u64::from((1 << one_of.ilog2()) - 1u32) }
    }

    /// Whether a block of this [`BlockHash::key`] is told of.
    pub fn keeps(self, key: u64) -> bool {
        key & self.mask == 0
    }

    /// Of a chain the first block is told of, and then every so-many-th.
    pub fn one_of(self) -> usize {
        self.mask as usize + 1
    }

    /// Those of these blocks that are told of.
    pub fn of(self, hashes: &[BlockHash]) -> impl Iterator<Item = &BlockHash> {
        hashes.iter().filter(move |hash| self.keeps(hash.key()))
    }

    pub fn keeps_all(self) -> bool {
        self == Self::ALL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(blocks: u32) -> Vec<BlockHash> {
        let root = BlockHash::root("l", "");
        let next = |hash: &mut BlockHash, token| {
            *hash = hash.child(&[token]);
            Some(*hash)
        };
        (0..blocks).scan(root, next).collect()
    }

    /// Coordinators and servers of different versions must agree.
    #[test]
    fn of_a_chain_the_first_block_is_kept_and_then_every_so_many_th() {
        let chain = chain(1000);
        for (every, block, one_of) in [
            (64, 16, 4),
            (64, 17, 2),
            (100, 16, 4),
            (127, 16, 4),
            (128, 16, 8),
            (64, 4, 16),
            (64, 64, 1),
            (64, 128, 1),
            (1, 16, 1),
            (0, 16, 1),
            (0, 0, 1),
            (4096, 16, 256),
            (u32::MAX, 16, 256),
        ] {
            let sieve = Sieve::new(every, block);
            assert!(sieve.of(&chain).eq(chain.iter().step_by(one_of)), "of {block} for {every}");
            assert_eq!((sieve.one_of(), sieve.keeps_all()), (one_of, one_of == 1));
        }
    }
}
