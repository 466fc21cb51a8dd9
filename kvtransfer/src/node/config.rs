//! What a node is told: its identity, memory, limits, and what to expect or offer.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_proto::{Incarnation, InstanceId, PromptDigest, TransferId};

use super::secret::FleetSecret;
use crate::{
    FirstTokens, KvLayout, Region, TransferError,
    transport::{AscendConfig, DataPortConfig, Faults, Terms, TransportKind},
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
    /// Shared by the fleet; a peer that does not show it is refused. `None` = whoever reaches the port is believed.
    pub secret: Option<FleetSecret>,
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

/// Bounds of everything that could grow. What is over a bound is refused with an error that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Transfers being received at a time, expected ones included.
    pub incoming_transfers: usize,
    /// Transfers being sent at a time, waiting ones included.
    pub outgoing_transfers: usize,
    /// Offers held that nobody has expected yet. Over it, one of a peer that has fewer takes the place of the oldest of the
    /// peer that has the most; more are refused.
    pub held_offers: usize,
    /// How long such an offer is held.
    pub held_offer: Duration,
    /// Ended transfers remembered, so that their late messages are told from unknown ones and their ids not reused; and,
    /// apart from them, as many offers that were refused or withdrawn before anybody expected them.
    pub remembered_transfers: usize,
    /// Peers with a control stream, each way.
    pub peers: usize,
    /// Control streams to this node whose peer has not proven yet that it belongs to the fleet; more are refused at once,
    /// and come again. Each may take `handshake` for its hello and for its proof. As many as there are peers, which may all
    /// come at once when this node has restarted.
    pub unproven_streams: usize,
    /// Payload bytes of one frame; at least one slice travels in a frame, however large.
    pub frame_bytes: usize,
    /// Bytes that may wait in one TCP data connection for the peer's acknowledgement; as the kernel is asked, which keeps
    /// to `net.core.wmem_max`. `None` = 512 KiB to a peer of the same host, which is the fastest there; elsewhere what the
    /// kernel finds to be right for the connection as it goes, up to the last of `net.ipv4.tcp_wmem`. A fixed number turns
    /// that off: it must then be the network's bandwidth times its round trip, divided by the connections.
    pub send_buffer: Option<usize>,
    /// Memory for slices on their way in from peers that lay their cache out otherwise: a frame, rounded up to a power of
    /// two, for each data connection that brings one at the moment. A transfer that finds none is aborted.
    pub staging_bytes: usize,
    /// For connecting, for the hellos of a control stream, and for those of a data connection, each.
    pub handshake: Duration,
    /// Attempts to open a control stream, or a data path, before the transfers that wait for it fail. A peer that answers
    /// and has no room for a stream is asked until their deadlines.
    pub connect_attempts: u32,
    /// After so long, a link whose data path is not over the best transport that both sides have tries a better one again;
    /// twice as long after each attempt, up to 30 times.
    pub better_path: Duration,
    /// A control stream without transfers is closed after this long.
    pub idle_link: Duration,
    /// How long a sealed transfer may wait for slices that are still on their way, or for `Released`; a sender that has
    /// lost the control stream waits so long for another one, and the lease holds again once it stands. A few leases, and
    /// never less than one.
    pub seal_grace: Duration,
    /// How long an aborted transfer lets a frame that is being written finish from its blocks; then zeros follow, marked
    /// as such. Where
    /// the receiver fetches, it may take ten times as long to let go of the sender's blocks; then its path is cut.
    pub fence_grace: Duration,
    /// A data connection on which a frame makes no progress for this long is closed; so is one whose peer does not
    /// acknowledge what was sent. Never less than the lease.
    pub data_stall: Duration,
    /// How often a quiet connection, for control or for data, is asked for a sign of life; a second at least. A third of
    /// the lease, as transfers say theirs.
    pub keep_alive: Duration,
    /// A control connection is given up if it does not answer for this long. Never less than the lease, which a peer
    /// that only pauses may use up.
    pub keep_alive_timeout: Duration,
}

