//! A transfer being received: the shell around its session, and what transports see of it.
//!
//! Whoever brings an event (control stream, data connection, clock, owner) runs the session under its lock and performs
//! the commands there and then; none of them waits. So the connection that reads the last slice completes the transfer.

use std::{
    io::IoSliceMut,
    ptr::NonNull,
    sync::{Arc, OnceLock},
    time::Instant,
};

use baton_proto::{ApiError, InstanceId, TransferId, v1};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use v1::receiver_message::Body;

use super::{
    Node,
    peer_link::PeerLink,
    reservation::{Reservation, Reserved},
    shell::{Outcome, Shell, State},
    transfer::{Direction, Reclaimed, Sealed},
    translation::Translation,
};
use crate::{
    Slices, TransferError,
    session::{Claim, OfferTerms, Receiver, ReceiverCommand, ReceiverState, SealTerms, SliceRun},
    sync::Mutex,
    transport::{DataKey, Landing},
};

/// One transfer being received.
#[derive(Debug)]
pub(super) struct Inbound {
    id: TransferId,
    node: Arc<Node>,
    /// Who is to send it.
    sender: InstanceId,
    /// What the sender is told of the key.
    told: DataKey,
    /// What that stands for on the stream over which the sender is told; nobody has been told anything before.
    key: OnceLock<DataKey>,
    state: Mutex<State<Receiver, Arc<PeerLink>>>,
    /// Set once the owner has reserved blocks.
    reserved: OnceLock<Reserved>,
    /// Set with the accept, if the sender lays its cache out otherwise.
    translation: OnceLock<Arc<Translation>>,
    revoked: CancellationToken,
    outcome: watch::Sender<Outcome<Sealed>>,
    /// Of whoever expects it: an offer that comes before is nobody's yet.
    span: OnceLock<tracing::Span>,
}

impl Inbound {
    /// Blocks are reserved and claimed; the offer has not come yet.
    pub(super) fn expected(node: &Arc<Node>, now: Instant, reservation: Reservation) -> Arc<Self> {
        let Reservation { id, expectation, reserved } = reservation;
        let sender = expectation.sender.clone();
        let session = Receiver::expected(now, node.receiver_timing(), node.slice_bytes(), expectation);
        let inbound = Self::new(node, id, sender, session, None);
        inbound.belongs_here();
        let _ = inbound.reserved.set(reserved);
        Arc::new(inbound)
    }

    /// An offer has come that nobody expects yet.
    pub(super) fn offered(
        node: &Arc<Node>,
        now: Instant,
        id: TransferId,
        terms: OfferTerms,
        link: Arc<PeerLink>,
    ) -> Arc<Self> {
        let sender = terms.sender.clone();
        let session = Receiver::offered(now, node.receiver_timing(), node.slice_bytes(), terms);
        Arc::new(Self::new(node, id, sender, session, Some(link)))
    }

    fn new(
        node: &Arc<Node>,
        id: TransferId,
        sender: InstanceId,
        session: Receiver,
        link: Option<Arc<PeerLink>>,
    ) -> Self {
        let told = DataKey::generate();
        Self {
            id,
            node: node.clone(),
            sender,
            told,
            key: OnceLock::new(),
            state: State::new(session, link),
            reserved: OnceLock::new(),
            translation: OnceLock::new(),
            revoked: CancellationToken::new(),
            outcome: Outcome::watched(),
            span: OnceLock::new(),
        }
    }

    /// It is a part of what is traced here and now.
    fn belongs_here(&self) {
        let span = || tracing::info_span!("kv_receive", transfer = %self.id, peer = %self.sender);
        self.span.get_or_init(span);
    }

    pub(super) fn id(&self) -> TransferId {
        self.id
    }

    pub(super) fn blocks(&self) -> &[u32] {
        self.reserved.get().map_or(&[], |reserved| &reserved.blocks)
    }

    pub(super) fn watch(&self) -> watch::Receiver<Outcome<Sealed>> {
        self.outcome.subscribe()
    }

    pub(super) fn sender(&self) -> &InstanceId {
        &self.sender
    }

    /// Blocks for a held offer of the sender that is expected.
    pub(super) fn adopt(&self, now: Instant, reservation: Reservation) -> Result<(), TransferError> {
        let Reservation { expectation, reserved, .. } = reservation;
        let mut state = self.state.lock();
        if let Some(reason) = &state.ending.reason {
            return Err(reason.clone());
        }
        self.belongs_here();
        let commands = state.session.expect(now, expectation)?;
        let _ = self.reserved.set(reserved);
        self.finish(state, commands);
        Ok(())
    }

