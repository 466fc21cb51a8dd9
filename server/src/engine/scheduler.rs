//! What the engine computes next: continuous batching over a paged cache. Pure: told what happened, it answers with
//! plans, outputs and effects, and touches neither the model nor a transfer.
//!
//! Called by the engine's thread ([`super::step`] between steps, [`super::thread`] for events from outside). The life
//! of a sequence (arrival, end, transfers) is in [`lifecycle`], that of its choices in [`choices`], what damage does to it
//! in [`quarantine`], and how full it all is in [`occupancy`]; this file holds the planning:
//!
//! - Everything is done by rank: priority, then by when the first token is wanted, then age. The first in rank always goes
//!   on, so everything ends.
//! - Decode first: every running sequence that needs one more token gets it. When blocks run out, the last in rank that
//!   can be computed again is preempted: its blocks are let go and it waits to be recomputed from its tokens, of which
//!   the cache may still have most. A sequence preempts itself if it is the last.
//! - What is left of the token budget goes to chunks of prompts. A chunk ends at a block border unless it
//!   ends its prompt, so that a full block is final and can be handed on at once.
//! - Waiting sequences are admitted strictly in order while there are slots and blocks. One free block is left for each
//!   sequence that grows, so that an arrival does not preempt what runs. A prefill leg gets all its blocks at once and
//!   is never preempted, since its blocks may be on the wire; a decode leg reserves its prompt's blocks plus one token
//!   and receives its cache into them. It takes nothing of the token budget, and so does not wait behind those that wait
//!   for that alone: it leaves them the slots and blocks to begin with.
//! - A sequence starts with the longest chain of full blocks that the cache has of it; it computes its last token at
//!   least, since that is where its logits come from. Every block that becomes full and final is sealed, whichever way
//!   its content came, and can be shared from then on. A decode leg holds what it found while the rest is received.
//! - A leg that is to hand on what is cached here ends where it is not: see [`Scheduler::refuse_uncached`].
//! - A decode leg queues only once its cache has been offered, which its prefill leg does with its own blocks in hand.
//!   So whoever holds blocks here for a cache to come waits for a prefill that holds its blocks already, and never the
//!   other way round: two instances with full pools cannot wait for each other.

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use baton_kvtransfer::FirstTokens;
use baton_proto::{ApiError, BlockHash, PromptDigest, TransferId};
use baton_runtime::BlockId;

use super::{
    blocks::{BlockManager, Cached, Write},
    sequence::{Address, Inbound, LegUpdate, Outbound, Sequence, SequenceId, State, Work},
};

mod choices;
mod lifecycle;
mod occupancy;
mod quarantine;
#[cfg(test)]
mod tests;

pub use lifecycle::Refused;
pub use occupancy::{Counts, Occupancy};

/// Limits the scheduler keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of one step; at least `max_sequences + block_tokens`, so that decoding never starves a prompt.
    pub max_batch_tokens: u32,
    /// Most sequences that run or receive at a time.
    pub max_sequences: u32,
    /// Most sequences that wait, for service or for an offer; more are refused.
    pub max_waiting: u32,
    /// Most tokens of prompt and completion together.
    pub context_tokens: u32,
    pub block_tokens: u32,
    /// Whether sequences share blocks of equal content.
    pub prefix_cache: bool,
}

/// Part of a sequence that the next step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub id: SequenceId,
    pub start: u32,
    pub tokens: u32,
    /// Whether a token is sampled after it.
    pub logits: bool,
}

/// A prefill leg's cache, to be sent as it is computed.
#[derive(Debug, PartialEq, Eq)]
pub struct Offer {
    pub to: Outbound,
    pub prompt_tokens: u32,
    pub prompt_digest: PromptDigest,
    /// Those of the prompt, and maybe more.
    pub blocks: Vec<BlockId>,
    /// So many of the first blocks are final already.
    pub cached: u32,
    pub priority: i32,
    pub deadline: Option<Instant>,
}

