//! Chooses the next token from logits.
//!
//! Called by [`super::step`] for each sequence that wants a token. Pure: the same logits, parameters, history, seed and
//! position give the same token on any instance, which is what lets a request move between instances unnoticed.
//!
//! Order of operations (that of vLLM): logit bias; stop tokens ruled out before `min_tokens`; repetition, frequency and
//! presence penalty; greedy choice if the temperature is 0; temperature; min_p; top_k; top_p over what top_k left,
//! renormalised; one draw. What the model itself holds likely, before all of that, is [`logprobs`]'s to say.
//! Penalties as defined by Hugging Face (repetition: over prompt and completion, logit / p if positive, * p if not) and
//! by OpenAI (frequency: - p * count, presence: - p if present, both over the completion alone).
//!
//! Randomness is counter based: one uniform number per (seed, position), see [`uniform`]. Nothing is carried from one
//! position to the next.

use std::{cmp::Ordering, collections::HashMap};

pub mod logprobs;

/// How tokens are chosen; every field is in range (see the adapter in [`crate::inference`]).
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy.
    pub temperature: f32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 0 = off.
    pub min_p: f32,
    /// 0 = off.
    pub frequency_penalty: f32,
    /// 0 = off.
    pub presence_penalty: f32,
    /// 1 = off.
    pub repetition_penalty: f32,
    pub seed: u64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens of the completion before any of `stop_tokens` can be chosen.
    pub min_tokens: u32,
    pub stop_tokens: Vec<u32>,
}

impl SamplingParams {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
        logit_bias: Vec::new(),
        min_tokens: 0,
        stop_tokens: Vec::new(),
    };

    /// Those of one choice of several to the same prompt: its seed is as far from the request's as it is from the first.
    /// Seeds are hashed (see [`uniform`]), so neighbours have nothing in common.
    #[must_use]
    pub fn of_choice(&self, choice: u32) -> Self {
        Self { seed: self.seed.wrapping_add(choice.into()), ..self.clone() }
    }

    /// Whether the choice depends on tokens seen before.
    pub fn penalises(&self) -> bool {
        self.frequency_penalty != 0.0 || self.presence_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

/// How often each token stands in the prompt and in the completion. Kept only for sequences with penalties.
#[derive(Debug, Clone, Default)]
pub struct TokenCounts(HashMap<u32, Count>);

#[derive(Debug, Clone, Default)]
struct Count {
    prompt: u32,
    completion: u32,
}

impl TokenCounts {
    pub fn new(prompt: &[u32], completion: &[u32]) -> Self {
        let mut counts = Self::default();
        for &token in prompt {
            counts.0.entry(token).or_default().prompt += 1;
        }
        for &token in completion {
            counts.add(token);
        }
        counts
    }

    /// Counts one more token of the completion.
    pub fn add(&mut self, token: u32) {
        self.0.entry(token).or_default().completion += 1;
    }
}

/// The logits have no largest finite value: nothing can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model computed logits that are not numbers")]
pub struct BadLogits;

/// Buffers that are kept from one call to the next.
#[derive(Debug, Default)]
pub struct Sampler {
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    /// exp(logit - largest logit); not normalised.
    weight: f32,
}

impl Sampler {
    /// The token at `position` of the completion (0 = the first).
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        counts: Option<&TokenCounts>,
        position: u32,
    ) -> Result<u32, BadLogits> {
        let counts = counts.filter(|_| params.penalises());
        let too_early = if position < params.min_tokens { &params.stop_tokens[..] } else { &[] };
        let logits = if counts.is_some() || !params.logit_bias.is_empty() || !too_early.is_empty() {
            self.logits.clear();
            self.logits.extend_from_slice(logits);
            bias(&mut self.logits, &params.logit_bias, too_early);
            if let Some(counts) = counts {
                penalise(&mut self.logits, params, counts);
            }
            &self.logits
        } else {
            logits
        };
        let (best, largest) = argmax(logits)?;
        if params.temperature < MIN_TEMPERATURE {
            return Ok(best);
        }
        weigh(logits, largest, params, &mut self.candidates);
        truncate(&mut self.candidates, params);
        Ok(draw(&self.candidates, uniform(params.seed, position)).unwrap_or(best))
    }
}

/// Below this a temperature counts as 0: dividing by it would overflow.
const MIN_TEMPERATURE: f32 = 1e-5;

