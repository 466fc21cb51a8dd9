//! Which of the blocks that an instance has cached a coordinator is told of.
//!
//! What a prompt's cache is worth is known well enough by one block for some dozens of tokens, and taking in what instances
//! store and evict is most of what a long prompt costs a coordinator. Which blocks are told follows from their names, so
//! that every instance tells the same ones and a coordinator knows of each prompt which these are. Names are hashes: the gaps
//! between blocks that are told vary, with the wanted one for their mean.

use crate::BlockHash;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sieve {
    /// Bits that are 0 in what is kept of the name.
    mask: u64,
}

impl Sieve {
    /// Every block is told of.
    pub const ALL: Self = Self { mask: 0 };

    /// Of blocks of so many tokens one for `every_tokens`, rounded to a power of two of blocks that is no more; all if a
    /// block has as many.
    pub fn new(every_tokens: u32, block_tokens: u32) -> Self {
        let one_of = (every_tokens / block_tokens.max(1)).max(1);
        Self { mask: u64::from((1 << one_of.ilog2()) - 1u32) }
    }

    /// Whether a block of this [`BlockHash::key`] is told of.
    pub fn keeps(self, key: u64) -> bool {
        key & self.mask == 0
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

    /// Coordinators and servers of different versions must agree.
    #[test]
    fn which_blocks_are_kept_stays_what_it_is() {
        let chain: Vec<BlockHash> = (0..32).map(|token| BlockHash::root("l", "").child(&[token])).collect();
        let low =
            |hash: &BlockHash| u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
        for (every, zeros) in [(64, 2), (100, 2), (128, 3), (16, 0)] {
            let kept: Vec<_> = Sieve::new(every, 16).of(&chain).collect();
            let wanted: Vec<_> = chain.iter().filter(|hash| low(hash).trailing_zeros() >= zeros).collect();
            assert_eq!(kept, wanted, "one for {every} tokens");
            assert!(!kept.is_empty());
        }
    }

    #[test]
    fn one_block_is_kept_for_so_many_tokens() {
        let chain: Vec<BlockHash> = (0..4096).map(|token| BlockHash::root("l", "").child(&[token])).collect();
        for (every, block, one_of) in [
            (64, 16, 4),
            (64, 17, 2),
            (127, 16, 4),
            (128, 16, 8),
            (64, 4, 16),
            (64, 64, 1),
            (64, 128, 1),
            (1, 16, 1),
        ] {
            let kept = Sieve::new(every, block).of(&chain).count();
            let wanted = chain.len() / one_of;
            assert!(kept.abs_diff(wanted) * 5 <= wanted, "{kept} of {block} for {every}, not about {wanted}");
            assert_eq!(Sieve::new(every, block).keeps_all(), one_of == 1);
        }
        assert!(Sieve::new(0, 0).keeps_all() && Sieve::new(0, 16).keeps_all());
        assert!(Sieve::new(u32::MAX, 1).keeps(0));
    }
}
