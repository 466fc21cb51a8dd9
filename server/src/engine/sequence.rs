//! One request's leg inside the engine: what it is asked for, how far it is, what it holds.
//!
//! States:
//! ```text
//! Announced (decode only) ── offer is here ──> Waiting
//!
//!            whole, prefill                           last chunk of a prefill leg
//! Waiting ───────────────────────────────> Running ─────────────────────────────> HandingOff
//!    │  ^                                   ^  │                                       │
//!    │  └────────── preempted ──────────────┼──┘        end while a transfer is open   v
//!    └── decode ──> Receiving ── sealed ────┘     any ─────────────────────────────> Closing ──> gone
//! ```
//! A sequence may stand for several choices, answers to one prompt: it computes, or receives, the prompt once. A prefill
//! leg's samples the first token of each and never stands for fewer than have not ended; another is forked, when the
//! first tokens are there, into a sequence for each choice, which share the prompt's blocks.
//!
//! A sequence without an open transfer is gone as soon as it ends. With one it stays, as `Closing`, until the transfer
//! can touch its blocks no more.

mod log;
mod telling;
mod work;

use std::{borrow::Cow, fmt, time::Instant};

use baton_process::telemetry::Stages;
use baton_proto::{BlockHash, LegId, PromptDigest, RequestId};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    blocks::BlockList,
    sampler::{SamplingParams, TokenCounts, logprobs::TokenLogprobs},
};

pub(super) use log::Stage;
use telling::Untold;
pub use telling::{FinishReason, LegEnd, LegUpdate, Sampled};
pub use work::{Asked, Inbound, Outbound, StopRule, Work};

/// A sequence in this engine; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A coordinator's stream; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// Where a sequence's tokens go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address {
    pub stream: StreamId,
    pub leg: LegId,
}

/// A validated request for one leg.
#[derive(Debug)]
pub struct NewSequence {
    /// The ids that follow are taken too, as many as there are choices.
    pub id: SequenceId,
    pub address: Address,
    pub asked: Asked,
    /// When the first token is wanted.
    pub wanted: Instant,
    /// The last token must be out by then.
    pub deadline: Option<Instant>,
    /// Held while the sequence is in the engine; a role switch waits for all of them. `None` in tests.
    pub permit: Option<TaskTrackerToken>,
    /// Covers the leg in traces.
    pub span: tracing::Span,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// A decode leg whose cache nobody has offered yet. It is not in the queue: see [`super::scheduler`].
    Announced,
    Waiting,
    Receiving,
    Running,
    HandingOff,
    Closing,
}

/// Who is served first: the lower. Who is preempted first: the higher. No two sequences have the same.
///
/// What comes later is wanted at its arrival at the soonest, so that nobody stands behind new arrivals for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) priority: i32,
    /// When the first token is wanted.
    pub(super) wanted: Instant,
    /// Order in which sequences came to the queue, a decode leg when its cache was offered.
    pub(super) arrival: u64,
    /// Which of a leg's sequences it is, once they are forked.
    pub(super) fork: u32,
}

pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) address: Address,
    pub(super) state: State,
    /// The choices that it stands for and that have not ended, ascending.
    pub(super) choices: Vec<u32>,
    /// How many choices are to be forked off it; 1 = it stands for its one choice alone.
    pub(super) unforked: u32,
    /// Place among all that want to be served.
    pub(super) rank: Rank,
    /// Prompt, then completion so far.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: u32,
    /// What it came with: the prompt, and tokens of the completion that another instance had generated.
    pub(super) given_tokens: u32,
    /// Tokens whose K and V are in `blocks`.
    pub(super) computed: u32,
    pub(super) blocks: BlockList,
    /// Hashes of the full blocks of `tokens`, as far as they have been asked for.
    hashes: Vec<BlockHash>,
    /// Blocks from the first on that are sealed: never written again, and others may share them.
    pub(super) sealed: u32,
    /// How many of the tokens need not be computed once it is admitted: what the cache had when it was last looked at.
    pub(super) found: u32,
    /// Of the tokens given, those that were in the cache when they were first computed here. None before that.
    pub(super) cached: Option<u32>,
    pub(super) sampling: SamplingParams,
    pub(super) counts: Option<TokenCounts>,
    pub(super) stop_tokens: Vec<u32>,
    pub(super) top_logprobs: Option<u32>,
    /// Most tokens the completion may have: `max_tokens` within the context and what the pool holds.
    pub(super) completion_limit: u32,
    pub(super) deadline: Option<Instant>,
    pub(super) work: Work,
    untold: Untold,
    request: RequestId,
    pub(super) span: tracing::Span,
    stages: Stages,
    _permit: Option<TaskTrackerToken>,
}

