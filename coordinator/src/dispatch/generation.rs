//! One placed request on its way: sends the legs, drives the machine with what they bring, acts on its commands.
//!
//! It has no task of its own: whoever reads the answer has it receive, so a request costs no hop between tasks. Dropping it
//! cancels every open leg at once and takes its work off the ledger.

use std::{collections::VecDeque, future::Future, mem, pin::Pin, sync::Arc, task::Context, time::Duration};

use baton_process::prefetch::prefetch;
use baton_proto::{ApiError, ErrorCode, InstanceId, TransferId};
use baton_schedule::{
    Assignee, Pair, Placement, Side,
    board::{Booking, Way},
};
use smallvec::SmallVec;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    assignment::Assignment,
    deadline::{Deadline, deadline_passed},
    hold::Hold,
    legs::Legs,
    machine::{Command, Completed, Fresh, Machine},
    wire::{Part, dispatch},
};
use crate::{
    cause,
    fleet::{
        CancelReason, Expected, LegEnd, LegGuard, Mailbox, Output, StopReason, attachment::not_there,
        keeper::Attachments,
    },
    handoffs::{Handoff, Handoffs},
};

/// How long the end of an answer waits for prefill to say how much of the prompt was cached.
const LINGER: Duration = Duration::from_millis(50);
/// How long decode may say nothing once prefill is lost. What is on its way from a prefill that lives, and is only lost to
/// this coordinator, arrives meanwhile, and is begun with; from one that is frozen nothing comes, and a client waits.
const DECODE_PATIENCE: Duration = Duration::from_secs(5);

/// After so long, who stays with an instance that drains is asked again.
const LEAVING_AGAIN: Duration = Duration::from_secs(1);

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// New tokens of a choice, see [`Generation::fresh`], or its end, or both.
    Choice { choice: u32, end: Option<Completed> },
    /// The instance drains that generates, or, if not `begun`, that has the prompt: what takes long had better go on elsewhere.
    /// Told again after a while.
    Leaving { begun: bool },
    /// The request cannot be completed.
    Failed(ApiError),
}

impl Progress {
    fn of(choice: u32, end: Result<Completed, ApiError>) -> Self {
        match end {
            Ok(completed) => Self::Choice { choice, end: Some(completed) },
            Err(error) => Self::Failed(error),
        }
    }
}

/// A request that an instance could not be asked. Nobody works at it: nothing has been sent, or what has is cancelled.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub struct NotSent {
    /// Whose stream does not stand, or has no room.
    pub instance: InstanceId,
    /// As a client is told if nobody else is found.
    pub error: ApiError,
}

/// A wait that the machine asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// For prefill's report.
    Linger,
    /// For decode's first word.
    Decode,
}

/// One of the answers to a request.
struct Choice {
    machine: Machine,
    /// At most one at a time: what ends the first rules the second out.
    wait: Option<(Wait, Pin<Box<Sleep>>)>,
}

/// A request whose legs have been dispatched.
pub struct Generation {
    choices: SmallVec<[Choice; 1]>,
    // Before `hold`: cancels leave before the work is taken off the ledger.
    legs: Legs,
    hold: Box<Hold>,
    /// The prompt has been computed; decode has the cache of it.
    computed: bool,
    taken_up: bool,
    mailbox: Arc<Mailbox>,
    inbox: VecDeque<(Side, Output)>,
    /// What has been made of the inbox and not been told.
    news: VecDeque<Progress>,
    /// The leg whose fault it was that it failed.
    failed: Option<Side>,
    /// Legs whose instances were lost to this coordinator, by its own word and not by theirs.
    lost: SmallVec<[Side; 2]>,
    /// Legs that have brought a token, and how many of them have been told.
    served: SmallVec<[Side; 2]>,
    served_told: usize,
    placed: Instant,
    /// Whoever prefills has the cache, and drains.
    handed_on: bool,
    /// When it was told that an instance drains.
    leaving: Option<Instant>,
    deadline: Deadline,
}

/// What is put into an empty queue next lies at its beginning, where the processor has what was there last.
fn begin_anew<T>(queue: &mut VecDeque<T>) {
    queue.clear();
}

