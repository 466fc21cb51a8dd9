//! How long things take in the simulation, and the draws of chance in it.
//!
//! The figures are round ones for a model of 70 billion parameters on a node of eight accelerators. Prefill computes in
//! chunks: a step has a fixed part, one for each token, and one for each pair of a token and one before it. A decode
//! step is bound by memory (the weights, and the caches of the batch) or, in large batches, by arithmetic, whichever is
//! longer. Every step is off by some noise, and of each eight instances of a role one is slower than the rest.

use super::trace::{BLOCK_TOKENS, Request};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Machine {
    /// Prompt tokens of a prefill step, of as many prompts as it takes.
    pub(crate) chunk_tokens: u32,
    pub(crate) prefill_step_micros: f64,
    pub(crate) prefill_token_micros: f64,
    /// For each token, for each token before it.
    pub(crate) attention_micros: f64,
    /// Reading the weights.
    pub(crate) decode_step_micros: f64,
    /// Reading the cache of one token.
    pub(crate) decode_context_micros: f64,
    /// Arithmetic of one sequence.
    pub(crate) decode_sequence_micros: f64,
    pub(crate) decode_sequences_most: usize,
    /// Tokens whose caches a decode instance has room for.
    pub(crate) decode_cache_tokens: u32,
    /// Until a cache that has landed is decoded from.
    pub(crate) handoff_micros: u64,
    /// Sending the cache of one token, alone on the way.
    pub(crate) transfer_token_micros: f64,
    /// Standard deviation of a step's time, as a share of it.
    pub(crate) noise: f64,
    /// How many times as long the slow instances take.
    pub(crate) slow: f64,
}

impl Machine {
    pub(crate) const NODE: Self = Self {
        chunk_tokens: 512,
        prefill_step_micros: 2_000.0,
        prefill_token_micros: 125.0,
        attention_micros: 1.2e-3,
        decode_step_micros: 22_000.0,
        decode_context_micros: 0.08,
        decode_sequence_micros: 900.0,
        decode_sequences_most: 256,
        decode_cache_tokens: 200_000,
        handoff_micros: 2_000,
        // 320 KiB a token over 25 GB/s.
        transfer_token_micros: 13.1,
        noise: 0.1,
        slow: 1.5,
    };

    /// Time for `tokens` of a prompt behind `before` others, without the step's fixed part.
    pub(crate) fn prefill_micros(&self, before: u32, tokens: u32) -> f64 {
        let (before, tokens) = (f64::from(before), f64::from(tokens));
        tokens * (self.prefill_token_micros + self.attention_micros * (before + tokens / 2.0))
    }

    /// Time for a prompt alone on an instance that has nothing of it, as slow as most are.
    pub(crate) fn alone_micros(&self, prompt_tokens: u32) -> f64 {
        let steps = f64::from(prompt_tokens.div_ceil(self.chunk_tokens));
        steps * self.prefill_step_micros + self.prefill_micros(0, prompt_tokens)
    }

    pub(crate) fn decode_micros(&self, sequences: usize, context_tokens: u64) -> f64 {
        let memory = self.decode_step_micros + self.decode_context_micros * context_tokens as f64;
        memory.max(self.decode_sequence_micros * sequences as f64)
    }

    /// How many times as long as others the `index`-th of `count` instances takes.
    pub(crate) fn slowness(&self, index: usize, count: usize, seed: u64) -> f64 {
        let shifted = index + (seed % 8) as usize;
        if shifted % 8 == 7 && count >= 8 { self.slow } else { 1.0 }
    }

    pub(crate) fn noisy(&self, micros: f64, draws: &mut Draws) -> u64 {
        let factor = if self.noise == 0.0 { 1.0 } else { 1.0 + self.noise * draws.normal() };
        (micros * factor.max(0.5)).round().max(1.0) as u64
    }
}

/// What an answer in time is: the first token within a second and what a prompt of its length may take, every further one
/// within 50 ms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target;

impl Target {
    pub(crate) const TPOT_MICROS: f64 = 50_000.0;

    pub(crate) fn ttft_micros(request: &Request) -> f64 {
        1e6 + 1.5e6 / (16.0 * f64::from(BLOCK_TOKENS)) * f64::from(request.prompt_tokens)
    }
}

/// Draws of chance by a seed (SplitMix64: Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub(crate) struct Draws(u64);

impl Draws {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Above 0, and 1 at most.
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 1.0) / (1u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// Mean 0, deviation 1 (Box and Muller).
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}
