//! Which transfer's slices go next to one peer: round robin over the transfers that have some, one frame each, so that
//! a long prompt does not hold a short one up.
//!
//! Fed by sender sessions (`Outbox::wake`), emptied by the transport's lanes. Holds each transfer at most once, so it is
//! bounded by the number of transfers.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::Notify;

use super::{Departure, observed::Counts};
use crate::{
    session::SliceRun,
    sync::{Mutex, step},
};

/// The slices waiting to go to one peer. Cheap to clone: one queue, whoever takes from it.
#[derive(Clone, Default)]
pub(crate) struct Outbox {
    queue: Arc<Queue>,
    counts: Option<Arc<Counts>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Arc<dyn Departure>>>,
    woken: Notify,
}

impl Outbox {
    /// The same, with what is taken by this handle counted.
    pub(super) fn counted_by(&self, counts: Arc<Counts>) -> Self {
        Self { queue: self.queue.clone(), counts: Some(counts) }
    }

    /// Whether both are of one queue.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.queue, &other.queue)
    }

    /// There is something to take from this transfer. Callable from any thread; never waits.
    pub(crate) fn wake(&self, departure: Arc<dyn Departure>) {
        if !departure.queued().swap(true, Ordering::AcqRel) {
            self.queue.waiting.lock().push_back(departure);
            self.queue.woken.notify_one();
        }
    }

    /// The next run to send, of at most `most` slices. Cancel safe.
    pub(crate) async fn next(&self, most: u32) -> Ticket {
        loop {
            if let Some(ticket) = self.try_next(most) {
                return ticket;
            }
            step();
            self.queue.woken.notified().await;
        }
    }

    /// The transfers in line.
    #[cfg(all(test, feature = "explore"))]
    pub(crate) fn waiting(&self) -> Vec<baton_proto::TransferId> {
        self.queue.waiting.lock().iter().map(|departure| departure.id()).collect()
    }

    fn try_next(&self, most: u32) -> Option<Ticket> {
        loop {
            let departure = self.queue.waiting.lock().pop_front()?;
            // Cleared before taking: a wake from here on queues it again.
            departure.queued().store(false, Ordering::Release);
            let Some(run) = departure.take(most) else { continue };
            if departure.has_runs() {
                // Back to the end of the line, and on to another lane if one sleeps.
                self.wake(departure.clone());
            }
            return Some(Ticket { departure, run: Some(run), counts: self.counts.clone() });
        }
    }
}

/// A run on its way out. Reported exactly once: dropping it unsent counts as failed.
pub(crate) struct Ticket {
    departure: Arc<dyn Departure>,
    run: Option<SliceRun>,
    counts: Option<Arc<Counts>>,
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
            self.counts.iter().for_each(|counts| counts.sent(run));
            self.departure.sent(run, sums);
        }
    }

    /// It is not, or not wholly; its blocks are no longer read.
    pub(crate) fn failed(&mut self, why: &str) {
        if let Some(run) = self.run.take() {
            self.counts.iter().for_each(|counts| counts.not_sent());
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
