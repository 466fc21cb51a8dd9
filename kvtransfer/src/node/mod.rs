//! The shell around the transfer sessions: one node per server process, both sender and receiver.
//!
//! Holds the transfers of either direction, the control streams (`link`: ours to peers, `service`: peers' to us), the
//! transport, and the clock that drives leases and deadlines. Decisions are the sessions' (`crate::session`).
//! Lock order: a table or a link before a transfer, a transfer before an outbox; the end of a transfer takes none.

mod backoff;
mod claims;
mod clock;
mod config;
#[cfg(all(test, feature = "explore"))]
mod explore;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod held;
mod inbound;
mod incoming;
mod link;
mod link_up;
mod outbound;
mod outgoing;
mod peer_link;
mod reservation;
mod route;
mod secret;
mod service;
mod shell;
mod staging;
mod stats;
mod table;
mod translate;
mod transports;
mod wire;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use baton_proto::{ApiError, Incarnation, InstanceId, TransferId, v1};
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::{
    Direction, ExpectSpec, Limits, NodeConfig, OfferSpec, Reclaimed, Sealed, TransferStats, TransportConfig,
};
pub use incoming::Incoming;
pub use outgoing::{Outgoing, Progress};
pub use secret::FleetSecret;
pub use service::HandoffService;
pub use stats::NodeStats;

use claims::Claims;
use inbound::Inbound;
use link::Link;
use outbound::Outbound;
use peer_link::PeerLink;
use reservation::{Reservation, check_blocks};
use staging::Staging;
use stats::Counters;
use table::{Bounds, Ended, Expected, Expecting, Lookup, Table};
use translate::{Translated, Translations};

use crate::{
    KvLayout, Slices, TransferError,
    session::ReceiverTiming,
    sync::Mutex,
    transport::{
        Admission, DataKey, DataPort, Found, Inbox, LinkId, Live, Observed, Transport, TransportKind,
    },
};

/// Sends and receives KV caches for one server process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KvNode {
    node: Arc<Node>,
}

/// What all parts of a node share.
struct Node {
    instance_id: InstanceId,
    incarnation: Incarnation,
    layout: KvLayout,
    slices: Slices,
    lease: Duration,
    limits: Limits,
    reclaim: Arc<dyn Fn(Reclaimed) + Send + Sync>,
    secret: Option<FleetSecret>,
    /// Whether values of another type are taken in.
    convert: bool,
    translations: Translations,
    staging: Staging,
    /// The best first.
    transports: Vec<Observed>,
    claims: Claims,
    incoming: Table<Inbound>,
    outgoing: Table<Outbound>,
    /// Streams to peers we send to, by endpoint.
    links: Mutex<HashMap<String, Arc<Link>>>,
    /// Streams of peers that send to us.
    peers: Mutex<HashMap<InstanceId, Arc<PeerLink>>>,
    /// Room for streams of peers that have proven nothing yet.
    unproven: Arc<Semaphore>,
    numbers: AtomicU64,
    counters: Counters,
    /// A transfer has been added.
    activity: Notify,
    tasks: TaskTracker,
    /// Where tasks run: transfers are offered from threads that belong to no runtime, too.
    runtime: Handle,
    /// Given by the owner: take nothing new, abort what there is.
    shutdown: CancellationToken,
    /// Ours, a moment later: end every stream and connection.
    stop: CancellationToken,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("instance_id", &self.instance_id).finish_non_exhaustive()
    }
}

impl KvNode {
    /// Starts taking slices in. Must be called within a tokio runtime. `shutdown` aborts every transfer and ends every
    /// task of the node; see [`KvNode::stopped`].
    pub fn start(config: NodeConfig, shutdown: CancellationToken) -> Result<Self, TransferError> {
        config.validate()?;
        let slices = config.region.slices(&config.layout, config.blocks)?;
        let limits = config.limits;
        let terms = limits.terms(config.layout.slice_bytes)?;
        let port = DataPort::new(config.data_port, terms)?;
        let transports = transports::open(config.transports, &config.region, &port, terms)?;
        let node = Arc::new(Node {
            instance_id: config.instance_id,
            incarnation: config.incarnation,
            layout: config.layout,
            slices,
            lease: config.lease,
            reclaim: config.reclaim,
            secret: config.secret,
            convert: config.convert,
            translations: Translations::default(),
            staging: Staging::new(limits.staging_bytes),
            transports,
            claims: Claims::new(config.blocks),
            incoming: Table::new(Bounds { remember: limits.remembered_transfers, hold: limits.held_offers }),
            outgoing: Table::new(Bounds { remember: limits.remembered_transfers, hold: 0 }),
            links: Mutex::default(),
            peers: Mutex::default(),
            unproven: Arc::new(Semaphore::new(limits.unproven_streams)),
            numbers: AtomicU64::new(0),
            counters: Counters::default(),
            activity: Notify::new(),
            tasks: TaskTracker::new(),
            runtime: Handle::current(),
            shutdown,
            stop: CancellationToken::new(),
            limits,
        });
        for transport in &node.transports {
            transport.receive(node.clone(), &node.tasks, node.stop.clone());
        }
        node.tasks.spawn(port.serve(node.clone(), node.tasks.clone(), node.stop.clone()));
        node.tasks.spawn(clock::keep_time(node.clone()));
        node.tasks.close();
        Ok(Self { node })
    }

