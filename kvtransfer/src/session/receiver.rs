//! The receiving side of one transfer, pure.
//!
//! Driven by the node (`node::inbound`): control messages, frames on the data plane, the clock and the local owner are
//! its events. `Expected` (blocks are reserved, no offer yet) and `Offered` (an offer is held, no blocks yet) both lead
//! to `Accepted`. A slice is *claimed* before any byte of it is written and *landed* after its checksum was compared;
//! an aborted session is over only when no claim is open, which is the fence.

mod agreement;

use std::time::{Duration, Instant};

use baton_proto::{ApiError, Incarnation, InstanceId, PromptDigest};

use super::{
    Cut, Lease,
    slices::{Claim, Shape, SliceRun, Tally},
    slots::Slots,
};
use crate::{FirstTokens, TransferError};

/// What the local owner has reserved.
#[derive(Debug, Clone)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct Expectation {
    pub(crate) sender: InstanceId,
    pub(crate) sender_incarnation: Option<Incarnation>,
    pub(crate) prompt_tokens: u32,
    pub(crate) prompt_digest: PromptDigest,
    pub(crate) shape: Shape,
    /// Indices of blocks that are filled already, in ascending order; from the accept on, of the sender's blocks.
    pub(crate) held: Vec<u32>,
    pub(crate) deadline: Instant,
}

/// What a sender offers, and who it is.
#[derive(Debug, Clone)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct OfferTerms {
    pub(crate) sender: InstanceId,
    pub(crate) sender_incarnation: Incarnation,
    pub(crate) prompt_tokens: u32,
    pub(crate) prompt_digest: PromptDigest,
    /// In the sender's blocks.
    pub(crate) shape: Shape,
    /// `None` = the sender lays its cache out as this side does.
    pub(crate) cut: Option<Cut>,
}

/// The sender's closing account.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct SealTerms {
    pub(crate) first_tokens: FirstTokens,
    pub(crate) tally: Tally,
}

/// Durations a session is run with.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct ReceiverTiming {
    pub(crate) lease: Duration,
    pub(crate) held_offer: Duration,
    pub(crate) seal_grace: Duration,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ReceiverCommand {
    /// Open the transfer to the data plane, then tell the sender.
    Accept,
    Renew,
    Released,
    /// Tell the sender that the transfer is off.
    Abort(TransferError),
    /// Make transports let go of the blocks.
    Revoke,
    /// The owner's answer: all of it is here. Once, and never with `Fail`.
    Complete {
        first_tokens: FirstTokens,
        tally: Tally,
        took: Duration,
        last_slice_at: Instant,
    },
    /// The owner's answer: it will not come. Once.
    Fail(TransferError),
    /// No transport touches the blocks any more. Once, last.
    Settled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) enum ReceiverState {
    Expected,
    Offered,
    Accepted,
    Moving,
    Sealed,
    Released,
    Aborting,
    Aborted,
}

type Commands = Vec<ReceiverCommand>;

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, Hash))]
pub(crate) struct Receiver {
    state: ReceiverState,
    timing: ReceiverTiming,
    /// Of this side's slices; from the accept on, of the sender's.
    slice_bytes: u64,
    expectation: Option<Expectation>,
    offer: Option<OfferTerms>,
    deadline: Instant,
    lease: Lease,
    accepted_at: Instant,
    /// When the last slice so far landed.
    last_slice_at: Instant,
    slices: Option<Slots>,
    seal: Option<SealTerms>,
    /// Slices claimed and neither landed nor let go.
    open_claims: u64,
}

impl Receiver {
    /// Blocks are reserved; the offer has not come yet.
    pub(crate) fn expected(
        now: Instant,
        timing: ReceiverTiming,
        slice_bytes: u64,
        expectation: Expectation,
    ) -> Self {
        let deadline = expectation.deadline;
        let mut session = Self::new(now, timing, slice_bytes, ReceiverState::Expected, deadline);
        session.expectation = Some(expectation);
        session
    }

    /// An offer has come; no blocks are reserved yet.
    pub(crate) fn offered(now: Instant, timing: ReceiverTiming, slice_bytes: u64, offer: OfferTerms) -> Self {
        let deadline = now + timing.held_offer;
        let mut session = Self::new(now, timing, slice_bytes, ReceiverState::Offered, deadline);
        session.offer = Some(offer);
        session
    }

