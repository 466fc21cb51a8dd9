//! One Attach stream to one instance: the handle through which requests use it, and the [`task`] that keeps it up.
//!
//! Started and stopped by [`crate::fleet::keeper`]. States: *down* -> connecting -> *up* (Welcome has come, and a load) -> down, with
//! a growing pause between attempts. While it is up, legs are dispatched over it and every message of the instance is
//! handed to the mailboxes of the legs in it, or to the board. When it breaks, every leg on it fails with
//! `instance_lost`; the instance cancels them on its side.
//!
//! An instance that does not get on is suspect: see [`stuck`]. What is to be sent waits in [`super::outbound`]; a dispatch
//! that finds no room there is refused. An instance that reads nothing of it for [`UNREAD_MOST`] is as good as lost: its
//! stream is cut, which cancels everything on it. What comes is read at once where it can be ([`super::inline`]).

mod reason;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod standing;
mod stuck;
mod target;
mod task;

use std::{
    cmp::Reverse,
    collections::HashMap,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_process::prefetch::prefetch;
use baton_proto::{ApiError, ErrorCode, InstanceId, LegId, v1};
use baton_schedule::{
    Side,
    board::{Credit, LegNews},
};
use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::time::Instant;
use v1::attach_request::Frame as Ask;

use super::{
    cancel::CancelReason,
    guard::{Choices, LegGuard, first_choices, only},
    inline,
    leg::Output,
    mailbox::Mailbox,
    outbound::Outbound,
};
use crate::{config::CHOICES_MOST, metrics::Metrics};
pub use reason::not_there;
pub use target::Target;
pub use task::AttachTask;

/// How long an instance may read nothing though something waits: longer than its engine takes for a long step, during
/// which it may stop reading.
const UNREAD_MOST: Duration = Duration::from_secs(30);

/// A leg waiting for output.
struct Slot {
    side: Side,
    mailbox: Arc<Mailbox>,
    /// Choices that have not ended.
    open: Choices,
    /// It has brought a token.
    begun: bool,
    sent: Instant,
}

/// Numbers of legs are this coordinator's own: nobody chooses them so that they fall together.
type Slots = HashMap<LegId, Slot, RandomState>;

/// A stream that stands, and the legs that go by it.
struct Up {
    outbound: Outbound,
    legs: Slots,
}

impl Up {
    /// Has the processor fetch the boxes of some legs, and then what lies in them.
    fn prefetch(&self, outputs: &[v1::LegOutput]) {
        let boxes = || outputs.iter().filter_map(|output| self.legs.get(&LegId(output.leg)));
        boxes().for_each(|slot| prefetch(&*slot.mailbox));
        boxes().for_each(|slot| slot.mailbox.prefetch());
    }

    /// Hands an output to its leg.
    fn deliver(&mut self, output: v1::LegOutput, news: &mut Vec<LegNews>) {
        let leg = LegId(output.leg);
        let slot = self.legs.get_mut(&leg);
        // The ledger knows cancelled legs for as long as the instance works on them.
        if slot.as_ref().is_none_or(|slot| !slot.begun) && !output.tokens.is_empty() {
            news.push(LegNews::Prefilled(leg));
        }
        if output.end.is_some() {
            news.push(LegNews::ChoiceEnded(leg));
        }
        // What is not there was cancelled, and the instance had not read that yet.
        let Some(slot) = slot.filter(|slot| slot.open & only(output.choice) != 0) else { return };
        slot.begun |= !output.tokens.is_empty();
        if output.end.is_some() {
            slot.open &= !only(output.choice);
        }
        let over = slot.open == 0;
        slot.mailbox.deliver(slot.side, Output::from(output));
        if over {
            self.legs.remove(&leg);
        }
    }
}

/// Handle to the stream of one instance.
pub struct Attachment {
    instance: InstanceId,
    /// Of all attachments: an instance that is forgotten and comes again is sent none that is still known of before.
    legs: Arc<AtomicU64>,
    /// `None` while down.
    stream: Mutex<Option<Up>>,
    /// The instance does not get on, though the stream may stand.
    stuck: AtomicBool,
    /// It is about to stop what it does.
    drains: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Attachment {
    /// `legs` counts the legs of all attachments.
    pub fn new(instance: InstanceId, legs: Arc<AtomicU64>, metrics: Arc<Metrics>) -> Arc<Self> {
        let (stuck, drains) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { instance, legs, stream: Mutex::new(None), stuck, drains, metrics })
    }

    /// Sends one leg of so many choices; its output goes to `mailbox` until the guard is dropped. An error: nothing was sent.
    pub fn dispatch(
        self: &Arc<Self>,
        side: Side,
        choices: u32,
        mailbox: &Arc<Mailbox>,
        credit: &mut Credit,
        mut dispatch: v1::Dispatch,
    ) -> Result<LegGuard, ApiError> {
        let mut stream = self.stream.lock();
        let Some(up) = stream.as_mut() else {
            return Err(not_there(&self.instance));
        };
        if !up.outbound.has_room() {
            let message = format!("instance {} takes no requests now; try again in a moment", self.instance);
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
        // Under the lock, so that legs leave in the order of their numbers, and are on the ledger before a load counts them.
        let leg = LegId(self.legs.fetch_add(1, Ordering::Relaxed) + 1);
        dispatch.leg = leg.0;
        let open = first_choices(choices);
        credit.dispatched(side, leg, open.count_ones());
        up.outbound.push(Ask::Dispatch(dispatch));
        let sent = Instant::now();
        up.legs.insert(leg, Slot { side, mailbox: mailbox.clone(), open, begun: false, sent });
        Ok(LegGuard::new(self.clone(), leg, open))
    }

    /// Cancels choices of a leg; those that have ended are let be.
    pub(super) fn cancel(&self, leg: LegId, choices: Choices, reason: CancelReason) {
        let mut stream = self.stream.lock();
        let Some(up) = stream.as_mut() else { return };
        let Some(slot) = up.legs.get_mut(&leg) else { return };
        let choices = choices & slot.open;
        slot.open &= !choices;
        let choice = match (choices, slot.open) {
            (0, _) => return,
            (_, 0) => None,
            (choices, _) => Some(choices.trailing_zeros()),
        };
        let (instance, side, why) = (&self.instance, slot.side.name(), reason.name());
        tracing::debug!(%instance, %leg, side, ?choice, reason = why, "cancelling");
        if choice.is_none() {
            up.legs.remove(&leg);
            self.metrics.cancels.get_or_create(&crate::metrics::reason(why)).inc();
        }
        let damaged = reason == CancelReason::KvDamaged;
        up.outbound.push(Ask::Cancel(v1::Cancel { leg: leg.0, reason: why.into(), choice, damaged }));
    }

    /// All on an instance that begins to drain look whether they had better leave it.
    fn wake_all(&self) {
        self.wake(|_| true);
    }

    /// The same of those whose prompts wait there.
    fn wake_waiting(&self) {
        self.wake(|slot| !slot.begun && slot.side != Side::Decode);
    }

    /// Whoever came last first: the queue is the shorter for the others.
    fn wake(&self, who: impl Fn(&Slot) -> bool) {
        let stream = self.stream.lock();
        let legs = stream.iter().flat_map(|up| &up.legs);
        let mut woken: Vec<_> = legs.filter(|(_, slot)| who(slot)).collect();
        woken.sort_unstable_by_key(|(leg, _)| Reverse(**leg));
        woken.iter().for_each(|(_, slot)| slot.mailbox.wake());
    }

    /// Whether the instance does not read what it is sent.
    fn is_deaf(&self) -> bool {
        let stream = self.stream.lock();
        stream.as_ref().is_some_and(|up| up.outbound.unread_for(Instant::now()) > UNREAD_MOST)
    }

    /// Whether the stream stands.
    pub fn is_up(&self) -> bool {
        self.stream.lock().is_some()
    }

    /// Hands a step's outputs to their legs. What the ledger is to know of them.
    fn deliver(&self, mut step: v1::StepOutput) -> Vec<LegNews> {
        let mut news = Vec::new();
        let mut stream = self.stream.lock();
        let Some(up) = stream.as_mut() else { return news };
        for few in step.legs.chunks_mut(inline::FEW) {
            up.prefetch(few);
            few.iter_mut().for_each(|output| up.deliver(mem::take(output), &mut news));
        }
        news
    }

    /// The stream is gone: every leg on it fails. False: there was none.
    fn break_off(&self) -> bool {
        let Some(up) = self.stream.lock().take() else { return false };
        let message =
            format!("the connection to instance {} was lost; send the request again", self.instance);
        self.lose(up.legs, &ApiError::new(ErrorCode::InstanceLost, message));
        true
    }

    fn lose(&self, legs: Slots, error: &ApiError) {
        self.metrics.legs_lost.inc_by(legs.len() as u64);
        for slot in legs.into_values() {
            for choice in (0..CHOICES_MOST).filter(|&choice| slot.open & only(choice) != 0) {
                slot.mailbox.deliver(slot.side, Output { choice, ..Output::lost(error.clone()) });
            }
        }
    }
}

#[cfg(test)]
mod tests;
