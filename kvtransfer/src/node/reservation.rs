//! What the owner of a node's blocks asks for, checked before anything is done about it.

use std::time::Instant;

use baton_proto::TransferId;

use super::{
    claims::{Claimed, Claims},
    transfer::ExpectSpec,
};
use crate::{
    KvLayout, TransferError,
    session::{Expectation, Shape},
    sync::Mutex,
};

/// A checked `ExpectSpec` and the claim on its blocks.
#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) id: TransferId,
    pub(super) expectation: Expectation,
    pub(super) reserved: Reserved,
}

/// The blocks of a transfer being received.
#[derive(Debug)]
pub(super) struct Reserved {
    /// In prompt order.
    pub(super) blocks: Vec<u32>,
    /// Indices of those that are filled already, in ascending order.
    pub(super) held: Vec<u32>,
    pub(super) prompt_tokens: u32,
    /// Writes those that will be written, reads those that are filled already. None once the transfer is over.
    pub(super) claimed: Mutex<Option<Claimed>>,
}

impl Reservation {
    /// Checks a spec against the node's layout and claims its blocks.
    pub(super) fn new(
        spec: ExpectSpec,
        layout: &KvLayout,
        claims: &Claims,
        now: Instant,
    ) -> Result<Self, TransferError> {
        let ExpectSpec { id, sender, sender_incarnation, prompt_tokens, prompt_digest, .. } = spec;
        let ExpectSpec { blocks, mut held, deadline, .. } = spec;
        let count = check_blocks(layout, prompt_tokens, &blocks, deadline, now)?;
        held.sort_unstable();
        held.dedup();
        if held.last().is_some_and(|&last| last >= count) {
            return Err(TransferError::Invalid("held names an index outside blocks".into()));
        }
        let is_held = |index: usize| held.binary_search(&(index as u32)).is_ok();
        let (mut missing, mut held_blocks) = (Vec::with_capacity(blocks.len()), Vec::new());
        for (index, &block) in blocks.iter().enumerate() {
            if is_held(index) { held_blocks.push(block) } else { missing.push(block) }
        }
        let shape = Shape { layers: layout.layers, blocks: count };
        let claimed = Mutex::new(Some(claims.claim(&missing, &held_blocks)?));
        let reserved = Reserved { blocks, held: held.clone(), prompt_tokens, claimed };
        let expectation =
            Expectation { sender, sender_incarnation, prompt_tokens, prompt_digest, shape, held, deadline };
        Ok(Self { id, expectation, reserved })
    }
}

/// Checks what both directions have in common; the number of blocks.
pub(super) fn check_blocks(
    layout: &KvLayout,
    prompt_tokens: u32,
    blocks: &[u32],
    deadline: Instant,
    now: Instant,
) -> Result<u32, TransferError> {
    let needed = layout.blocks_for(prompt_tokens);
    if prompt_tokens == 0 || blocks.len() != needed as usize {
        return Err(TransferError::Invalid(format!(
            "{prompt_tokens} prompt tokens need {needed} blocks of {} tokens, got {}",
            layout.block_tokens,
            blocks.len()
        )));
    }
    if deadline <= now {
        return Err(TransferError::DeadlineExceeded { waiting_for: "starting the transfer" });
    }
    Ok(needed)
}