/// A decode leg's cache, to be received.
#[derive(Debug, PartialEq, Eq)]
pub struct Expect {
    pub from: Inbound,
    pub prompt_tokens: u32,
    pub prompt_digest: PromptDigest,
    /// Those of the prompt, and maybe more.
    pub blocks: Vec<BlockId>,
    /// So many of the first blocks have their content.
    pub held: u32,
    pub deadline: Option<Instant>,
}

/// What has to be done outside.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Offer a prefill leg's blocks to its receiver.
    Offer { id: SequenceId, offer: Offer },
    /// Say by [`Scheduler::offered`] when the transfer of a decode leg has been offered, or that it has not been in time.
    Watch { id: SequenceId, transfer: TransferId, deadline: Option<Instant> },
    /// Let a decode leg's cache be written into its blocks.
    Expect { id: SequenceId, expect: Expect },
    /// All of a prefill leg's cache is computed; this is the first token of each choice.
    Seal { id: SequenceId, first_tokens: FirstTokens },
    /// Tell the sender that its transfer will not be expected here.
    Refuse { transfer: TransferId, reason: ApiError },
    /// Watch no more for an offer.
    Unwatch { id: SequenceId },
    /// End a transfer; [`Scheduler::transfer_ended`] must follow once it can touch the blocks no more. Unless `needed`,
    /// its sequence has come to its own end already.
    Close { id: SequenceId, needed: bool },
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// Where the hashes of blocks start.
    root: BlockHash,
    blocks: BlockManager,
    sequences: HashMap<SequenceId, Sequence>,
    /// By rank.
    waiting: VecDeque<SequenceId>,
    /// By rank.
    running: Vec<SequenceId>,
    receiving: u32,
    /// Decode legs whose offer has not come: neither in `waiting` nor in service.
    announced: u32,
    arrivals: u64,
    outputs: Vec<(Address, LegUpdate)>,
    effects: Vec<Effect>,
    /// What the next step copies before it computes.
    copies: Vec<(BlockId, BlockId)>,
    counts: Counts,
}

