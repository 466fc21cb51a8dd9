//! Whether an instance gets on, as far as its stream shows. Pure: time is an argument.
//!
//! Told by an attachment ([`super::attachment`]) all that the instance says, and asked several times a second. An instance is *stuck*
//! - if it has work and its count of layers and steps stands still, or a leg was sent to it that its engine has not taken
//!   in, for longer than eight times what such a thing takes there and than the least that is allowed. A long prompt is
//!   computed layer by layer, each of which counts: who is slow gets on all the same. Or
//! - if it has said nothing at all for the least that is allowed, though every second a load is due, and has not answered
//!   when it was asked meanwhile: its process is frozen, or what lies between.
//!
//! States: *well* -> *stuck*, which is told once, and again after as long, for what was sent there meanwhile -> well, as
//! soon as it gets on. Who asks seldom has been held up itself, and knows nothing of the time before.

use std::time::Duration;

use baton_proto::{LegId, v1};
use tokio::time::Instant;

/// How often it is to be asked.
pub const LOOK: Duration = Duration::from_millis(250);
/// Whoever asks again only after so long was held up itself.
const HELD_UP: Duration = Duration::from_secs(1);
/// So many times what is usual is too long.
const TIMES: u32 = 8;
/// Nobody is waited for longer, however slow.
const PATIENCE_MOST: Duration = Duration::from_secs(60);
/// Loads, and with them the count, come as seldom as this.
const BEAT: Duration = Duration::from_secs(1);
/// What was the longest that the count stood still is half of that after so long.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// How an instance fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Well,
    /// Nothing was heard for long: it is to be asked whether it is there, and [`Stall::heard`] told if it answers.
    Ask,
    /// It has become stuck, or is so still and has been given more: what it has is to go on elsewhere.
    Stuck(Why),
    /// It is stuck still.
    StillStuck,
}

/// How it shows that an instance is stuck; for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    #[error("it has work and has computed nothing for {0:.1?}")]
    Idles(Duration),
    #[error("it has said nothing for {0:.1?} and does not answer")]
    Silent(Duration),
}

/// One stream to one instance. See the module.
#[derive(Debug)]
pub struct Stall {
    /// Nobody is taken to be stuck sooner.
    least: Duration,
    /// When it said anything last, and whether it was asked since.
    heard: Instant,
    asked: bool,
    /// Since when its count stands still, or it has work.
    still: Instant,
    /// What it last said; none if it does not say what is needed, being of an earlier version.
    said: Option<Said>,
    /// How long the count stood still at the longest, beyond what loads are apart, and when that was.
    longest: (Duration, Instant),
    looked: Instant,
    /// Since when it is stuck, or was told to be so last.
    stuck: Option<Instant>,
    /// The last leg that was taken from it unseen, and since when it was waited for: until it says to have seen that, or
    /// brings anything, it is stuck still, though nothing waits for it any more.
    owed: Option<(LegId, Instant)>,
}

#[derive(Debug, Clone, Copy)]
struct Said {
    progress: u64,
    at_work: bool,
    seen: LegId,
    /// The mean of a decode step.
    step: Duration,
}

impl Stall {
    /// Of a stream that stands from now on.
    pub fn new(least: Duration, now: Instant) -> Self {
        Self {
            least,
            heard: now,
            asked: false,
            still: now,
            said: None,
            longest: (Duration::ZERO, now),
            looked: now,
            stuck: None,
            owed: None,
        }
    }

    /// It has said something, or answered.
    pub fn heard(&mut self, now: Instant) {
        (self.heard, self.asked) = (now, false);
    }

    /// It has brought output of a leg.
    pub fn output(&mut self, now: Instant) {
        self.heard(now);
        self.still = now;
        self.owed = None;
    }

    /// Its legs have been taken from it, of which this was the last; those that it has not seen were first sent at `unseen`.
    pub fn gave_up(&mut self, last: LegId, unseen: Option<Instant>) {
        if let Some(sent) = unseen {
            self.owed = Some((last, self.owed.map_or(sent, |(_, since)| since)));
        }
    }

    /// It has told its load.
    pub fn load(&mut self, load: &v1::InstanceLoad, now: Instant) {
        self.heard(now);
        let transfers = load.incoming_transfers > 0 || load.outgoing_transfers > 0;
        let said = load.seen_leg.map(|seen| Said {
            progress: load.progress,
            // What waits for a cache, or for blocks that a transfer holds, waits for others.
            at_work: load.running_sequences > 0 || (load.queued_prefill_tokens > 0 && !transfers),
            seen: LegId(seen),
            step: Duration::from_micros(load.decode_step_micros),
        });
        let before = std::mem::replace(&mut self.said, said);
        match (before, said) {
            (Some(before), Some(said))
                if (before.at_work, before.progress) == (said.at_work, said.progress) => {}
            (Some(Said { at_work: true, .. }), _) => {
                let stood = now.saturating_duration_since(self.still).saturating_sub(BEAT);
                if stood >= self.longest(now) {
                    self.longest = (stood, now);
                }
                self.still = now;
            }
            _ => self.still = now,
        }
        let got_on = before.zip(said).is_some_and(|(before, said)| before.progress != said.progress);
        if got_on || said.is_none_or(|said| self.owed.is_some_and(|(last, _)| said.seen >= last)) {
            self.owed = None;
        }
    }

    fn longest(&self, now: Instant) -> Duration {
        let (longest, at) = self.longest;
        let halves = now.saturating_duration_since(at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        longest.mul_f64(0.5f64.powf(halves))
    }

    /// How long it may stand still.
    fn patience(&self, now: Instant) -> Duration {
        let step = self.said.map_or(Duration::ZERO, |said| said.step);
        step.max(self.longest(now)).saturating_mul(TIMES).min(PATIENCE_MOST).max(self.least)
    }

    /// The last of the legs on the stream that it has said to have taken in; none: it does not say.
    pub fn seen(&self) -> Option<LegId> {
        self.said.map(|said| said.seen)
    }

    /// To be asked every [`LOOK`]. `unseen`: when the first of the legs after [`Self::seen`] was sent that are wanted still.
    pub fn look(&mut self, unseen: Option<Instant>, now: Instant) -> Verdict {
        if now.saturating_duration_since(std::mem::replace(&mut self.looked, now)) > HELD_UP {
            (self.still, self.heard, self.asked) = (now, now, false);
        }
        let owed = self.owed.map(|(_, since)| since);
        let Some(why) = self.why(unseen.into_iter().chain(owed).min(), now) else {
            self.stuck = None;
            let silent = now.saturating_duration_since(self.heard);
            if self.asked || silent * 3 < self.least * 2 {
                return Verdict::Well;
            }
            self.asked = true;
            return Verdict::Ask;
        };
        let patience = self.patience(now);
        match self.stuck {
            Some(told) if now.saturating_duration_since(told) < patience => Verdict::StillStuck,
            _ => {
                self.stuck = Some(now);
                Verdict::Stuck(why)
            }
        }
    }

    fn why(&self, unseen: Option<Instant>, now: Instant) -> Option<Why> {
        let silent = now.saturating_duration_since(self.heard);
        if self.asked && silent > self.least {
            return Some(Why::Silent(silent));
        }
        let at_work = self.said?.at_work.then_some(self.still);
        let since = at_work.or(unseen.map(|sent| sent.max(self.still)))?;
        let idle = now.saturating_duration_since(since);
        (idle > self.patience(now)).then_some(Why::Idles(idle))
    }
}

#[cfg(test)]
mod tests;
