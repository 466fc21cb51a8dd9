//! A transfer being sent: the shell around its session, and what transports see of it.
//!
//! As with `inbound`, whoever brings an event runs the session under its lock and performs the commands; none waits.

use std::{
    fmt,
    io::IoSlice,
    ops::Range,
    sync::{Arc, OnceLock, Weak},
    time::{Duration, Instant},
};

use baton_proto::{ApiError, TransferId, v1};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use v1::sender_message::Body;

use super::{
    Node,
    claims::Claimed,
    link_up::LinkUp,
    shell::{Outcome, Shell, State},
    table::Ended,
    transfer::{Direction, OfferSpec, Reclaimed, TransferStats},
};
use crate::{
    FirstTokens, TransferError,
    session::{Sender, SenderCommand, SenderTerms, Shape, SliceRun},
    sync::{AtomicBool, Mutex},
    transport::{DataKey, Departure},
};

/// Leases that a receiver may ask for.
const LEASE_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_millis(30)..=Duration::from_secs(3600);

/// One transfer being sent.
pub(super) struct Outbound {
    me: Weak<Outbound>,
    node: Arc<Node>,
    spec: OfferSpec,
    /// Reads the blocks. None once the transfer is over.
    claimed: Mutex<Option<Claimed>>,
    /// Takes it off the stream it was offered on.
    ended: Box<dyn Fn(&TransferId) + Send + Sync>,
    state: Mutex<State<Sender, LinkUp>>,
    /// Given with `Accept`.
    key: OnceLock<DataKey>,
    queued: AtomicBool,
    revoked: CancellationToken,
    outcome: watch::Sender<Outcome<TransferStats>>,
    span: tracing::Span,
}

