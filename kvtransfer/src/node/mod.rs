//! The shell around the transfer sessions: one node per server process, both sender and receiver.
//!
//! Holds the transfers of either direction, the control streams (`link`: ours to peers, `service`: peers' to us), the
//! transport, and the clock that drives leases and deadlines. Decisions are the sessions' (`crate::session`).
//! Lock order: a table or a link before a transfer, a transfer before an outbox; the end of a transfer takes none.

mod backoff;
mod claims;
mod clock;
mod config;
mod control_queue;
#[cfg(all(test, feature = "explore"))]
mod explore;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod held;
mod identity;
mod inbound;
mod incoming;
mod lifetime;
mod limits;
mod link;
mod link_up;
mod links;
mod outbound;
mod outgoing;
mod peer_link;
mod peers;
mod pool;
mod reservation;
mod route;
mod secret;
mod service;
mod shell;
mod staging;
mod stats;
mod table;
mod transfer;
mod translate;
mod translation;
mod transports;
mod wire;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_proto::{ApiError, TransferId, v1};
use tokio::{runtime::Handle, sync::Notify};
use tokio_util::sync::CancellationToken;

pub use config::{Dial, Dialling, NodeConfig, Plaintext, TransportConfig};
pub use incoming::Incoming;
pub use limits::Limits;
pub use outgoing::{Outgoing, Progress};
pub use secret::{FleetSecret, FleetSecrets};
pub use service::{HandoffService, KnownPeer};
pub use stats::NodeStats;
pub use transfer::{Direction, ExpectSpec, OfferSpec, Reclaimed, Sealed, TransferStats};
pub use wire::HANDOFF_PROTOCOLS;

use claims::Claims;
use identity::Identity;
use inbound::Inbound;
use lifetime::Lifetime;
use link::{Destination, Link};
use links::Links;
use outbound::Outbound;
use peers::Peers;
use pool::Pool;
use reservation::{Reservation, check_blocks};
use stats::{Active, Counters};
use table::{Bounds, Counts, Ended, Expected, Expecting, Lookup, Table};
use translate::Translator;
use transports::Means;

use crate::{
    KvLayout, TransferError,
    session::ReceiverTiming,
    transport::{Admission, DataPort, Found, Inbox, LinkId, Live, Observed, Transport, TransportKind},
};

/// Sends and receives KV caches for one server process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KvNode {
    node: Arc<Node>,
}

/// What all parts of a node share.
struct Node {
    identity: Identity,
    dial: Arc<dyn Dial>,
    layout: KvLayout,
    lease: Duration,
    limits: Limits,
    pool: Pool,
    /// The best first.
    transports: Vec<Observed>,
    translator: Translator,
    /// Streams of peers that send to us.
    peers: Peers,
    incoming: Table<Inbound>,
    /// Streams to peers that we send to.
    links: Links,
    outgoing: Table<Outbound>,
    counters: Counters,
    /// A transfer has been added.
    activity: Notify,
    lifetime: Lifetime,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("instance_id", &self.identity.instance_id).finish_non_exhaustive()
    }
}

