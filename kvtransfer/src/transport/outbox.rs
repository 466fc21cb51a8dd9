//! Which transfer's slices go next to one peer: round robin over the transfers that have some, one frame each, so that
//! a long prompt does not hold a short one up. Those of the lowest priority number go first, but for every eighth frame,
//! which goes to whoever is next in line of the others: nobody starves.
//!
//! Fed by sender sessions (`Outbox::wake`), emptied by the transport's lanes. Holds each transfer at most once, so it is
//! bounded by the number of transfers.

use std::{
    collections::{BTreeMap, VecDeque},
    future::pending,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Departure, meter::Meter};
use crate::{
    peak::{Held, Peak},
    session::SliceRun,
    sync::{Mutex, step},
};

/// A handle on the slices waiting to go to one peer. Cheap to clone: one queue, whoever takes from it.
#[derive(Clone, Default)]
pub(crate) struct Outbox {
    queue: Arc<Queue>,
    meter: Option<Arc<Meter>>,
    /// Nothing more is taken by this handle and its clones.
    closed: CancellationToken,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting<Arc<dyn Departure>>>,
    woken: Notify,
    /// Runs that were sent.
    sent: AtomicU64,
    /// Of transfers in line.
    peak: Arc<Peak>,
}

impl Outbox {
    /// An empty one, which tells `peak` how many transfers are in line.
    pub(crate) fn counted_by(peak: Arc<Peak>) -> Self {
        Self { queue: Arc::new(Queue { peak, ..Queue::default() }), ..Self::default() }
    }

    /// The same, with what is taken by this handle told to `meter`.
    pub(super) fn observed_by(&self, meter: Arc<Meter>) -> Self {
        Self { meter: Some(meter), ..self.clone() }
    }

    /// Another handle on the same queue, closed on its own.
    pub(crate) fn another(&self) -> Self {
        Self { closed: CancellationToken::new(), ..self.clone() }
    }

    /// From now on nothing is taken by this handle and its clones. What they have taken stays theirs to report.
    pub(crate) fn close(&self) {
        let _none_is_taking = self.queue.waiting.lock();
        self.closed.cancel();
    }

    /// Runs sent so far, by whichever path.
    pub(crate) fn sent(&self) -> u64 {
        self.queue.sent.load(Ordering::Relaxed)
    }

    /// Whether both are of one queue.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.queue, &other.queue)
    }

    /// There is something to take from this transfer. Callable from any thread; never waits.
    pub(crate) fn wake(&self, departure: Arc<dyn Departure>) {
        if !departure.queued().swap(true, Ordering::AcqRel) {
            let in_line = {
                let mut waiting = self.queue.waiting.lock();
                waiting.push(departure.priority(), departure);
                waiting.count
            };
            self.queue.peak.saw(in_line);
            self.queue.woken.notify_one();
        }
    }

    /// Nothing more is to be taken from this transfer: it leaves the line. One that a lane has taken out already has nothing.
    pub(crate) fn forget(&self, departure: &dyn Departure) {
        if departure.queued().load(Ordering::Acquire) {
            self.queue.waiting.lock().remove(departure.priority(), |one| one.id() == departure.id());
        }
    }

    /// The next run to send, of at most `most` slices. Cancel safe.
    pub(crate) async fn next(&self, most: u32) -> Ticket {
        loop {
            if let Some(ticket) = self.try_next(most) {
                return ticket;
            }
            step();
            tokio::select! {
                biased;
                () = self.closed.cancelled() => {
                    self.queue.woken.notify_one(); // it may have been woken in place of another
                    pending::<()>().await;
                }
                () = self.queue.woken.notified() => {}
            }
        }
    }

    /// The transfers in line.
    #[cfg(all(test, feature = "explore"))]
    pub(crate) fn waiting(&self) -> Vec<baton_proto::TransferId> {
        self.queue.waiting.lock().lines.values().flatten().map(|departure| departure.id()).collect()
    }

    fn try_next(&self, most: u32) -> Option<Ticket> {
        loop {
            let mut waiting = self.queue.waiting.lock();
            if self.closed.is_cancelled() {
                return None;
            }
            let departure = waiting.pop()?;
            drop(waiting);
            // Cleared before taking: a wake from here on queues it again.
            departure.queued().store(false, Ordering::Release);
            let Some(run) = departure.take(most) else { continue };
            if departure.has_runs() {
                // Back to the end of the line, and on to another lane if one sleeps.
                self.wake(departure.clone());
            }
            let (queue, meter) = (self.queue.clone(), self.meter.clone());
            let held = meter.as_ref().map(|meter: &Arc<Meter>| meter.sending(run));
            return Some(Ticket { departure, run: Some(run), held, since: Instant::now(), queue, meter });
        }
    }
}