/// One number in [0, 1), a pure function of its arguments, on a grid of 2^-53.
///
/// Position `n` of the stream of `seed` is SplitMix64's output number `n` of a generator that starts at the hash of
/// `seed` (the hash, so that neighbouring seeds have streams that do not overlap shifted by one).
pub fn uniform(seed: u64, position: u32) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    let start = mix(seed.wrapping_add(GOLDEN));
    let bits = mix(start.wrapping_add((u64::from(position) + 1).wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn bias(logits: &mut [f32], biases: &[(u32, f32)], ruled_out: &[u32]) {
    for &(token, bias) in biases {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for &token in ruled_out {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn penalise(logits: &mut [f32], params: &SamplingParams, counts: &TokenCounts) {
    for (&token, count) in &counts.0 {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        let sound = logit.is_finite();
        if count.prompt + count.completion > 0 {
            *logit = if *logit > 0.0 {
                *logit / params.repetition_penalty
            } else {
                *logit * params.repetition_penalty
            };
        }
        if count.completion > 0 {
            *logit -= params.frequency_penalty * count.completion as f32 + params.presence_penalty;
        }
        if sound {
            // A penalty may overflow; that is not the model's fault.
            *logit = logit.clamp(f32::MIN, f32::MAX);
        }
    }
}

/// The first of the largest logits. A NaN anywhere is an error: it means that the model's state is broken.
fn argmax(logits: &[f32]) -> Result<(u32, f32), BadLogits> {
    // Sixteen maxima side by side, which the compiler computes at once, as it would not with an index beside each.
    let mut maxima = [f32::NEG_INFINITY; 16];
    let mut broken = false;
    for some in logits.chunks(16) {
        for (most, &logit) in maxima.iter_mut().zip(some) {
            broken |= logit.is_nan();
            *most = if logit > *most { logit } else { *most };
        }
    }
    let largest = maxima.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let first = logits.iter().position(|&logit| logit == largest);
    match first {
        Some(token) if largest.is_finite() && !broken => Ok((token as u32, largest)),
        _ => Err(BadLogits),
    }
}

/// The tokens that min_p leaves, in the order of their ids, with their weights.
fn weigh(logits: &[f32], largest: f32, params: &SamplingParams, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    for (token, &logit) in logits.iter().enumerate() {
        // The likeliest token weighs 1, so min_p, a share of its probability, is compared with weights as they are.
        let weight = ((logit - largest) / params.temperature).exp();
        if weight > 0.0 && weight >= params.min_p {
            candidates.push(Candidate { token: token as u32, weight });
        }
    }
}

/// Heaviest first; equal weights by token id, so that the order is the same everywhere.
fn heavier(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}

fn truncate(candidates: &mut Vec<Candidate>, params: &SamplingParams) {
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, heavier);
        candidates.truncate(top_k);
    }
    if params.top_p < 1.0 {
        keep_top_p(candidates, params.top_p);
    } else if top_k > 0 {
        // Selection left an order that depends on the algorithm; the draw walks in an order of ours.
        candidates.sort_unstable_by_key(|candidate| candidate.token);
    }
}

/// Keeps the fewest candidates, heaviest first, whose probabilities add up to at least `top_p`; at least one.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let wanted = total * f64::from(top_p);
    let (mut kept, mut sum, mut sorted) = (0, 0.0, 0);
    while kept < candidates.len() && (kept == 0 || sum < wanted) {
        if kept == sorted {
            // Few candidates hold most of the weight: sort a growing head instead of the whole vocabulary.
            let head = (sorted.max(32) * 4).min(candidates.len() - sorted);
            let rest = &mut candidates[sorted..];
            if head < rest.len() {
                rest.select_nth_unstable_by(head - 1, heavier);
            }
            rest[..head].sort_unstable_by(heavier);
            sorted += head;
        }
        sum += f64::from(candidates[kept].weight);
        kept += 1;
    }
    candidates.truncate(kept);
}

/// Walks the candidates until their weight reaches the share `uniform` of the whole.
fn draw(candidates: &[Candidate], uniform: f64) -> Option<u32> {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    for candidate in candidates {
        sum += f64::from(candidate.weight);
        if target < sum {
            return Some(candidate.token);
        }
    }
    candidates.last().map(|candidate| candidate.token)
}

#[cfg(test)]
mod tests;
