//! The owner's side of a transfer being sent: the handle it holds, and the one it gives its engine.

use std::{ops::Range, sync::Arc};

use baton_proto::TransferId;
use tokio::sync::watch;

use super::{
    outbound::Outbound,
    shell::{Outcome, Shell},
    transfer::TransferStats,
};
use crate::{FirstTokens, TransferError};

/// A transfer being sent.
///
/// Its blocks come back exactly once: from [`Outgoing::close`], or, when this is dropped, through
/// `NodeConfig::reclaim`; released or not. Dropping it before it is released aborts the transfer.
#[derive(Debug)]
pub struct Outgoing {
    outbound: Arc<Outbound>,
    outcome: watch::Receiver<Outcome<TransferStats>>,
    returned: bool,
}

impl Outgoing {
    pub(super) fn new(outbound: Arc<Outbound>) -> Self {
        let outcome = outbound.watch();
        Self { outbound, outcome, returned: false }
    }

    pub fn id(&self) -> TransferId {
        self.outbound.id()
    }

    /// The engine's handle to say what is ready.
    pub fn progress(&self) -> Progress {
        Progress { outbound: self.outbound.clone() }
    }

    /// Every slice has been made ready (those of blocks that the receiver holds need not be) and this is the first
    /// token. The seal goes out behind the last slice. Does not wait.
    pub fn seal(&self, first_tokens: impl Into<FirstTokens>) {
        self.outbound.seal(first_tokens.into());
    }

    /// Resolves when the receiver has taken the transfer over, or, with the reason, when it has been aborted; either way
    /// no transport reads the blocks for it any more. (A peer that maps this node's memory, over `shm`, or whose NPU reads
    /// it, may still be copying when the connection to it breaks; it drops what it reads then.) Cancel safe; asked again, it gives the same answer.
    pub async fn finished(&mut self) -> Result<TransferStats, TransferError> {
        match self.outcome.wait_for(Outcome::is_settled).await {
            Ok(outcome) => outcome.result.clone().unwrap_or(Err(TransferError::ShuttingDown)),
            Err(_) => Err(TransferError::ShuttingDown),
        }
    }

    /// Resolves with the reason as soon as the transfer is aborted, before its blocks are free; never if it is not.
    /// So a prefill that has lost its receiver can stop computing. Cancel safe.
    pub async fn aborted(&mut self) -> TransferError {
        let failed = |outcome: &Outcome<TransferStats>| matches!(outcome.result, Some(Err(_)));
        match self.outcome.wait_for(failed).await.map(|outcome| outcome.result.clone()) {
            Ok(Some(Err(reason))) => reason,
            _ => std::future::pending().await,
        }
    }

    /// Aborts the transfer unless it is released, and tells the receiver why. Does not wait; see [`Outgoing::close`].
    pub fn cancel(&self, reason: &str) {
        self.outbound.cancel(TransferError::Cancelled(reason.to_owned()));
    }

    /// Aborts it too, and has it counted, here and at the receiver, as one that nobody wants any more.
    pub fn withdraw(&self, reason: &str) {
        self.outbound.cancel(TransferError::NotNeeded(reason.to_owned()));
    }

    /// Gives the blocks back once no transport reads them any more. Aborts the transfer if it is not released.
    pub async fn close(mut self) -> Vec<u32> {
        self.cancel("closed by the sender");
        let _ = self.outcome.wait_for(Outcome::is_settled).await;
        self.returned = true;
        self.outbound.blocks().to_vec()
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.returned {
            self.cancel("dropped by the sender");
            self.outbound.orphan();
        }
    }
}

/// Says, from the engine's thread, which slices are final. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress {
    outbound: Arc<Outbound>,
}

impl Progress {
    /// The slices of `layer` for `blocks` (indices into the offer's block list) are final and may be read from now on.
    ///
    /// Takes a short lock and wakes a sending task, never waits for the network. Each slice is to be named once; one out
    /// of range, named twice or after the seal aborts the transfer. After an abort this does nothing.
    pub fn ready(&self, layer: u32, blocks: Range<u32>) {
        self.outbound.ready(layer, blocks);
    }

    /// As [`Outgoing::seal`], for an engine that does not hold the transfer itself: sealing from its thread spares a
    /// hop between the last layer and the receiver. To be called once, by either of the two.
    pub fn seal(&self, first_tokens: impl Into<FirstTokens>) {
        self.outbound.seal(first_tokens.into());
    }
}
