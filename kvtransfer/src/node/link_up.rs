//! A control stream to a peer, while it stands, as the transfers that rest on it use it.
//!
//! Made by [`super::link`], which opens the stream and reads it.

use std::{fmt, sync::Arc, time::Instant};

use baton_proto::{Incarnation, InstanceId, TransferId, v1};
use tokio_util::sync::CancellationToken;
use v1::sender_message::Body;

use super::{control_queue::ControlQueue, secret::FleetSecret, transfer::OfferSpec, wire::wire_id};
use crate::{
    TransferError,
    sync::Mutex,
    transport::{DataKey, Departure, Outbox},
};

/// A control stream that stands. Cheap to clone.
#[derive(Clone)]
pub(super) struct LinkUp {
    messages: ControlQueue<v1::SenderMessage>,
    outbox: Outbox,
    broken: CancellationToken,
    /// When the peer last said anything.
    heard: Arc<Mutex<Instant>>,
    receiver: InstanceId,
    incarnation: Incarnation,
    /// What the stream is of; none in a fleet that has none.
    secret: Option<FleetSecret>,
}

impl fmt::Debug for LinkUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkUp").field("receiver", &self.receiver).finish_non_exhaustive()
    }
}

impl LinkUp {
    /// `messages` is the stream's outbound half; the instance at its other end has said who it is, and what goes to it over
    /// the data plane is taken from `outbox`.
    pub(super) fn new(
        now: Instant,
        messages: ControlQueue<v1::SenderMessage>,
        receiver: InstanceId,
        incarnation: Incarnation,
        secret: Option<FleetSecret>,
        outbox: Outbox,
    ) -> Self {
        let (broken, heard) = (CancellationToken::new(), Arc::new(Mutex::new(now)));
        Self { messages, outbox, broken, heard, receiver, incarnation, secret }
    }

    /// The key that 16 bytes stand for on this stream.
    pub(super) fn key(&self, told: &DataKey) -> DataKey {
        FleetSecret::key_of(self.secret.as_ref(), told)
    }

    /// Which start of the receiver.
    pub(super) fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// What is to go over the data plane.
    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Cancelled when the stream is given up.
    pub(super) fn broken(&self) -> &CancellationToken {
        &self.broken
    }

    /// Gives the stream up.
    pub(super) fn cut(&self) {
        self.broken.cancel();
    }

    /// The peer has said something.
    pub(super) fn hear(&self, now: Instant) {
        *self.heard.lock() = now;
    }

    pub(super) fn heard(&self) -> Instant {
        *self.heard.lock()
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        self.outbox.is(&other.outbox)
    }

    /// Queues a message. A queue that is full means a peer that does not read: the stream is given up.
    pub(super) fn send(&self, id: Option<TransferId>, body: Body) {
        let message = v1::SenderMessage { transfer_id: wire_id(id), body: Some(body) };
        if !self.messages.put(message) {
            self.broken.cancel();
        }
    }

    /// There is something to take from this transfer.
    pub(super) fn wake(&self, departure: Arc<dyn Departure>) {
        self.outbox.wake(departure);
    }

    /// Whether it is the start of the receiver that a transfer is meant for.
    pub(super) fn check_receiver(&self, spec: &OfferSpec) -> Result<(), TransferError> {
        match spec.receiver_incarnation {
            Some(expected) if expected != self.incarnation => {
                let (instance, found) = (self.receiver.clone(), self.incarnation);
                Err(TransferError::StalePeer { instance, expected, found })
            }
            _ => Ok(()),
        }
    }
}