    fn new(
        now: Instant,
        timing: ReceiverTiming,
        slice_bytes: u64,
        state: ReceiverState,
        deadline: Instant,
    ) -> Self {
        Self {
            state,
            timing,
            slice_bytes,
            expectation: None,
            offer: None,
            deadline,
            lease: Lease::new(now, timing.lease),
            accepted_at: now,
            last_slice_at: now,
            slices: None,
            seal: None,
            open_claims: 0,
        }
    }

    /// Indices of the blocks that the sender is to leave out.
    pub(crate) fn held(&self) -> &[u32] {
        self.expectation.as_ref().map_or(&[], |expectation| &expectation.held)
    }

    pub(crate) fn state(&self) -> ReceiverState {
        self.state
    }

    /// Neither released nor aborted nor about to be.
    pub(crate) fn live(&self) -> bool {
        !matches!(self.state, ReceiverState::Released | ReceiverState::Aborting | ReceiverState::Aborted)
    }

    /// A frame wants to write these slices, whose CRC32Cs it names.
    pub(crate) fn claim(&mut self, now: Instant, run: SliceRun, crcs: &[u32]) -> (Claim, Commands) {
        if !self.live() {
            return (Claim::Skip, Vec::new());
        }
        let Some(slots) = &mut self.slices else {
            let early = TransferError::Protocol("slices came before the transfer was accepted".into());
            return (Claim::Refused, self.abort(early, true));
        };
        self.lease.heard(now);
        match slots.claim(run, crcs) {
            Ok(Claim::Write) => {
                self.open_claims += u64::from(run.count);
                if self.state == ReceiverState::Accepted {
                    self.state = ReceiverState::Moving;
                }
                (Claim::Write, Vec::new())
            }
            Ok(other) => (other, Vec::new()),
            Err(reason) => (Claim::Refused, self.abort(reason, true)),
        }
    }

    /// Every slice of a claimed run is in its block and matches its checksum.
    pub(crate) fn landed(&mut self, now: Instant, run: SliceRun) -> Commands {
        self.lease.heard(now);
        if self.live()
            && let Some(slots) = &mut self.slices
        {
            self.last_slice_at = now;
            for block in run.blocks() {
                slots.land(run.layer, block, self.slice_bytes);
            }
        }
        let mut commands = self.close_claim(run);
        commands.extend(self.settle_seal(now));
        commands
    }

    /// A slice of a claimed run does not match its checksum.
    pub(crate) fn damaged(&mut self, run: SliceRun, block: u32) -> Commands {
        let mut commands = self.abort(TransferError::Damaged { layer: run.layer, block }, true);
        commands.extend(self.close_claim(run));
        commands
    }

    /// A claimed run will not be written further: its connection failed, or the claim was revoked.
    pub(crate) fn interrupted(&mut self, run: SliceRun, why: &str) -> Commands {
        self.let_go(run, TransferError::DataPath(why.to_owned()))
    }

    /// A claimed run cannot be taken in here.
    pub(crate) fn let_go(&mut self, run: SliceRun, reason: TransferError) -> Commands {
        let mut commands = self.abort(reason, true);
        commands.extend(self.close_claim(run));
        commands
    }

    fn close_claim(&mut self, run: SliceRun) -> Commands {
        self.open_claims = self.open_claims.saturating_sub(u64::from(run.count));
        self.settle_abort()
    }

    /// The sender says that everything has been sent.
    pub(crate) fn seal(&mut self, now: Instant, seal: SealTerms) -> Commands {
        self.lease.heard(now);
        match self.state {
            ReceiverState::Released | ReceiverState::Aborting | ReceiverState::Aborted => return Vec::new(),
            ReceiverState::Accepted | ReceiverState::Moving => {}
            ReceiverState::Expected | ReceiverState::Offered => {
                return self.abort(TransferError::Protocol("sealed before it was accepted".into()), true);
            }
            ReceiverState::Sealed => return self.abort(TransferError::Protocol("sealed twice".into()), true),
        }
        let expected = self.slices.as_ref().map_or(0, Slots::expected);
        if let Err(mismatch) = compare("slices", seal.tally.slices, expected)
            .and_then(|()| compare("bytes", seal.tally.bytes, expected * self.slice_bytes))
        {
            return self.abort(mismatch, true);
        }
        self.seal = Some(seal);
        self.state = ReceiverState::Sealed;
        self.deadline = self.deadline.min(now + self.timing.seal_grace);
        self.settle_seal(now)
    }