impl KvNode {
    /// Starts taking slices in. Must be called within a tokio runtime. `shutdown` aborts every transfer and ends every
    /// task of the node; see [`KvNode::stopped`].
    ///
    /// # Errors
    /// `Invalid`: the configuration contradicts itself, the region does not hold the layout's slices, or none of the
    /// transports can be had on this host; the message says which. `Io`: the data port's listener cannot be used.
    pub fn start(config: NodeConfig, shutdown: CancellationToken) -> Result<Self, TransferError> {
        config.validate()?;
        let slices = config.region.slices(&config.layout, config.blocks)?;
        let limits = config.limits;
        let terms = limits.terms(config.layout.slice_bytes)?;
        let port = DataPort::new(config.data_port, terms)?;
        let lifetime = Lifetime::new(Handle::current(), shutdown);
        let means = Means { region: &config.region, port: &port, terms, threads: &lifetime.threads };
        let transports = means.open(config.transports)?;
        let (instance_id, incarnation, secrets) = (config.instance_id, config.incarnation, config.secret);
        let remember = limits.remembered_transfers;
        let node = Arc::new(Node {
            identity: Identity { instance_id, incarnation, secrets },
            dial: config.dial,
            layout: config.layout,
            lease: config.lease,
            pool: Pool::new(slices, Claims::new(config.blocks), config.reclaim),
            transports,
            translator: Translator::new(config.convert, limits.staging_bytes),
            peers: Peers::new(&limits),
            incoming: Table::new(Bounds { remember, hold: limits.held_offers }),
            links: Links::new(limits.peers),
            outgoing: Table::new(Bounds { remember, hold: 0 }),
            counters: Counters::default(),
            activity: Notify::new(),
            lifetime,
            limits,
        });
        let Lifetime { tasks, stop, .. } = &node.lifetime;
        for transport in &node.transports {
            transport.receive(node.clone(), tasks, stop.clone());
        }
        tasks.spawn(port.serve(node.clone(), tasks.clone(), stop.clone()));
        tasks.spawn(clock::keep_time(node.clone()));
        tasks.close();
        Ok(Self { node })
    }

    /// Resolves once every task and every thread of the node has ended after shutdown. Threads are waited for, after the
    /// tasks, no longer than fetching a run and ending its connection may take, four times [`Limits::data_stall`] and a
    /// little: one may be held by a library that does not return.
    pub async fn stopped(&self) {
        self.node.lifetime.over(self.node.limits.waits().fence).await;
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
        node.lifetime.check_running()?;
        let reservation = Reservation::new(spec, &node.layout, &node.pool.claims, now)?;
        let inbound = node.expect(now, reservation)?;
        if node.lifetime.shutdown.is_cancelled() {
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
        node.lifetime.check_running()?;
        check_blocks(&node.layout, spec.prompt_tokens, &spec.blocks, spec.deadline, now)?;
        let outbound = node.offer(now, spec)?;
        if node.lifetime.shutdown.is_cancelled() {
            outbound.cancel(TransferError::ShuttingDown); // the sweep at shutdown may have missed it
        }
        Ok(Outgoing::new(outbound))
    }

    /// Counters since start and current numbers, for metrics.
    pub fn stats(&self) -> NodeStats {
        let Counts { live, held } = self.node.incoming.counts();
        let (incoming, outgoing) = (live as u64, self.node.outgoing.len() as u64);
        let active = Active { incoming, outgoing, held_offers: held as u64 };
        let staging_bytes_peak = self.node.translator.staging_bytes_peak();
        let by_transport = self.node.transports.iter().map(Observed::stats).collect();
        self.node.counters.snapshot(active, staging_bytes_peak, by_transport)
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
        let (id, limit) = (spec.id, self.limits.outgoing_transfers);
        let to = Destination { endpoint: spec.peer.clone(), receiver: spec.receiver.clone() };
        loop {
            let start = |link: Arc<Link>| {
                self.lifetime.spawn(link.run(self.clone(), self.lifetime.stop.clone()));
            };
            let link = self.links.to(&to, start)?;
            let claimed = self.pool.claims.claim(&[], &spec.blocks)?;
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
            self.lifetime.check_running()?;
        }
    }
}

impl Inbox for Node {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        let link = self.peers.of(id)?;
        let translation = link.translation();
        let slice_bytes = translation.map_or(self.slice_bytes(), |mapped| mapped.cut().slice_bytes);
        Some(Admission {
            key: link.key(&link.pass().key),
            slice_bytes: u32::try_from(slice_bytes).ok()?,
            mapped: translation.is_some(),
            ended: link.ended().clone(),
        })
    }

    fn find(&self, id: &TransferId) -> Found {
        match self.incoming.get(id) {
            Lookup::Live(inbound) => match inbound.translation().cloned() {
                None => Found::Live(Live::new(inbound)),
                Some(how) => Found::Live(Live::new(Arc::new(self.translator.before(inbound, how)))),
            },
            Lookup::Ended(_) | Lookup::Unknown => Found::Over,
        }
    }
}
