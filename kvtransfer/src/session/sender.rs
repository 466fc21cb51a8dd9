//! The sending side of one transfer, pure.
//!
//! Driven by the node (`node::outbound`): the engine's progress, control messages, transports and the clock are its
//! events. Slices that become ready before the receiver has accepted wait here; afterwards transports *take* runs of
//! them and report each as sent or failed. An aborted session is over only when no run is taken, which is the fence.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use baton_proto::ApiError;

use super::{
    Lease,
    slices::{Shape, SliceRun, SliceSet, Tally},
};
use crate::{FirstTokens, TransferError};

/// What a sender session is started with.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct SenderTerms {
    pub(crate) shape: Shape,
    pub(crate) slice_bytes: u64,
    pub(crate) deadline: Instant,
    /// Until `Accept` names the agreed one.
    pub(crate) lease: Duration,
    pub(crate) seal_grace: Duration,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SenderCommand {
    Offer,
    Renew,
    Seal {
        first_tokens: FirstTokens,
        tally: Tally,
    },
    /// Tell the receiver that what it lacks will not come.
    Doubt,
    /// Tell the receiver that the transfer is off.
    Abort(TransferError),
    /// There are runs to take.
    Wake,
    /// Give the control stream up, which leads nowhere; its end comes as `link_lost`.
    Cut,
    /// Make transports let go of the blocks.
    Revoke,
    /// The owner's answer: the receiver has it. Once, and never with `Fail`.
    Complete {
        tally: Tally,
        took: Duration,
        ready_to_released: Duration,
    },
    /// The owner's answer: it did not arrive. Once.
    Fail(TransferError),
    /// No transport touches the blocks any more. Once, last.
    Settled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) enum SenderState {
    Offered,
    Accepted,
    Moving,
    Sealed,
    Released,
    Aborting,
    Aborted,
}

type Commands = Vec<SenderCommand>;

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, Hash))]
pub(crate) struct Sender {
    state: SenderState,
    terms: SenderTerms,
    started: Instant,
    deadline: Instant,
    lease: Lease,
    /// Whether the offer has gone out on the present control stream.
    offer_sent: bool,
    link_up: bool,
    /// By block; known from `Accept` on.
    held: Vec<bool>,
    /// Slices that must be sent; known from `Accept` on.
    expected: u64,
    ready: SliceSet,
    /// Of those expected, how many are ready.
    expected_ready: u64,
    queue: VecDeque<SliceRun>,
    /// Runs taken by transports and not reported yet.
    taken: u64,
    sent: Tally,
    first_tokens: Option<FirstTokens>,
    /// When slices became ready last.
    ready_at: Instant,
}

impl Sender {
    pub(crate) fn new(now: Instant, terms: SenderTerms) -> Self {
        Self {
            state: SenderState::Offered,
            terms,
            started: now,
            deadline: terms.deadline,
            lease: Lease::new(now, terms.lease),
            offer_sent: false,
            link_up: false,
            held: Vec::new(),
            expected: 0,
            ready: SliceSet::new(terms.shape),
            expected_ready: 0,
            queue: VecDeque::new(),
            taken: 0,
            sent: Tally::default(),
            first_tokens: None,
            ready_at: now,
        }
    }

    /// Neither released nor aborted nor about to be.
    pub(crate) fn live(&self) -> bool {
        !matches!(self.state, SenderState::Released | SenderState::Aborting | SenderState::Aborted)
    }

