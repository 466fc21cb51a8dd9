//! One rail's share of a read: requests go to the device as its queue has room, until all have completed.

use std::{io, time::Instant};

use super::{
    completion::Patience,
    parameters::Window,
    queue_pair::{BATCH, QueuePair},
    stripe::Chunk,
};

/// One request in this many is reported when it succeeds (those that fail are all reported): as a queue completes in
/// order, it stands for those before it.
const SIGNAL_EVERY: u64 = BATCH as u64;

/// A connected queue pair and what it reads from.
pub(super) struct Rail {
    pub(super) name: String,
    pub(super) pair: QueuePair,
    pub(super) window: Window,
    /// Most requests at a time; at least [`SIGNAL_EVERY`], or a full queue could be silent for ever.
    pub(super) depth: usize,
}

/// A rail's share of one read.
pub(super) struct Share {
    chunks: Vec<Chunk>,
    posted: usize,
    done: usize,
}

impl Share {
    pub(super) fn new(chunks: Vec<Chunk>) -> Self {
        Self { chunks, posted: 0, done: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.done == self.chunks.len()
    }
}

impl Rail {
    /// The smallest queue that works.
    pub(super) const MIN_DEPTH: u32 = SIGNAL_EVERY as u32;

    /// Does what can be done without waiting; false if that was nothing.
    pub(super) fn advance(&mut self, share: &mut Share) -> io::Result<bool> {
        let posted = self.post(share)?;
        Ok(self.poll(share)? || posted)
    }

    fn post(&mut self, share: &mut Share) -> io::Result<bool> {
        let before = share.posted;
        let last = share.chunks.len().saturating_sub(1) as u64;
        loop {
            let room = self.depth.saturating_sub(share.posted - share.done).min(BATCH);
            let batch = &share.chunks[share.posted..];
            let batch = &batch[..batch.len().min(room)];
            if batch.is_empty() {
                return Ok(share.posted > before);
            }
            // Counted before they are posted: of a batch that is refused, some may be on the way.
            let first = share.posted as u64;
            share.posted += batch.len();
            self.pair
                .post_reads(batch, &self.window, first, |id| id == last || (id + 1) % SIGNAL_EVERY == 0)
                .map_err(|error| io::Error::new(error.kind(), format!("rail {}: {error}", self.name)))?;
        }
    }

    fn poll(&mut self, share: &mut Share) -> io::Result<bool> {
        let mut failure = None;
        let count = self.pair.completions().poll(|id, outcome| {
            let done = usize::try_from(id).unwrap_or(usize::MAX).saturating_add(1);
            share.done = share.done.max(done).min(share.posted);
            if let Err(why) = outcome {
                failure.get_or_insert(why);
            }
        })?;
        match failure {
            Some(why) => Err(io::Error::other(format!("rail {}: a read failed: {why}", self.name))),
            None => Ok(count > 0),
        }
    }

    /// Ends the connection, and waits a little for the requests on the way to be given up. That they have been is sure
    /// only once the queue pair is dropped.
    pub(super) fn give_up(&mut self, share: &mut Share, deadline: Instant) {
        if let Err(error) = self.pair.fail() {
            tracing::debug!(rail = self.name, %error, "the queue pair does not take an error");
        }
        let mut patience = Patience::default();
        while share.done < share.posted && Instant::now() < deadline {
            let _ = self.poll(share); // an error stands for requests that have been given up, which is what is waited for
            patience.wait(deadline);
        }
    }
}
