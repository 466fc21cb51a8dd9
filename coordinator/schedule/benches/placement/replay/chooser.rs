//! Who says where a request goes, what it sees, and what it is told afterwards.

use baton_schedule::fleet::Timed;

use super::{cache::Changes, prefill::Prefill, trace::Request};

/// Where a request goes: indices of a prefill and a decode instance, or of one for decode that computes the prompt itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) prefill: Option<usize>,
    pub(crate) decode: usize,
    /// Instances are told by when the first token is wanted, and take prompts in that order.
    pub(crate) in_time: bool,
}

/// An instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Prefill(usize),
    Decode(usize),
}

/// What an instance says of itself, every half second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Report {
    /// Running and waiting.
    pub(crate) sequences: u32,
    /// Of them so many are decoded at a time, at most; 0 = no answer is.
    pub(crate) sequences_most: u32,
    /// Requests that it was ever given: those that this report knows of.
    pub(crate) taken: u64,
    /// Prompt tokens taken on and not computed, without those that are cached.
    pub(crate) queued_uncached_tokens: u64,
    /// Pairs of these and the tokens before them.
    pub(crate) queued_uncached_pairs: u64,
    /// Prompt tokens of caches that were handed over and wait for room.
    pub(crate) waiting_tokens: u64,
    /// What it has timed since it began.
    pub(crate) timed: Timed,
    /// Room for caches.
    pub(crate) cache_tokens: u32,
    pub(crate) cache_free_tokens: u32,
    /// Mean of late, of prompts or of answers; 0 = not measured.
    pub(crate) tokens_per_second: f64,
    /// Mean decode step of late; 0 = not measured.
    pub(crate) step_micros: u64,
}

/// A request that has come, as one sees it who chooses.
pub(crate) struct Sight<'a> {
    pub(crate) now_micros: u64,
    /// Which one it is: later calls name it by that.
    pub(crate) index: usize,
    pub(crate) request: &'a Request,
    pub(crate) prefills: &'a [Prefill],
}

impl Sight<'_> {
    /// Prompt tokens that a prefill instance has cached now. An index is never late, and never wrong, for anybody.
    pub(crate) fn held_tokens(&self, prefill: usize) -> u32 {
        self.request.tokens_of(self.prefills[prefill].cache.held(&self.request.chain))
    }
}

pub(crate) trait Chooser {
    /// `None`: it waits, and [`Self::bind`] tells when it does not any more.
    fn choose(&mut self, sight: &Sight<'_>) -> Option<Choice>;
    /// Who of those that wait goes where now.
    fn bind(&mut self, now_micros: u64) -> Option<(usize, Choice)>;
    /// The request's first token is there.
    fn prefilled(&mut self, index: usize, now_micros: u64);
    /// The request's cache is with decode.
    fn handed_off(&mut self, index: usize, now_micros: u64);
    /// The request's last token is there; it has so many.
    fn finished(&mut self, index: usize, output_tokens: u32, now_micros: u64);
    fn heard(&mut self, place: Place, report: &Report, now_micros: u64);
    /// An instance says what came into its cache and what went.
    fn cached(&mut self, place: Place, changes: &Changes, now_micros: u64);
}
