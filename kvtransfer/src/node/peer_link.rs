//! The control stream of one peer that sends to this node, as its transfers use it.
//!
//! Made and read by [`super::service`]; transfers being received answer over it.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use baton_proto::{ApiError, Incarnation, InstanceId, TransferId, v1};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use v1::receiver_message::Body;

use super::{
    control_queue::ControlQueue,
    secret::{FleetSecret, Party},
    translation::Translation,
    wire::wire_id,
};
use crate::{
    TransferError,
    sync::Mutex,
    transport::{DataKey, LinkPass},
};

/// A peer's control stream.
#[derive(Debug)]
pub(super) struct PeerLink {
    number: u64,
    peer: Party,
    /// What the stream is of, set by the peer's proof; never in a fleet that has none.
    secret: OnceLock<FleetSecret>,
    messages: ControlQueue<Result<v1::ReceiverMessage, Status>>,
    /// What its data connections show.
    pass: LinkPass,
    /// Set before it is welcomed, if it lays its cache out otherwise.
    translation: OnceLock<Arc<Translation>>,
    /// When the peer last said anything.
    heard: Mutex<Instant>,
    broken: CancellationToken,
}

impl PeerLink {
    /// `number` is unique in this process; `broken` is cancelled to end the stream.
    pub(super) fn new(
        now: Instant,
        number: u64,
        peer: Party,
        messages: ControlQueue<Result<v1::ReceiverMessage, Status>>,
        broken: CancellationToken,
    ) -> Self {
        let (pass, secret, translation) = (LinkPass::generate(), OnceLock::new(), OnceLock::new());
        let heard = Mutex::new(now);
        Self { number, peer, secret, messages, pass, translation, heard, broken }
    }

    /// The peer has said something.
    pub(super) fn hear(&self, now: Instant) {
        *self.heard.lock() = now;
    }

    pub(super) fn heard(&self) -> Instant {
        *self.heard.lock()
    }

    /// Says by which secret the peer has proven itself.
    pub(super) fn proven(&self, secret: FleetSecret) {
        let _ = self.secret.set(secret);
    }

    /// The key that 16 bytes stand for on this stream.
    pub(super) fn key(&self, told: &DataKey) -> DataKey {
        FleetSecret::key_of(self.secret.get(), told)
    }

    /// How its slices become this node's; `None` = they are as they are.
    pub(super) fn translation(&self) -> Option<&Arc<Translation>> {
        self.translation.get()
    }

    /// Says how; before the peer is welcomed.
    pub(super) fn translate(&self, translation: Arc<Translation>) {
        let _ = self.translation.set(translation);
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn peer(&self) -> &InstanceId {
        &self.peer.id
    }

    pub(super) fn incarnation(&self) -> Incarnation {
        self.peer.incarnation
    }

    /// Queues a message. A queue that is full means a peer that does not read: the stream is given up.
    pub(super) fn send(&self, id: Option<TransferId>, body: Body) {
        let message = v1::ReceiverMessage { transfer_id: wire_id(id), body: Some(body) };
        if !self.messages.put(Ok(message)) {
            self.broken.cancel();
        }
    }

    pub(super) fn pass(&self) -> &LinkPass {
        &self.pass
    }

    /// Cancelled when the stream has ended or is to end.
    pub(super) fn ended(&self) -> &CancellationToken {
        &self.broken
    }

    /// Ends the stream, and its data connections.
    pub(super) fn cut(&self) {
        self.broken.cancel();
    }

    /// Ends the stream with an error.
    pub(super) async fn refuse(&self, status: Status) {
        self.messages.put_last(Err(status)).await;
    }

    /// Resolves once the stream is to end.
    pub(super) async fn broken(&self) {
        self.broken.cancelled().await;
    }

    /// Resolves once the peer takes no more messages.
    pub(super) async fn closed(&self) {
        self.messages.closed().await;
    }

    /// Tells the peer how a transfer ended.
    pub(super) fn ended_as(&self, id: TransferId, how: Result<(), TransferError>) {
        match how {
            Ok(()) => self.send(Some(id), Body::Released(v1::Released {})),
            Err(reason) => self.abort(id, &reason),
        }
    }

    pub(super) fn abort(&self, id: TransferId, reason: &TransferError) {
        self.send(Some(id), Body::Abort(v1::Abort { reason: Some(ApiError::from(reason).into()) }));
    }
}
