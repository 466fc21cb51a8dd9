//! A decode instance: a batch of sequences, each of which gains a token with each step, and those that wait for room.

use std::collections::VecDeque;

use baton_schedule::fleet::Timed;

use super::{
    chooser::Report,
    machine::{Draws, Machine},
    prefill::mean,
    trace::Request,
};

#[derive(Debug)]
struct Sequence {
    index: usize,
    context_tokens: u32,
    /// Tokens still to come.
    left: u32,
    /// Room that it has taken.
    taken: u32,
}

#[derive(Debug)]
pub(crate) struct Decode {
    machine: Machine,
    slowness: f64,
    draws: Draws,
    /// Requests whose caches are not here yet.
    announced: u32,
    taken: u64,
    timed: Timed,
    waiting: VecDeque<usize>,
    batch: Vec<Sequence>,
    taken_tokens: u32,
    stepping: bool,
    step_micros: f64,
    tokens_per_second: f64,
}

impl Decode {
    pub(crate) fn new(machine: Machine, slowness: f64, seed: u64) -> Self {
        Self {
            machine,
            slowness,
            draws: Draws::new(seed),
            announced: 0,
            taken: 0,
            timed: Timed::default(),
            waiting: VecDeque::new(),
            batch: Vec::new(),
            taken_tokens: 0,
            stepping: false,
            step_micros: 0.0,
            tokens_per_second: 0.0,
        }
    }

    /// A request will come here.
    pub(crate) fn announce(&mut self) {
        self.announced += 1;
        self.taken += 1;
    }

    /// A request that was announced is here, or will not come.
    pub(crate) fn land(&mut self, cache: Option<usize>) {
        self.announced -= 1;
        self.waiting.extend(cache);
    }

    /// Begins a step unless one runs or there is nothing to do: how long it takes.
    pub(crate) fn step(&mut self, requests: &[Request]) -> Option<u64> {
        if self.stepping {
            return None;
        }
        while let Some(index) = self.waiting.front().copied() {
            let request = &requests[index];
            let wanted = request.prompt_tokens + request.output_tokens;
            let room = self.machine.decode_cache_tokens.saturating_sub(self.taken_tokens);
            if self.batch.len() == self.machine.decode_sequences_most
                || (wanted > room && !self.batch.is_empty())
            {
                break;
            }
            self.waiting.pop_front();
            self.taken_tokens += wanted;
            let (context_tokens, left) = (request.prompt_tokens + 1, request.output_tokens - 1);
            self.batch.push(Sequence { index, context_tokens, left, taken: wanted });
        }
        if self.batch.is_empty() {
            return None;
        }
        let context: u64 = self.batch.iter().map(|sequence| u64::from(sequence.context_tokens)).sum();
        let micros = self.machine.decode_micros(self.batch.len(), context) * self.slowness;
        let micros = self.machine.noisy(micros, &mut self.draws);
        self.stepping = true;
        self.timed.decode_micros += micros;
        self.timed.decode_steps += 1;
        self.timed.decode_sequences += self.batch.len() as u64;
        self.timed.context_tokens += context;
        self.step_micros = mean(self.step_micros, micros as f64);
        self.tokens_per_second = mean(self.tokens_per_second, self.batch.len() as f64 * 1e6 / micros as f64);
        Some(micros)
    }

    /// The step has ended, and these requests with it.
    pub(crate) fn stepped(&mut self) -> Vec<usize> {
        self.stepping = false;
        for sequence in &mut self.batch {
            sequence.context_tokens += 1;
            sequence.left -= 1;
        }
        let ended = self.batch.extract_if(.., |sequence| sequence.left == 0);
        let ended: Vec<_> = ended.map(|sequence| (sequence.index, sequence.taken)).collect();
        self.taken_tokens -= ended.iter().map(|(_, taken)| taken).sum::<u32>();
        ended.into_iter().map(|(index, _)| index).collect()
    }

    pub(crate) fn report(&self, requests: &[Request]) -> Report {
        let queued = self.waiting.iter().map(|index| u64::from(requests[*index].prompt_tokens)).sum();
        let waiting = u32::try_from(self.waiting.len() + self.batch.len()).unwrap_or(u32::MAX);
        Report {
            sequences: self.announced.saturating_add(waiting),
            taken: self.taken,
            queued_tokens: 0,
            queued_uncached_pairs: 0,
            timed: self.timed,
            queued_uncached_tokens: queued,
            cache_tokens: self.machine.decode_cache_tokens,
            cache_free_tokens: self.machine.decode_cache_tokens.saturating_sub(self.taken_tokens),
            tokens_per_second: self.tokens_per_second,
            step_micros: self.step_micros as u64,
        }
    }
}
