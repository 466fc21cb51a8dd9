//! Has answers go on that nobody reads, and ends those whose time is up.
//!
//! An answer moves by itself only while its client takes what is written: of a client that holds its connection open and gives
//! no room nothing would be counted, no instance would be told to stop or be left, and it would keep seat, legs, ledger and
//! memory for ever. [`Overdue`], one task for all, looks after every answer that [`crate::http`] has begun to write, moves it
//! now and then, and ends it some time after the request's deadline.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    task::coop::consume_budget,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

/// After the deadline, for whoever does read: an answer then ends by itself, and its reader is woken.
const GRACE: Duration = Duration::from_secs(1);
/// How often all of them are looked at.
const EVERY: Duration = Duration::from_secs(1);

/// An answer that waits for its client to read it.
pub trait Unread: Send + Sync {
    /// Takes in what has come, if nobody else does. What is complete has nothing to take in.
    fn advance(self: Arc<Self>) {}

    /// Its time is up: it gives back all that it holds.
    fn expire(&self);
}

/// Every answer that is being written. Those that have ended, and given their seats back, are let go with their bodies, of which
/// connections have only so many.
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
                () = sleep(EVERY) => self.sweep(Instant::now()).await,
            }
        }
    }

    async fn sweep(&self, now: Instant) {
        let (mut due, mut others) = (Vec::new(), Vec::new());
        self.held.lock().retain(|held| {
            let (answer, is_due) = (held.answer.upgrade(), held.by <= now);
            let lives = answer.is_some();
            if is_due { &mut due } else { &mut others }.extend(answer);
            lives && !is_due
        });
        // Without the lock: either tells instances, and gives back what is held.
        due.iter().for_each(|answer| answer.expire());
        for answer in others {
            answer.advance();
            consume_budget().await;
        }
    }
}
