//! A request's hold on what was booked for it: made by [`Board`], kept for as long as the request is where it was placed.

use std::{sync::Arc, time::Duration};

use baton_proto::{InstanceId, LegId, Role};
use tokio::time::Instant;

use super::Board;
use crate::{Pair, Placement, Receipt, Side, index::Ticket, ledger::Work};

/// How long a prompt that has been computed may take to be among what its instance says that it has.
const TOLD_WITHIN: Duration = Duration::from_secs(1);

/// A placement whose work is on the ledger.
pub struct Booking {
    pub placement: Placement,
    pub receipt: Receipt,
    pub credit: Credit,
    pub way: Way,
}

/// How the work of a request is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One computes the prompt, and hands its cache over to another.
    Apart,
    /// Who has all of the cache but a block at most hands it on, though it drains.
    HandedOn,
    /// One does all of it, in this role.
    Alone(Role),
}

impl Way {
    /// All that there can be.
    pub const ALL: [Self; 5] = [
        Self::Apart,
        Self::HandedOn,
        Self::Alone(Role::Mixed),
        Self::Alone(Role::Prefill),
        Self::Alone(Role::Decode),
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Apart => "apart",
            Self::HandedOn => "handed_on",
            Self::Alone(role) => role.name(),
        }
    }
}

/// Of what an instance says of a leg, what the ledger is to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegNews {
    /// Its prompt is computed.
    Prefilled(LegId),
    /// One of its choices has ended.
    ChoiceEnded(LegId),
}

/// What is booked on one instance.
pub(super) struct Part {
    pub(super) instance: InstanceId,
    pub(super) work: Work,
    /// Under which number it was dispatched.
    pub(super) leg: Option<LegId>,
    /// That it will have the prompt; none once it is about to say so itself.
    pub(super) expected: Option<Ticket>,
}

impl Part {
    /// Its instance will say soon that it has the prompt.
    fn settle(&mut self, board: &Board) {
        if let Some(ticket) = self.expected.take() {
            board.caches.settle(ticket, Instant::now() + TOLD_WITHIN);
        }
    }
}

/// Work on the ledger. The streams to instances take it off as these say that it is done; what is left on drop is not wanted any
/// more.
pub struct Credit {
    pub(super) board: Arc<Board>,
    /// On the instance that prefills, or does everything.
    pub(super) prefill: Part,
    pub(super) decode: Option<Part>,
    /// Decode was predicted to let it wait for a place, or for blocks: when it goes on says little of the way of the cache.
    pub(super) decode_waits: bool,
}

impl Credit {
    fn part(&mut self, side: Side) -> &mut Part {
        match (side, &mut self.decode) {
            (Side::Decode, Some(decode)) => decode,
            _ => &mut self.prefill,
        }
    }

    pub fn pair(&self) -> Pair<'_> {
        Pair { prefill: &self.prefill.instance, decode: self.decode.as_ref().map(|decode| &decode.instance) }
    }

    /// Who has one of the legs.
    pub fn instance(&self, side: Side) -> &InstanceId {
        match (side, &self.decode) {
            (Side::Decode, Some(decode)) => &decode.instance,
            _ => &self.prefill.instance,
        }
    }

    /// A leg of so many choices is about to be sent, under a number above that of all before it.
    pub fn dispatched(&mut self, side: Side, leg: LegId, choices: u32) {
        let board = self.board.clone();
        let part = self.part(side);
        part.leg = Some(leg);
        board.state.lock().ledger.dispatched(&part.instance, leg, part.work, choices);
    }

    /// The prompt has been computed: prefill will say soon that it has it.
    pub fn prefilled(&mut self) {
        self.prefill.settle(&self.board);
    }

    /// Prefill's part is over: decode will say soon that it has the prompt, if it has it.
    pub fn prefill_ended(&mut self) {
        if let Some(decode) = &mut self.decode {
            decode.settle(&self.board);
        }
    }

    /// Decode has gone on from the cache, so long after the first token; `None`: it could not be handed over.
    pub fn handoff_took(&self, took: Option<Duration>) {
        if let Some(decode) = self.decode.as_ref().filter(|_| took.is_none() || !self.decode_waits) {
            let view = &mut self.board.state.lock().view;
            view.learn_handoff(&self.prefill.instance, &decode.instance, took, Instant::now());
        }
    }

    /// A choice has come to its end, with so many tokens.
    pub fn answered(&self, tokens: u32) {
        let state = &mut *self.board.state.lock();
        if let Some(revision) = state.fleet.revision(&self.prefill.instance) {
            state.lengths.learn(revision, tokens);
        }
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        // Before the state is locked: see the board.
        self.prefilled();
        self.prefill_ended();
        let state = &mut *self.board.state.lock();
        for part in [Some(&self.prefill), self.decode.as_ref()].into_iter().flatten() {
            match part.leg {
                Some(leg) => state.ledger.cancelled(&part.instance, leg),
                None => state.ledger.release(&part.instance, part.work),
            }
            state.renew(&part.instance, Instant::now());
        }
        self.board.freed.notify_waiters();
    }
}
