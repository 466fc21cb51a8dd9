//! How a node is set up: its identity, its memory, how it may send and reach its peers.

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use baton_proto::{Incarnation, InstanceId};
use tonic::transport::{Channel, Endpoint, Error};

use super::{limits::Limits, secret::FleetSecrets, transfer::Reclaimed};
use crate::{
    KvLayout, Region, TransferError,
    transport::{AscendConfig, DataPortConfig, Faults, TransportKind},
};

/// How a node is set up. There is one node for each server process.
pub struct NodeConfig {
    pub instance_id: InstanceId,
    /// Of this start of the process. Transfers are stamped with both sides' incarnations.
    pub incarnation: Incarnation,
    /// Must equal the peers', or be one that theirs can be mapped to and it to theirs; checked when a control stream
    /// opens.
    pub layout: KvLayout,
    /// The KV pool's memory: `layout.layers` x `blocks` slices.
    pub region: Region,
    /// Blocks in each layer of the region.
    pub blocks: u32,
    /// Where peers bring data connections.
    pub data_port: DataPortConfig,
    /// How slices may travel, the best first; each kind once. What cannot be had on this host is left out and logged.
    pub transports: Vec<TransportConfig>,
    /// How control streams to peers are connected: [`Plaintext`], or as whoever serves [`super::HandoffService`] wants.
    pub dial: Arc<dyn Dial>,
    /// Shared by the fleet; a peer that does not show it is refused. `None` = whoever reaches the port is believed.
    pub secret: Option<FleetSecrets>,
    /// Whether caches of another type (bf16, int8) are taken in and converted, which changes values. Other blocks and
    /// arrangements of the same type change none, and are always taken.
    pub convert: bool,
    /// Silence of a peer for this long ends its transfers. Signs of life are sent three times as often. The receiver's
    /// lease holds once it has accepted, the sender's before; give all nodes of a fleet the same.
    pub lease: Duration,
    /// `Limits::for_lease(lease)`, or some that wait for a peer no less than the lease.
    pub limits: Limits,
    /// Gets the blocks of transfers whose handle was dropped, once no transport touches them any more. It is called by
    /// whichever thread brings that about, one that drops a handle or reports slices among them: it must not block, nor
    /// take a lock that such a thread may hold.
    pub reclaim: Arc<dyn Fn(Reclaimed) + Send + Sync>,
}

impl fmt::Debug for NodeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeConfig")
            .field("instance_id", &self.instance_id)
            .field("incarnation", &self.incarnation)
            .field("layout", &self.layout)
            .field("blocks", &self.blocks)
            .field("data_port", &self.data_port)
            .field("transports", &self.transports)
            .field("convert", &self.convert)
            .field("lease", &self.lease)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// A connection on its way.
pub type Dialling = Pin<Box<dyn Future<Output = Result<Channel, Error>> + Send>>;

/// Connects to the `Handoff` services of peers.
pub trait Dial: Send + Sync {
    /// To `http://HOST:PORT`, with what the endpoint says of timeouts and probes; `receiver` is who should be there. An
    /// error is tried again.
    fn dial(&self, peer: Endpoint, receiver: &InstanceId) -> Dialling;
}

/// In plaintext, whoever answers.
#[derive(Debug, Clone, Copy)]
pub struct Plaintext;

impl Dial for Plaintext {
    fn dial(&self, peer: Endpoint, _: &InstanceId) -> Dialling {
        Box::pin(async move { peer.connect().await })
    }
}

/// A way for slices to travel, as a node is given it.
#[derive(Debug, Clone, PartialEq)]
pub enum TransportConfig {
    /// Between processes of one host; needs a region that is `backed_by` a file.
    Shm,
    Tcp {
        /// Opened to one peer.
        connections: usize,
    },
    /// By the RoCE cards of the machine. Registering the region takes all of its memory from the system at once.
    Rdma,
    /// By an Ascend NPU's own network, through HIXL-CS.
    Hixl(AscendConfig),
    /// As `Hixl`, through HCCL; the region must be the device's memory.
    Hccl(AscendConfig),
    /// Another one, with faults by a seed: for tests of what stands above.
    Faulty(Box<TransportConfig>, Faults),
}

impl TransportConfig {
    pub fn kind(&self) -> TransportKind {
        match self {
            Self::Shm => TransportKind::Shm,
            Self::Tcp { .. } => TransportKind::Tcp,
            Self::Rdma => TransportKind::Rdma,
            Self::Hixl(_) => TransportKind::Hixl,
            Self::Hccl(_) => TransportKind::Hccl,
            Self::Faulty(config, _) => config.kind(),
        }
    }
}

impl NodeConfig {
    pub(crate) fn validate(&self) -> Result<(), TransferError> {
        if self.lease < Duration::from_millis(30) || self.lease > Duration::from_secs(3600) {
            return Err(TransferError::Invalid("node configuration: lease must be 30 ms to 1 h".into()));
        }
        self.limits.validate(self.lease)?;
        self.layout.validate()
    }
}
