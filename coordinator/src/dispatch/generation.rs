//! One placed request on its way: sends the legs, drives the machine with what they bring, acts on its commands.
//!
//! It has no task of its own: whoever reads the answer polls it, so a request costs no hop between tasks. Dropping it
//! cancels every open leg at once and takes its work off the ledger.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use baton_proto::{ApiError, ErrorCode, RequestId, TransferId, v1};
use tokio::time::{Instant, Sleep, sleep_until};
use v1::dispatch::Work;

use super::{
    leg::{Output, Side},
    link::LegGuard,
    machine::{Command, Completed, Machine},
    mailbox::Mailbox,
};
use crate::{
    fleet::keeper::Links,
    prepare::Sampling,
    schedule::{
        Placement, Seat,
        board::{Booking, Credit},
    },
};

/// How long the end of an answer waits for prefill to say how much of the prompt was cached.
const LINGER: Duration = Duration::from_millis(50);

/// What a request is, as far as instances are told.
#[derive(Debug, Clone)]
pub struct Assignment {
    pub request: RequestId,
    /// W3C trace context; empty = none.
    pub traceparent: String,
    pub prompt: Arc<[u32]>,
    pub sampling: Sampling,
    pub deadline: Instant,
}

/// The guards of the open legs.
#[derive(Default)]
struct Legs {
    whole: Option<LegGuard>,
    prefill: Option<LegGuard>,
    decode: Option<LegGuard>,
}

impl Legs {
    fn of(&mut self, side: Side) -> &mut Option<LegGuard> {
        match side {
            Side::Whole => &mut self.whole,
            Side::Prefill => &mut self.prefill,
            Side::Decode => &mut self.decode,
        }
    }
}

/// What polling brought; new tokens are in [`Generation::fresh`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    Tokens,
    /// The last; fresh tokens may have come with it.
    End(Result<Completed, ApiError>),
}

/// A request whose legs have been dispatched.
pub struct Generation {
    machine: Machine,
    // Before `credit`: cancels leave before the work is taken off the ledger.
    legs: Legs,
    credit: Credit,
    mailbox: Arc<Mailbox>,
    inbox: VecDeque<(Side, Output)>,
    deadline: Pin<Box<Sleep>>,
    linger: Option<Pin<Box<Sleep>>>,
    why_cancelled: &'static str,
}

impl Generation {
    /// Dispatches both legs of a booked placement, or the only one. The booking's work is taken off if it fails.
    pub fn start(links: &Links, booking: Booking, assignment: Assignment) -> Result<Self, ApiError> {
        let mailbox = Arc::new(Mailbox::default());
        let mut legs = Legs::default();
        let send = |side: Side, seat: &Seat, work: Work| {
            let link = links.get(&seat.instance).ok_or_else(|| {
                ApiError::new(ErrorCode::InstanceLost, format!("instance {} has just left", seat.instance))
            })?;
            link.dispatch(side, &mailbox, dispatch(seat, &assignment, work))
        };
        let max_tokens = assignment.sampling.max_tokens;
        let machine = match &booking.placement {
            Placement::Mixed(seat) => {
                legs.whole = Some(send(Side::Whole, seat, Work::Whole(v1::dispatch::Whole {}))?);
                Machine::whole(max_tokens)
            }
            Placement::Apart { prefill, decode } => {
                let transfer = TransferId::generate();
                // Decode first: its blocks can be reserved while prefill's dispatch is on its way.
                let take_up = v1::dispatch::Decode {
                    transfer_id: transfer.as_bytes().to_vec().into(),
                    prefill_instance: prefill.instance.to_string(),
                    prefill_incarnation: prefill.incarnation.0,
                };
                legs.decode = Some(send(Side::Decode, decode, Work::Decode(take_up))?);
                let hand_on = v1::dispatch::Prefill {
                    transfer_id: transfer.as_bytes().to_vec().into(),
                    decode_instance: decode.instance.to_string(),
                    decode_incarnation: decode.incarnation.0,
                    decode_handoff_endpoint: decode.handoff_endpoint.clone(),
                };
                legs.prefill = Some(send(Side::Prefill, prefill, Work::Prefill(hand_on))?);
                Machine::apart(max_tokens)
            }
        };
        Ok(Self {
            machine,
            legs,
            credit: booking.credit,
            mailbox,
            inbox: VecDeque::new(),
            deadline: Box::pin(sleep_until(assignment.deadline)),
            linger: None,
            why_cancelled: "other_leg_ended",
        })
    }

