//! Traffic made up by a seed, in the proportions of an hour of real chats, for whoever has no trace at hand.
//!
//! Of that hour: 3.4 requests a second, which its clock rounds down to windows of 3 s; prompts with a median of 6,900
//! tokens, a mean of 12,000 and a 99th percentile of 85,000; answers of 340 tokens; one block that all have in common;
//! a third of all prompt tokens seen before, in longer and longer turns of the same conversations.

use super::{
    machine::Draws,
    trace::{BLOCK_TOKENS, Request, Trace},
};

const REQUESTS_PER_SECOND: f64 = 3.4;
const WINDOW_MICROS: u64 = 3_000_000;
/// Of requests, how many go on with a conversation.
const GOES_ON: f64 = 0.36;
/// Conversations that may go on.
const OPEN: usize = 400;
const PROMPT_TOKENS_MOST: f64 = 126_000.0;
const OUTPUT_TOKENS_MOST: f64 = 2_000.0;
/// Of the logarithm of prompt lengths.
const PROMPT_MEDIAN: f64 = 5_200.0;
const PROMPT_SPREAD: f64 = 1.1;

pub(crate) fn trace(requests: usize, seed: u64) -> Trace {
    let mut draws = Draws::new(seed);
    let mut fresh = 1;
    let mut open: Vec<(u32, Vec<u64>)> = Vec::new();
    let mut micros = 0.0;
    let mut made = Vec::with_capacity(requests);
    for _ in 0..requests {
        micros += -draws.unit().ln() * 1e6 / REQUESTS_PER_SECOND;
        let length = PROMPT_MEDIAN * (PROMPT_SPREAD * draws.normal()).exp();
        let (tokens, mut chain) = if !open.is_empty() && draws.unit() < GOES_ON {
            let (tokens, chain) = open.swap_remove(draws.below(open.len()));
            // The last block may have been a part of one: it is another as the conversation grows.
            let whole = (tokens / BLOCK_TOKENS) as usize;
            (f64::from(tokens) + length / 2.0, chain[..whole.max(1).min(chain.len())].to_vec())
        } else {
            (length, vec![0])
        };
        let tokens = tokens.clamp(600.0, PROMPT_TOKENS_MOST) as u32;
        while chain.len() < tokens.div_ceil(BLOCK_TOKENS) as usize {
            chain.push(fresh);
            fresh += 1;
        }
        let output = (-draws.unit().ln() * 340.0).clamp(1.0, OUTPUT_TOKENS_MOST) as u32;
        if open.len() == OPEN {
            open.swap_remove(draws.below(OPEN));
        }
        open.push((tokens, chain.clone()));
        made.push(Request::new(micros as u64 / WINDOW_MICROS * WINDOW_MICROS, tokens, output, chain));
    }
    Trace::new(made)
}