/// Every so many frames, one goes to those that are not first by priority.
const TURN: u32 = 8;

/// Who is in line, by priority. No line is empty.
struct Waiting<T> {
    lines: BTreeMap<i32, VecDeque<T>>,
    /// In all of them.
    count: u64,
    /// Frames since the others had theirs.
    first: u32,
    /// The priority whose turn it was then.
    turn: i32,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { lines: BTreeMap::new(), count: 0, first: 0, turn: i32::MIN }
    }
}

impl<T> Waiting<T> {
    fn push(&mut self, priority: i32, one: T) {
        self.lines.entry(priority).or_default().push_back(one);
        self.count += 1;
    }

    fn remove(&mut self, priority: i32, is_it: impl Fn(&T) -> bool) {
        let Some(line) = self.lines.get_mut(&priority) else { return };
        line.retain(|one| !is_it(one));
        if line.is_empty() {
            self.lines.remove(&priority);
        }
    }

    fn pop(&mut self) -> Option<T> {
        let (&best, _) = self.lines.first_key_value()?;
        let mut from = best;
        self.first += 1;
        if self.first >= TURN {
            self.first = 0;
            let mut after = self.lines.range((Bound::Excluded(self.turn.max(best)), Bound::Unbounded));
            let mut others = self.lines.range((Bound::Excluded(best), Bound::Unbounded));
            if let Some((&other, _)) = after.next().or_else(|| others.next()) {
                (from, self.turn) = (other, other);
            }
        }
        let line = self.lines.get_mut(&from)?;
        let one = line.pop_front();
        self.count -= 1;
        if line.is_empty() {
            self.lines.remove(&from);
        }
        one
    }
}

/// A run on its way out. Reported exactly once: dropping it unsent counts as failed.
pub(crate) struct Ticket {
    departure: Arc<dyn Departure>,
    run: Option<SliceRun>,
    /// Counts it among what is on its way out, until it is reported.
    held: Option<Held>,
    since: Instant,
    queue: Arc<Queue>,
    meter: Option<Arc<Meter>>,
}

impl Ticket {
    pub(crate) fn departure(&self) -> &Arc<dyn Departure> {
        &self.departure
    }

    /// The run, until it is reported.
    pub(crate) fn run(&self) -> SliceRun {
        self.run.unwrap_or(SliceRun { layer: 0, first: 0, count: 0 })
    }

    /// All of it is on its way.
    pub(crate) fn sent(mut self, sums: &[u32]) {
        if let Some(run) = self.run.take() {
            drop(self.held.take());
            self.queue.sent.fetch_add(1, Ordering::Relaxed);
            if let Some(meter) = &self.meter {
                meter.sent(self.departure.span(), run, self.since);
            }
            self.departure.sent(run, sums);
        }
    }

    /// It is not, or not wholly; its blocks are no longer read.
    pub(crate) fn failed(&mut self, why: &str) {
        if let Some(run) = self.run.take() {
            drop(self.held.take());
            if let Some(meter) = &self.meter {
                meter.interrupted(self.departure.span(), run, self.since);
            }
            self.departure.failed(run, why);
        }
    }

    /// Whether it has been reported.
    pub(crate) fn settled(&self) -> bool {
        self.run.is_none()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.failed("the data connection was given up");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_goes_first_in_turns_and_the_others_get_every_eighth_frame() {
        let mut waiting = Waiting::default();
        for (priority, name) in [(5, 'x'), (0, 'a'), (9, 'y'), (0, 'b')] {
            waiting.push(priority, name);
        }
        let priority = |name| match name {
            'a' | 'b' => 0,
            'x' => 5,
            _ => 9,
        };
        let mut order = String::new();
        for _ in 0..32 {
            let next = waiting.pop().expect("someone is in line");
            order.push(next);
            waiting.push(priority(next), next);
        }
        assert_eq!(order, "abababaxbabababyabababaxbabababy");
    }

    #[test]
    fn who_is_taken_out_of_line_leaves_the_others_as_they_were() {
        let mut waiting = Waiting::default();
        for (priority, name) in [(0, 'a'), (0, 'b'), (3, 'x'), (0, 'c')] {
            waiting.push(priority, name);
        }
        waiting.remove(0, |one| *one == 'b');
        waiting.remove(0, |one| *one == 'x');
        waiting.remove(3, |one| *one == 'x');
        waiting.remove(7, |_| true);
        assert_eq!([(); 3].map(|()| waiting.pop()), [Some('a'), Some('c'), None]);
    }

    #[test]
    fn whoever_is_alone_has_it_all() {
        let mut waiting = Waiting::default();
        assert_eq!(waiting.pop(), None);
        for round in 0..20 {
            waiting.push(3, round);
            assert_eq!(waiting.pop(), Some(round));
        }
        assert_eq!(waiting.pop(), None);
    }
}
