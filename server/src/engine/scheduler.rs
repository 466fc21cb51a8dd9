//! What the engine computes next: continuous batching over a paged cache. Pure: told what happened, it answers with
//! plans, outputs and effects, and touches neither the model nor a transfer.
//!
//! Called by the engine's thread ([`super::step`] between steps, [`super::thread`] for events from outside). The life
//! of a sequence (arrival, end, transfers) is in [`lifecycle`]; this file holds the planning:
//!
//! - Decode first: every running sequence that needs one more token gets it, oldest first. When blocks run out, the
//!   youngest sequence that can be computed again is preempted: its blocks are freed and it waits, first in line, to be
//!   recomputed from its tokens. A sequence preempts itself if it is the youngest, so the oldest always goes on.
//! - What is left of the token budget goes to chunks of prompts, oldest first. A chunk ends at a block border unless it
//!   ends its prompt, so that a full block is final and can be handed on at once.
//! - Waiting sequences are admitted strictly in order while there are slots and blocks. One free block is left for each
//!   sequence that grows, so that an arrival does not preempt what runs. A prefill leg gets all its blocks at once and
//!   is never preempted, since its blocks may be on the wire; a decode leg reserves its prompt's blocks plus one token
//!   and receives its cache into them.
//! - A decode leg queues only once its cache has been offered, which its prefill leg does with its own blocks in hand.
//!   So whoever holds blocks here for a cache to come waits for a prefill that holds its blocks already, and never the
//!   other way round: two instances with full pools cannot wait for each other.

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use baton_proto::{ApiError, TransferId};
use baton_runtime::BlockId;

use super::{
    blocks::BlockManager,
    sequence::{Address, Inbound, LegUpdate, Outbound, Sequence, SequenceId, State, Work},
};

mod lifecycle;
#[cfg(test)]
mod tests;

pub use lifecycle::{Occupancy, Refused};

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

/// What has to be done outside.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Offer a prefill leg's blocks to its receiver.
    Offer {
        id: SequenceId,
        to: Outbound,
        prompt_tokens: u32,
        blocks: Vec<BlockId>,
        deadline: Option<Instant>,
    },
    /// Say by [`Scheduler::offered`] when the transfer of a decode leg has been offered, or that it has not been in time.
    Watch { id: SequenceId, transfer: TransferId, deadline: Option<Instant> },
    /// Let a decode leg's cache be written into these blocks.
    Expect {
        id: SequenceId,
        from: Inbound,
        prompt_tokens: u32,
        blocks: Vec<BlockId>,
        deadline: Option<Instant>,
    },
    /// All of a prefill leg's cache is computed; this is the first token.
    Seal { id: SequenceId, first_token: u32 },
    /// Tell the sender that its transfer will not be expected here.
    Refuse { transfer: TransferId, reason: ApiError },
    /// Watch no more for an offer.
    Unwatch { id: SequenceId },
    /// End a transfer; [`Scheduler::transfer_ended`] must follow once it can touch the blocks no more.
    Close { id: SequenceId },
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    sequences: HashMap<SequenceId, Sequence>,
    /// In order of service.
    waiting: VecDeque<SequenceId>,
    /// By arrival.
    running: Vec<SequenceId>,
    receiving: u32,
    /// Decode legs whose offer has not come: neither in `waiting` nor in service.
    announced: u32,
    arrivals: u64,
    outputs: Vec<(Address, LegUpdate)>,
    effects: Vec<Effect>,
    preemptions: u64,
}

impl Scheduler {
    /// A scheduler of a pool of `blocks` blocks.
    pub fn new(limits: Limits, blocks: u32) -> Self {
        Self {
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
            preemptions: 0,
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

    /// Gives a sequence the block for its next token, taking blocks from younger ones if it must. False if it had to
    /// preempt itself.
    fn grow_or_preempt(&mut self, id: SequenceId) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let tokens = sequence.computed + 1;
            if self.blocks.extend(&mut sequence.blocks, tokens) {
                return true;
            }
            // `running` is by arrival, so whoever is found was not planned in this step yet, or is `id` itself.
            let sequences = &self.sequences;
            let youngest = self.running.iter().rposition(|id| sequences[id].preemptible());
            let Some(victim) = youngest.map(|index| self.running.remove(index)) else { return false };
            self.preempt(victim);
            if victim == id {
                return false;
            }
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.blocks.release(std::mem::take(&mut sequence.blocks));
        sequence.computed = 0;
        sequence.state = State::Waiting;
        // From now on it is computed here, wherever its cache first came from.
        sequence.work = Work::Whole;
        self.waiting.push_front(id);
        self.preemptions += 1;
    }

    fn admit(&mut self, plan: &mut Vec<Chunk>, budget: &mut u32) {
        while let Some(&id) = self.waiting.front() {
            if self.running.len() as u32 + self.receiving >= self.limits.max_sequences {
                return;
            }
            let sequence = &self.sequences[&id];
            let receives = matches!(sequence.work, Work::Decode(_));
            if !receives && *budget < self.limits.block_tokens.min(sequence.remaining()) {
                return;
            }
            let tokens = sequence.tokens.len() as u32 + u32::from(receives);
            if self.blocks.blocks_for(tokens) + self.growing() > self.blocks.room() {
                return;
            }
            self.waiting.pop_front();
            self.start(id, tokens);
            if !receives {
                self.plan_chunk(id, plan, budget, |_| true);
            }
        }
    }

    /// Sequences that may need another block while they run.
    fn growing(&self) -> u32 {
        let running = self.running.iter().filter(|id| self.sequences[id].preemptible()).count() as u32;
        running + self.receiving
    }

    /// Takes a sequence from the queue into service, with blocks for `tokens` tokens, which are free.
    fn start(&mut self, id: SequenceId, tokens: u32) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let extended = self.blocks.extend(&mut sequence.blocks, tokens);
        debug_assert!(extended, "admitted without free blocks");
        let (prompt_tokens, deadline) = (sequence.prompt_tokens, sequence.deadline);
        let blocks = || sequence.blocks.as_slice().to_vec();
        match &sequence.work {
            Work::Decode(from) => {
                let from = from.clone();
                self.effects.push(Effect::Expect { id, from, prompt_tokens, blocks: blocks(), deadline });
                sequence.state = State::Receiving;
                self.receiving += 1;
                return;
            }
            Work::Prefill(to) => {
                let to = to.clone();
                self.effects.push(Effect::Offer { id, to, prompt_tokens, blocks: blocks(), deadline });
            }
            Work::Whole => {}
        }
        self.run(id);
    }

    /// Puts a sequence into the running batch, by arrival.
    fn run(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.state = State::Running;
        let arrival = sequence.arrival;
        let at = self.running.partition_point(|other| self.sequences[other].arrival < arrival);
        self.running.insert(at, id);
    }
}
