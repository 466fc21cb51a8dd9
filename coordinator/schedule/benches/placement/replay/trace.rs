//! Requests as they came: read from a file, or multiplied for a larger fleet. [`super::synthetic`] makes some up.
//!
//! The format is that of the traces published with Mooncake (FAST'25): one JSON object a line, `timestamp` in
//! milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, one for each block of 512 prompt tokens.
//! Equal ids are equal blocks behind equal prefixes.

use std::{collections::HashSet, path::Path};

use serde::Deserialize;

/// Prompt tokens of a block of the trace.
pub(crate) const BLOCK_TOKENS: u32 = 512;
/// Prompt and answer that a simulated instance has room for.
pub(crate) const LONGEST_TOKENS: u32 = 160_000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    #[error("the trace {path} cannot be read: {source}; `--trace` wants the path of a file")]
    Read { path: String, source: std::io::Error },
    #[error("line {line} of the trace: {source}")]
    Line { line: usize, source: serde_json::Error },
    #[error(
        "line {line} of the trace: `input_length` is {tokens}, and `hash_ids` has {blocks} blocks of 512 tokens"
    )]
    Blocks { line: usize, tokens: u32, blocks: usize },
    #[error(
        "line {line} of the trace: `input_length` and `output_length` are {tokens} together, not 1 to {LONGEST_TOKENS}"
    )]
    Length { line: usize, tokens: u64 },
    #[error("the trace has no requests")]
    Empty,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// From the start of the trace.
    pub(crate) at_micros: u64,
    pub(crate) prompt_tokens: u32,
    /// At least 1.
    pub(crate) output_tokens: u32,
    /// Ids of its blocks, the last of which may be a part of one.
    pub(crate) chain: Vec<u64>,
    /// Leading prompt tokens that earlier requests had, too: the most that could be cached anywhere.
    pub(crate) seen_tokens: u32,
}

impl Request {
    pub(crate) fn new(at_micros: u64, prompt_tokens: u32, output_tokens: u32, chain: Vec<u64>) -> Self {
        Self { at_micros, prompt_tokens, output_tokens, chain, seen_tokens: 0 }
    }

    /// Prompt tokens in this many leading blocks of the chain.
    pub(crate) fn tokens_of(&self, blocks: usize) -> u32 {
        u32::try_from(blocks).unwrap_or(u32::MAX).saturating_mul(BLOCK_TOKENS).min(self.prompt_tokens)
    }
}

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// Requests in the order of their arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) requests: Vec<Request>,
}

impl Trace {
    pub(crate) fn new(mut requests: Vec<Request>) -> Self {
        requests.sort_by_key(|request| request.at_micros);
        let mut seen = HashSet::new();
        for request in &mut requests {
            let known = request.chain.iter().take_while(|block| seen.contains(*block)).count();
            request.seen_tokens = request.tokens_of(known);
            seen.extend(request.chain.iter().copied());
        }
        Self { requests }
    }

    pub(crate) fn read(path: &Path) -> Result<Self, TraceError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| TraceError::Read { path: path.display().to_string(), source })?;
        Self::parse(&text)
    }

    pub(crate) fn parse(text: &str) -> Result<Self, TraceError> {
        let lines = text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty());
        let requests = lines.map(|(index, text)| request(index + 1, text)).collect::<Result<Vec<_>, _>>()?;
        if requests.is_empty() { Err(TraceError::Empty) } else { Ok(Self::new(requests)) }
    }

    /// The same traffic `times` over, with nothing in common between the copies.
    pub(crate) fn times(&self, times: u32) -> Self {
        let copy = |request: &Request, copy: u32| {
            let chain = request.chain.iter().map(|block| block * u64::from(times) + u64::from(copy));
            Request { chain: chain.collect(), ..request.clone() }
        };
        let requests = &self.requests;
        Self::new((0..times).flat_map(|of| requests.iter().map(move |request| copy(request, of))).collect())
    }

    /// Of all prompt tokens, the share that earlier requests had, too.
    pub(crate) fn seen_share(&self) -> f64 {
        let sum = |of: fn(&Request) -> u32| self.requests.iter().map(|r| f64::from(of(r))).sum::<f64>();
        sum(|request| request.seen_tokens) / sum(|request| request.prompt_tokens)
    }
}

fn request(line: usize, text: &str) -> Result<Request, TraceError> {
    let read: Line = serde_json::from_str(text).map_err(|source| TraceError::Line { line, source })?;
    let tokens = u64::from(read.input_length) + u64::from(read.output_length);
    if read.input_length == 0 || tokens > u64::from(LONGEST_TOKENS) {
        return Err(TraceError::Length { line, tokens });
    }
    if read.input_length.div_ceil(BLOCK_TOKENS) as usize != read.hash_ids.len() {
        return Err(TraceError::Blocks { line, tokens: read.input_length, blocks: read.hash_ids.len() });
    }
    let at_micros = read.timestamp.saturating_mul(1_000);
    Ok(Request::new(at_micros, read.input_length, read.output_length.max(1), read.hash_ids))
}
