//! The owner's side of a transfer being received: the handle it holds.

use std::sync::Arc;

use baton_proto::TransferId;
use tokio::sync::watch;

use super::{
    inbound::Inbound,
    shell::{Outcome, Shell},
    transfer::Sealed,
};
use crate::TransferError;

/// A transfer being received.
///
/// Its blocks come back exactly once: from [`Incoming::close`], or, when this is dropped, through
/// `NodeConfig::reclaim`; sealed or not. Dropping it before it is sealed aborts the transfer.
#[derive(Debug)]
pub struct Incoming {
    inbound: Arc<Inbound>,
    outcome: watch::Receiver<Outcome<Sealed>>,
    returned: bool,
}

impl Incoming {
    pub(super) fn new(inbound: Arc<Inbound>) -> Self {
        let outcome = inbound.watch();
        Self { inbound, outcome, returned: false }
    }

    pub fn id(&self) -> TransferId {
        self.inbound.id()
    }

    /// Resolves when every slice is in its block and matches the seal, or with the reason of the abort. After `Ok` no
    /// transport touches the blocks any more. Cancel safe; asked again, it gives the same answer.
    pub async fn sealed(&mut self) -> Result<Sealed, TransferError> {
        match self.outcome.wait_for(Outcome::known).await {
            Ok(outcome) => outcome.result.clone().unwrap_or(Err(TransferError::ShuttingDown)),
            Err(_) => Err(TransferError::ShuttingDown),
        }
    }

    /// Aborts the transfer unless it is sealed, and tells the sender why. Does not wait; see [`Incoming::close`].
    pub fn cancel(&self, reason: &str) {
        self.inbound.cancel(TransferError::Cancelled(reason.to_owned()));
    }

    /// Gives the blocks back once no transport can write into them any more. Aborts the transfer if it is not sealed.
    pub async fn close(mut self) -> Vec<u32> {
        self.cancel("closed by the receiver");
        let _ = self.outcome.wait_for(Outcome::is_settled).await;
        self.returned = true;
        self.inbound.blocks().to_vec()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.returned {
            self.cancel("dropped by the receiver");
            self.inbound.orphan();
        }
    }
}