    /// Tokens that came since the last call, in order.
    pub fn fresh(&mut self) -> &[u32] {
        self.machine.take_fresh()
    }

    /// The reader has seen enough (a stop string): the legs are cancelled. The answer is [`Progress::End`]'s.
    pub fn stop(&mut self) -> Completed {
        self.why_cancelled = "stop_string";
        let commands = self.machine.stop();
        match self.perform(commands) {
            Some(Ok(completed)) => completed,
            _ => Completed { reason: super::StopReason::Stop, cached_tokens: 0 },
        }
    }

    /// Waits for the next tokens or the end. Must not be called after the end.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Progress> {
        loop {
            match self.mailbox.poll_take(context, &mut self.inbox) {
                Poll::Ready(()) => {
                    let before = self.machine.tokens().len();
                    if let Some(end) = self.drain_inbox() {
                        return Poll::Ready(Progress::End(end));
                    }
                    if self.machine.tokens().len() > before {
                        return Poll::Ready(Progress::Tokens);
                    }
                }
                Poll::Pending => return self.poll_timers(context),
            }
        }
    }

    fn drain_inbox(&mut self) -> Option<Result<Completed, ApiError>> {
        while let Some((side, output)) = self.inbox.pop_front() {
            let leg_ended = output.end.is_some();
            let handed_off = matches!(output.end, Some(super::LegEnd::HandedOff { .. }));
            let commands = self.machine.output(side, output);
            if leg_ended && let Some(guard) = self.legs.of(side).take() {
                guard.ended();
            }
            if !self.machine.tokens().is_empty() {
                self.credit.prefilled();
            }
            if handed_off {
                self.credit.handed_off();
            }
            if let Some(end) = self.perform(commands) {
                self.inbox.clear();
                return Some(end);
            }
        }
        None
    }

    fn poll_timers(&mut self, context: &mut Context<'_>) -> Poll<Progress> {
        let mut commands = Vec::new();
        if self.deadline.as_mut().poll(context).is_ready() {
            self.why_cancelled = "deadline";
            let message =
                "the request did not finish within its time; ask for fewer tokens or try again later";
            commands = self.machine.abort(ApiError::new(ErrorCode::DeadlineExceeded, message));
        } else if self.linger.as_mut().is_some_and(|linger| linger.as_mut().poll(context).is_ready()) {
            self.linger = None;
            self.why_cancelled = "answer_complete";
            commands = self.machine.linger_over();
        }
        match self.perform(commands) {
            Some(end) => Poll::Ready(Progress::End(end)),
            None => {
                // A linger timer that was just set has to be polled once to wake this task.
                if let Some(linger) = self.linger.as_mut() {
                    let _ = linger.as_mut().poll(context);
                }
                Poll::Pending
            }
        }
    }

    fn perform(&mut self, commands: Vec<Command>) -> Option<Result<Completed, ApiError>> {
        let mut ended = None;
        for command in commands {
            match command {
                Command::Cancel(side) => {
                    if let Some(guard) = self.legs.of(side).take() {
                        guard.cancel(self.why_cancelled);
                    }
                }
                Command::Linger => self.linger = Some(Box::pin(sleep_until(Instant::now() + LINGER))),
                Command::End(end) => ended = Some(end),
            }
        }
        ended
    }
}

fn dispatch(seat: &Seat, assignment: &Assignment, work: Work) -> v1::Dispatch {
    let left = assignment.deadline.saturating_duration_since(Instant::now());
    v1::Dispatch {
        leg: 0, // the link's to choose
        request_id: assignment.request.to_string(),
        traceparent: assignment.traceparent.clone(),
        incarnation: seat.incarnation.0,
        role_epoch: seat.role_epoch.0,
        model: seat.model.clone(),
        prompt_tokens: assignment.prompt.to_vec(),
        sampling: Some((&assignment.sampling).into()),
        timeout_millis: u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1),
        work: Some(work),
    }
}