    /// Resolves once every task of the node has ended after shutdown.
    pub async fn stopped(&self) {
        self.node.shutdown.cancelled().await;
        self.node.tasks.wait().await;
    }

    /// The gRPC service for the server to mount.
    ///
    /// The server should ask its connections for signs of life (HTTP/2 keep-alive: tonic's `http2_keepalive_interval` and
    /// `http2_keepalive_timeout`, the latter no less than the lease). Transfers do not need it, their leases run out. But
    /// only the server can tell that a sender which its network has cut off is gone while it has no transfers: until then
    /// its control stream and its data connections stay, and count against `Limits::peers` and
    /// `DataPortConfig::connections`, unless it comes back and replaces them.
    pub fn handoff_service(&self) -> v1::handoff_server::HandoffServer<HandoffService> {
        v1::handoff_server::HandoffServer::new(HandoffService { node: self.node.clone() })
    }

    /// The ways by which this node takes slices in, the best first, with the address that peers are told.
    pub fn transports(&self) -> Vec<(TransportKind, String)> {
        self.node.transports.iter().map(|transport| (transport.kind(), transport.address())).collect()
    }

    /// Reserves a place for a transfer that `spec.sender` has offered or will offer.
    ///
    /// # Errors
    /// - `ShuttingDown`: the node takes nothing new.
    /// - `Invalid`: the blocks are not as many as the prompt's tokens need, do not exist or are in use by another transfer,
    ///   or `held` names one outside them.
    /// - `DeadlineExceeded`: the deadline has passed already.
    /// - `Limit`: as many transfers are being received as [`Limits::incoming_transfers`] allows.
    /// - `AlreadyExists`: the id is expected already, or its transfer was received.
    /// - Whatever ended the transfer, or this sender's offer of it, before: `Refused` or `PeerAborted`, `LinkLost`,
    ///   `LeaseExpired` or any other.
    pub fn expect(&self, spec: ExpectSpec) -> Result<Incoming, TransferError> {
        let node = &self.node;
        let now = node.now();
        node.check_running()?;
        let reservation = Reservation::new(spec, &node.layout, &node.claims, now)?;
        let inbound = node.expect(now, reservation)?;
        if node.shutdown.is_cancelled() {
            inbound.cancel(TransferError::ShuttingDown); // the sweep at shutdown may have missed it
        }
        Ok(Incoming::new(inbound))
    }

    /// Resolves once an offer of this transfer has come, at once if it has, and also if the transfer has ended for
    /// whatever reason; [`KvNode::expect`] then tells which. Stays pending otherwise: bound it by the request's deadline.
    /// Cancel safe; what it takes to wait is given back when it resolves or is dropped.
    pub fn offered(&self, id: TransferId) -> impl Future<Output = ()> + Send + use<> {
        let node = self.node.clone();
        async move { node.incoming.known(id).await }
    }

    /// Tells the sender of a transfer, now or when its offer comes, that it will not be received.
    pub fn refuse(&self, id: TransferId, reason: ApiError) {
        let reason = TransferError::Refused(reason);
        let ended = Ended { peer: None, reason: Some(reason.clone()) };
        for inbound in self.node.incoming.end_unless_live(id, ended) {
            inbound.cancel(reason.clone());
        }
    }

    /// Offers a transfer. Returns at once; connecting and offering happen in the background.
    ///
    /// # Errors
    /// - `ShuttingDown`: the node takes nothing new.
    /// - `Invalid`: the blocks are not as many as the prompt's tokens need, do not exist or are being received into.
    /// - `DeadlineExceeded`: the deadline has passed already.
    /// - `AlreadyExists`: the id was used before.
    /// - `Limit`: as many transfers are being sent as [`Limits::outgoing_transfers`] allows, or to as many peers as
    ///   [`Limits::peers`].
    pub fn offer(&self, spec: OfferSpec) -> Result<Outgoing, TransferError> {
        let node = &self.node;
        let now = node.now();
        node.check_running()?;
        check_blocks(&node.layout, spec.prompt_tokens, &spec.blocks, spec.deadline, now)?;
        let outbound = node.offer(now, spec)?;
        if node.shutdown.is_cancelled() {
            outbound.cancel(TransferError::ShuttingDown); // the sweep at shutdown may have missed it
        }
        Ok(Outgoing::new(outbound))
    }

    /// Counters since start and current numbers, for metrics.
    pub fn stats(&self) -> NodeStats {
        let (incoming, held) = self.node.incoming.counts();
        let active = (incoming as u64, self.node.outgoing.len() as u64, held as u64);
        self.node.counters.snapshot(active, self.node.transports.iter().map(Observed::stats).collect())
    }
}

