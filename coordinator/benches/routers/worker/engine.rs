//! The step that all sequences share, whichever kind of instance they are on.
//!
//! Every step brings each sequence one token. Paced, there is a step every so often, and those that were missed are left
//! out, as by an engine that has been slow; unpaced, the next begins once everybody had a turn to send what the last brought.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::yield_now,
    time::{Instant, sleep_until},
};

use crate::protocol::Pace;

/// What a step is done with.
pub(crate) trait Sequence: Send {
    /// Takes one token. False: that was the last, or nobody wants it.
    fn step(&mut self) -> bool;
}

/// See the module.
#[derive(Default)]
pub(crate) struct Engine {
    sequences: Mutex<HashMap<u64, Box<dyn Sequence>>>,
    next: Mutex<u64>,
    /// There is something to step.
    filled: Notify,
}

impl Engine {
    /// Joins with the next step.
    pub(crate) fn add(&self, sequence: Box<dyn Sequence>) -> u64 {
        let id = {
            let mut next = self.next.lock();
            *next += 1;
            *next
        };
        self.sequences.lock().insert(id, sequence);
        self.filled.notify_one();
        id
    }

    pub(crate) fn remove(&self, id: u64) {
        self.sequences.lock().remove(&id);
    }

    pub(crate) async fn run(self: Arc<Self>, mut pace: watch::Receiver<Pace>) {
        let mut due = Instant::now();
        loop {
            let step = Duration::from_micros(pace.borrow_and_update().step_micros);
            if self.sequences.lock().is_empty() {
                self.filled.notified().await;
                continue;
            }
            if step.is_zero() {
                yield_now().await;
            } else {
                let now = Instant::now();
                while due <= now {
                    due += step;
                }
                sleep_until(due).await;
            }
            self.sequences.lock().retain(|_, sequence| sequence.step());
        }
    }
}