impl Sequence {
    /// `context_tokens` bounds prompt and completion together, `pool_tokens` what of them is held here at a time.
    pub(super) fn new(new: NewSequence, arrival: u64, context_tokens: u32, pool_tokens: u32) -> Self {
        let asked = new.asked;
        let prompt_tokens = asked.prompt.len() as u32;
        let carried = asked.generated.len() as u32;
        let counts = asked.sampling.penalises().then(|| TokenCounts::new(&asked.prompt, &asked.generated));
        let mut tokens = asked.prompt;
        tokens.extend(asked.generated);
        // The last token of a completion is never computed, so it needs no room. A prefill leg's completion is held
        // elsewhere.
        let room = match asked.work {
            Work::Prefill(_) => context_tokens,
            Work::Whole | Work::Decode(_) => context_tokens.min(pool_tokens.saturating_add(1)),
        };
        Self {
            id: new.id,
            address: new.address,
            state: if matches!(asked.work, Work::Decode(_)) { State::Announced } else { State::Waiting },
            choices: (0..asked.choices).collect(),
            unforked: asked.choices,
            rank: Rank { priority: asked.priority, wanted: new.wanted, arrival, fork: 0 },
            tokens,
            prompt_tokens,
            given_tokens: prompt_tokens + carried,
            computed: 0,
            blocks: BlockList::default(),
            hashes: Vec::new(),
            sealed: 0,
            found: 0,
            cached: None,
            sampling: asked.sampling,
            counts,
            stop_tokens: asked.stop.stop_tokens,
            top_logprobs: asked.top_logprobs,
            completion_limit: asked.stop.max_tokens.min(room.saturating_sub(prompt_tokens)).max(carried + 1),
            deadline: new.deadline,
            work: asked.work,
            untold: Untold::new(asked.tokens_at_a_time),
            request: asked.request,
            stages: Stages::begin(&new.span, Instant::now()),
            span: new.span,
            _permit: new.permit,
        }
    }

    /// Hashes of the full blocks of its tokens, in a chain that starts at `root`.
    pub(super) fn hashes(&mut self, root: BlockHash, block_tokens: u32) -> &[BlockHash] {
        let block_tokens = block_tokens as usize;
        let mut parent = self.hashes.last().copied().unwrap_or(root);
        for block in self.tokens.chunks_exact(block_tokens).skip(self.hashes.len()) {
            parent = parent.child(block);
            self.hashes.push(parent);
        }
        &self.hashes
    }

    /// Its blocks, with the hashes of those that its tokens fill.
    pub(super) fn chain(&mut self, root: BlockHash, block_tokens: u32) -> (&BlockList, &[BlockHash]) {
        self.hashes(root, block_tokens);
        (&self.blocks, &self.hashes)
    }

    /// By which the two sides of a handoff know that they mean the cache of the same tokens.
    pub(super) fn given_digest(&self) -> PromptDigest {
        PromptDigest::of(&self.tokens[..self.given_tokens as usize])
    }

    /// Tokens still to be computed before the next one can be sampled.
    pub(super) fn remaining(&self) -> u32 {
        self.tokens.len() as u32 - self.computed
    }

    /// Tokens of the completion so far.
    pub(super) fn completion_tokens(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_tokens
    }

    /// Index in a choice's completion of the token that comes next. Of a leg that hands over there is only the first.
    pub(super) fn first_untold(&self) -> u32 {
        let first = self.given_tokens - self.prompt_tokens;
        if matches!(self.work, Work::Prefill(_)) { first } else { self.completion_tokens() }
    }

    /// Most tokens that will ever have to be in the KV cache here. The last token of a completion is never computed.
    pub(super) fn most_cached_tokens(&self) -> u32 {
        match self.work {
            Work::Prefill(_) => self.given_tokens,
            Work::Whole => self.prompt_tokens + self.completion_limit - 1,
            Work::Decode(_) => (self.prompt_tokens + self.completion_limit - 1).max(self.given_tokens + 1),
        }
    }

    /// Whether a transfer may touch its blocks.
    pub(super) fn transfers(&self) -> bool {
        match self.state {
            State::Receiving | State::HandingOff | State::Closing => true,
            State::Running => matches!(self.work, Work::Prefill(_)),
            State::Announced | State::Waiting => false,
        }
    }

