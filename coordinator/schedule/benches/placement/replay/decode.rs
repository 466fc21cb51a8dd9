//! A decode instance: a batch of sequences, each of which gains a token with each step, and those that wait for room.
//!
//! It computes a prompt itself if it is given one whole: the steps that do are as much longer as its chunk takes, and nobody
//! in the batch gains a token meanwhile. It keeps prompts that it has had for as long as what runs leaves room.

use std::collections::VecDeque;

use baton_proto::attention_pairs;
use baton_schedule::fleet::Timed;

use super::{
    cache::Cache,
    chooser::Report,
    machine::{Draws, Machine},
    prefill::{Computed, mean},
    trace::{BLOCK_TOKENS, Request},
};

/// Who waits for room.
#[derive(Debug)]
struct Waiting {
    index: usize,
    /// Its cache was handed over; else its prompt is to be computed here.
    landed: bool,
    /// By when its first token is wanted; of one that has landed 0.
    due_micros: u64,
}

#[derive(Debug)]
struct Sequence {
    index: usize,
    /// Computed, found or handed over.
    context_tokens: u32,
    /// Tokens of the prompt, or of what there is of it, that are still to be computed; 0 = it decodes.
    uncomputed: u32,
    /// Of `uncomputed`, those that the step which runs computes.
    chunk: u32,
    /// Of the prompt, those that were in the cache.
    found: u32,
    /// Tokens of the answer still to come.
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
    waiting: VecDeque<Waiting>,
    batch: Vec<Sequence>,
    taken_tokens: u32,
    pub(crate) cache: Cache,
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
            cache: Cache::new((machine.decode_cache_tokens / BLOCK_TOKENS) as usize),
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
        if let Some(index) = cache {
            self.wait(Waiting { index, landed: true, due_micros: 0 });
        }
    }

    /// A request is here whole. It is served in the order of `due_micros`, after those whose caches have landed.
    pub(crate) fn take(&mut self, index: usize, due_micros: u64) {
        self.taken += 1;
        self.wait(Waiting { index, landed: false, due_micros });
    }

    fn wait(&mut self, new: Waiting) {
        let at = self.waiting.partition_point(|waiting| waiting.due_micros <= new.due_micros);
        self.waiting.insert(at, new);
    }

    /// Leading tokens of a prompt that are here.
    pub(crate) fn held_tokens(&self, request: &Request) -> u32 {
        request.tokens_of(self.cache.held(&request.chain))
    }

    /// Begins a step unless one runs or there is nothing to do: how long it takes.
    pub(crate) fn step(&mut self, requests: &[Request]) -> Option<u64> {
        if self.stepping {
            return None;
        }
        self.admit(requests);
        if self.batch.is_empty() {
            return None;
        }
        let decoding = || self.batch.iter().filter(|sequence| sequence.uncomputed == 0);
        let sequences = decoding().count();
        let context: u64 = decoding().map(|sequence| u64::from(sequence.context_tokens)).sum();
        let mut micros = if sequences > 0 { self.machine.decode_micros(sequences, context) } else { 0.0 };
        let budget = self.machine.chunk_tokens.saturating_sub(sequences as u32);
        let (mut computing, mut pairs) = (0, 0);
        for sequence in self.batch.iter_mut().filter(|sequence| sequence.uncomputed > 0) {
            sequence.chunk = sequence.uncomputed.min(budget - computing);
            computing += sequence.chunk;
            micros += self.machine.prefill_micros(sequence.context_tokens, sequence.chunk);
            pairs +=
                attention_pairs(sequence.chunk.into(), u64::from(sequence.context_tokens + sequence.chunk));
        }
        if computing > 0 {
            micros += self.machine.prefill_step_micros;
        }
        let micros = self.machine.noisy(micros * self.slowness, &mut self.draws);
        self.stepping = true;
        // Those that do both are not counted, as servers do not.
        if computing == 0 {
            self.timed.decode_micros += micros;
            self.timed.decode_steps += 1;
            self.timed.decode_sequences += sequences as u64;
            self.timed.context_tokens += context;
            self.step_micros = mean(self.step_micros, micros as f64);
            self.tokens_per_second = mean(self.tokens_per_second, sequences as f64 * 1e6 / micros as f64);
        } else if sequences == 0 {
            self.timed.prefill_micros += micros;
            self.timed.prefill_steps += 1;
            self.timed.prefill_tokens += u64::from(computing);
            self.timed.prefill_pairs += pairs;
        }
        Some(micros)
    }

    /// Takes in whoever waits, in their order, as far as there is room.
    fn admit(&mut self, requests: &[Request]) {
        while let Some(Waiting { index, landed, .. }) = self.waiting.front() {
            let (index, request) = (*index, &requests[*index]);
            let wanted = request.prompt_tokens + request.output_tokens;
            let room = self.machine.decode_cache_tokens.saturating_sub(self.taken_tokens);
            if self.batch.len() == self.machine.decode_sequences_most
                || (wanted > room && !self.batch.is_empty())
            {
                break;
            }
            let prompt = request.prompt_tokens;
            let (context_tokens, found, left) = if *landed {
                (prompt + 1, 0, request.output_tokens - 1)
            } else {
                // The last token is always computed: its result is the first of the answer.
                let found = self.held_tokens(request).min(prompt - 1);
                (found, found, request.output_tokens)
            };
            let uncomputed = prompt.saturating_sub(context_tokens);
            self.waiting.pop_front();
            self.taken_tokens += wanted;
            self.batch.push(Sequence {
                index,
                context_tokens,
                uncomputed,
                chunk: 0,
                found,
                left,
                taken: wanted,
            });
            self.keep(requests);
        }
    }

    /// What runs keeps its blocks, and answers take theirs from those that are not in use.
    fn keep(&mut self, requests: &[Request]) {
        let (mut others, mut blocks) = (0, 0);
        for sequence in &self.batch {
            let request = &requests[sequence.index];
            let computed = sequence.context_tokens.min(request.prompt_tokens);
            let whole = computed == request.prompt_tokens;
            let here = if whole { request.chain.len() } else { (computed / BLOCK_TOKENS) as usize };
            self.cache.hold(&request.chain[..here]);
            others += sequence.taken - computed;
            blocks += here;
        }
        let room = self.machine.decode_cache_tokens.saturating_sub(others) / BLOCK_TOKENS;
        self.cache.limit(blocks.max(room as usize));
    }

    /// The step has ended: the prompts that have been computed with it, and the requests that have ended.
    pub(crate) fn stepped(&mut self, requests: &[Request]) -> (Vec<Computed>, Vec<usize>) {
        self.stepping = false;
        let mut computed = Vec::new();
        for sequence in &mut self.batch {
            if sequence.uncomputed == 0 {
                sequence.context_tokens += 1;
                sequence.left -= 1;
                continue;
            }
            let chunk = std::mem::take(&mut sequence.chunk);
            sequence.context_tokens += chunk;
            sequence.uncomputed -= chunk;
            if sequence.uncomputed == 0 {
                sequence.context_tokens += 1;
                sequence.left -= 1;
                let (index, found_tokens) = (sequence.index, sequence.found);
                computed.push(Computed { index, found_tokens, began_micros: 0 });
            }
        }
        if computed.is_empty() && self.batch.iter().all(|sequence| sequence.left > 0) {
            return (computed, Vec::new());
        }
        self.keep(requests);
        let ended = self.batch.extract_if(.., |sequence| sequence.left == 0);
        let ended: Vec<_> = ended.map(|sequence| (sequence.index, sequence.taken)).collect();
        self.taken_tokens -= ended.iter().map(|(_, taken)| taken).sum::<u32>();
        self.keep(requests);
        (computed, ended.into_iter().map(|(index, _)| index).collect())
    }

    pub(crate) fn report(&self, requests: &[Request]) -> Report {
        let waiting = u32::try_from(self.waiting.len() + self.batch.len()).unwrap_or(u32::MAX);
        let mut report = Report {
            sequences: self.announced.saturating_add(waiting),
            sequences_most: u32::try_from(self.machine.decode_sequences_most).unwrap_or(u32::MAX),
            taken: self.taken,
            timed: self.timed,
            cache_tokens: self.machine.decode_cache_tokens,
            cache_free_tokens: self.machine.decode_cache_tokens.saturating_sub(self.taken_tokens),
            tokens_per_second: self.tokens_per_second,
            step_micros: self.step_micros as u64,
            ..Report::default()
        };
        for waiting in self.waiting.iter().filter(|waiting| waiting.landed) {
            report.waiting_tokens += u64::from(requests[waiting.index].prompt_tokens);
        }
        let to_compute = self.waiting.iter().filter(|waiting| !waiting.landed).map(|waiting| {
            let request = &requests[waiting.index];
            (waiting.index, request.prompt_tokens - self.held_tokens(request))
        });
        let computing = self.batch.iter().map(|sequence| (sequence.index, sequence.uncomputed));
        for (index, tokens) in to_compute.chain(computing) {
            report.queued_uncached_tokens += u64::from(tokens);
            report.queued_uncached_pairs +=
                attention_pairs(tokens.into(), requests[index].prompt_tokens.into());
        }
        report
    }
}
