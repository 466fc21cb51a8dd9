//! What a leg is asked to do with its sequence, and when that is over.

use baton_proto::{Incarnation, InstanceId, RequestId, TransferId};

use super::SamplingParams;

/// What a coordinator asks for, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub request: RequestId,
    /// At least 1.
    pub choices: u32,
    /// At least one token, with `generated` fewer than the context holds.
    pub prompt: Vec<u32>,
    /// Tokens of the completion that there are already, fewer than it may have; none of several choices.
    pub generated: Vec<u32>,
    pub sampling: SamplingParams,
    pub stop: StopRule,
    /// Log probabilities are wanted, with as many of the likeliest tokens.
    pub top_logprobs: Option<u32>,
    /// Lower is served first, and preempted last.
    pub priority: i32,
    pub work: Work,
    /// How many tokens behind the first may be told at a time; at least 1.
    pub tokens_at_a_time: u32,
}

/// When a completion ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopRule {
    /// At least one.
    pub max_tokens: u32,
    pub stop_tokens: Vec<u32>,
}

/// Which part of the request is done here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Prefill and decode.
    Whole,
    /// Prefill; the cache goes to another instance.
    Prefill(Outbound),
    /// The cache comes from another instance; decode.
    Decode(Inbound),
}

impl Work {
    /// For logs and traces.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Prefill(_) => "prefill",
            Self::Decode(_) => "decode",
        }
    }

    /// Whether what is cached here is to be handed on, and nothing else.
    pub fn hands_on(&self) -> bool {
        matches!(self, Self::Prefill(to) if to.hand_on)
    }
}

/// Where a prefill leg's cache goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outbound {
    pub transfer: TransferId,
    pub receiver: InstanceId,
    pub receiver_incarnation: Incarnation,
    /// host:port of the receiver's Handoff service.
    pub endpoint: String,
    /// The cache is to be here already, but for a block at most: it is not computed where it is not.
    pub hand_on: bool,
}

/// Where a decode leg's cache comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    pub transfer: TransferId,
    pub sender: InstanceId,
    pub sender_incarnation: Incarnation,
}