impl Scheduler {
    /// A scheduler of a pool of `blocks` blocks, whose content is named by chains of hashes that start at `root`.
    pub fn new(limits: Limits, blocks: u32, root: BlockHash) -> Self {
        Self {
            root,
            blocks: BlockManager::new(blocks, limits.block_tokens),
            limits,
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            receiving: 0,
            announced: 0,
            arrivals: 0,
            outputs: Vec::new(),
            effects: Vec::new(),
            copies: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Plans one step. An empty plan means that nothing can be computed until something happens outside.
    ///
    /// The caller computes every chunk and reports by [`Self::computed`] or [`Self::fail`].
    pub fn schedule(&mut self) -> Vec<Chunk> {
        let mut plan = Vec::new();
        let mut budget = self.limits.max_batch_tokens;
        self.plan_decodes(&mut plan, &mut budget);
        self.plan_prompts(&mut plan, &mut budget);
        self.admit(&mut plan, &mut budget);
        plan
    }

    fn plan_decodes(&mut self, plan: &mut Vec<Chunk>, budget: &mut u32) {
        let mut next = 0;
        while next < self.running.len() && *budget > 0 {
            let id = self.running[next];
            if self.sequences[&id].remaining() == 1 && !self.grow_or_preempt(id) {
                // It preempted itself: who followed it in `running` stands at `next` now.
                next += usize::from(self.running.get(next) == Some(&id));
                continue;
            }
            next += 1;
            self.plan_chunk(id, plan, budget, |sequence| sequence.remaining() == 1);
        }
    }

    fn plan_prompts(&mut self, plan: &mut Vec<Chunk>, budget: &mut u32) {
        for index in 0..self.running.len() {
            self.plan_chunk(self.running[index], plan, budget, |sequence| sequence.remaining() > 1);
        }
    }

    fn plan_chunk(
        &self,
        id: SequenceId,
        plan: &mut Vec<Chunk>,
        budget: &mut u32,
        wanted: fn(&Sequence) -> bool,
    ) {
        let sequence = &self.sequences[&id];
        if !wanted(sequence) {
            return;
        }
        let remaining = sequence.remaining();
        let mut tokens = remaining.min(*budget);
        if tokens < remaining {
            let end = sequence.computed + tokens;
            tokens = tokens.saturating_sub(end % self.limits.block_tokens);
        }
        if tokens > 0 {
            *budget -= tokens;
            plan.push(Chunk { id, start: sequence.computed, tokens, logits: tokens == remaining });
        }
    }

    /// Gives a sequence a block of its own for its next token, taking blocks from those behind it if it must. False if it
    /// had to preempt itself.
    fn grow_or_preempt(&mut self, id: SequenceId) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let index = sequence.computed / self.limits.block_tokens;
            if index < sequence.blocks.count() {
                match self.blocks.write(&mut sequence.blocks, index) {
                    Write::InPlace => return true,
                    Write::Copy { from, to } => {
                        self.copies.push((from, to));
                        return true;
                    }
                    Write::NoRoom => {}
                }
            } else if self.blocks.extend(&mut sequence.blocks, sequence.computed + 1) {
                return true;
            }
            // `running` is by rank, so whoever is found was not planned in this step yet, or is `id` itself.
            let sequences = &self.sequences;
            let last = self.running.iter().rposition(|id| sequences[id].preemptible());
            let Some(victim) = last.map(|index| self.running.remove(index)) else { return false };
            self.preempt(victim);
            if victim == id {
                return false;
            }
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        self.recompute(id);
        self.counts.preemptions += 1;
    }

    /// Takes the blocks of a sequence that has left the batch; it waits to be computed again from its tokens.
    fn recompute(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.blocks.release(std::mem::take(&mut sequence.blocks));
        sequence.computed = 0;
        sequence.sealed = 0;
        sequence.enter(State::Waiting);
        // From now on it is computed here, wherever its cache first came from.
        sequence.work = Work::Whole;
        self.queue(id);
    }

    /// Takes sequences from the queue into service, by rank. Those that lack nothing but tokens of this step are passed over
    /// by legs that receive, and seats and blocks for them to begin with are kept. Each takes a seat at least, so that no
    /// more are looked at than there are seats.
    fn admit(&mut self, plan: &mut Vec<Chunk>, budget: &mut u32) {
        // Seats that are taken or kept, and blocks that are kept of the room there is.
        let (mut seats, mut kept) = (self.seats(), self.growing());
        let mut next = 0;
        while let Some(&id) = self.waiting.get(next) {
            let sequence = &self.sequences[&id];
            let choices = choices_of(sequence);
            if seats + choices > self.limits.max_sequences {
                return;
            }
            let receives = matches!(sequence.work, Work::Decode(_));
            let grows = !matches!(sequence.work, Work::Prefill(_));
            let tokens = sequence.tokens.len() as u32 + u32::from(receives);
            if !receives && *budget == 0 {
                // Whatever the cache has of it may be evicted before it begins.
                kept += self.blocks.blocks_for(tokens) + choices;
                seats += choices;
                next += 1;
                continue;
            }
            let (block_tokens, cached) = (self.limits.block_tokens, self.find_cached(id));
            // It may have been evicted while it waited.
            if self.refuse_uncached(id) {
                continue;
            }
            let remaining =
                self.sequences[&id].remaining() - cached.blocks * block_tokens * u32::from(!receives);
            if !receives && *budget < block_tokens.min(remaining) {
                // Nobody behind it begins with what is left.
                *budget = 0;
                continue;
            }
            let needed = self.blocks.blocks_for(tokens) - cached.blocks + cached.idle;
            // Each choice but one will want a last block of its own; they take turns if there never are as many.
            let own = if seats == 0 { 0 } else { choices - 1 };
            if needed + own + kept > self.blocks.room() {
                return;
            }
            self.waiting.remove(next);
            self.start(id, tokens, cached);
            seats += choices;
            kept += choices * u32::from(grows);
            if !receives {
                self.plan_chunk(id, plan, budget, |_| true);
            }
        }
    }

    /// What the cache has of a waiting sequence, as far as it may be used.
    fn find_cached(&mut self, id: SequenceId) -> Cached {
        let Some(sequence) = self.sequences.get_mut(&id) else { return Cached::default() };
        let cached = self.blocks.find(usable_hashes(sequence, self.root, &self.limits));
        sequence.found = cached.blocks * self.limits.block_tokens;
        cached
    }

    /// Choices that may need another block while they run.
    fn growing(&self) -> u32 {
        let running = self.running.iter().map(|id| &self.sequences[id]).filter(|s| s.preemptible());
        running.map(choices_of).sum::<u32>() + self.receiving_choices()
    }

    /// Choices in service.
    fn seats(&self) -> u32 {
        self.running.iter().map(|id| choices_of(&self.sequences[id])).sum::<u32>() + self.receiving_choices()
    }

    fn receiving_choices(&self) -> u32 {
        if self.receiving == 0 {
            return 0;
        }
        self.sequences.values().filter(|s| s.state == State::Receiving).map(choices_of).sum()
    }

    /// Takes a sequence from the queue into service, with blocks for `tokens` tokens, for which there is room beside
    /// those that are `cached`.
    fn start(&mut self, id: SequenceId, tokens: u32, cached: Cached) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let (cached, hashes) = (cached.blocks, usable_hashes(sequence, self.root, &self.limits));
        sequence.blocks = self.blocks.take(&hashes[..cached as usize]);
        sequence.sealed = cached;
        let extended = self.blocks.extend(&mut sequence.blocks, tokens);
        debug_assert!(extended, "admitted without free blocks");
        let (given_tokens, deadline) = (sequence.given_tokens, sequence.deadline);
        let blocks = || sequence.blocks.as_slice().to_vec();
        match &sequence.work {
            Work::Decode(from) => {
                let expect = Expect {
                    from: from.clone(),
                    prompt_tokens: given_tokens,
                    prompt_digest: sequence.given_digest(),
                    blocks: blocks(),
                    held: cached,
                    deadline,
                };
                self.effects.push(Effect::Expect { id, expect });
                self.counts.held_blocks += u64::from(cached);
                sequence.cached = Some(0);
                sequence.enter(State::Receiving);
                self.receiving += 1;
                return;
            }
            Work::Prefill(to) => {
                let offer = Offer {
                    to: to.clone(),
                    prompt_tokens: given_tokens,
                    prompt_digest: sequence.given_digest(),
                    blocks: blocks(),
                    cached,
                    priority: sequence.rank.priority,
                    deadline,
                };
                self.effects.push(Effect::Offer { id, offer });
            }
            Work::Whole => {}
        }
        sequence.computed = cached * self.limits.block_tokens;
        if sequence.cached.is_none() {
            sequence.cached = Some(sequence.computed);
            self.counts.prefix_hit_tokens += u64::from(sequence.computed);
            self.counts.prefix_miss_tokens += u64::from(given_tokens - sequence.computed);
        }
        self.run(id);
    }