impl Node {
    /// The clock of leases and deadlines; tests may pause it.
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn slice_bytes(&self) -> u64 {
        self.layout.slice_bytes
    }

    fn receiver_timing(&self) -> ReceiverTiming {
        let Limits { held_offer, seal_grace, .. } = self.limits;
        ReceiverTiming { lease: self.lease, held_offer, seal_grace }
    }

    fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    fn check_running(&self) -> Result<(), TransferError> {
        if self.shutdown.is_cancelled() { Err(TransferError::ShuttingDown) } else { Ok(()) }
    }

    fn expect(
        self: &Arc<Self>,
        now: Instant,
        reservation: Reservation,
    ) -> Result<Arc<Inbound>, TransferError> {
        let (id, sender) = (reservation.id, reservation.expectation.sender.clone());
        let limit = self.limits.incoming_transfers;
        let room = |live| match live < limit {
            true => Ok(()),
            false => Err(TransferError::Limit { what: "incoming transfers", limit }),
        };
        let make = |reservation| Inbound::expected(self, now, reservation);
        let Expecting { found, strays } = self.incoming.expect(id, &sender, reservation, room, make)?;
        for stray in strays {
            let (expected, found) = (sender.clone(), stray.sender().clone());
            stray.cancel(TransferError::WrongPeer { expected, found });
        }
        match found {
            Expected::Made(inbound) => {
                self.activity.notify_one();
                Ok(inbound)
            }
            Expected::Offered(inbound, reservation) => {
                inbound.adopt(now, reservation)?;
                Ok(inbound)
            }
            Expected::Ended(Ended { reason: Some(reason), .. }) => Err(reason),
            Expected::Ended(_) | Expected::Exists => Err(TransferError::AlreadyExists(id)),
        }
    }

    fn offer(self: &Arc<Self>, now: Instant, spec: OfferSpec) -> Result<Arc<Outbound>, TransferError> {
        let (id, endpoint, limit) = (spec.id, spec.peer.clone(), self.limits.outgoing_transfers);
        loop {
            let link = self.link(&endpoint)?;
            let claimed = self.claims.claim(&[], &spec.blocks)?;
            let outbound = self.outgoing.add(id, |live| {
                if live >= limit {
                    return Err(TransferError::Limit { what: "outgoing transfers", limit });
                }
                let off = link.clone();
                let ended = Box::new(move |id: &TransferId| off.remove(id));
                Ok(Outbound::new(self, now, spec.clone(), claimed, ended))
            })?;
            if link.add(&outbound) {
                self.activity.notify_one();
                return Ok(outbound);
            }
            // The link ended at this very moment.
            self.outgoing.forget(&id);
            self.check_running()?;
        }
    }

    /// The link to an endpoint, started if there is none.
    fn link(self: &Arc<Self>, endpoint: &str) -> Result<Arc<Link>, TransferError> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(endpoint).filter(|link| !link.ended()) {
            return Ok(link.clone());
        }
        if links.len() >= self.limits.peers {
            return Err(TransferError::Limit { what: "peers to send to", limit: self.limits.peers });
        }
        let link = Link::new(endpoint.to_owned());
        links.insert(endpoint.to_owned(), link.clone());
        self.tasks.spawn_on(link.clone().run(self.clone(), self.stop.clone()), &self.runtime);
        Ok(link)
    }

    fn forget_link(&self, endpoint: &str, link: &Arc<Link>) {
        let mut links = self.links.lock();
        if links.get(endpoint).is_some_and(|current| Arc::ptr_eq(current, link)) {
            links.remove(endpoint);
        }
    }

    fn identity(&self) -> (InstanceId, Incarnation) {
        (self.instance_id.clone(), self.incarnation)
    }

    /// The key that 16 bytes of the wire stand for: themselves, or what only members of a fleet with a secret make of them.
    fn key(&self, told: &DataKey) -> DataKey {
        self.secret.as_ref().map_or_else(|| told.clone(), |secret| secret.key(told))
    }
}

impl Inbox for Node {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        let peers = self.peers.lock();
        let link = peers.values().find(|link| link.pass().id == *id)?;
        let translation = link.translation();
        let slice_bytes = translation.map_or(self.slice_bytes(), |mapped| mapped.cut().slice_bytes);
        Some(Admission {
            key: self.key(&link.pass().key),
            slice_bytes: u32::try_from(slice_bytes).ok()?,
            mapped: translation.is_some(),
            ended: link.ended().clone(),
        })
    }

    fn find(&self, id: &TransferId) -> Found {
        match self.incoming.get(id) {
            Lookup::Live(inbound) => match inbound.translation().cloned() {
                None => Found::Live(Live::new(inbound)),
                Some(how) => {
                    Found::Live(Live::new(Arc::new(Translated::new(inbound, how, self.staging.clone()))))
                }
            },
            Lookup::Ended(_) | Lookup::Unknown => Found::Over,
        }
    }
}
