//! A prefill instance: prompts in the order in which they came, or are wanted, computed a chunk at a time.

use std::collections::VecDeque;

use baton_proto::attention_pairs;
use baton_schedule::fleet::Timed;

use super::{
    cache::Cache,
    chooser::Report,
    machine::{Draws, Machine},
    trace::{BLOCK_TOKENS, Request},
};

/// Weight of a step in the means that are reported.
const FRESH: f64 = 0.1;

/// A prompt here.
#[derive(Debug)]
struct Job {
    index: usize,
    /// Computed or found in the cache; `None`: it waits.
    done: Option<u32>,
    found: u32,
    began_micros: u64,
    /// By when its first token is wanted.
    due_micros: u64,
}

/// A prompt that has been computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Computed {
    pub(crate) index: usize,
    /// Of its tokens, those that were in the cache.
    pub(crate) found_tokens: u32,
    pub(crate) began_micros: u64,
}

#[derive(Debug)]
pub(crate) struct Prefill {
    machine: Machine,
    slowness: f64,
    draws: Draws,
    jobs: VecDeque<Job>,
    taken: u64,
    timed: Timed,
    pub(crate) cache: Cache,
    cache_blocks: usize,
    /// Tokens of the step that runs, and their pairs; 0 = none does.
    stepping: u32,
    stepping_pairs: u64,
    tokens_per_second: f64,
    pub(crate) busy_micros: u64,
}

impl Prefill {
    pub(crate) fn new(machine: Machine, slowness: f64, seed: u64, cache_blocks: usize) -> Self {
        Self {
            machine,
            slowness,
            draws: Draws::new(seed),
            jobs: VecDeque::new(),
            taken: 0,
            timed: Timed::default(),
            cache: Cache::new(cache_blocks),
            cache_blocks,
            stepping: 0,
            stepping_pairs: 0,
            tokens_per_second: 0.0,
            busy_micros: 0,
        }
    }

    /// In the order of `due_micros` behind those that have begun.
    pub(crate) fn take(&mut self, index: usize, due_micros: u64) {
        self.taken += 1;
        let behind = |job: &Job| job.done.is_some() || job.due_micros <= due_micros;
        let at = self.jobs.partition_point(behind);
        self.jobs.insert(at, Job { index, done: None, found: 0, began_micros: 0, due_micros });
    }

    /// Begins a step unless one runs or there is nothing to do: how long it takes.
    pub(crate) fn step(&mut self, requests: &[Request], now_micros: u64) -> Option<u64> {
        if self.stepping > 0 || self.jobs.is_empty() {
            return None;
        }
        let mut micros = self.machine.prefill_step_micros;
        self.stepping_pairs = 0;
        for job in &mut self.jobs {
            let request = &requests[job.index];
            let done = job.done.unwrap_or_else(|| {
                // The last token is always computed: its result is the first of the answer.
                job.found = request.tokens_of(self.cache.held(&request.chain)).min(request.prompt_tokens - 1);
                job.began_micros = now_micros;
                job.found
            });
            let tokens = (request.prompt_tokens - done).min(self.machine.chunk_tokens - self.stepping);
            micros += self.machine.prefill_micros(done, tokens);
            self.stepping += tokens;
            self.stepping_pairs += attention_pairs(tokens.into(), u64::from(done + tokens));
            job.done = Some(done + tokens);
            if done + tokens == request.prompt_tokens {
                self.cache.hold(&request.chain);
            }
            if self.stepping == self.machine.chunk_tokens {
                break;
            }
        }
        let micros = self.machine.noisy(micros * self.slowness, &mut self.draws);
        self.busy_micros += micros;
        self.timed.prefill_micros += micros;
        self.timed.prefill_steps += 1;
        self.timed.prefill_tokens += u64::from(self.stepping);
        self.timed.prefill_pairs += self.stepping_pairs;
        let rate = f64::from(self.stepping) * 1e6 / micros as f64;
        self.tokens_per_second = mean(self.tokens_per_second, rate);
        Some(micros)
    }

    /// The step has ended, and these prompts with it.
    pub(crate) fn stepped(&mut self, requests: &[Request]) -> Vec<Computed> {
        (self.stepping, self.stepping_pairs) = (0, 0);
        let mut computed = Vec::new();
        while let Some(job) = self.jobs.front()
            && job.done == Some(requests[job.index].prompt_tokens)
        {
            let (index, found_tokens, began_micros) = (job.index, job.found, job.began_micros);
            computed.push(Computed { index, found_tokens, began_micros });
            self.jobs.pop_front();
        }
        computed
    }

    pub(crate) fn report(&self, requests: &[Request]) -> Report {
        // What the step computes is not done before it ends.
        let mut report = Report {
            taken: self.taken,
            queued_uncached_tokens: self.stepping.into(),
            queued_uncached_pairs: self.stepping_pairs,
            timed: self.timed,
            ..Report::default()
        };
        let mut holding = 0;
        for job in &self.jobs {
            let request = &requests[job.index];
            let left = request.prompt_tokens - job.done.unwrap_or(0);
            report.sequences += 1;
            let uncached = match job.done {
                Some(_) => left.into(),
                None => u64::from(left - request.tokens_of(self.cache.held(&request.chain))),
            };
            report.queued_uncached_tokens += uncached;
            report.queued_uncached_pairs += attention_pairs(uncached, request.prompt_tokens.into());
            holding += job.done.map_or(0, |_| request.prompt_tokens);
        }
        let total = u32::try_from(self.cache_blocks).unwrap_or(u32::MAX).saturating_mul(BLOCK_TOKENS);
        report.cache_tokens = total;
        report.cache_free_tokens = total.saturating_sub(holding);
        report.tokens_per_second = self.tokens_per_second;
        report
    }
}

/// A running mean; the first value stands for itself.
pub(crate) fn mean(held: f64, fresh: f64) -> f64 {
    if held == 0.0 { fresh } else { held + FRESH * (fresh - held) }
}
