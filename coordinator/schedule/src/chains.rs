//! The names of a prompt's KV blocks, as the instances say them that might hold some.
//!
//! Made by the coordinator as it prepares a prompt, asked by whoever books it. What a block is called depends on who cuts
//! it: a [`Dialect`] is the root that follows from an instance's model and KV layout, and the tokens of a block. The
//! hashes are [`BlockHash`]es, the servers' own; of each the first 64 bits are kept: two that are equal by chance, or by
//! somebody's work, cost a misprediction and nothing else, as only the server's whole hash decides what is taken.
//!
//! A chain is computed once for a request and dialect, when it is first asked for: a fraction of a microsecond a block.
//! The coordinator asks first, on the core that has tokenised the prompt.

mod names;

use std::{num::NonZero, sync::Arc};

use baton_proto::{BlockHash, Tokens};
use parking_lot::Mutex;

pub use names::Names;
pub(crate) use names::mixed;

/// How some instances name their blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dialect {
    root: BlockHash,
    block_tokens: NonZero<u32>,
}

impl Dialect {
    /// Of instances with this fingerprint of their layout, without adapters. `None`: no block has no tokens.
    pub fn new(layout_fingerprint: &str, block_tokens: u32) -> Option<Self> {
        let block_tokens = NonZero::new(block_tokens)?;
        Some(Self { root: BlockHash::root(layout_fingerprint, ""), block_tokens })
    }

    /// Tokens of a full block.
    pub fn block_tokens(self) -> u32 {
        self.block_tokens.get()
    }
}

/// A prompt's full blocks in one dialect.
#[derive(Debug, Clone)]
pub struct Chain {
    pub dialect: Dialect,
    /// By the blocks' order.
    pub keys: Arc<Names>,
}

/// A chain that can be gone on with.
#[derive(Debug, Clone)]
struct Growing {
    chain: Chain,
    /// The last full block, or the root.
    last: BlockHash,
}

impl Growing {
    fn of(dialect: Dialect, tokens: &[u32]) -> Self {
        Self { chain: Chain { dialect, keys: Arc::default() }, last: dialect.root }.followed_by(tokens)
    }

    /// With the full blocks of `tokens`, which come right behind it.
    fn followed_by(&self, tokens: &[u32]) -> Self {
        let Chain { dialect, keys } = &self.chain;
        let mut last = self.last;
        let blocks = tokens.chunks_exact(dialect.block_tokens() as usize).map(|block| {
            last = last.child(block);
            last.key()
        });
        let keys: Names = keys.iter().copied().chain(blocks).collect();
        Self { chain: Chain { dialect: *dialect, keys: keys.into() }, last }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Chains {
    tokens: Tokens,
    known: Mutex<Vec<Growing>>,
}

impl Chains {
    /// Of this prompt; nothing is computed yet.
    pub fn new(tokens: Tokens) -> Arc<Self> {
        Arc::new(Self { tokens, known: Mutex::default() })
    }

    /// In each of these dialects, of the prompt and what was `generated` after it.
    pub fn say(&self, dialects: &[Dialect], generated: &[u32]) -> Vec<Chain> {
        let whole = |dialect: &Dialect| {
            let prompt = self.of_prompt(*dialect);
            if generated.is_empty() {
                return prompt.chain;
            }
            let full = prompt.chain.keys.len() * dialect.block_tokens() as usize;
            prompt.followed_by(&[&self.tokens[full..], generated].concat()).chain
        };
        dialects.iter().map(whole).collect()
    }

    /// What the names known so far take, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.known.lock().iter().map(|growing| growing.chain.keys.held_bytes()).sum()
    }

    fn of_prompt(&self, dialect: Dialect) -> Growing {
        let mut known = self.known.lock();
        if let Some(prompt) = known.iter().find(|prompt| prompt.chain.dialect == dialect) {
            return prompt.clone();
        }
        let prompt = Growing::of(dialect, &self.tokens);
        known.push(prompt.clone());
        prompt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dialect(block_tokens: u32) -> Dialect {
        Dialect::new("layout", block_tokens).expect("blocks of some tokens")
    }

    /// The names as a server finds them.
    fn named(tokens: &[u32], block_tokens: usize) -> Vec<u64> {
        let mut hash = BlockHash::root("layout", "");
        let block = |tokens: &[u32]| {
            hash = hash.child(tokens);
            hash.key()
        };
        tokens.chunks_exact(block_tokens).map(block).collect()
    }

    #[test]
    fn a_prompt_is_named_as_servers_name_it_in_each_dialect() {
        let tokens: Vec<u32> = (0..41).collect();
        let chains = Chains::new(tokens.clone().into());
        for _ in 0..2 {
            let said = chains.say(&[dialect(16), dialect(8)], &[]);
            let (of_16, of_8) = (named(&tokens, 16), named(&tokens, 8));
            assert_eq!((&said[0].keys[..], &said[1].keys[..]), (&of_16[..], &of_8[..]));
        }
        assert_eq!(chains.known.lock().len(), 2, "each is computed once");
        assert!(Dialect::new("layout", 0).is_none());
    }

    #[test]
    fn what_was_generated_comes_behind_the_prompts_last_tokens() {
        let all: Vec<u32> = (0..70).collect();
        for prompt in [0, 15, 16, 41] {
            let chains = Chains::new(all[..prompt].into());
            let said = chains.say(&[dialect(16)], &all[prompt..]);
            assert_eq!(said[0].keys[..], named(&all, 16)[..], "after {prompt}");
            assert_eq!(chains.say(&[dialect(16)], &[])[0].keys.len(), prompt / 16);
        }
    }
}