impl Outbound {
    /// `claimed` is the claim on the blocks; `ended` is called with the id once no transport touches them any more.
    pub(super) fn new(
        node: &Arc<Node>,
        now: Instant,
        spec: OfferSpec,
        claimed: Claimed,
        ended: Box<dyn Fn(&TransferId) + Send + Sync>,
    ) -> Arc<Self> {
        let terms = SenderTerms {
            shape: Shape { layers: node.pool.slices.layers(), blocks: spec.blocks.len() as u32 },
            slice_bytes: node.slice_bytes(),
            deadline: spec.deadline,
            lease: node.lease,
            seal_grace: node.limits.seal_grace,
        };
        let span = tracing::info_span!("kv_send", transfer = %spec.id, peer = %spec.receiver);
        let session = Sender::new(now, terms);
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            node: node.clone(),
            spec,
            claimed: Mutex::new(Some(claimed)),
            ended,
            state: State::new(session, None),
            key: OnceLock::new(),
            queued: AtomicBool::new(false),
            revoked: CancellationToken::new(),
            outcome: Outcome::watched(),
            span,
        })
    }

    pub(super) fn id(&self) -> TransferId {
        self.spec.id
    }

    pub(super) fn blocks(&self) -> &[u32] {
        &self.spec.blocks
    }

    /// Whether it has been taken off the stream it was offered on, or is about to be.
    pub(super) fn is_over(&self) -> bool {
        self.claimed.lock().is_none()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Outcome<TransferStats>> {
        self.outcome.subscribe()
    }

    /// The control stream stands; the receiver at its other end must be the one meant. One that has been given up
    /// meanwhile is not taken: its end has been told, or will be, to those that rest on it already.
    pub(super) fn link_up(&self, up: &LinkUp) {
        let wrong = up.check_receiver(&self.spec);
        let now = self.node.now();
        let mut state = self.state.lock();
        if up.broken().is_cancelled() {
            return;
        }
        let commands = match wrong {
            Ok(()) => {
                state.link = Some(up.clone());
                state.session.link_up(now)
            }
            Err(wrong) => state.session.link_failed(wrong),
        };
        self.finish(state, commands);
    }

    /// The control stream `up` is gone; nothing to a transfer that is on another one by now.
    pub(super) fn link_lost(&self, up: &LinkUp, why: &str) {
        let mut state = self.state.lock();
        if !state.link.as_ref().is_some_and(|link| link.is(up)) {
            return;
        }
        state.link = None;
        let commands = state.session.link_lost(why);
        self.finish(state, commands);
    }

    pub(super) fn link_failed(&self, reason: TransferError) {
        self.run(|session| session.link_failed(reason));
    }

    pub(super) fn accepted(&self, now: Instant, accept: &v1::Accept, up: &LinkUp) {
        let lease = Duration::from_millis(accept.lease_millis.into());
        let key = DataKey::from_wire(&accept.data_key).map(|told| up.key(&told));
        self.run(|session| match key {
            Some(key) if LEASE_RANGE.contains(&lease) && accept.receiver_epoch == up.incarnation().0 => {
                if self.key.set(key).is_ok() {
                    self.node.counters.outgoing_accepted();
                }
                session.accepted(now, &accept.held, lease)
            }
            _ => {
                let reason = "the accept's data key, lease or epoch is not valid";
                session.cancel(TransferError::Protocol(reason.into()))
            }
        });
    }

    pub(super) fn ready(&self, layer: u32, blocks: Range<u32>) {
        let now = self.node.now();
        self.run(|session| session.ready(now, layer, blocks));
    }

    pub(super) fn seal(&self, first_tokens: FirstTokens) {
        let now = self.node.now();
        self.run(|session| session.seal(now, first_tokens));
    }

    pub(super) fn renewed(&self, now: Instant) {
        self.state.lock().session.renewed(now);
    }

    pub(super) fn released(&self, now: Instant) {
        self.run(|session| session.released(now));
    }

    pub(super) fn peer_aborted(&self, reason: ApiError) {
        self.run(|session| session.peer_aborted(reason));
    }

    pub(super) fn cancel(&self, reason: TransferError) {
        self.run(|session| session.cancel(reason));
    }

    pub(super) fn tick(&self, now: Instant) {
        let mut state = self.state.lock();
        let stream_heard = state.link.as_ref().map_or(now, LinkUp::heard);
        let commands = state.session.tick(now, stream_heard);
        self.finish(state, commands);
    }

    fn send(&self, state: &State<Sender, LinkUp>, body: Body) {
        if let Some(up) = &state.link {
            up.send(Some(self.spec.id), body);
        }
    }

    /// Pool index of a block of this transfer.
    fn block(&self, index: u32) -> Result<u32, TransferError> {
        let block = self.spec.blocks.get(index as usize).copied();
        block.ok_or_else(|| TransferError::Invalid(format!("the transfer has no block {index}")))
    }
}

impl Shell for Outbound {
    type Session = Sender;
    type Command = SenderCommand;
    type Link = LinkUp;
    type Success = TransferStats;

    const SETTLED: SenderCommand = SenderCommand::Settled;

    fn state(&self) -> &Mutex<State<Sender, LinkUp>> {
        &self.state
    }

    fn outcome(&self) -> &watch::Sender<Outcome<TransferStats>> {
        &self.outcome
    }

