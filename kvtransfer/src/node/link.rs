//! The control stream to one peer's `Handoff` service, as the sender keeps it: one for all transfers to that peer.
//!
//! Opened when there is something to offer, kept while there are transfers and some time longer. When it breaks, every
//! transfer that is not sealed is over (`Outbound::link_lost`), and the stream is opened again only if transfers wait
//! for it, with growing pauses and a bounded number of attempts. A peer that cuts it for newer ones before it is
//! proven is asked again for as long as there are transfers, which their own deadlines bound.
//!
//! A stream that leads nowhere, with nobody to say so, is given up when a transfer's lease runs out on it and nothing
//! else has been heard either (`SenderCommand::Cut`); one without transfers by HTTP/2's pings (`Limits::keep_alive`).

use std::{collections::HashMap, fmt, iter, sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, TransferId, v1};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, transport::Endpoint};
use v1::{handoff_client::HandoffClient, receiver_message, sender_message::Body};

use super::{
    Node,
    backoff::Backoff,
    control_queue::ControlQueue,
    link_up::LinkUp,
    outbound::Outbound,
    route::Route,
    secret::{End, GOOD_MOST, Hellos, Party, nonce},
    wire::{HANDOFF_PROTOCOLS, check_agreed, from_status, wire_id},
};
use crate::{
    TransferError,
    sync::Mutex,
    transport::{DataKey, LinkPass, Outbox},
};

/// Before the second attempt to open the stream.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// An instance, and where it is. Who else answers there is not spoken to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Destination {
    /// `host:port` of its `Handoff` service.
    pub(super) endpoint: String,
    pub(super) receiver: InstanceId,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.receiver, self.endpoint)
    }
}

/// The way to one peer.
pub(super) struct Link {
    to: Destination,
    state: Mutex<State>,
    /// A transfer has come, or the last one has gone.
    changed: Notify,
}

struct State {
    up: Option<LinkUp>,
    transfers: HashMap<TransferId, Arc<Outbound>>,
    /// Since when there are none.
    idle_since: Instant,
    /// It takes no transfers any more, and its task ends.
    ended: bool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("to", &self.to).finish_non_exhaustive()
    }
}

/// How an attempt to open the stream, or the stream itself, ended.
enum Break {
    /// The peer cannot be reached; trying again may help.
    Unreachable(String),
    /// The peer answers, and has cut this stream, unproven as it was, for newer ones.
    Busy(String),
    /// The peer does not want this stream; trying again will not help.
    Refused(TransferError),
    /// The stream stood and is gone.
    Lost(String),
    /// Nothing to do for long.
    Idle,
}

impl Link {
    pub(super) fn new(to: Destination) -> Arc<Self> {
        let idle_since = Instant::now();
        let state = State { up: None, transfers: HashMap::new(), idle_since, ended: false };
        Arc::new(Self { to, state: Mutex::new(state), changed: Notify::new() })
    }

    /// Adds a transfer; it is offered as soon as the stream stands. False if this link has ended: use a new one.
    pub(super) fn add(&self, outbound: &Arc<Outbound>) -> bool {
        let mut state = self.state.lock();
        if state.ended {
            return false;
        }
        state.transfers.insert(outbound.id(), outbound.clone());
        self.changed.notify_one();
        let up = state.up.clone();
        // Not under the lock: a refusal ends the transfer, which removes it here.
        drop(state);
        if outbound.is_over() {
            // The clock knows it already, and may have ended it before there was anything to remove.
            self.remove(&outbound.id());
            return true;
        }
        if let Some(up) = up {
            outbound.link_up(&up);
        }
        true
    }

    pub(super) fn remove(&self, id: &TransferId) {
        let mut state = self.state.lock();
        state.transfers.remove(id);
        if state.transfers.is_empty() {
            state.idle_since = Instant::now();
            self.changed.notify_one();
        }
    }

