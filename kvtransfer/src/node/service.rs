//! Server side of the `Handoff` contract: the control streams of the peers that send to this node.

use std::{pin::Pin, sync::Arc};

use baton_proto::{ApiError, Incarnation, InstanceId, PromptDigest, TransferId, v1};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use v1::{receiver_message::Body, sender_message};

use super::{
    Node,
    control_queue::ControlQueue,
    inbound::Inbound,
    peer_link::PeerLink,
    secret::{End, FleetSecret, Hellos, Party, nonce},
    table::{Ended, Holding, Lookup},
    wire::{agree, to_status},
};
use crate::{
    FirstTokens, KvLayout, TransferError,
    plan::PairPlan,
    session::{OfferTerms, Receiver, SealTerms, Shape, Tally},
    transport::{Observed, Transport},
};

/// The gRPC service; mount it with `KvNode::handoff_service`.
#[derive(Debug, Clone)]
pub struct HandoffService {
    pub(super) node: Arc<Node>,
}

/// Who is at the other end of a request's connection, if whoever mounts the service knows: put among its extensions. A peer
/// that calls itself otherwise is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownPeer(pub InstanceId);

#[tonic::async_trait]
impl v1::handoff_server::Handoff for HandoffService {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<v1::ReceiverMessage, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::SenderMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let node = self.node.clone();
        node.lifetime.check_running().map_err(|error| to_status(&error))?;
        let stranger = node.peers.stranger();
        let known = request.extensions().get::<KnownPeer>().cloned();
        let mut incoming = request.into_inner();
        let hello = stranger.cut().run_until_cancelled(next(&node, &mut incoming, "the hello")).await;
        let hello = match hello.unwrap_or_else(|| Err(gave_way()))? {
            sender_message::Body::Hello(hello) => hello,
            _ => return Err(protocol("the first message must be a hello")),
        };
        let peer = InstanceId::new(hello.instance_id).map_err(|error| protocol(&error.to_string()))?;
        if let Some(KnownPeer(known)) = known
            && known != peer
        {
            return Err(Status::permission_denied(format!("{peer} says hello on a connection of {known}")));
        }
        let version =
            agree(hello.oldest_protocol, hello.newest_protocol).map_err(|error| to_status(&error))?;
        let layout = hello.layout.ok_or_else(|| protocol("the hello has no KV layout"))?;
        let layout = node.layout.of_peer(&layout).map_err(|error| to_status(&error))?;
        let plan = node.plan_from(&layout).map_err(|error| to_status(&error))?;
        let (number, peer) =
            (node.peers.next_number(), Party { id: peer, incarnation: Incarnation(hello.incarnation) });
        let hellos = Hellos {
            nonces: [nonce(&hello.nonce).map_err(|error| to_status(&error))?, rand::random()],
            sender: peer.clone(),
            receiver: node.identity.party(),
        };

