//! What others choose by, written down here from their published formulas; nothing of their code is in it.
//!
//! - `least-load`: SMG (`policies/least_load.rs`): (queued tokens, less what is cached + tokens sent since the last
//!   report) / throughput + 0.15 k/(1-k), k being how full its cache is.
//! - `cache-aware`: SMG (`policies/cache_aware.rs`), as it is where servers tell what they have cached: while requests under way
//!   differ by more than 64 and by more than half, whoever has least to do; else whoever holds most of the prompt, of equals
//!   whoever has the fewest requests; where nobody holds any of it the former. (The 0.3 of a prompt below which it does not go by
//!   what is held are those of its approximate tree, which knows only what was sent where.)
//! - `dynamo`: NVIDIA Dynamo's KV router (`kv-router/src/scheduling/selector/default.rs`): in blocks, tokens under way
//!   to be computed + prompt - overlap, not below 0; decode by blocks in use + those of the prompt. `dynamo-decay`: the
//!   overlap counts 1/(1 + excess of tokens under way above the least / prompt) of itself.
//! - `smetric`: vLLM's router (`src/policies/smetric.rs`): work = c n + a n (l - n/2), n of l tokens not being held.
//!   Whoever holds most of the prompt, if that is above half of what is expected and all work there, at the rate that
//!   it has shown (the 90th percentile of 64), is in time, or nobody's is; else whoever has least work.
//! - `least-requests` and `round-robin` are what they are called.
//!
//! They are given more than they have: an index that is exact, loads twice a second (SMG asks every 10 s), the true
//! coefficients of work, and the target that they are judged by. Where a formula speaks of prefill alone, decode goes to
//! whoever has the fewest requests. Ties take turns.

use std::collections::{HashMap, VecDeque};

use super::{
    cache::Changes,
    chooser::{Choice, Chooser, Place, Report, Sight},
    machine::{Machine, Target},
    trace::BLOCK_TOKENS,
};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Rule {
    RoundRobin,
    LeastRequests,
    LeastLoad,
    CacheAware,
    /// With this weight of the decay; 0 = none.
    Dynamo(f64),
    Smetric,
}

const CACHE_PRESSURE_SECONDS: f64 = 0.15;
/// Taken for an instance that has not said its throughput.
const THROUGHPUT: f64 = 2_000.0;
const UNBALANCED_REQUESTS: u32 = 64;
const UNBALANCED_RATIO: f64 = 1.5;
const HIT_LEAST: f64 = 0.5;
const RATES: usize = 64;
const RATES_LEAST: usize = 8;
const RATE_PERCENTILE: f64 = 0.9;

/// What is known of an instance from what was sent there.
#[derive(Debug, Default)]
struct Book {
    requests: u32,
    /// Under way: for prefill those to be computed, for decode whole prompts.
    tokens: u64,
    sent_since_report: u64,
    report: Report,
    /// Microseconds under way.
    work: f64,
    /// Of late: work done for each microsecond between placement and first token.
    rates: VecDeque<f64>,
}

impl Book {
    fn drain_seconds(&self) -> f64 {
        let report = &self.report;
        let waiting = report.queued_uncached_tokens + report.waiting_tokens;
        let queued = (waiting + self.sent_since_report) as f64;
        let throughput = if report.tokens_per_second > 0.0 { report.tokens_per_second } else { THROUGHPUT };
        let used = f64::from(report.cache_tokens - report.cache_free_tokens);
        let full = (used / f64::from(report.cache_tokens.max(1))).min(0.999);
        queued / throughput + CACHE_PRESSURE_SECONDS * full / (1.0 - full)
    }

    fn rate(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.rates.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let at = (sorted.len().saturating_sub(1) as f64 * RATE_PERCENTILE).round() as usize;
        sorted.get(at).copied().filter(|_| sorted.len() >= RATES_LEAST)
    }

    fn done(&mut self, work: f64, micros: u64) {
        if self.rates.len() == RATES {
            self.rates.pop_front();
        }
        self.rates.push_back(work / micros.max(1) as f64);
    }
}

/// A request under way.
#[derive(Debug)]
struct Sent {
    prefill: usize,
    decode: usize,
    prompt_tokens: u64,
    uncached_tokens: u64,
    work: f64,
    at_micros: u64,
    prefilled: bool,
}

pub(crate) struct Peer {
    rule: Rule,
    machine: Machine,
    prefills: Vec<Book>,
    decodes: Vec<Book>,
    under_way: HashMap<usize, Sent>,
    turn: usize,
}

impl Peer {
    pub(crate) fn new(rule: Rule, machine: Machine, prefills: usize, decodes: usize) -> Self {
        let books = |count: usize| (0..count).map(|_| Book::default()).collect();
        let (prefills, decodes) = (books(prefills), books(decodes));
        Self { rule, machine, prefills, decodes, under_way: HashMap::new(), turn: 0 }
    }

    fn prefill(&self, sight: &Sight<'_>) -> usize {
        let books = &self.prefills;
        match self.rule {
            Rule::RoundRobin => self.turn % books.len(),
            Rule::LeastRequests => self.least(books, |_, book| f64::from(book.requests)),
            Rule::LeastLoad => self.least(books, |_, book| book.drain_seconds()),
            Rule::CacheAware => self.cache_aware(sight),
            Rule::Dynamo(weight) => self.dynamo(sight, weight),
            Rule::Smetric => self.smetric(sight),
        }
    }