/// TCP's own keep-alive counts in seconds.
const LEAST_KEEP_ALIVE: Duration = Duration::from_secs(1);

impl Default for Limits {
    /// Those for a lease of 3 s.
    fn default() -> Self {
        Self::for_lease(Duration::from_secs(3))
    }
}

impl Limits {
    /// Limits in which every wait for a peer follows from the lease: a few of them, and a second at least.
    ///
    /// A peer that cannot be reached any more, and whose system says nothing, is noticed after a lease by transfers (the
    /// control stream is then given up too), after `keep_alive` and `keep_alive_timeout` by a control stream without
    /// any, and after `data_stall` and a `keep_alive` by a data connection that nothing else has ended.
    pub fn for_lease(lease: Duration) -> Self {
        Self {
            incoming_transfers: 1024,
            outgoing_transfers: 1024,
            held_offers: 256,
            held_offer: (lease * 10).max(Duration::from_secs(5)),
            remembered_transfers: 8192,
            peers: 256,
            unproven_streams: 256,
            frame_bytes: 1 << 20,
            send_buffer: None,
            staging_bytes: 256 << 20,
            handshake: (lease * 5 / 3).clamp(Duration::from_secs(1), Duration::from_secs(30)),
            connect_attempts: 4,
            better_path: Duration::from_secs(10),
            idle_link: Duration::from_secs(300),
            seal_grace: (lease * 10 / 3).max(Duration::from_secs(1)),
            fence_grace: (lease / 30).clamp(Duration::from_millis(10), Duration::from_secs(1)),
            data_stall: (lease * 10 / 3).max(Duration::from_secs(1)),
            keep_alive: (lease / 3).clamp(LEAST_KEEP_ALIVE, Duration::from_secs(10)),
            keep_alive_timeout: lease.max(LEAST_KEEP_ALIVE),
        }
    }
}

/// A transfer that this node is to receive.
#[derive(Debug, Clone)]
pub struct ExpectSpec {
    pub id: TransferId,
    /// Who may send it.
    pub sender: InstanceId,
    /// Which start of the sender; `None` = any.
    pub sender_incarnation: Option<Incarnation>,
    pub prompt_tokens: u32,
    /// Of the prompt whose cache is to come, and of whose cache the held blocks are. An offer of another is refused.
    pub prompt_digest: PromptDigest,
    /// Where the prompt's blocks go, in order: `layout.blocks_for(prompt_tokens)` pool indices, lent until they come
    /// back or the transfer is sealed.
    pub blocks: Vec<u32>,
    /// Indices into `blocks` of those already filled; the sender leaves them out.
    pub held: Vec<u32>,
    /// The transfer must be sealed by then.
    pub deadline: Instant,
}

/// A transfer that this node is to send.
#[derive(Debug, Clone)]
pub struct OfferSpec {
    pub id: TransferId,
    /// `host:port` of the receiver's `Handoff` service.
    pub peer: String,
    pub receiver: InstanceId,
    /// Which start of the receiver; `None` = any.
    pub receiver_incarnation: Option<Incarnation>,
    pub prompt_tokens: u32,
    /// Of the prompt whose cache this is.
    pub prompt_digest: PromptDigest,
    /// The prompt's blocks in order: `layout.blocks_for(prompt_tokens)` pool indices, lent until they come back. Other
    /// transfers may read them at the same time.
    pub blocks: Vec<u32>,
    /// Among the transfers to one peer: slices of a lower one go first, while the others get every eighth frame.
    pub priority: i32,
    /// The receiver must have released the transfer by then.
    pub deadline: Instant,
}

/// Which way a transfer goes, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    Incoming,
    Outgoing,
}

/// Blocks that are their owner's again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reclaimed {
    pub id: TransferId,
    pub direction: Direction,
    pub blocks: Vec<u32>,
}