    fn perform(&self, state: &mut State<Sender, LinkUp>, command: SenderCommand) {
        match command {
            SenderCommand::Offer => {
                let offer = v1::Offer {
                    prompt_tokens: self.spec.prompt_tokens,
                    blocks: self.spec.blocks.len() as u32,
                    layers: self.node.pool.slices.layers(),
                    sender_epoch: self.node.identity.incarnation.0,
                    prompt_digest: self.spec.prompt_digest.as_bytes().to_vec().into(),
                };
                self.send(state, Body::Offer(offer));
            }
            SenderCommand::Renew => self.send(state, Body::Renew(v1::Renew {})),
            SenderCommand::Seal { first_tokens, tally } => {
                let (slices, bytes, checksum) = (tally.slices, tally.bytes, tally.checksum);
                self.send(
                    state,
                    Body::Seal(v1::Seal {
                        first_tokens: first_tokens.as_slice().to_vec(),
                        slices,
                        bytes,
                        checksum,
                    }),
                );
            }
            SenderCommand::Doubt => self.send(state, Body::Doubt(v1::Doubt {})),
            SenderCommand::Abort(reason) => {
                self.send(state, Body::Abort(v1::Abort { reason: Some(ApiError::from(reason).into()) }));
            }
            SenderCommand::Wake => {
                if let (Some(up), Some(me)) = (&state.link, self.me.upgrade()) {
                    up.wake(me);
                }
            }
            SenderCommand::Cut => {
                if let Some(up) = &state.link {
                    up.cut();
                }
            }
            SenderCommand::Revoke => {
                self.revoked.cancel();
                if let Some(up) = &state.link {
                    up.outbox().forget(self);
                }
            }
            SenderCommand::Complete { tally, took, ready_to_released } => {
                let (slices, bytes) = (tally.slices, tally.bytes);
                self.node.counters.outgoing_completed();
                self.span.in_scope(|| {
                    tracing::debug!(slices, bytes, ?took, ?ready_to_released, "kv transfer sent")
                });
                let stats = TransferStats { slices, bytes, took, ready_to_released };
                self.outcome.send_modify(|outcome| outcome.result = Some(Ok(stats)));
            }
            SenderCommand::Fail(reason) => {
                self.node.counters.aborted(Direction::Outgoing, reason.code());
                self.span.in_scope(|| tracing::info!(%reason, "kv transfer aborted"));
                state.ending.reason = Some(reason.clone());
                self.outcome.send_modify(|outcome| outcome.result = Some(Err(reason)));
            }
            SenderCommand::Settled => {}
        }
    }

    fn let_go(&self, reason: Option<TransferError>) {
        drop(self.claimed.lock().take());
        (self.ended)(&self.spec.id);
        self.node.outgoing.end(self.spec.id, Ended { peer: Some(self.spec.receiver.clone()), reason });
    }

    fn reclaim(&self) {
        let blocks = self.spec.blocks.clone();
        self.node.pool.reclaim(Reclaimed { id: self.spec.id, direction: Direction::Outgoing, blocks });
    }
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound")
            .field("spec", &self.spec)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Departure for Outbound {
    fn id(&self) -> TransferId {
        self.spec.id
    }

    fn span(&self) -> &tracing::Span {
        &self.span
    }

    fn priority(&self) -> i32 {
        self.spec.priority
    }

    fn data_key(&self) -> Option<DataKey> {
        self.key.get().cloned()
    }

    fn take(&self, most: u32) -> Option<SliceRun> {
        self.state.lock().session.take(most)
    }

    fn has_runs(&self) -> bool {
        self.state.lock().session.has_runs()
    }

    fn sent(&self, run: SliceRun, crcs: &[u32]) {
        let now = self.node.now();
        self.run(|session| session.sent(now, run, crcs));
    }

    fn failed(&self, _run: SliceRun, why: &str) {
        self.run(|session| session.failed(why));
    }

    fn path_lost(&self, why: &str) {
        self.run(|session| session.path_lost(why));
    }

    fn live(&self) -> bool {
        self.state.lock().session.live()
    }

    fn queued(&self) -> &AtomicBool {
        &self.queued
    }

    fn source(&self, layer: u32, block: u32, skip: usize) -> Result<IoSlice<'_>, TransferError> {
        self.node.pool.slices.io_slice(layer, self.block(block)?, skip)
    }

    fn is_on_device(&self) -> bool {
        self.node.pool.slices.is_on_device()
    }

    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError> {
        self.node.pool.slices.copy_out(layer, self.block(block)?, from, into)
    }

    fn offset(&self, layer: u32, block: u32) -> Result<u64, TransferError> {
        self.node.pool.slices.offset(layer, self.block(block)?)
    }

    fn revoked(&self) -> &CancellationToken {
        &self.revoked
    }
}
