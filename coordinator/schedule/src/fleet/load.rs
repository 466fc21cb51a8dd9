//! What an instance says of how busy it is, and of how long its steps took.

use std::num::NonZeroU32;

use baton_proto::{LegId, v1};

/// Counters of steps that did one kind of work alone and of which nothing failed, since the instance's process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timed {
    /// Of steps that computed prompts: how long they took, how many they were (0: it does not say), of how many tokens they
    /// were, and of how many pairs of a token and one before it.
    pub prefill_micros: u64,
    pub prefill_steps: u64,
    pub prefill_tokens: u64,
    pub prefill_pairs: u64,
    /// Of steps that decoded: how long they took, how many they were, and the sums of their sequences and of the tokens of
    /// these.
    pub decode_micros: u64,
    pub decode_steps: u64,
    pub decode_sequences: u64,
    pub context_tokens: u64,
}

impl Timed {
    /// What was counted since; `None`: some counter went back.
    pub fn since(&self, before: &Self) -> Option<Self> {
        Some(Self {
            prefill_micros: self.prefill_micros.checked_sub(before.prefill_micros)?,
            prefill_steps: self.prefill_steps.checked_sub(before.prefill_steps)?,
            prefill_tokens: self.prefill_tokens.checked_sub(before.prefill_tokens)?,
            prefill_pairs: self.prefill_pairs.checked_sub(before.prefill_pairs)?,
            decode_micros: self.decode_micros.checked_sub(before.decode_micros)?,
            decode_steps: self.decode_steps.checked_sub(before.decode_steps)?,
            decode_sequences: self.decode_sequences.checked_sub(before.decode_sequences)?,
            context_tokens: self.context_tokens.checked_sub(before.context_tokens)?,
        })
    }
}

impl From<&v1::InstanceLoad> for Timed {
    fn from(load: &v1::InstanceLoad) -> Self {
        Self {
            prefill_micros: load.prefill_micros,
            prefill_steps: load.timed_prefill_steps,
            prefill_tokens: load.timed_prefill_tokens,
            prefill_pairs: load.timed_prefill_pairs,
            decode_micros: load.decode_micros,
            decode_steps: load.timed_decode_steps,
            decode_sequences: load.decode_sequences,
            context_tokens: load.decode_context_tokens,
        }
    }
}

/// How busy an instance said it is, over all coordinators.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Running and waiting.
    pub sequences: u32,
    /// Of them those that run.
    pub running: u32,
    /// Of them those that it decodes at a time, at most. `None`: it does not say.
    pub sequences_most: Option<NonZeroU32>,
    /// Requests that it lets wait beyond those. `None`: it does not say.
    pub waiting_room: Option<u32>,
    /// Tokens that it computes in one step, at most. `None`: it does not say.
    pub step_tokens: Option<NonZeroU32>,
    /// Prompt tokens accepted and still to be computed.
    pub queued_prefill_tokens: u64,
    /// Pairs of one of these tokens and one before it in its prompt.
    pub queued_prefill_pairs: u64,
    /// 0 = not said.
    pub kv_blocks_total: u32,
    pub kv_blocks_free: u32,
    /// 0 = not yet measured.
    pub prefill_tokens_per_second: u64,
    /// 0 = not yet measured.
    pub decode_step_micros: u64,
    pub timed: Timed,
    /// Caches on their way in, and out.
    pub transfers: u32,
    /// The last leg on the stream that this includes; `None`: the instance, of an earlier version, does not say.
    pub seen_leg: Option<LegId>,
}

impl Load {
    /// Sequences that it decodes at a time now.
    pub fn batch(&self) -> u32 {
        self.sequences_most.map_or(self.sequences, |most| self.sequences.min(most.get()))
    }
}

/// Most prompt tokens an instance is believed to have queued.
const QUEUED_TOKENS_MOST: u64 = 1 << 32;
/// Most pairs of these tokens and those before them.
const QUEUED_PAIRS_MOST: u64 = 1 << 52;
/// Longest decode step an instance is believed to have measured: one minute.
const DECODE_STEP_MICROS_MOST: u64 = 60_000_000;
/// Most caches that are believed to be on their way at once.
const TRANSFERS_MOST: u32 = 1 << 20;

/// Numbers beyond reason are cut down to where costs of instances still compare.
impl From<&v1::InstanceLoad> for Load {
    fn from(load: &v1::InstanceLoad) -> Self {
        Self {
            sequences: load.running_sequences.saturating_add(load.waiting_sequences),
            running: load.running_sequences,
            sequences_most: NonZeroU32::new(load.max_sequences),
            step_tokens: NonZeroU32::new(load.max_batch_tokens),
            waiting_room: load.waiting_room,
            queued_prefill_tokens: load.queued_prefill_tokens.min(QUEUED_TOKENS_MOST),
            queued_prefill_pairs: load.queued_prefill_pairs.min(QUEUED_PAIRS_MOST),
            kv_blocks_total: load.kv_blocks_total,
            kv_blocks_free: load.kv_blocks_free.min(load.kv_blocks_total),
            prefill_tokens_per_second: load.prefill_tokens_per_second,
            decode_step_micros: load.decode_step_micros.min(DECODE_STEP_MICROS_MOST),
            timed: load.into(),
            transfers: load.outgoing_transfers.saturating_add(load.incoming_transfers).min(TRANSFERS_MOST),
            seen_leg: load.seen_leg.map(LegId),
        }
    }
}
