//! What a transfer is allowed to do: the two session machines, pure.
//!
//! Offered -> Accepted -> Moving -> Sealed -> Released | Aborted, on either side. Events come in as calls that carry the
//! time; commands go out as a list that the node's shell performs. The machines own every decision: what is legal, when
//! a lease has run out, when the slices are complete, when nothing touches the blocks any more.

mod cut;
mod receiver;
mod sender;
mod slices;
mod slots;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

pub(crate) use cut::Cut;
pub(crate) use receiver::{
    Expectation, OfferTerms, Receiver, ReceiverCommand, ReceiverState, ReceiverTiming, SealTerms,
};
pub(crate) use sender::{Sender, SenderCommand, SenderTerms};
pub(crate) use slices::{Claim, Crc32c, Shape, SliceRun, Tally, crc32c};

/// Signs of life: when the peer was last heard, and when it must hear from here again. It binds a peer that can be heard:
/// a sealed sender without a control stream waits for the next one, until its deadline.
#[derive(Debug, Clone)]
#[cfg_attr(test, derive(Hash))]
struct Lease {
    length: Duration,
    heard: Instant,
    renew_at: Instant,
}

impl Lease {
    fn new(now: Instant, length: Duration) -> Self {
        Self { length, heard: now, renew_at: now + length / 3 }
    }

    /// Takes over the length that both sides agreed on.
    fn agree(&mut self, now: Instant, length: Duration) {
        *self = Self::new(now, length);
    }

    fn heard(&mut self, now: Instant) {
        self.heard = self.heard.max(now);
    }

    /// How long the peer has been silent, if that is longer than the lease.
    fn expired(&self, now: Instant) -> Option<Duration> {
        let silent = now.saturating_duration_since(self.heard);
        (silent >= self.length).then_some(silent)
    }

    /// Whether a peer that has a lease to renew, and says nothing at all for so long, cannot be heard: it has missed two
    /// signs of life at least.
    fn is_silence(&self, time: Duration) -> bool {
        time >= self.length * 2 / 3
    }

    /// Whether a sign of life is due; if so, the next one is scheduled.
    fn renewal_due(&mut self, now: Instant) -> bool {
        let due = now >= self.renew_at;
        if due {
            self.renew_at = now + self.length / 3;
        }
        due
    }
}