    /// An offer over `link`. An error refuses it.
    pub(super) fn offer(
        &self,
        now: Instant,
        terms: OfferTerms,
        link: &Arc<PeerLink>,
    ) -> Result<(), TransferError> {
        let mut state = self.state.lock();
        let own = state.link.as_ref().is_some_and(|own| own.number() == link.number());
        let commands = match state.session.offer(now, terms) {
            Ok(commands) => {
                state.link = Some(link.clone());
                commands
            }
            // The same stream offers twice: its sender is confused, and the first offer not to be trusted either.
            Err(reason) if own => state.session.cancel(reason),
            Err(reason) => return Err(reason),
        };
        self.finish(state, commands);
        Ok(())
    }

    /// Runs an event that came over `link`; false if the transfer belongs to another control stream.
    pub(super) fn over_link(
        &self,
        link: &PeerLink,
        step: impl FnOnce(&mut Receiver) -> Vec<ReceiverCommand>,
    ) -> bool {
        let mut state = self.state.lock();
        if state.link.as_ref().is_none_or(|own| own.number() != link.number()) {
            return false;
        }
        let commands = step(&mut state.session);
        self.finish(state, commands);
        true
    }

    /// A seal over `link`; false if the transfer is not that peer's, or rests on another of its streams.
    pub(super) fn seal(&self, now: Instant, link: &PeerLink, terms: SealTerms) -> bool {
        let mut state = self.state.lock();
        if state.link.as_ref().is_some_and(|own| own.number() == link.number()) {
            let commands = state.session.seal(now, terms);
            self.finish(state, commands);
            return true;
        }
        // Over, and on its way to the ended ones: the sender asks how it ended, and must be told the same as there.
        let over = match &state.ending.reason {
            Some(reason) => Some(Err(reason.clone())),
            None if state.session.state() == ReceiverState::Released => Some(Ok(())),
            None => None,
        };
        drop(state);
        match over {
            Some(how) if self.sender == *link.peer() => link.ended_as(self.id, how),
            _ => return false,
        }
        true
    }

    pub(super) fn cancel(&self, reason: TransferError) {
        self.run(|session| session.cancel(reason));
    }

    pub(super) fn tick(&self, now: Instant) {
        self.run(|session| session.tick(now));
    }

    /// How its slices become this node's.
    pub(super) fn translation(&self) -> Option<&Arc<Translation>> {
        self.translation.get()
    }

    /// A claimed run cannot be taken in.
    pub(super) fn let_go_of(&self, run: SliceRun, reason: TransferError) {
        self.run(|session| session.let_go(run, reason));
    }

    /// Lets a slice of the sender's be written into this transfer's blocks: `work` is given the prompt's tokens, the
    /// pool, and which of its blocks one of the transfer's is, `None` for those that are held and not to be written.
    pub(super) fn take_in(
        &self,
        work: impl FnOnce(
            u32,
            &Slices,
            &dyn Fn(u32) -> Result<Option<u32>, TransferError>,
        ) -> Result<(), TransferError>,
    ) -> Result<(), TransferError> {
        let Some(reserved) = self.reserved.get() else { return Ok(()) };
        let place = |index| match reserved.held.binary_search(&index) {
            Ok(_) => Ok(None),
            Err(_) => self.block(index).map(Some),
        };
        work(reserved.prompt_tokens, &self.node.pool.slices, &place)
    }

    fn accept(&self, state: &State<Receiver, Arc<PeerLink>>) {
        if let Some(translation) = state.link.as_ref().and_then(|link| link.translation()) {
            let _ = self.translation.set(translation.clone());
        }
        if let Some(link) = &state.link {
            let _ = self.key.set(link.key(&self.told));
        }
        let held = state.session.held();
        let accept = v1::Accept {
            held: held.to_vec(),
            lease_millis: u32::try_from(self.node.lease.as_millis()).unwrap_or(u32::MAX),
            data_key: self.told.as_bytes().to_vec().into(),
            receiver_epoch: self.node.identity.incarnation.0,
        };
        self.send(state, Body::Accept(accept));
    }

    fn send(&self, state: &State<Receiver, Arc<PeerLink>>, body: Body) {
        if let Some(link) = &state.link {
            link.send(Some(self.id), body);
        }
    }

    /// Pool index of a block of this transfer.
    fn block(&self, index: u32) -> Result<u32, TransferError> {
        let block = self.blocks().get(index as usize).copied();
        block.ok_or_else(|| TransferError::Protocol(format!("the transfer has no block {index}")))
    }
}

impl Shell for Inbound {
    type Session = Receiver;
    type Command = ReceiverCommand;
    type Link = Arc<PeerLink>;
    type Success = Sealed;

