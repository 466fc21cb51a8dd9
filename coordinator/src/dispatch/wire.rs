//! How an instance is told of a leg.

use baton_proto::{TransferId, v1};
use baton_schedule::{Assignee, Side};
use bytes::Bytes;
use tokio::time::Instant;
use v1::dispatch::{Decode, Prefill, Whole, Work};

use super::Assignment;
use crate::{fleet::BATCH_TOKENS, prepare::Sampling};

/// What of a request is an instance's, and with whom.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'a> {
    Whole,
    Prefill {
        transfer: TransferId,
        decode: &'a Assignee,
        /// It has the cache, and hands it on though it drains.
        hand_on: bool,
    },
    Decode {
        transfer: TransferId,
        prefill: &'a Assignee,
    },
}

impl Part<'_> {
    pub(super) fn side(&self) -> Side {
        match self {
            Self::Whole => Side::Whole,
            Self::Prefill { .. } => Side::Prefill,
            Self::Decode { .. } => Side::Decode,
        }
    }
}

impl From<Part<'_>> for Work {
    fn from(part: Part<'_>) -> Self {
        let id = |transfer: TransferId| transfer.as_bytes().to_vec().into();
        match part {
            Part::Whole => Self::Whole(Whole {}),
            Part::Prefill { transfer, decode, hand_on } => Self::Prefill(Prefill {
                transfer_id: id(transfer),
                decode_instance: decode.instance.to_string(),
                decode_incarnation: decode.incarnation.0,
                decode_handoff_endpoint: decode.handoff_endpoint.clone(),
                hand_on,
            }),
            Part::Decode { transfer, prefill } => Self::Decode(Decode {
                transfer_id: id(transfer),
                prefill_instance: prefill.instance.to_string(),
                prefill_incarnation: prefill.incarnation.0,
            }),
        }
    }
}

/// `prompt` is the assignment's, written once for all legs. The leg's number is to be set by who sends it.
pub(super) fn dispatch(
    assignee: &Assignee,
    assignment: &Assignment,
    prompt: Bytes,
    part: Part<'_>,
) -> v1::Dispatch {
    let now = Instant::now();
    let millis =
        |until: Instant| u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX);
    v1::Dispatch {
        leg: 0,
        request_id: assignment.request.to_string(),
        traceparent: assignment.trace.parent().to_owned(),
        tracestate: assignment.trace.state().to_owned(),
        incarnation: assignee.incarnation.0,
        role_epoch: assignee.role_epoch.0,
        model: assignee.model.clone(),
        prompt_tokens: prompt,
        generated_tokens: assignment.generated.to_vec(),
        sampling: Some(sampling(&assignment.prompt.sampling)),
        timeout_millis: millis(assignment.deadline).max(1),
        work: Some(part.into()),
        priority: assignment.priority,
        first_token_within_millis: millis(assignment.wanted),
        tokens_at_a_time: if assignment.in_batches { BATCH_TOKENS } else { 0 },
    }
}

fn sampling(sampling: &Sampling) -> v1::Sampling {
    let bias = |&(token, bias): &(u32, f32)| v1::LogitBias { token, bias };
    v1::Sampling {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
        choices: sampling.choices,
        max_tokens: sampling.max_tokens,
        stop_token_ids: sampling.stop_token_ids.to_vec(),
        logit_bias: sampling.logit_bias.iter().flat_map(|biases| biases.iter()).map(bias).collect(),
        min_tokens: sampling.min_tokens,
        top_logprobs: sampling.top_logprobs,
    }
}