    /// Since when it has no transfers; `None` = it has some.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.state.lock();
        state.transfers.is_empty().then_some(state.idle_since)
    }

    /// Whether the link may be dropped; if so, it takes no more transfers, and its task ends.
    pub(super) fn end_if_empty(&self) -> bool {
        let mut state = self.state.lock();
        if state.transfers.is_empty() {
            state.ended = true;
            self.changed.notify_one();
        }
        state.ended
    }

    /// Takes a stream without transfers down; false if there is one. None can come in between and rest on it.
    fn down_if_empty(&self) -> bool {
        let mut state = self.state.lock();
        if state.transfers.is_empty() {
            state.up = None;
        }
        state.up.is_none()
    }

    pub(super) fn ended(&self) -> bool {
        self.state.lock().ended
    }

    fn transfers(&self) -> Vec<Arc<Outbound>> {
        self.state.lock().transfers.values().cloned().collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state.lock().transfers.is_empty()
    }

    fn get(&self, id: &TransferId) -> Option<Arc<Outbound>> {
        self.state.lock().transfers.get(id).cloned()
    }

    /// Keeps the stream for as long as there is use for it, or until `stop`.
    pub(super) async fn run(self: Arc<Self>, node: Arc<Node>, stop: CancellationToken) {
        let _ = stop.run_until_cancelled(self.keep(&node)).await;
        self.down("this node is shutting down");
        self.state.lock().ended = true;
        self.transfers().iter().for_each(|outbound| outbound.link_failed(TransferError::ShuttingDown));
        node.links.forget(&self.to, &self);
    }

    async fn keep(&self, node: &Arc<Node>) {
        let mut attempts = 0;
        let mut backoff = Backoff::new(FIRST_PAUSE);
        loop {
            while self.is_empty() {
                if self.ended() {
                    return;
                }
                if timeout(node.limits.idle_link, self.changed.notified()).await.is_err() {
                    self.end_if_empty();
                }
            }
            let started = Instant::now();
            let ended = self.session(node).await;
            let failed = match ended {
                Break::Idle => continue,
                Break::Lost(why) => {
                    tracing::debug!(peer = %self.to, %why, "control stream broke");
                    self.down(&why);
                    attempts = 0;
                    if started.elapsed() > Backoff::LONGEST {
                        backoff.reset();
                    }
                    None
                }
                Break::Busy(why) => {
                    tracing::debug!(peer = %self.to, %why, "no control stream to this peer yet");
                    attempts = 0;
                    None
                }
                Break::Refused(reason) => Some(reason),
                Break::Unreachable(reason) => {
                    attempts += 1;
                    let endpoint = self.to.endpoint.clone();
                    (attempts >= node.limits.connect_attempts)
                        .then_some(TransferError::Unreachable { endpoint, reason })
                }
            };
            if let Some(reason) = failed {
                tracing::warn!(peer = %self.to, %reason, "no control stream to this peer");
                attempts = 0;
                self.transfers().iter().for_each(|outbound| outbound.link_failed(reason.clone()));
            }
            backoff.pause().await;
        }
    }

    /// A stream stands: offers what waits for one.
    pub(super) fn rise(&self, up: &LinkUp) {
        self.state.lock().up = Some(up.clone());
        self.transfers().iter().for_each(|outbound| outbound.link_up(up));
    }

    /// Ends what rests on the stream. Cut first: a transfer that comes meanwhile waits for the next one.
    pub(super) fn down(&self, why: &str) {
        let Some(up) = self.state.lock().up.take() else { return };
        up.cut();
        self.transfers().iter().for_each(|outbound| outbound.link_lost(&up, why));
    }

    /// Opens the stream and serves it until it ends.
    async fn session(&self, node: &Arc<Node>) -> Break {
        let opened = timeout(node.limits.handshake, self.open(node)).await;
        let (mut messages, up, route) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(ended)) => return ended,
            Err(_) => return Break::Unreachable("it did not answer within the handshake deadline".into()),
        };
        let stop = up.broken().child_token();
        let _stop_paths = stop.clone().drop_guard();
        let transfers = || self.state.lock().transfers.keys().copied().collect();
        let mut route = std::pin::pin!(route.keep(node, &stop, &transfers));
        self.rise(&up);
        loop {
            let idle = self.is_empty();
            tokio::select! {
                biased;
                () = up.broken().cancelled() => {
                    return Break::Lost("the peer is silent, or does not read its messages".into());
                }
                message = messages.message() => match message {
                    Ok(Some(message)) => self.dispatch(node, &up, message),
                    Ok(None) => return Break::Lost("the peer ended it".into()),
                    Err(status) => return Break::Lost(status.message().to_owned()),
                },
                why = &mut route => return Break::Lost(why),
                () = self.changed.notified() => if self.ended() {
                    return Break::Idle;
                },
                () = sleep(node.limits.idle_link), if idle => if self.down_if_empty() {
                    return Break::Idle;
                }
            }
        }
    }

    /// Connects and exchanges hellos.
    async fn open(&self, node: &Arc<Node>) -> Result<(Streaming<v1::ReceiverMessage>, LinkUp, Route), Break> {
        let unreachable = |error: &dyn std::error::Error| Break::Unreachable(innermost(error));
        let peer = Endpoint::from_shared(format!("http://{}", self.to.endpoint))
            .map_err(|error| Break::Refused(TransferError::Invalid(format!("peer {}: {error}", self.to))))?
            .connect_timeout(node.limits.handshake)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(node.limits.keep_alive)
            .keep_alive_timeout(node.limits.keep_alive_timeout);
        let channel = node.dial.dial(peer, &self.to.receiver).await.map_err(|error| unreachable(&error))?;
        let (sender, queue) = mpsc::channel(node.limits.control_queue());
        let sender = ControlQueue::new(sender, node.counters.control_queue.clone());
        let say = |body| {
            let message = v1::SenderMessage { transfer_id: wire_id(None), body: Some(body) };
            let gone = || Break::Unreachable("the control stream takes no messages".into());
            sender.put(message).then_some(()).ok_or_else(gone)
        };
        let own = rand::random::<[u8; 16]>();
        say(Body::Hello(node.sender_hello(own)))?;
        let mut messages = HandoffClient::new(channel)
            .exchange(ReceiverStream::new(queue))
            .await
            .map_err(refused)?
            .into_inner();
        let Some(receiver_message::Body::Hello(hello)) = next(&mut messages).await? else {
            return Err(protocol("the peer's first message is not its hello"));
        };
        check_agreed(hello.protocol).map_err(Break::Refused)?;
        let Some(layout) = &hello.layout else {
            return Err(protocol("the peer's hello has no KV layout"));
        };
        let theirs = node.layout.of_peer(layout).map_err(Break::Refused)?;
        let mapped = node.layout.plan_to(&theirs).map_err(Break::Refused)?.is_some();
        let receiver = InstanceId::new(hello.instance_id)
            .map_err(|error| protocol(&format!("the peer's hello: {error}")))?;
        if receiver != self.to.receiver {
            // It has not been shown who this is: a stream that it may have of this node stays.
            let expected = self.to.receiver.clone();
            return Err(Break::Refused(TransferError::WrongPeer { expected, found: receiver }));
        }
        let incarnation = Incarnation(hello.incarnation);
        let hellos = Hellos {
            nonces: [own, nonce(&hello.nonce).map_err(Break::Refused)?],
            sender: node.identity.party(),
            receiver: Party { id: receiver.clone(), incarnation },
        };
        let shown: Vec<&[u8]> =
            iter::once(&hello.proof).chain(&hello.proofs_before).take(GOOD_MOST).map(|it| &it[..]).collect();
        let secret = hellos.known(&node.identity.secrets(), End::Receiver, &shown).map_err(Break::Refused)?;
        let proof = hellos.prove(secret.as_ref(), End::Sender).into();
        say(Body::Proof(v1::Proof { proof }))?;
        let Some(receiver_message::Body::Welcome(welcome)) = next(&mut messages).await? else {
            return Err(protocol("the peer's second message is not its welcome"));
        };
        let outbox = Outbox::counted_by(node.counters.outbox.clone());
        let up = LinkUp::new(node.now(), sender.clone(), receiver, incarnation, secret, outbox);
        let pass = pass(&up, &welcome).ok_or_else(|| protocol("the peer's welcome has no link id or key"))?;
        let route = Route::new(node, (&welcome.endpoints, mapped), pass, up.outbox().clone());
        Ok((messages, up, route.map_err(|why| protocol(&why))?))
    }

    pub(super) fn dispatch(&self, node: &Node, up: &LinkUp, message: v1::ReceiverMessage) {
        let now = node.now();
        up.hear(now);
        let Ok(id) = TransferId::try_from(message.transfer_id.as_ref()) else {
            tracing::warn!(peer = %self.to, "message without a transfer id ignored");
            return;
        };
        // Messages of ended transfers cross with their end: nothing to do for them.
        let (Some(outbound), Some(body)) = (self.get(&id), message.body) else { return };
        match body {
            receiver_message::Body::Accept(accept) => outbound.accepted(now, &accept, up),
            receiver_message::Body::Released(_) => outbound.released(now),
            receiver_message::Body::Renew(_) => outbound.renewed(now),
            receiver_message::Body::Abort(abort) => {
                outbound.peer_aborted(ApiError::from(abort.reason.unwrap_or_default()));
            }
            receiver_message::Body::Hello(_) | receiver_message::Body::Welcome(_) => {
                outbound.cancel(TransferError::Protocol("a second hello".into()));
            }
        }
    }
}