impl Generation {
    /// Dispatches both legs of a booked placement, or the only one. The booking's work is taken off if it fails.
    pub fn start(
        attachments: &Attachments,
        handoffs: &Arc<Handoffs>,
        booking: Booking,
        assignment: Assignment,
    ) -> Result<Self, NotSent> {
        let Booking { placement, mut credit, way, .. } = booking;
        let handed_on = way == Way::HandedOn;
        let (sampling, prompt) = (&assignment.prompt.sampling, assignment.prompt.tokens.to_wire());
        let mailbox = Arc::new(Mailbox::new(Expected {
            choices: sampling.choices,
            max_tokens: sampling.max_tokens,
            top_logprobs: sampling.top_logprobs,
            in_batches: assignment.in_batches,
        }));
        let (mut legs, mut handoff) = (Legs::default(), None);
        let mut send = |assignee: &Assignee, part: Part<'_>| {
            let side = part.side();
            let sent = match attachments.get(&assignee.instance) {
                Some(attachment) => {
                    let dispatch = dispatch(assignee, &assignment, prompt.clone(), part);
                    attachment.dispatch(side, sampling.choices, &mailbox, &mut credit, dispatch)
                }
                None => Err(not_there(&assignee.instance)),
            };
            sent.map_err(|error| NotSent { instance: assignee.instance.clone(), error })
        };
        let machine: fn(u32) -> Machine = match &placement {
            Placement::Alone(alone) => {
                legs.whole = Some(send(alone, Part::Whole)?);
                Machine::whole
            }
            Placement::Apart { prefill, decode } => {
                let transfer = TransferId::generate();
                // Decode first: its blocks can be reserved while prefill's dispatch is on its way.
                let taken_up = send(decode, Part::Decode { transfer, prefill })?;
                match send(prefill, Part::Prefill { transfer, decode, hand_on: handed_on }) {
                    Ok(guard) => legs.prefill = Some(guard),
                    Err(error) => {
                        taken_up.cancel_all(CancelReason::PrefillNotDispatched);
                        return Err(error);
                    }
                }
                legs.decode = Some(taken_up);
                handoff = Some(Handoff::new(handoffs, &prefill.instance, &decode.instance));
                Machine::apart
            }
        };
        let choice = |_| {
            let machine = machine(sampling.max_tokens).with_logprobs(sampling.top_logprobs.is_some());
            Choice { machine: machine.after(&assignment.generated), wait: None }
        };
        Ok(Self {
            choices: (0..sampling.choices).map(choice).collect(),
            legs,
            hold: Box::new(Hold { credit, handoff }),
            computed: false,
            taken_up: false,
            mailbox,
            inbox: VecDeque::new(),
            news: VecDeque::new(),
            failed: None,
            lost: SmallVec::new(),
            served: SmallVec::new(),
            served_told: 0,
            placed: Instant::now(),
            handed_on,
            leaving: None,
            deadline: Deadline::new(assignment.deadline),
        })
    }

    /// Tokens of a choice that came since the last call, in order.
    pub fn fresh(&mut self, choice: u32) -> Option<Fresh<'_>> {
        Some(self.choices.get_mut(choice as usize)?.machine.take_fresh())
    }

    /// The reader has seen enough of a choice (a stop string): it is cancelled, and nothing more will be told of it.
    pub fn stop(&mut self, choice: u32) -> Completed {
        let commands = self.choices.get_mut(choice as usize).map(|choice| choice.machine.stop());
        match self.perform(choice, commands.unwrap_or_default(), CancelReason::StopString) {
            Some(Ok(completed)) => {
                self.ended_here(choice);
                completed
            }
            _ => Completed { reason: StopReason::Stop, cached_tokens: 0, outgrown: None },
        }
    }

    /// How much of the prompt was taken from a prefix cache, as far as a leg has said it.
    pub fn cached_tokens(&self) -> Option<u32> {
        self.choices.iter().filter_map(|choice| choice.machine.cached_tokens()).max()
    }

    pub fn placed(&self) -> Instant {
        self.placed
    }

    pub fn pair(&self) -> Pair<'_> {
        self.hold.credit.pair()
    }

    /// Whether who generates has the cache of the prompt and of what it has brought.
    pub fn has_cache(&self) -> bool {
        self.served.iter().any(|side| *side != Side::Prefill)
    }

    /// Who has one of the legs.
    pub fn instance(&self, side: Side) -> &InstanceId {
        self.hold.credit.instance(side)
    }

    /// A choice is as long as it becomes: others are expected to be like it.
    pub fn ended_here(&mut self, choice: u32) {
        let tokens = self.choices.get(choice as usize).map(|choice| choice.machine.tokens().len() as u32);
        tokens.into_iter().for_each(|tokens| self.hold.credit.answered(tokens));
    }

    /// Who made it fail, if that is known.
    pub fn culprit(&self) -> Option<&InstanceId> {
        self.failed.map(|side| self.instance(side))
    }

    /// Who has brought a first token since the last call.
    pub fn take_served(&mut self) -> impl Iterator<Item = &InstanceId> {
        let from = mem::replace(&mut self.served_told, self.served.len());
        self.served[from..].iter().map(|side| self.hold.credit.instance(*side))
    }

    /// Ends what is left of it, and tells the instances why.
    pub fn give_up(self, why: CancelReason) {
        let Legs { whole, prefill, decode } = self.legs;
        [whole, prefill, decode].into_iter().flatten().for_each(|guard| guard.cancel_all(why));
    }

    /// Has the processor fetch what [`Self::receive`] appends to, and tells the last token that it is to find.
    pub fn prefetch(&self) -> Option<u32> {
        for last in self.choices.iter().filter_map(|choice| choice.machine.tokens().last()) {
            prefetch(last);
        }
        self.mailbox.last_token()
    }

    /// Takes in what the legs have brought; whatever they bring next wakes `context`.
    pub fn receive(&mut self, context: &mut Context<'_>) {
        let flooded = self.mailbox.take(context.waker(), &mut self.inbox);
        self.drain_inbox();
        self.look_for_drain();
        if let Some(side) = flooded {
            self.fail_flooded(side);
        }
        self.look_at_timers(context);
    }

    /// What was received, one after the other; after the end of the last choice, or a failure, nothing more is to be asked.
    pub fn news(&mut self) -> Option<Progress> {
        let next = self.news.pop_front();
        if next.is_none() {
            begin_anew(&mut self.news);
        }
        next
    }

    fn drain_inbox(&mut self) {
        while let Some((side, output)) = self.inbox.pop_front() {
            let (choice, leg_ended) = (output.choice, output.end.is_some());
            if side == Side::Decode && output.generates() && !mem::replace(&mut self.taken_up, true) {
                self.hold.taken_up(self.mailbox.handoff_time());
            }
            if output.generates() && !self.served.contains(&side) {
                self.served.push(side);
                self.leaving = None;
            }
            if matches!(output.end, Some(LegEnd::Lost(_))) && !self.lost.contains(&side) {
                self.lost.push(side);
            }
            let Some(of) = self.choices.get_mut(choice as usize) else { continue };
            let before = of.machine.tokens().len();
            let commands = of.machine.output(side, output);
            let grown = of.machine.tokens().len() > before;
            if grown && !mem::replace(&mut self.computed, true) {
                self.hold.credit.prefilled();
            }
            if leg_ended && let Some(guard) = self.legs.of(side) {
                guard.ended(choice);
                if side == Side::Prefill {
                    self.hold.credit.prefill_ended();
                }
            }
            match self.perform(choice, commands, CancelReason::OtherLegEnded) {
                Some(end) => {
                    match &end {
                        // Whoever reads it may go on elsewhere.
                        Ok(Completed { outgrown: Some(_), .. }) => {}
                        Ok(_) => self.ended_here(choice),
                        Err(error) => {
                            let failed = self.failed_by(side, error);
                            self.failed.get_or_insert(failed);
                        }
                    }
                    self.news.push_back(Progress::of(choice, end));
                }
                None if grown => self.news.push_back(Progress::Choice { choice, end: None }),
                None => {}
            }
        }
        begin_anew(&mut self.inbox);
    }

    /// Who waits for a cache finds out when it has come.
    fn look_for_drain(&mut self) {
        let begun = !self.served.is_empty();
        let own = if begun { self.legs.generates() } else { self.legs.computes() };
        // Whoever hands on what it has drains from the first.
        if (self.handed_on && !begun) || !own.is_some_and(LegGuard::drains) {
            return;
        }
        let now = Instant::now();
        if self.leaving.is_none_or(|told| now >= told + LEAVING_AGAIN) {
            self.leaving = Some(now);
            self.news.push_back(Progress::Leaving { begun });
        }
    }

    /// Something that an instance sent was not taken. Its leg has not ended, and is told to like every other.
    fn fail_flooded(&mut self, side: Side) {
        let flood = format!("{} floods the request with output that nobody asked for", side.instance());
        for choice in 0..self.choices.len() as u32 {
            let error = ApiError::new(ErrorCode::Internal, flood.clone());
            let commands = self.choices[choice as usize].machine.abort(error);
            if let Some(end) = self.perform(choice, commands, CancelReason::Flood) {
                self.failed.get_or_insert(side);
                self.news.push_back(Progress::of(choice, end));
            }
        }
    }

    /// Whose fault an error is that a leg ended with: an instance that reports a loss means its peer, however it is itself
    /// when that is read.
    fn failed_by(&self, side: Side, error: &ApiError) -> Side {
        let reported = cause::is_loss(error.code) && !self.lost.contains(&side);
        match side {
            Side::Prefill if reported => Side::Decode,
            Side::Decode if reported => Side::Prefill,
            side => side,
        }
    }

    fn look_at_timers(&mut self, context: &mut Context<'_>) {
        let late = self.deadline.has_passed(context);
        for choice in 0..self.choices.len() as u32 {
            let of = &mut self.choices[choice as usize];
            if !late && of.wait.is_none() {
                continue;
            }
            // Who is to blame if it fails: nobody for its deadline.
            let (commands, why, by) = if late {
                (of.machine.abort(deadline_passed()), CancelReason::Deadline, None)
            } else if let Some((wait, sleep)) = &mut of.wait
                && sleep.as_mut().poll(context).is_ready()
            {
                let wait = *wait;
                of.wait = None;
                match wait {
                    Wait::Linger => (of.machine.linger_over(), CancelReason::AnswerComplete, None),
                    Wait::Decode => {
                        (of.machine.decode_silent(), CancelReason::PrefillLost, Some(Side::Prefill))
                    }
                }
            } else {
                continue;
            };
            if let Some(end) = self.perform(choice, commands, why) {
                if let (Err(error), Some(side)) = (&end, by) {
                    let failed = self.failed_by(side, error);
                    self.failed.get_or_insert(failed);
                }
                self.news.push_back(Progress::of(choice, end));
            }
        }
    }

    /// `why`: what the machine wants cancelled is.
    fn perform(
        &mut self,
        choice: u32,
        commands: Vec<Command>,
        why: CancelReason,
    ) -> Option<Result<Completed, ApiError>> {
        let mut ended = None;
        for command in commands {
            match command {
                Command::Cancel(side) => {
                    if let Some(guard) = self.legs.of(side) {
                        guard.cancel(choice, why);
                    }
                }
                Command::CancelDamaged(side) => {
                    if let Some(guard) = self.legs.of(side) {
                        guard.cancel(choice, CancelReason::KvDamaged);
                    }
                }
                Command::Linger => self.wait_for(choice, Wait::Linger, LINGER),
                Command::AwaitDecode => self.wait_for(choice, Wait::Decode, DECODE_PATIENCE),
                Command::End(end) => ended = Some(end),
            }
        }
        if let Some(Err(error)) = &ended {
            let first_token = self.choices.iter().any(|choice| choice.machine.has_begun());
            if cause::is_of_the_link(error.code, first_token) {
                self.hold.link_failed();
            }
        }
        ended
    }

    /// The timer is set before [`Self::look_at_timers`] is reached, which polls it: nobody waits once a reader has seen enough.
    fn wait_for(&mut self, choice: u32, wait: Wait, time: Duration) {
        if let Some(choice) = self.choices.get_mut(choice as usize) {
            choice.wait = Some((wait, Box::pin(sleep_until(Instant::now() + time))));
        }
    }
}

#[cfg(test)]
mod tests;