/// A received transfer: every slice is in its block and matches its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Of every choice, sampled by the sender.
    pub first_tokens: FirstTokens,
    /// (layer, block) pairs that were sent; held ones are not among them.
    pub slices: u64,
    pub bytes: u64,
    /// From accept to seal.
    pub took: Duration,
    /// When its last slice had landed; the seal may have come later.
    pub last_slice_at: Instant,
    /// When it was complete.
    pub at: Instant,
}

/// A sent transfer that its receiver has taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferStats {
    pub slices: u64,
    pub bytes: u64,
    /// From offer to release.
    pub took: Duration,
    /// From the moment that the last slice was ready to release.
    pub ready_to_released: Duration,
}

impl Limits {
    /// A wait for a peer that would end before its lease does, for all of which it may pause.
    fn shorter_than(&self, lease: Duration) -> Option<(&'static str, Duration)> {
        let waits = [
            ("seal_grace", self.seal_grace),
            ("data_stall", self.data_stall),
            ("keep_alive_timeout", self.keep_alive_timeout),
        ];
        waits.into_iter().find(|(_, wait)| *wait < lease)
    }

    pub(crate) fn terms(&self, slice_bytes: u64) -> Result<Terms, TransferError> {
        let Self { frame_bytes, handshake, fence_grace, data_stall, keep_alive, send_buffer, .. } = *self;
        let terms = Terms::new(slice_bytes, frame_bytes, handshake, fence_grace, data_stall, keep_alive)?;
        Ok(Terms { send_buffer, ..terms })
    }

    /// Messages that may wait on a control stream, each way: a handful for each transfer. A fuller queue means a peer
    /// that does not read, and breaks the stream.
    pub(crate) fn control_queue(&self) -> usize {
        64 + 4 * (self.incoming_transfers.max(self.outgoing_transfers) + self.held_offers)
    }
}

impl NodeConfig {
    pub(crate) fn validate(&self) -> Result<(), TransferError> {
        let bad = |what: &str| Err(TransferError::Invalid(format!("node configuration: {what}")));
        let limits = &self.limits;
        if self.lease < Duration::from_millis(30) || self.lease > Duration::from_secs(3600) {
            return bad("lease must be 30 ms to 1 h");
        }
        if limits.peers == 0 || limits.unproven_streams == 0 {
            return bad("peers and unproven_streams must be at least 1");
        }
        let times = [
            ("held_offer", limits.held_offer),
            ("handshake", limits.handshake),
            ("better_path", limits.better_path),
            ("idle_link", limits.idle_link),
            ("seal_grace", limits.seal_grace),
            ("fence_grace", limits.fence_grace),
            ("data_stall", limits.data_stall),
            ("keep_alive_timeout", limits.keep_alive_timeout),
        ];
        if let Some((name, _)) = times.iter().find(|(_, time)| time.is_zero()) {
            return bad(&format!("{name} must be more than 0"));
        }
        if limits.send_buffer == Some(0) {
            return bad("send_buffer must be more than 0; none = as the kernel finds right");
        }
        if limits.keep_alive < LEAST_KEEP_ALIVE {
            return bad("keep_alive must be at least 1 s");
        }
        if let Some((name, time)) = limits.shorter_than(self.lease) {
            let lease = self.lease;
            return bad(&format!(
                "{name} ({time:?}) must be no less than the lease ({lease:?}); see `Limits::for_lease`"
            ));
        }
        if limits.connect_attempts == 0 {
            return bad("connect_attempts must be at least 1");
        }
        self.layout.validate()
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use super::*;

    #[test]
    fn nothing_ends_a_connection_to_a_peer_that_pauses_within_its_lease() {
        for millis in [30, 1000, 3000, 60_000, 3_600_000] {
            let lease = Duration::from_millis(millis);
            let limits = Limits::for_lease(lease);
            assert_eq!(limits.shorter_than(lease), None);
            let Limits { keep_alive, keep_alive_timeout, .. } = limits;
            assert!(keep_alive >= LEAST_KEEP_ALIVE && keep_alive <= keep_alive_timeout);
        }
    }
}
