//! The KV pool whose blocks are lent to a node's transfers.

use std::sync::Arc;

use super::{claims::Claims, transfer::Reclaimed};
use crate::Slices;

pub(super) struct Pool {
    pub(super) slices: Slices,
    pub(super) claims: Claims,
    reclaim: Arc<dyn Fn(Reclaimed) + Send + Sync>,
}

impl Pool {
    /// `reclaim` is `NodeConfig::reclaim`.
    pub(super) fn new(slices: Slices, claims: Claims, reclaim: Arc<dyn Fn(Reclaimed) + Send + Sync>) -> Self {
        Self { slices, claims, reclaim }
    }

    /// Hands blocks back to an owner that has let its transfer go.
    pub(super) fn reclaim(&self, blocks: Reclaimed) {
        (self.reclaim)(blocks);
    }
}
