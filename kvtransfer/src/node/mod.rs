//! The shell around the transfer sessions: one node per server process.

mod config;

use std::ops::Range;

use baton_proto::{ErrorCode, TransferId, v1};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub use config::{Direction, ExpectSpec, Limits, NodeConfig, OfferSpec, Reclaimed, Sealed, TransferStats};

use crate::TransferError;

/// Sends and receives KV caches for one server process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KvNode {
    shutdown: CancellationToken,
}

impl KvNode {
    /// Starts listening for slices. Must be called within a tokio runtime; `shutdown` aborts every transfer and ends
    /// every task of the node.
    pub fn start(config: NodeConfig, shutdown: CancellationToken) -> Result<Self, TransferError> {
        config.validate()?;
        Ok(Self { shutdown })
    }

    /// Resolves once every task of the node has ended after shutdown.
    pub async fn stopped(&self) {
        self.shutdown.cancelled().await;
    }

    /// The gRPC service to mount: `v1::handoff_server::HandoffServer<HandoffService>`.
    pub fn handoff_service(&self) -> v1::handoff_server::HandoffServer<HandoffService> {
        v1::handoff_server::HandoffServer::new(HandoffService { _node: self.clone() })
    }

    /// Reserves a place for a transfer that `spec.sender` offers or will offer.
    pub fn expect(&self, _spec: ExpectSpec) -> Result<Incoming, TransferError> {
        Err(TransferError::ShuttingDown)
    }

    /// Tells the sender of a transfer, now or when its offer comes, that it will not be received.
    pub fn refuse(&self, _id: TransferId, _reason: baton_proto::ApiError) {}

    /// Offers a transfer. Returns at once; connecting and offering happen in the background.
    pub fn offer(&self, _spec: OfferSpec) -> Result<Outgoing, TransferError> {
        Err(TransferError::ShuttingDown)
    }

    /// Counters since start and current numbers, for metrics.
    pub fn stats(&self) -> NodeStats {
        NodeStats::default()
    }
}

/// Server side of the `Handoff` contract.
#[derive(Debug, Clone)]
pub struct HandoffService {
    _node: KvNode,
}

#[tonic::async_trait]
impl v1::handoff_server::Handoff for HandoffService {
    type ExchangeStream = tokio_stream::Empty<Result<v1::ReceiverMessage, Status>>;

    async fn exchange(
        &self,
        _request: Request<Streaming<v1::SenderMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        Err(Status::unavailable("this node is shutting down"))
    }
}

/// A transfer being received. Dropping it aborts it, unless it is sealed; its blocks then go to `NodeConfig::reclaim`.
#[derive(Debug)]
pub struct Incoming {
    _node: KvNode,
}

impl Incoming {
    /// Resolves when every slice has arrived and matches the seal, or with the reason of the abort. Cancel safe; after
    /// it has resolved, further calls give the same answer.
    pub async fn sealed(&mut self) -> Result<Sealed, TransferError> {
        Err(TransferError::ShuttingDown)
    }

    /// Aborts the transfer unless it is sealed, tells the sender `reason`, and waits for nothing.
    pub fn cancel(&self, _reason: &str) {}

    /// Gives the blocks back once no transport can write into them any more; aborts the transfer if it is not sealed.
    pub async fn close(self) -> Vec<u32> {
        Vec::new()
    }
}

/// A transfer being sent. Dropping it aborts it, unless it is released; its blocks then go to `NodeConfig::reclaim`.
#[derive(Debug)]
pub struct Outgoing {
    _node: KvNode,
}

impl Outgoing {
    /// The engine's handle to say what is ready.
    pub fn progress(&self) -> Progress {
        Progress { _node: self._node.clone() }
    }

    /// Every slice has been made ready and this is the first token. The seal goes out behind the last slice.
    pub fn seal(&self, _first_token: u32) {}

    /// Resolves when the receiver has taken the transfer over, or, with the reason, when it is aborted; either way no
    /// transport reads the blocks any more. Cancel safe; further calls give the same answer.
    pub async fn finished(&mut self) -> Result<TransferStats, TransferError> {
        Err(TransferError::ShuttingDown)
    }

    /// Aborts the transfer unless it is released, tells the receiver `reason`, and waits for nothing.
    pub fn cancel(&self, _reason: &str) {}

    /// Gives the blocks back once no transport reads them any more; aborts the transfer if it is not released.
    pub async fn close(self) -> Vec<u32> {
        Vec::new()
    }
}

/// Says, from the engine's thread, which slices are final. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress {
    _node: KvNode,
}

impl Progress {
    /// Slices of `layer` for `blocks` (indices into the offer's block list) are final and may be read from now on.
    /// Never blocks. Each slice is named once; a slice out of range or named twice aborts the transfer.
    pub fn ready(&self, _layer: u32, _blocks: Range<u32>) {}
}

/// What a node has done and is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeStats {
    pub incoming_active: u64,
    pub outgoing_active: u64,
    pub held_offers: u64,
    pub incoming_completed: u64,
    pub outgoing_completed: u64,
    /// Aborted transfers by direction and the code of the reason.
    pub aborted: Vec<(Direction, ErrorCode, u64)>,
    pub slices_received: u64,
    pub bytes_received: u64,
    pub slices_sent: u64,
    pub bytes_sent: u64,
    /// From seal to release as the sender sees it: how often, sum, and counts of those at most the bound in `SEAL_BUCKETS_MICROS`.
    pub seal_to_released_count: u64,
    pub seal_to_released_micros: u64,
    pub seal_to_released_buckets: Vec<(u64, u64)>,
}