    const SETTLED: ReceiverCommand = ReceiverCommand::Settled;

    fn state(&self) -> &Mutex<State<Receiver, Arc<PeerLink>>> {
        &self.state
    }

    fn outcome(&self) -> &watch::Sender<Outcome<Sealed>> {
        &self.outcome
    }

    fn perform(&self, state: &mut State<Receiver, Arc<PeerLink>>, command: ReceiverCommand) {
        match command {
            ReceiverCommand::Accept => self.accept(state),
            ReceiverCommand::Renew => self.send(state, Body::Renew(v1::Renew {})),
            ReceiverCommand::Released => self.send(state, Body::Released(v1::Released {})),
            ReceiverCommand::Abort(reason) => {
                self.send(state, Body::Abort(v1::Abort { reason: Some(ApiError::from(reason).into()) }));
                if state.session.state() == ReceiverState::Expected {
                    state.link = None; // another start of the sender offered it; the right one may still come
                }
            }
            ReceiverCommand::Revoke => self.revoked.cancel(),
            ReceiverCommand::Complete { first_tokens, tally, took, last_slice_at } => {
                let (slices, bytes) = (tally.slices, tally.bytes);
                self.node.counters.incoming_completed();
                self.span().in_scope(|| tracing::debug!(slices, bytes, ?took, "kv transfer received"));
                let at = self.node.now();
                let sealed = Sealed { first_tokens, slices, bytes, took, last_slice_at, at };
                self.outcome.send_modify(|outcome| outcome.result = Some(Ok(sealed)));
            }
            ReceiverCommand::Fail(reason) => {
                self.node.counters.aborted(Direction::Incoming, reason.code());
                let (transfer, peer) = (&self.id, &self.sender);
                // One that nobody expected is in no span that would say which it is.
                self.span().in_scope(|| tracing::info!(%transfer, %peer, %reason, "kv transfer aborted"));
                state.ending.reason = Some(reason.clone());
                self.outcome.send_modify(|outcome| outcome.result = Some(Err(reason)));
            }
            ReceiverCommand::Settled => {}
        }
    }

    fn let_go(&self, reason: Option<TransferError>) {
        if let Some(reserved) = self.reserved.get() {
            drop(reserved.claimed.lock().take());
        }
        self.node.incoming.leave(self.id, &self.sender, self, reason);
    }

    fn reclaim(&self) {
        if let Some(reserved) = self.reserved.get() {
            let blocks = reserved.blocks.clone();
            self.node.pool.reclaim(Reclaimed { id: self.id, direction: Direction::Incoming, blocks });
        }
    }
}

impl Landing for Inbound {
    fn data_key(&self) -> &DataKey {
        self.key.get().unwrap_or(&self.told)
    }

    fn slice_bytes(&self) -> u64 {
        self.node.slice_bytes()
    }

    fn span(&self) -> &tracing::Span {
        static NOBODYS: tracing::Span = tracing::Span::none();
        self.span.get().unwrap_or(&NOBODYS)
    }

    fn claim(&self, run: SliceRun, crcs: &[u32]) -> Claim {
        let mut state = self.state.lock();
        let (claim, commands) = state.session.claim(self.node.now(), run, crcs);
        self.finish(state, commands);
        claim
    }

    fn arrived(&self, _: u32, _: u32) -> Result<(), TransferError> {
        Ok(()) // it is where it belongs
    }

    fn landed(&self, run: SliceRun) {
        let now = self.node.now();
        self.run(|session| session.landed(now, run));
    }

    fn damaged(&self, run: SliceRun, block: u32) {
        self.run(|session| session.damaged(run, block));
    }

    fn interrupted(&self, run: SliceRun, why: &str) {
        self.run(|session| session.interrupted(run, why));
    }

    fn target(&self, layer: u32, block: u32, skip: usize) -> Result<IoSliceMut<'_>, TransferError> {
        self.node.pool.slices.io_slice_mut(layer, self.block(block)?, skip)
    }

    fn place(&self, layer: u32, block: u32) -> Result<NonNull<u8>, TransferError> {
        self.node.pool.slices.place(layer, self.block(block)?)
    }

    fn content(&self, layer: u32, block: u32, skip: usize) -> Result<&[u8], TransferError> {
        let slice = self.node.pool.slices.source(layer, self.block(block)?)?;
        slice.get(skip..).ok_or_else(|| TransferError::Invalid(format!("byte {skip} lies outside a slice")))
    }

    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError> {
        self.node.pool.slices.copy_out(layer, self.block(block)?, from, into)
    }

    fn revoked(&self) -> &CancellationToken {
        &self.revoked
    }
}