    fn decode(&self) -> usize {
        let books = &self.decodes;
        match self.rule {
            Rule::RoundRobin => self.turn % books.len(),
            Rule::LeastLoad => self.least(books, |_, book| book.drain_seconds()),
            Rule::Dynamo(_) => self.least(books, |_, book| book.tokens as f64),
            Rule::LeastRequests | Rule::CacheAware | Rule::Smetric => {
                self.least(books, |_, book| f64::from(book.requests))
            }
        }
    }

    /// Whoever has the lowest score.
    fn least(&self, books: &[Book], score: impl Fn(usize, &Book) -> f64) -> usize {
        let turns = (0..books.len()).map(|offset| (self.turn + offset) % books.len());
        let scored = turns.map(|index| (index, score(index, &books[index])));
        scored.min_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(index, _)| index)
    }

    fn cache_aware(&self, sight: &Sight<'_>) -> usize {
        let books = &self.prefills;
        let requests = || books.iter().map(|book| book.requests);
        let (most, least) = (requests().max().unwrap_or(0), requests().min().unwrap_or(0));
        let unbalanced =
            most - least > UNBALANCED_REQUESTS && f64::from(most) > UNBALANCED_RATIO * f64::from(least);
        let overlap = (0..books.len()).map(|index| sight.held_tokens(index)).max().unwrap_or(0);
        if unbalanced || overlap == 0 {
            return self.least(books, |_, book| book.tokens as f64);
        }
        let requests = |index, book: &Book| match sight.held_tokens(index) == overlap {
            true => f64::from(book.requests),
            false => f64::INFINITY,
        };
        self.least(books, requests)
    }

    fn dynamo(&self, sight: &Sight<'_>, weight: f64) -> usize {
        let books = &self.prefills;
        let floor = books.iter().map(|book| book.tokens).min().unwrap_or(0);
        let prompt = f64::from(sight.request.prompt_tokens);
        let prompt_blocks = f64::from(sight.request.prompt_tokens.div_ceil(BLOCK_TOKENS));
        self.least(books, |index, book| {
            let excess = (book.tokens - floor) as f64 / f64::from(BLOCK_TOKENS) / prompt_blocks;
            let credit = f64::from(sight.held_tokens(index)) / (1.0 + weight * excess);
            (book.tokens as f64 + prompt - credit).max(0.0)
        })
    }

    fn smetric(&self, sight: &Sight<'_>) -> usize {
        let books = &self.prefills;
        let target = Target::ttft_micros(sight.request);
        let all = |index: usize| books[index].work + self.work(sight, index);
        let in_time = |index: usize| books[index].rate().is_none_or(|rate| all(index) / rate <= target);
        let best = self.least(books, |index, _| -f64::from(sight.held_tokens(index)));
        let hit = f64::from(sight.held_tokens(best)) > HIT_LEAST * f64::from(sight.request.seen_tokens);
        // What every conversation begins with makes none of them one that goes on.
        let goes_on = sight.request.seen_tokens > BLOCK_TOKENS;
        if goes_on && hit && (in_time(best) || !(0..books.len()).any(in_time)) {
            best
        } else {
            self.least(books, |index, _| all(index))
        }
    }

    /// Microseconds that the rest of a prompt takes to compute.
    fn work(&self, sight: &Sight<'_>, prefill: usize) -> f64 {
        let held = sight.held_tokens(prefill);
        self.machine.prefill_micros(held, sight.request.prompt_tokens - held)
    }
}

impl Chooser for Peer {
    fn choose(&mut self, sight: &Sight<'_>) -> Option<Choice> {
        let (to, then) = (self.prefill(sight), self.decode());
        self.turn += 1;
        let prompt_tokens = u64::from(sight.request.prompt_tokens);
        let uncached_tokens = prompt_tokens - u64::from(sight.held_tokens(to));
        let work = self.work(sight, to);
        let (prefill, decode) = (&mut self.prefills[to], &mut self.decodes[then]);
        prefill.requests += 1;
        prefill.tokens += uncached_tokens;
        prefill.sent_since_report += prompt_tokens;
        prefill.work += work;
        decode.requests += 1;
        decode.tokens += prompt_tokens;
        decode.sent_since_report += prompt_tokens;
        let at_micros = sight.now_micros;
        let sent = Sent {
            prefill: to,
            decode: then,
            prompt_tokens,
            uncached_tokens,
            work,
            at_micros,
            prefilled: false,
        };
        self.under_way.insert(sight.index, sent);
        Some(Choice { prefill: Some(to), decode: then, in_time: false })
    }

    fn bind(&mut self, _: u64) -> Option<(usize, Choice)> {
        None
    }

    fn prefilled(&mut self, index: usize, now_micros: u64) {
        if let Some(sent) = self.under_way.get_mut(&index)
            && !std::mem::replace(&mut sent.prefilled, true)
        {
            let book = &mut self.prefills[sent.prefill];
            book.requests -= 1;
            book.tokens -= sent.uncached_tokens;
            book.work = (book.work - sent.work).max(0.0);
            book.done(sent.work, now_micros - sent.at_micros);
        }
    }

    fn handed_off(&mut self, _: usize, _: u64) {}

    fn finished(&mut self, index: usize, _: u32, _: u64) {
        if let Some(sent) = self.under_way.remove(&index) {
            let book = &mut self.decodes[sent.decode];
            book.requests -= 1;
            book.tokens -= sent.prompt_tokens;
        }
    }

    fn heard(&mut self, place: Place, report: &Report, _: u64) {
        let book = match place {
            Place::Prefill(index) => &mut self.prefills[index],
            Place::Decode(index) => &mut self.decodes[index],
        };
        book.report = *report;
        book.sent_since_report = 0;
    }

    fn cached(&mut self, _: Place, _: &Changes, _: u64) {}
}
