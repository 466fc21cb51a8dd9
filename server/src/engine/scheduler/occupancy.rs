//! How full a scheduler is: read after each step, for coordinators and metrics.

use baton_proto::attention_pairs;

use super::{Scheduler, choices_of};
use crate::engine::sequence::{Sequence, State, Work};

/// How many sequences and blocks there are, by use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Most that can be in the batch.
    pub places: u32,
    /// Most tokens of one step.
    pub batch_tokens: u32,
    /// In the batch. What is to become several sequences here, a prompt with its choices, counts as many.
    pub running: u32,
    /// In the queue, or with a cache not offered yet or still on its way; counted likewise.
    pub waiting: u32,
    /// Requests that may come to the queue yet.
    pub waiting_room: u32,
    /// Held for a transfer alone: prefill legs handed on, and ended legs whose transfer is being closed.
    pub leaving: u32,
    /// Caches on their way in, and out; counted above too.
    pub receiving: u32,
    pub sending: u32,
    /// Prompt tokens accepted and still to be computed here: of who waits, less what the cache had when they came to the
    /// queue, or were first in it. An estimate, since blocks are evicted and stored meanwhile.
    pub queued_prefill_tokens: u64,
    /// Pairs of one of these and a token before it.
    pub queued_prefill_pairs: u64,
    pub blocks_total: u32,
    /// Blocks that nobody holds.
    pub blocks_free: u32,
    /// How many of them have content that can be taken again.
    pub blocks_cached: u32,
    pub counts: Counts,
}

/// What has happened since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub accepted: Accepted,
    /// Sequences whose blocks were taken for others.
    pub preemptions: u64,
    /// Cached blocks that were given up for others.
    pub evictions: u64,
    /// Tokens of prompts that were in the cache, and those that had to be computed.
    pub prefix_hit_tokens: u64,
    pub prefix_miss_tokens: u64,
    /// Blocks of decode legs that need not be sent to them.
    pub held_blocks: u64,
}

/// What was taken on to be prefilled here. Those that began elsewhere and go on here are not among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accepted {
    pub requests: u64,
    /// Tokens of their prompts, cached ones among them.
    pub prompt_tokens: u64,
    /// Completions that they ask for.
    pub choices: u64,
}

impl Accepted {
    pub(super) fn add(&mut self, sequence: &Sequence) {
        self.requests += 1;
        self.prompt_tokens += u64::from(sequence.given_tokens);
        self.choices += u64::from(sequence.unforked);
    }
}

impl Scheduler {
    pub fn occupancy(&self) -> Occupancy {
        let mut occupancy = Occupancy {
            places: self.limits.max_sequences,
            batch_tokens: self.limits.max_batch_tokens,
            waiting_room: self.waiting_room(),
            blocks_total: self.blocks.total(),
            blocks_free: self.blocks.room(),
            blocks_cached: self.blocks.idle(),
            counts: Counts { evictions: self.blocks.evictions(), ..self.counts },
            ..Occupancy::default()
        };
        for sequence in self.sequences.values() {
            let becomes = match sequence.work {
                // Its choices part where they are decoded.
                Work::Prefill(_) => 1,
                Work::Whole | Work::Decode(_) => choices_of(sequence),
            };
            match sequence.state {
                State::Running => occupancy.running += becomes,
                State::Announced | State::Waiting | State::Receiving => occupancy.waiting += becomes,
                State::HandingOff | State::Closing => occupancy.leaving += 1,
            }
            occupancy.receiving += u32::from(sequence.state == State::Receiving);
            occupancy.sending += u32::from(sequence.transfers() && matches!(sequence.work, Work::Prefill(_)));
            let computes = matches!(sequence.state, State::Waiting | State::Running);
            if computes && !matches!((&sequence.work, sequence.state), (Work::Decode(_), State::Waiting)) {
                let found = if sequence.state == State::Waiting { sequence.found } else { 0 };
                let left = u64::from((sequence.remaining() - found).saturating_sub(1));
                occupancy.queued_prefill_tokens += left;
                occupancy.queued_prefill_pairs += attention_pairs(left, sequence.tokens.len() as u64);
            }
        }
        occupancy
    }
}