        let (messages, queue) = mpsc::channel(node.limits.control_queue());
        let messages = ControlQueue::new(messages, node.counters.control_queue.clone());
        let broken = node.lifetime.stop.child_token();
        let secrets = node.identity.secrets();
        let link = Arc::new(PeerLink::new(node.now(), number, peer, messages, broken));
        link.send(None, Body::Hello(node.receiver_hello(&hellos, version, &secrets)));
        let tasks = node.lifetime.tasks.clone();
        tasks.spawn(async move {
            let mapped = plan.map(|plan| (layout, plan));
            let admitted = async {
                let proof = prove(&node, &secrets, &hellos, &mut incoming);
                let proof = stranger.cut().run_until_cancelled(proof).await;
                if let Some(secret) = proof.unwrap_or_else(|| Err(gave_way()))? {
                    link.proven(secret);
                }
                drop(stranger);
                admit(&node, &link, mapped).await
            };
            let refused = match admitted.await {
                Ok(()) => return serve(node, link, incoming).await,
                Err(status) => status,
            };
            tracing::info!(peer = %link.peer(), reason = refused.message(), "control stream refused");
            link.refuse(refused).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

/// The next message's body, within the handshake deadline.
async fn next(
    node: &Node,
    incoming: &mut Streaming<v1::SenderMessage>,
    what: &'static str,
) -> Result<sender_message::Body, Status> {
    match timeout(node.limits.handshake, incoming.message()).await {
        Ok(Ok(Some(v1::SenderMessage { body: Some(body), .. }))) => Ok(body),
        Ok(Ok(_)) => Err(protocol(&format!("the stream ended, or a message was empty, in place of {what}"))),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(to_status(&TransferError::DeadlineExceeded { waiting_for: what })),
    }
}

/// Too many came and said nothing; whoever means it comes again.
fn gave_way() -> Status {
    Status::aborted("newer control streams came before its proof, and there were too many")
}

/// The peer is to prove that it belongs to the fleet, by one of the secrets that it was shown. Before that it learns nothing
/// and displaces nobody.
async fn prove(
    node: &Node,
    secrets: &[FleetSecret],
    hellos: &Hellos,
    incoming: &mut Streaming<v1::SenderMessage>,
) -> Result<Option<FleetSecret>, Status> {
    let sender_message::Body::Proof(proof) = next(node, incoming, "the proof").await? else {
        return Err(protocol("the second message must be a proof"));
    };
    hellos.known(secrets, End::Sender, &[&proof.proof]).map_err(|error| to_status(&error))
}

/// Takes a proven peer in.
async fn admit(
    node: &Node,
    link: &Arc<PeerLink>,
    mapped: Option<(KvLayout, PairPlan)>,
) -> Result<(), Status> {
    if let Some((layout, plan)) = mapped {
        let translation = node.translation(&layout, plan).await.map_err(|error| to_status(&error))?;
        tracing::info!(peer = %link.peer(), "this peer's KV layout is another one; its slices are mapped");
        link.translate(translation);
    }
    node.admit_peer(link).map_err(|error| to_status(&error))?;
    tracing::debug!(peer = %link.peer(), "control stream opened");
    link.send(None, Body::Welcome(node.welcome(link)));
    Ok(())
}

/// Reads one peer's messages until its stream ends; then ends what rested on it.
async fn serve(node: Arc<Node>, link: Arc<PeerLink>, mut incoming: Streaming<v1::SenderMessage>) {
    let why = loop {
        let message = tokio::select! {
            biased;
            () = link.broken() => break "it was replaced, or the peer does not read its messages".to_owned(),
            message = incoming.message() => message,
            () = link.closed() => break "the peer closed it".to_owned(),
        };
        match message {
            Ok(Some(message)) => {
                link.hear(node.now());
                if let Err(reason) = handle(&node, &link, message) {
                    break reason.to_string();
                }
            }
            Ok(None) => break "the peer ended it".to_owned(),
            Err(status) => break status.message().to_owned(),
        }
    };
    tracing::debug!(peer = %link.peer(), %why, "control stream ended");
    node.peer_lost(&link, &why);
}

/// One message. An error ends the stream.
pub(super) fn handle(
    node: &Arc<Node>,
    link: &Arc<PeerLink>,
    message: v1::SenderMessage,
) -> Result<(), TransferError> {
    let id = TransferId::try_from(message.transfer_id.as_ref())
        .map_err(|error| TransferError::Protocol(error.to_string()))?;
    let body = message.body.ok_or_else(|| TransferError::Protocol("a message without a body".into()))?;
    match body {
        sender_message::Body::Hello(_) | sender_message::Body::Proof(_) => {
            Err(TransferError::Protocol("a second hello".into()))
        }
        sender_message::Body::Offer(offer) => {
            if let Err(reason) = take_offer(node, link, id, &offer) {
                tracing::info!(transfer = %id, peer = %link.peer(), %reason, "offer refused");
                link.abort(id, &reason);
            }
            Ok(())
        }
        sender_message::Body::Seal(seal) => {
            take_seal(node, link, id, &seal);
            Ok(())
        }
        sender_message::Body::Renew(_) => {
            of_live(node, link, id, |inbound, now| {
                inbound.over_link(link, |session| {
                    session.renewed(now);
                    Vec::new()
                })
            });
            Ok(())
        }
        sender_message::Body::Doubt(_) => {
            of_live(node, link, id, |inbound, _| inbound.over_link(link, Receiver::doubted));
            Ok(())
        }
        sender_message::Body::Abort(abort) => {
            let reason = ApiError::from(abort.reason.unwrap_or_default());
            of_live(node, link, id, |inbound, _| {
                inbound.over_link(link, |session| session.peer_aborted(reason))
            });
            Ok(())
        }
    }
}

/// Runs an event of a live transfer. Late messages of ended ones are nothing to worry about.
fn of_live(
    node: &Node,
    link: &PeerLink,
    id: TransferId,
    event: impl FnOnce(&Inbound, std::time::Instant) -> bool,
) {
    if let Lookup::Live(inbound) = node.incoming.get_from(&id, link.peer())
        && !event(&inbound, node.now())
    {
        tracing::debug!(transfer = %id, peer = %link.peer(), "message for a transfer of another stream ignored");
    }
}

fn take_offer(
    node: &Arc<Node>,
    link: &Arc<PeerLink>,
    id: TransferId,
    offer: &v1::Offer,
) -> Result<(), TransferError> {
    if offer.sender_epoch != link.incarnation().0 {
        let (instance, found) = (link.peer().clone(), Incarnation(offer.sender_epoch));
        return Err(TransferError::StalePeer { instance, expected: link.incarnation(), found });
    }
    let prompt_digest = PromptDigest::try_from(offer.prompt_digest.as_ref()).map_err(|error| {
        TransferError::Protocol(format!("the offer does not say of which prompt: {error}"))
    })?;
    let terms = OfferTerms {
        sender: link.peer().clone(),
        sender_incarnation: link.incarnation(),
        prompt_tokens: offer.prompt_tokens,
        prompt_digest,
        shape: Shape { layers: offer.layers, blocks: offer.blocks },
        cut: link.translation().map(|translation| translation.cut()),
    };
    let now = node.now();
    // A sender offers once: whoever is to expect this transfer from it must learn that it will not come.
    let Holding { found, displaced } = node.incoming.hold(id, link.peer(), || {
        node.lifetime.check_running()?;
        Ok(Inbound::offered(node, now, id, terms.clone(), link.clone()))
    })?;
    if let Some((offer, reason)) = displaced {
        offer.cancel(reason);
    }
    match found {
        Lookup::Unknown => {
            node.activity.notify_one();
            Ok(())
        }
        Lookup::Live(inbound) => inbound.offer(now, terms, link),
        Lookup::Ended(Ended { reason: Some(reason), .. }) => Err(reason),
        Lookup::Ended(_) => Err(TransferError::AlreadyExists(id)),
    }
}

/// A seal may come again after a broken stream, from a sender that has not heard how its transfer ended.
fn take_seal(node: &Arc<Node>, link: &Arc<PeerLink>, id: TransferId, seal: &v1::Seal) {
    let tally = Tally { slices: seal.slices, bytes: seal.bytes, checksum: seal.checksum };
    let first_tokens = match FirstTokens::new(&seal.first_tokens) {
        Ok(first_tokens) => first_tokens,
        Err(error) => return link.abort(id, &TransferError::Protocol(error.to_string())),
    };
    let terms = SealTerms { first_tokens, tally };
    match node.incoming.get_from(&id, link.peer()) {
        Lookup::Live(inbound) if inbound.seal(node.now(), link, terms) => {}
        Lookup::Ended(Ended { peer: Some(peer), reason }) if peer == *link.peer() => {
            link.ended_as(id, reason.map_or(Ok(()), Err));
        }
        _ => link.abort(id, &TransferError::Protocol("a seal for a transfer that is not this peer's".into())),
    }
}

impl Node {
    /// Takes a peer's control stream; the one in whose place it comes is cut, and what rested on that is over.
    pub(super) fn admit_peer(&self, link: &Arc<PeerLink>) -> Result<(), TransferError> {
        if let Some(old) = self.peers.admit(link, self.now())? {
            old.cut();
            self.end_transfers_of(&old, "another control stream took its place");
        }
        Ok(())
    }

    fn receiver_hello(&self, hellos: &Hellos, version: u32, secrets: &[FleetSecret]) -> v1::ReceiverHello {
        let proof = |secret: Option<&FleetSecret>| hellos.prove(secret, End::Receiver).into();
        v1::ReceiverHello {
            instance_id: self.identity.instance_id.to_string(),
            incarnation: self.identity.incarnation.0,
            layout: Some((&self.layout).into()),
            nonce: hellos.nonces[1].to_vec().into(),
            proof: proof(secrets.first()),
            protocol: version,
            proofs_before: secrets.iter().skip(1).map(|secret| proof(Some(secret))).collect(),
        }
    }

    /// What an authenticated sender is told.
    fn welcome(&self, link: &PeerLink) -> v1::Welcome {
        let endpoint = |transport: &Observed| v1::DataEndpoint {
            transport: transport.kind().name().to_owned(),
            address: transport.address(),
        };
        let mapped = link.translation().is_some();
        let able = |transport: &&Observed| transport.kind().brings(mapped);
        let pass = link.pass();
        v1::Welcome {
            endpoints: self.transports.iter().filter(able).map(endpoint).collect(),
            link_id: pass.id.to_vec().into(),
            link_key: pass.key.as_bytes().to_vec().into(),
        }
    }

    /// A peer's control stream has ended.
    pub(super) fn peer_lost(&self, link: &Arc<PeerLink>, why: &str) {
        link.cut();
        self.peers.forget(link);
        self.end_transfers_of(link, why);
    }

    fn end_transfers_of(&self, link: &PeerLink, why: &str) {
        for inbound in self.incoming.all() {
            inbound.over_link(link, |session| session.link_lost(why));
        }
    }
}

fn protocol(what: &str) -> Status {
    to_status(&TransferError::Protocol(what.to_owned()))
}