    /// Puts a sequence into the queue.
    fn queue(&mut self, id: SequenceId) {
        // Its place in the queue does not depend on it: it is for [`Occupancy`] alone.
        self.find_cached(id);
        let rank = self.sequences[&id].rank;
        let at = self.waiting.partition_point(|other| self.sequences[other].rank < rank);
        self.waiting.insert(at, id);
    }

    /// Puts a sequence into the running batch.
    fn run(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.enter(State::Running);
        let rank = sequence.rank;
        let at = self.running.partition_point(|other| self.sequences[other].rank < rank);
        self.running.insert(at, id);
    }
}

fn choices_of(sequence: &Sequence) -> u32 {
    sequence.choices.len() as u32
}

/// Hashes of the blocks that a waiting sequence need not compute, or receive, if the cache has them.
fn usable_hashes<'s>(sequence: &'s mut Sequence, root: BlockHash, limits: &Limits) -> &'s [BlockHash] {
    if !limits.prefix_cache {
        return &[];
    }
    // Logits come from computing the last token; who receives its cache receives the next token with it.
    let receives = matches!(sequence.work, Work::Decode(_));
    let usable = sequence.tokens.len() - usize::from(!receives);
    &sequence.hashes(root, limits.block_tokens)[..usable / limits.block_tokens as usize]
}
