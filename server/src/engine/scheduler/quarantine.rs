//! What becomes of a cache that is in doubt, and of those who share it.
//!
//! Nobody can take it any more, nor what was computed from it, and who holds any of it seals nothing more (see
//! [`BlockManager::distrust`](crate::engine::blocks::BlockManager::distrust)). Damage is silent, so after it none may go on
//! over such blocks: whoever can be computed again is, here, from its tokens; a cache that is on its way, in or out, is
//! given up, and its request placed again. It is not called damaged in turn: the coordinator would have it quarantined on
//! the other side too, where others share it, and so on from pair to pair. Logits that are not numbers are loud: whoever
//! reads what made them has such logits too, so the others go on.

use baton_proto::{ApiError, ErrorCode};

use super::Scheduler;
use crate::engine::sequence::{SequenceId, State};

impl Scheduler {
    /// Ends a sequence whose logits are not numbers.
    pub fn fail_damaged(&mut self, id: SequenceId, error: ApiError) {
        self.distrust(id);
        self.fail(id, error);
    }

    /// What a sequence holds has been damaged. It is left to the caller; nobody else goes on over any of it.
    pub fn quarantine(&mut self, id: SequenceId) {
        self.distrust(id);
        let sharers = self.sequences.values().filter(|s| s.id != id && s.state != State::Closing);
        let sharers: Vec<_> = sharers.filter(|s| !self.blocks.trusts(&s.blocks)).map(|s| s.id).collect();
        for sharer in sharers {
            if self.sequences[&sharer].preemptible() {
                self.leave_batch(sharer);
                self.recompute(sharer);
            } else {
                let message = "what this request shares of the KV cache is in quarantine: send it again";
                self.fail(sharer, ApiError::new(ErrorCode::Unavailable, message));
            }
        }
    }

    fn distrust(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let (blocks, hashes) = sequence.chain(self.root, self.limits.block_tokens);
            self.blocks.distrust(blocks, hashes);
        }
    }
}
