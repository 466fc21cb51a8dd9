//! Ends answers whose time is up although nobody reads them.
//!
//! An answer moves only while its client takes what is written, and so does its own clock: a client that holds its connection
//! open and gives no room would keep seat, legs, ledger and memory for ever. [`Overdue`], one task for all, looks after every
//! answer that [`crate::http`] has begun to write, and ends it some time after the request's deadline.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// After the deadline, for whoever does read: an answer then ends by itself, and its reader is woken.
const GRACE: Duration = Duration::from_secs(1);
/// How often all of them are looked at.
const EVERY: Duration = Duration::from_secs(1);

/// An answer that waits for its client to read it.
pub trait Unread: Send + Sync {
    /// Its time is up: it gives back all that it holds.
    fn expire(&self);
}

/// Every answer that is being written: of streamed ones as many at most as there are seats.
#[derive(Default)]
pub struct Overdue {
    held: Mutex<Vec<Held>>,
}

/// An answer and by when it is to be read.
struct Held {
    answer: Weak<dyn Unread>,
    by: Instant,
}

impl Overdue {
    /// Takes charge of an answer that is to be read by this deadline, for as long as somebody else holds it.
    pub fn watch<A: Unread + 'static>(&self, answer: &Arc<A>, deadline: Instant) {
        let answer: Weak<A> = Arc::downgrade(answer);
        self.held.lock().push(Held { answer, by: deadline + GRACE });
    }

    /// Runs until requests have drained.
    pub async fn run(&self, drained: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = drained.cancelled() => return,
                () = sleep(EVERY) => self.sweep(Instant::now()),
            }
        }
    }

    fn sweep(&self, now: Instant) {
        let mut due = Vec::new();
        self.held.lock().retain(|held| match held.answer.upgrade() {
            Some(answer) if held.by <= now => {
                due.push(answer);
                false
            }
            lives => lives.is_some(),
        });
        // Ended without the lock: it tells instances and gives back what it holds.
        due.iter().for_each(|answer| answer.expire());
    }
}
