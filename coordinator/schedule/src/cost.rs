//! What each part of a request's work would cost on an instance, in predicted microseconds, so that unlike machines
//! compare. Pure.
//!
//! - prefill: (prompt tokens queued there + those of this prompt that it has not cached) / its measured tokens per second;
//! - decode: the tokens expected x its decode step, half of which is taken as fixed and half as growing with the number
//!   of sequences; plus a wait as long again, scaled by the shortfall, when its free KV blocks do not hold the request;
//!   plus the time that what it has not cached takes to be moved there, over a good link: none is measured here;
//! - an instance that does both costs the sum of the two, and nothing is moved;
//! - of several choices each is decoded, and the prompt is computed once.

use baton_proto::InstanceId;

use super::{Ask, Side, ledger::Standing};
use crate::fleet::Spec;

/// Taken for an instance that has not yet measured its prefill.
const UNMEASURED_PREFILL_TOKENS_PER_SECOND: u64 = 2_000;
/// Taken for an instance that has not yet measured a decode step.
const UNMEASURED_DECODE_STEP_MICROS: u64 = 30_000;
/// Output lengths are not known beforehand: at most this much of what is allowed is expected.
const EXPECTED_TOKENS_MOST: u32 = 128;
/// What is taken for the link to any decode instance.
const LINK_BYTES_PER_MICROSECOND: u64 = 10_000;

/// How much of the prompt an instance is expected to have. The last token is computed by whoever samples from it.
pub(super) fn cached_tokens(instance: &InstanceId, ask: &Ask<'_>, side: Side) -> u32 {
    let Some((blocks, block_tokens)) = ask.held.blocks(instance) else { return 0 };
    let usable = match side {
        Side::Decode => ask.prompt_tokens,
        Side::Whole | Side::Prefill => ask.prompt_tokens.saturating_sub(1),
    };
    blocks.min(usable / block_tokens) * block_tokens
}

/// Whether the prompt and one more token could ever be held there.
pub(super) fn fits(spec: &Spec, standing: &Standing, ask: &Ask<'_>) -> bool {
    let context = spec.context_tokens == 0 || ask.prompt_tokens < spec.context_tokens;
    let blocks = blocks_for(spec, ask.prompt_tokens.saturating_add(1));
    context && standing.blocks_total.is_none_or(|total| blocks <= total)
}

fn blocks_for(spec: &Spec, tokens: u32) -> u64 {
    u64::from(tokens.div_ceil(spec.block_tokens))
}

/// The prompt's once, and each choice's own.
pub(super) fn blocks_wanted(spec: &Spec, ask: &Ask<'_>) -> u64 {
    let own = expected_tokens(ask).saturating_mul(ask.choices);
    blocks_for(spec, ask.prompt_tokens.saturating_add(own))
}

pub(super) fn expected_tokens(ask: &Ask<'_>) -> u32 {
    ask.max_tokens.min(EXPECTED_TOKENS_MOST)
}

/// `cached`: tokens of the prompt that the instance has.
pub(super) fn cost_micros(
    spec: &Spec,
    standing: &Standing,
    ask: &Ask<'_>,
    (side, cached): (Side, u32),
) -> u64 {
    let uncached = u64::from(ask.prompt_tokens.saturating_sub(cached));
    let (prefill, decode) = (prefill_micros(standing, uncached), decode_micros(spec, standing, ask));
    match side {
        Side::Prefill => prefill,
        Side::Decode => {
            decode.saturating_add(uncached.saturating_mul(spec.token_bytes) / LINK_BYTES_PER_MICROSECOND)
        }
        Side::Whole => prefill.saturating_add(decode),
    }
}

fn prefill_micros(standing: &Standing, uncached: u64) -> u64 {
    let rate = match standing.prefill_tokens_per_second {
        0 => UNMEASURED_PREFILL_TOKENS_PER_SECOND,
        measured => measured,
    };
    let tokens = standing.queued_prefill_tokens.saturating_add(uncached);
    tokens.saturating_mul(1_000_000) / rate
}

fn decode_micros(spec: &Spec, standing: &Standing, ask: &Ask<'_>) -> u64 {
    let step = match standing.decode_step_micros {
        0 => UNMEASURED_DECODE_STEP_MICROS,
        measured => measured,
    };
    let expected = expected_tokens(ask);
    let sequences = standing.sequences.saturating_add(u64::from(ask.choices));
    let growing = (step / 2).saturating_mul(sequences) / standing.measured_sequences.max(1);
    let generating = u64::from(expected).saturating_mul((step / 2).saturating_add(growing));
    let wanted = blocks_wanted(spec, ask);
    let missing = standing.blocks_free.map_or(0, |free| wanted.saturating_sub(free));
    generating.saturating_add(generating.saturating_mul(missing) / wanted.max(1))
}
