//! What a leg tells of its tokens: each as it comes, or many at a time where nobody reads them before.

use baton_proto::{ApiError, LegId};

use super::{Address, Sequence, TokenLogprobs};

/// What the engine has to say about one leg.
#[derive(Debug, Clone, PartialEq)]
pub struct LegUpdate {
    pub leg: LegId,
    pub choice: u32,
    /// Index in the completion of the first of `tokens`.
    pub first_position: u32,
    pub tokens: Vec<u32>,
    /// One for each of `tokens` if they are wanted, else none.
    pub logprobs: Vec<TokenLogprobs>,
    /// As [`LegEnd::Finished`] has it, with the first tokens of a choice at least; not of a decode leg.
    pub cached_tokens: Option<u32>,
    /// Set once, with the last update.
    pub end: Option<LegEnd>,
}

impl LegUpdate {
    /// Of a leg that is refused.
    pub fn failed(leg: LegId, choice: u32, error: ApiError) -> Self {
        let (tokens, logprobs, end) = (Vec::new(), Vec::new(), Some(LegEnd::Failed(error)));
        Self { leg, choice, first_position: 0, tokens, logprobs, cached_tokens: None, end }
    }
}

/// A token just chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub choice: u32,
    pub token: u32,
    pub logprobs: Option<TokenLogprobs>,
}

/// How a leg ended.
#[derive(Debug, Clone, PartialEq)]
pub enum LegEnd {
    Finished {
        reason: FinishReason,
        prompt_tokens: u32,
        /// Of the prompt, not computed because they were in the prefix cache; 0 for a decode leg, which computes none.
        cached_tokens: u32,
        completion_tokens: u32,
    },
    Failed(ApiError),
}

/// Why a leg ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, which is the last of the completion's tokens.
    Stop,
    /// `max_tokens`, or the context or the whole KV cache is full.
    Length,
    /// Decode has the cache and goes on.
    HandedOff,
    Cancelled,
}

/// Tokens that have been chosen and not been told. Of a sequence of several choices there are none.
#[derive(Debug)]
pub(super) struct Untold {
    at_a_time: usize,
    /// The first is told at once: it is news.
    begun: bool,
    /// Index in the completion of the first of `tokens`.
    first_position: u32,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
}

impl Untold {
    pub(super) fn new(at_a_time: u32) -> Self {
        let (tokens, logprobs) = (Vec::new(), Vec::new());
        Self { at_a_time: at_a_time as usize, begun: false, first_position: 0, tokens, logprobs }
    }

    /// Of a sequence that is forked off.
    pub(super) fn fork(&self) -> Self {
        Self { at_a_time: self.at_a_time, ..Self::new(0) }
    }

    fn push(&mut self, position: u32, token: u32, logprobs: Option<TokenLogprobs>) {
        if self.tokens.is_empty() {
            self.first_position = position;
        }
        self.tokens.push(token);
        self.logprobs.extend(logprobs);
    }

    fn take(&mut self) -> (u32, Vec<u32>, Vec<TokenLogprobs>) {
        (self.first_position, std::mem::take(&mut self.tokens), std::mem::take(&mut self.logprobs))
    }
}

impl Sequence {
    /// A choice's next token is there: what is to be told now, unless the choice has ended.
    pub(in crate::engine) fn tell(&mut self, sampled: Sampled) -> Option<(Address, LegUpdate)> {
        let Sampled { choice, token, logprobs } = sampled;
        if !self.choices.contains(&choice) {
            return None;
        }
        self.untold.push(self.first_untold(), token, logprobs);
        let begun = std::mem::replace(&mut self.untold.begun, self.choices.len() == 1);
        if begun && self.untold.tokens.len() < self.untold.at_a_time {
            return None;
        }
        let (address, update) = self.update(choice, None);
        let cached_tokens = (!begun).then(|| self.cached_tokens()).flatten();
        Some((address, LegUpdate { cached_tokens, ..update }))
    }

    /// A choice has ended: the update that tells it, with what has not been told.
    pub(in crate::engine) fn tell_end(&mut self, choice: u32, end: &LegEnd) -> (Address, LegUpdate) {
        self.log_end(end);
        self.update(choice, Some(end.clone()))
    }

    fn update(&mut self, choice: u32, end: Option<LegEnd>) -> (Address, LegUpdate) {
        let (first, tokens, logprobs) = self.untold.take();
        let first_position = if tokens.is_empty() { self.completion_tokens() } else { first };
        let leg = self.address.leg;
        (self.address, LegUpdate { leg, choice, first_position, tokens, logprobs, cached_tokens: None, end })
    }
}