    /// The control stream to the receiver stands. A sealed transfer that lost it asks again how it ended, and gives the
    /// receiver a lease to answer in.
    pub(crate) fn link_up(&mut self, now: Instant) -> Commands {
        self.link_up = true;
        match self.state {
            SenderState::Offered if !self.offer_sent => {
                self.offer_sent = true;
                self.lease.agree(now, self.terms.lease);
                vec![SenderCommand::Offer]
            }
            SenderState::Sealed => {
                self.lease.heard(now);
                self.seal_command().into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// The control stream broke. Offers not sent yet and sealed transfers wait for the next one; the others are over.
    /// A sealed one waits until its deadline, `seal_grace` after the seal at the latest: the receiver may own the cache.
    pub(crate) fn link_lost(&mut self, why: &str) -> Commands {
        self.link_up = false;
        match self.state {
            SenderState::Offered if !self.offer_sent => Vec::new(),
            SenderState::Sealed => Vec::new(),
            _ => self.abort(TransferError::LinkLost(why.to_owned()), false),
        }
    }

    /// No control stream can be had.
    pub(crate) fn link_failed(&mut self, reason: TransferError) -> Commands {
        self.abort(reason, false)
    }

    /// The receiver has blocks and wants all slices but those of the blocks it holds.
    pub(crate) fn accepted(&mut self, now: Instant, held: &[u32], lease: Duration) -> Commands {
        match self.state {
            SenderState::Offered if self.offer_sent => {}
            SenderState::Released | SenderState::Aborting | SenderState::Aborted => return Vec::new(),
            _ => {
                return self
                    .abort(TransferError::Protocol("accepted an offer it does not have".into()), true);
            }
        }
        let shape = self.terms.shape;
        self.held = vec![false; shape.blocks as usize];
        for &block in held {
            match self.held.get_mut(block as usize) {
                Some(slot) if !*slot => *slot = true,
                _ => {
                    let reason = format!("block {block} cannot be held: it is named twice or does not exist");
                    return self.abort(TransferError::Protocol(reason), true);
                }
            }
        }
        let missing = self.held.iter().filter(|&&held| !held).count() as u64;
        self.expected = missing * u64::from(shape.layers);
        self.lease.agree(now, lease);
        self.state = SenderState::Accepted;
        for layer in 0..shape.layers {
            self.enqueue_ready(layer, 0..shape.blocks);
        }
        self.check_sealable().unwrap_or_else(|| self.after_progress(now))
    }

    /// The engine says that slices are final.
    pub(crate) fn ready(&mut self, now: Instant, layer: u32, blocks: Range<u32>) -> Commands {
        if !self.live() || blocks.is_empty() {
            return Vec::new();
        }
        let run = SliceRun { layer, first: blocks.start, count: blocks.end - blocks.start };
        if !self.terms.shape.contains(run) {
            let reason = format!("slices were made ready that the transfer does not have: {run:?}");
            return self.abort(TransferError::Invalid(reason), true);
        }
        if self.first_tokens.is_some() || !blocks.clone().all(|block| self.ready.insert(layer, block)) {
            let reason = format!("slices were made ready twice or after the seal: {run:?}");
            return self.abort(TransferError::Invalid(reason), true);
        }
        self.ready_at = now;
        if self.state == SenderState::Offered {
            return Vec::new();
        }
        self.enqueue_ready(layer, blocks);
        self.after_progress(now)
    }

    /// Queues those slices of a layer that are ready and not held, joining neighbours.
    fn enqueue_ready(&mut self, layer: u32, blocks: Range<u32>) {
        for block in blocks {
            if self.held[block as usize] || !self.ready.contains(layer, block) {
                continue;
            }
            self.expected_ready += 1;
            match self.queue.back_mut() {
                Some(last) if last.layer == layer && last.first + last.count == block => last.count += 1,
                _ => self.queue.push_back(SliceRun { layer, first: block, count: 1 }),
            }
        }
    }

    /// A transport takes the next run, of at most `most` slices; it reports with `sent` or `failed`.
    pub(crate) fn take(&mut self, most: u32) -> Option<SliceRun> {
        if !matches!(self.state, SenderState::Accepted | SenderState::Moving) {
            return None;
        }
        let front = self.queue.front_mut()?;
        let run = SliceRun { count: front.count.min(most.max(1)), ..*front };
        front.first += run.count;
        front.count -= run.count;
        if front.count == 0 {
            self.queue.pop_front();
        }
        self.taken += 1;
        self.state = SenderState::Moving;
        Some(run)
    }

    /// Whether there are runs to take.
    pub(crate) fn has_runs(&self) -> bool {
        matches!(self.state, SenderState::Accepted | SenderState::Moving) && !self.queue.is_empty()
    }

    /// A taken run is on its way; `crcs` are its slices' CRC32Cs.
    pub(crate) fn sent(&mut self, now: Instant, run: SliceRun, crcs: &[u32]) -> Commands {
        self.taken = self.taken.saturating_sub(1);
        if self.live() {
            for (block, &crc) in run.blocks().zip(crcs) {
                self.sent.add(run.layer, block, crc, self.terms.slice_bytes);
            }
            return self.after_progress(now);
        }
        self.settle_abort()
    }

    /// A taken run was not sent, or not wholly.
    pub(crate) fn failed(&mut self, why: &str) -> Commands {
        self.taken = self.taken.saturating_sub(1);
        if self.live() {
            return self.abort(TransferError::DataPath(why.to_owned()), true);
        }
        self.settle_abort()
    }

    /// A connection that carried some of the slices broke, so they may not have arrived. What is sealed asks for the
    /// receiver's verdict.
    pub(crate) fn path_lost(&mut self, why: &str) -> Commands {
        match self.state {
            SenderState::Accepted | SenderState::Moving => {
                self.abort(TransferError::DataPath(why.to_owned()), true)
            }
            SenderState::Sealed if self.link_up => vec![SenderCommand::Doubt],
            _ => Vec::new(),
        }
    }

    /// The engine has made everything ready and has the first token.
    pub(crate) fn seal(&mut self, now: Instant, first_tokens: FirstTokens) -> Commands {
        if !self.live() {
            return Vec::new();
        }
        if self.first_tokens.replace(first_tokens).is_some() {
            return self.abort(TransferError::Invalid("the transfer was sealed twice".into()), true);
        }
        if self.state == SenderState::Offered {
            return Vec::new();
        }
        self.check_sealable().unwrap_or_else(|| self.after_progress(now))
    }

    /// With the seal asked for, every slice must be ready: a missing one would never come. The engine's thread comes by
    /// here, so they are looked through only to name one that is missing.
    fn check_sealable(&mut self) -> Option<Commands> {
        self.first_tokens.as_ref()?;
        if self.expected_ready == self.expected {
            return None;
        }
        let shape = self.terms.shape;
        let missing = (0..shape.layers)
            .flat_map(|layer| (0..shape.blocks).map(move |block| (layer, block)))
            .find(|&(layer, block)| !self.held[block as usize] && !self.ready.contains(layer, block));
        missing.map(|(layer, block)| {
            let reason = format!("sealed before block {block} of layer {layer} was ready");
            self.abort(TransferError::Invalid(reason), true)
        })
    }

    /// Seals when everything asked for has been sent; otherwise wakes the transports if there is something to take.
    fn after_progress(&mut self, now: Instant) -> Commands {
        if self.has_runs() {
            return vec![SenderCommand::Wake];
        }
        let moving = matches!(self.state, SenderState::Accepted | SenderState::Moving);
        if moving && self.first_tokens.is_some() && self.sent.slices == self.expected {
            self.state = SenderState::Sealed;
            self.deadline = self.deadline.min(now + self.terms.seal_grace);
            return self.seal_command().into_iter().collect();
        }
        Vec::new()
    }

    fn seal_command(&self) -> Option<SenderCommand> {
        Some(SenderCommand::Seal { first_tokens: self.first_tokens.clone()?, tally: self.sent })
    }

    /// The receiver is alive.
    pub(crate) fn renewed(&mut self, now: Instant) {
        self.lease.heard(now);
    }

    /// The receiver has taken the transfer over.
    pub(crate) fn released(&mut self, now: Instant) -> Commands {
        match self.state {
            SenderState::Released | SenderState::Aborting | SenderState::Aborted => Vec::new(),
            SenderState::Sealed => {
                self.state = SenderState::Released;
                let took = now.saturating_duration_since(self.started);
                let ready_to_released = now.saturating_duration_since(self.ready_at);
                vec![
                    SenderCommand::Complete { tally: self.sent, took, ready_to_released },
                    SenderCommand::Settled,
                ]
            }
            _ => self.abort(TransferError::Protocol("released before the seal".into()), true),
        }
    }

    pub(crate) fn peer_aborted(&mut self, reason: ApiError) -> Commands {
        self.abort(TransferError::PeerAborted(reason), false)
    }

    /// The local owner does not want it any more.
    pub(crate) fn cancel(&mut self, reason: TransferError) -> Commands {
        self.abort(reason, true)
    }

    /// Time has passed; `stream_heard` is when the peer was last heard on the control stream, whatever it said.
    pub(crate) fn tick(&mut self, now: Instant, stream_heard: Instant) -> Commands {
        if !self.live() {
            return Vec::new();
        }
        if now >= self.deadline {
            let waiting_for = match self.state {
                SenderState::Offered => "waiting for the offer to be accepted",
                SenderState::Sealed => "waiting for the receiver to take over",
                _ => "sending slices",
            };
            return self.abort(TransferError::DeadlineExceeded { waiting_for }, true);
        }
        // The lease runs only while there is a stream on which the peer can be heard.
        if !self.offer_sent || !self.link_up {
            return Vec::new();
        }
        if let Some(silent) = self.lease.expired(now) {
            let cut = self.lease.is_silence(now.saturating_duration_since(stream_heard));
            // The receiver of a sealed transfer may own the cache: it is asked over another stream.
            let over = !(cut && self.state == SenderState::Sealed);
            let mut commands = Vec::new();
            if over {
                commands = self.abort(TransferError::LeaseExpired { silent }, true);
            }
            if cut {
                commands.insert(0, SenderCommand::Cut);
            }
            return commands;
        }
        if self.lease.renewal_due(now) { vec![SenderCommand::Renew] } else { Vec::new() }
    }

    fn abort(&mut self, reason: TransferError, tell_peer: bool) -> Commands {
        if !self.live() {
            return Vec::new();
        }
        let mut commands = Vec::with_capacity(4);
        if tell_peer && self.offer_sent && self.link_up {
            commands.push(SenderCommand::Abort(reason.clone()));
        }
        self.state = SenderState::Aborting;
        self.queue.clear();
        commands.extend([SenderCommand::Revoke, SenderCommand::Fail(reason)]);
        commands.extend(self.settle_abort());
        commands
    }

    fn settle_abort(&mut self) -> Commands {
        if self.state != SenderState::Aborting || self.taken > 0 {
            return Vec::new();
        }
        self.state = SenderState::Aborted;
        vec![SenderCommand::Settled]
    }
}