    /// Releases the sender once the seal is here and every slice is accounted for.
    fn settle_seal(&mut self, now: Instant) -> Commands {
        let (ReceiverState::Sealed, Some(seal), Some(slots)) = (self.state, self.seal.clone(), &self.slices)
        else {
            return Vec::new();
        };
        let tally = slots.landed();
        if tally.slices < slots.expected() {
            return Vec::new();
        }
        if let Err(mismatch) = compare("checksum", seal.tally.checksum.into(), tally.checksum.into()) {
            return self.abort(mismatch, true);
        }
        self.state = ReceiverState::Released;
        let took = now.saturating_duration_since(self.accepted_at);
        let (first_tokens, last_slice_at) = (seal.first_tokens, self.last_slice_at);
        vec![
            ReceiverCommand::Released,
            ReceiverCommand::Complete { first_tokens, tally, took, last_slice_at },
            ReceiverCommand::Settled,
        ]
    }

    /// The sender says that what has not arrived of a sealed transfer will not come.
    pub(crate) fn doubted(&mut self) -> Commands {
        if self.state != ReceiverState::Sealed {
            return Vec::new();
        }
        let lost = "a data connection that carried some of the slices broke at the sender";
        self.abort(TransferError::DataPath(lost.into()), true)
    }

    /// The sender is alive.
    pub(crate) fn renewed(&mut self, now: Instant) {
        self.lease.heard(now);
    }

    pub(crate) fn peer_aborted(&mut self, reason: ApiError) -> Commands {
        self.abort(TransferError::PeerAborted(reason), false)
    }

    /// The control stream is gone, and with it every transfer that is not whole. One whose offer has not come stays.
    pub(crate) fn link_lost(&mut self, why: &str) -> Commands {
        if self.state == ReceiverState::Expected {
            return Vec::new();
        }
        self.abort(TransferError::LinkLost(why.to_owned()), false)
    }

    /// The local owner does not want it any more.
    pub(crate) fn cancel(&mut self, reason: TransferError) -> Commands {
        self.abort(reason, true)
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Instant) -> Commands {
        if !self.live() {
            return Vec::new();
        }
        if now >= self.deadline {
            let waiting_for = match self.state {
                ReceiverState::Expected => "waiting for the offer",
                ReceiverState::Offered => "holding an offer that nobody expected",
                ReceiverState::Sealed => "waiting for slices that the seal counts",
                _ => "receiving slices",
            };
            return self.abort(TransferError::DeadlineExceeded { waiting_for }, true);
        }
        if self.state == ReceiverState::Expected {
            return Vec::new();
        }
        if let Some(silent) = self.lease.expired(now) {
            return self.abort(TransferError::LeaseExpired { silent }, true);
        }
        if self.lease.renewal_due(now) { vec![ReceiverCommand::Renew] } else { Vec::new() }
    }

    fn abort(&mut self, reason: TransferError, tell_peer: bool) -> Commands {
        if !self.live() {
            return Vec::new();
        }
        let mut commands = Vec::with_capacity(4);
        if tell_peer && self.state != ReceiverState::Expected {
            commands.push(ReceiverCommand::Abort(reason.clone()));
        }
        self.state = ReceiverState::Aborting;
        commands.extend([ReceiverCommand::Revoke, ReceiverCommand::Fail(reason)]);
        commands.extend(self.settle_abort());
        commands
    }

    fn settle_abort(&mut self) -> Commands {
        if self.state != ReceiverState::Aborting || self.open_claims > 0 {
            return Vec::new();
        }
        self.state = ReceiverState::Aborted;
        vec![ReceiverCommand::Settled]
    }
}

fn compare(what: &'static str, expected: u64, found: u64) -> Result<(), TransferError> {
    if expected == found { Ok(()) } else { Err(TransferError::SealMismatch { what, expected, found }) }
}