    /// Whether its blocks may be taken and computed again later.
    pub(super) fn preemptible(&self) -> bool {
        self.state == State::Running && !matches!(self.work, Work::Prefill(_))
    }

    /// The choices that its next logits are sampled for. All of a prefill leg's, though some may have ended: the other
    /// side counts them.
    pub(super) fn sampled_choices(&self) -> Vec<u32> {
        match self.work {
            Work::Prefill(_) => (0..self.unforked).collect(),
            Work::Whole | Work::Decode(_) => self.choices.clone(),
        }
    }

    /// How one of its choices is sampled.
    pub(super) fn sampling_of(&self, choice: u32) -> Cow<'_, SamplingParams> {
        if self.unforked > 1 {
            Cow::Owned(self.sampling.of_choice(choice))
        } else {
            Cow::Borrowed(&self.sampling)
        }
    }

    /// The sequence of one of its choices, which it no longer stands for, over blocks that hold the same.
    pub(super) fn fork(&mut self, choice: u32, blocks: BlockList) -> Self {
        self.choices.retain(|&other| other != choice);
        Self {
            id: SequenceId(self.id.0 + u64::from(choice)),
            address: self.address,
            state: self.state,
            choices: vec![choice],
            unforked: 1,
            rank: Rank { fork: choice, ..self.rank },
            tokens: self.tokens.clone(),
            prompt_tokens: self.prompt_tokens,
            given_tokens: self.given_tokens,
            computed: self.computed,
            blocks,
            hashes: self.hashes.clone(),
            sealed: self.sealed,
            found: self.found,
            cached: self.cached,
            sampling: self.sampling.of_choice(choice),
            counts: self.counts.clone(),
            stop_tokens: self.stop_tokens.clone(),
            top_logprobs: self.top_logprobs,
            completion_limit: self.completion_limit,
            deadline: self.deadline,
            work: self.work.clone(),
            untold: self.untold.fork(),
            request: self.request.clone(),
            stages: Stages::begin(&self.span, Instant::now()),
            span: self.span.clone(),
            _permit: self._permit.clone(),
        }
    }

    pub(super) fn stages(&self) -> &Stages {
        &self.stages
    }

    /// Changes its state.
    pub(super) fn enter(&mut self, state: State) {
        self.leave();
        self.state = state;
    }

    /// What it was in its state for is over; in traces it is a part of the leg.
    pub(super) fn leave(&mut self) {
        self.stages.passed_now(match self.state {
            State::Announced => "await_offer",
            State::Waiting => "await_turn",
            State::Receiving => "receive",
            State::Running => match self.work {
                Work::Prefill(_) => "prefill",
                Work::Decode(_) => "decode",
                Work::Whole => "run",
            },
            State::HandingOff => "hand_off",
            State::Closing => "close",
        });
    }

    /// It stands for its one remaining choice alone from now on.
    pub(super) fn settle(&mut self) {
        if let ([choice], 2..) = (&self.choices[..], self.unforked) {
            self.sampling = self.sampling.of_choice(*choice);
            self.unforked = 1;
        }
    }

    /// Appends a token of the completion.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(counts) = &mut self.counts {
            counts.add(token);
        }
    }

    /// Why the completion is over with its last token, if it is.
    pub(super) fn finish_reason(&self) -> Option<FinishReason> {
        let last = self.tokens.last().filter(|_| self.completion_tokens() > 0)?;
        self.finish_reason_of(*last)
    }

    /// The same, if its last token were `last`.
    pub(super) fn finish_reason_of(&self, last: u32) -> Option<FinishReason> {
        if self.stop_tokens.contains(&last) {
            Some(FinishReason::Stop)
        } else if self.completion_tokens() >= self.completion_limit {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Tokens of the prompt that were in the cache; none of a decode leg, which computes no prompt.
    pub(super) fn cached_tokens(&self) -> Option<u32> {
        let cached = self.cached.filter(|_| !matches!(self.work, Work::Decode(_)))?;
        Some(cached.min(self.prompt_tokens))
    }

    pub(super) fn finished(&self, reason: FinishReason) -> LegEnd {
        LegEnd::Finished {
            reason,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens().unwrap_or(0),
            completion_tokens: self.completion_tokens(),
        }
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} {:?} {}+{} tokens, {} computed, {} blocks",
            self.id,
            self.state,
            self.prompt_tokens,
            self.completion_tokens(),
            self.computed,
            self.blocks.count()
        )
    }
}
