//! Text that tokenises to as many tokens as are wanted: words that are one token each, drawn with the frequent ones first.
//!
//! Prompts and answers are functions of a seed, so that the worker, which is told the seed, and the client, which chose it,
//! know the same text without speaking to each other.

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde::{Deserialize, Serialize};

/// Tokens of every answer.
pub(crate) const ANSWER_TOKENS: u32 = 128;

/// A token and its text, a space and some letters.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Word {
    pub(crate) token: u32,
    pub(crate) text: String,
}

/// A model's name, revision and words.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Words {
    pub(crate) model: String,
    pub(crate) revision: String,
    pub(crate) vocabulary: u32,
    /// In the order of token ids, which is about that of how frequent they are.
    pub(crate) all: Vec<Word>,
}

impl Words {
    /// Which words answer the request of a seed.
    pub(crate) fn answer(&self, seed: u64) -> impl Iterator<Item = &Word> {
        let first = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        (0..ANSWER_TOKENS).map(move |position| self.answered(first, position))
    }

    /// The word at one position of an answer.
    pub(crate) fn answer_at(&self, seed: u64, position: u32) -> &Word {
        self.answered(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32, position)
    }

    fn answered(&self, first: u64, position: u32) -> &Word {
        &self.all[self.answer_index(first, position)]
    }

    fn answer_index(&self, first: u64, position: u32) -> usize {
        ((first + u64::from(position) * 101) % self.all.len() as u64) as usize
    }

    /// A prompt of so many words.
    pub(crate) fn prompt(&self, seed: u64, words: u32) -> Vec<&Word> {
        let mut draws = SmallRng::seed_from_u64(seed);
        let draw = |_| {
            let at: f64 = draws.random_range(0.0..1.0);
            &self.all[(at * at * self.all.len() as f64) as usize]
        };
        (0..words).map(draw).collect()
    }
}
