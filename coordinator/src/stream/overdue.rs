//! Ends answers whose time is up although nobody reads them.
//!
//! A streamed answer moves only while its client takes what is written, and so does its own clock: a client that holds
//! its connection open and gives no room would keep seat, legs and ledger for ever. [`crate::http`] therefore reads an
//! answer out of a cell that [`Overdue`], one task for all, empties some time after the request's deadline.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::Streaming;

/// After the deadline, for whoever does read: an answer then ends by itself, and its reader is woken.
const GRACE: Duration = Duration::from_secs(1);
/// How often all of them are looked at.
const EVERY: Duration = Duration::from_secs(1);

/// An answer on its way, until it has ended or was taken away.
pub type AnswerCell = Arc<Mutex<Option<Streaming>>>;

/// Every streamed answer there is: as many at most as there are seats.
#[derive(Default)]
pub struct Overdue {
    held: Mutex<Vec<Held>>,
}

/// An answer and by when it is to be read.
struct Held {
    cell: Weak<Mutex<Option<Streaming>>>,
    by: Instant,
}

impl Overdue {
    /// Takes charge of an answer's deadline.
    pub fn hold(&self, streaming: Streaming) -> AnswerCell {
        let deadline = streaming.deadline();
        let cell = Arc::new(Mutex::new(Some(streaming)));
        if let Some(deadline) = deadline {
            self.held.lock().push(Held { cell: Arc::downgrade(&cell), by: deadline + GRACE });
        }
        cell
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
        self.held.lock().retain(|held| match held.cell.upgrade() {
            Some(cell) if held.by <= now => {
                due.push(cell);
                false
            }
            lives => lives.is_some(),
        });
        for cell in due {
            // Ended without the lock: it tells instances and gives back what it holds.
            let unread = cell.lock().take();
            if let Some(unread) = unread {
                unread.expire();
            }
        }
    }
}
