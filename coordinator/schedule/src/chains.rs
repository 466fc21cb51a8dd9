//! The names of a prompt's KV blocks, as the instances say them that might hold some.
//!
//! Made by the coordinator as it prepares a prompt, asked by whoever books it. What a block is called depends on who cuts
//! it: a [`Dialect`] is the root that follows from an instance's model and KV layout, and the tokens of a block. The
//! hashes are [`BlockHash`]es, the servers' own; of each the first 64 bits are kept: two that are equal by chance, or by
//! somebody's work, cost a misprediction and nothing else, as only the server's whole hash decides what is taken.
//!
//! A chain is computed once for a request and dialect, when it is first asked for: a fraction of a microsecond a block, and less
//! of what was named before ([`KnownStrides`]). The coordinator asks first, on the core that has tokenised the prompt.

mod names;
mod strides;

use std::{num::NonZero, sync::Arc};

use baton_proto::{BlockHash, Tokens};
use parking_lot::Mutex;

pub use names::Names;
pub(crate) use names::scrambled;
pub use strides::KnownStrides;
use strides::STRIDE;

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

    /// The names of the full blocks of `tokens`, the first of which comes right behind `last`, which is the last of them then.
    fn name(self, last: &mut BlockHash, tokens: &[u32]) -> impl Iterator<Item = u64> {
        tokens.chunks_exact(self.block_tokens() as usize).map(move |block| {
            *last = last.child(block);
            last.key()
        })
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
    fn of(dialect: Dialect, tokens: &[u32], known: &KnownStrides) -> Self {
        let mut last = dialect.root;
        let mut names = Vec::with_capacity(tokens.len() / dialect.block_tokens() as usize);
        let strides = tokens.chunks_exact(STRIDE * dialect.block_tokens() as usize);
        let rest = strides.remainder();
        for tokens in strides {
            let stride = known.of(last, tokens);
            names.extend(stride.names);
            last = stride.last;
        }
        names.extend(dialect.name(&mut last, rest));
        Self { chain: Chain { dialect, keys: Arc::new(names.into_iter().collect()) }, last }
    }

    /// With the full blocks of `tokens`, which come right behind it.
    fn followed_by(&self, tokens: &[u32]) -> Chain {
        let Chain { dialect, keys } = &self.chain;
        let mut last = self.last;
        let keys: Names = keys.iter().copied().chain(dialect.name(&mut last, tokens)).collect();
        Chain { dialect: *dialect, keys: keys.into() }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Chains {
    tokens: Tokens,
    said: Mutex<Vec<Growing>>,
}

impl Chains {
    /// Of this prompt; nothing is computed yet.
    pub fn new(tokens: Tokens) -> Arc<Self> {
        Arc::new(Self { tokens, said: Mutex::default() })
    }

    /// In each of these dialects, of the prompt and what was `generated` after it.
    pub fn say(&self, dialects: &[Dialect], generated: &[u32], known: &KnownStrides) -> Vec<Chain> {
        let whole = |dialect: &Dialect| {
            let prompt = self.of_prompt(*dialect, known);
            if generated.is_empty() {
                return prompt.chain;
            }
            let full = prompt.chain.keys.len() * dialect.block_tokens() as usize;
            prompt.followed_by(&[&self.tokens[full..], generated].concat())
        };
        dialects.iter().map(whole).collect()
    }

    /// What the names known so far take, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.said.lock().iter().map(|growing| growing.chain.keys.held_bytes()).sum()
    }

    fn of_prompt(&self, dialect: Dialect, known: &KnownStrides) -> Growing {
        let mut said = self.said.lock();
        if let Some(prompt) = said.iter().find(|prompt| prompt.chain.dialect == dialect) {
            return prompt.clone();
        }
        let prompt = Growing::of(dialect, &self.tokens, known);
        said.push(prompt.clone());
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
        let known = KnownStrides::default();
        for length in [41, 1100, 3000] {
            let tokens: Vec<u32> = (0..length).collect();
            let (of_16, of_8) = (named(&tokens, 16), named(&tokens, 8));
            let chains = [0, 1].map(|_| Chains::new(tokens.clone().into()));
            // The second prompt finds what the first had named.
            for chains in [&chains[0], &chains[0], &chains[1]] {
                let said = chains.say(&[dialect(16), dialect(8)], &[], &known);
                assert_eq!((&said[0].keys[..], &said[1].keys[..]), (&of_16[..], &of_8[..]));
                assert_eq!(chains.said.lock().len(), 2, "each is computed once");
            }
        }
        assert!(Dialect::new("layout", 0).is_none());
    }

    #[test]
    fn what_was_generated_comes_behind_the_prompts_last_tokens() {
        let (all, known) = ((0..1200).collect::<Vec<u32>>(), KnownStrides::default());
        for prompt in [0, 15, 16, 41, 1024, 1100] {
            let chains = Chains::new(all[..prompt].into());
            let said = chains.say(&[dialect(16)], &all[prompt..], &known);
            assert_eq!(said[0].keys[..], named(&all, 16)[..], "after {prompt}");
            assert_eq!(chains.say(&[dialect(16)], &[], &known)[0].keys.len(), prompt / 16);
        }
    }
}