async fn next(
    messages: &mut Streaming<v1::ReceiverMessage>,
) -> Result<Option<receiver_message::Body>, Break> {
    Ok(messages.message().await.map_err(refused)?.and_then(|message| message.body))
}

/// What data connections show.
fn pass(up: &LinkUp, welcome: &v1::Welcome) -> Option<LinkPass> {
    let id = welcome.link_id.as_ref().try_into().ok()?;
    Some(LinkPass { id, key: up.key(&DataKey::from_wire(&welcome.link_key)?) })
}

impl Node {
    fn sender_hello(&self, nonce: [u8; 16]) -> v1::SenderHello {
        v1::SenderHello {
            instance_id: self.identity.instance_id.to_string(),
            incarnation: self.identity.incarnation.0,
            layout: Some((&self.layout).into()),
            nonce: nonce.to_vec().into(),
            oldest_protocol: HANDOFF_PROTOCOLS.oldest(),
            newest_protocol: HANDOFF_PROTOCOLS.newest(),
        }
    }
}

fn protocol(what: &str) -> Break {
    Break::Refused(TransferError::Protocol(what.to_owned()))
}

/// A peer that is only busy or starting is worth another attempt, one that has cut this stream for the sake of newer ones
/// any number; one that says no is not.
fn refused(status: Status) -> Break {
    if status.code() == Code::Aborted && status.details().is_empty() {
        return Break::Busy(status.message().to_owned());
    }
    let error = from_status(&status);
    match error.code {
        ErrorCode::Unavailable | ErrorCode::InstanceLost | ErrorCode::Internal => {
            Break::Unreachable(error.message)
        }
        _ => Break::Refused(TransferError::PeerRefused(error)),
    }
}

/// The cause at the bottom of an error, e.g. "connection refused" instead of "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
