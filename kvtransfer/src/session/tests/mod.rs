//! Properties of the session machines under any order of events.

mod every_order;
mod pair;
mod receiver;
mod sender;

use std::time::{Duration, Instant};

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, PromptDigest};
use proptest::prelude::*;

use super::*;
use crate::TransferError;

const SLICE_BYTES: u64 = 10;
const LEASE: Duration = Duration::from_millis(900);
const SEAL_GRACE: Duration = Duration::from_secs(2);

fn peer(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a valid name")
}

fn reason() -> ApiError {
    ApiError::new(ErrorCode::Cancelled, "test")
}

fn timing() -> ReceiverTiming {
    ReceiverTiming { lease: LEASE, held_offer: Duration::from_secs(3), seal_grace: SEAL_GRACE }
}

fn expectation(shape: Shape, held: Vec<u32>, deadline: Instant) -> Expectation {
    let (sender, prompt_tokens) = (peer("prefill-0"), shape.blocks * 16);
    Expectation {
        sender,
        sender_incarnation: Some(Incarnation(1)),
        prompt_tokens,
        prompt_digest: PromptDigest::of(&[1]),
        shape,
        held,
        deadline,
    }
}

fn offer(shape: Shape) -> OfferTerms {
    let (sender, prompt_tokens) = (peer("prefill-0"), shape.blocks * 16);
    OfferTerms {
        sender,
        sender_incarnation: Incarnation(1),
        prompt_tokens,
        prompt_digest: PromptDigest::of(&[1]),
        shape,
        cut: None,
    }
}

fn terms(shape: Shape, now: Instant) -> SenderTerms {
    SenderTerms {
        shape,
        slice_bytes: SLICE_BYTES,
        deadline: now + Duration::from_secs(60),
        lease: LEASE,
        seal_grace: SEAL_GRACE,
    }
}

/// A slice's content, as its CRC.
fn crc(layer: u32, block: u32) -> u32 {
    layer * 1000 + block + 1
}

fn crcs(run: SliceRun) -> Vec<u32> {
    run.blocks().map(|block| crc(run.layer, block)).collect()
}

/// The tally of everything that is not held.
fn whole(shape: Shape, held: &[u32]) -> Tally {
    let mut tally = Tally::default();
    for layer in 0..shape.layers {
        for block in (0..shape.blocks).filter(|block| !held.contains(block)) {
            tally.add(layer, block, crc(layer, block), SLICE_BYTES);
        }
    }
    tally
}

fn any_shape() -> impl Strategy<Value = (Shape, Vec<u32>)> {
    (1..4u32, 1..5u32).prop_flat_map(|(layers, blocks)| {
        let held = proptest::collection::btree_set(0..blocks, 0..=blocks as usize);
        held.prop_map(move |held| (Shape { layers, blocks }, held.into_iter().collect()))
    })
}

/// Runs of a shape, now and then ones that reach outside it.
fn any_run() -> impl Strategy<Value = SliceRun> {
    (0..4u32, 0..5u32, 1..3u32).prop_map(|(layer, first, count)| SliceRun { layer, first, count })
}
