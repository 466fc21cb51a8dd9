//! What one instance's reports tell of how it does: faded sums of what failed and what did not, and when it last got on.
//!
//! Instances count since they started; the difference between two reports is what happened between them. A report of
//! another start, or of counts that went back, begins anew. Pure; [`super`] compares instances with each other.

use std::time::Duration;

use baton_proto::{Incarnation, InstanceLoad, Phase};
use tokio::time::Instant;

use crate::{fleet::Beat, steps::Steps};

/// After this long what failed, or did not, has lost all but 1/e of its weight.
const FADING: Duration = Duration::from_secs(60);
/// Fewer failures than this, faded ones in part, say nothing.
const FEWEST_FAILURES: f64 = 5.0;
/// More reports than this, faded ones in part, must tell of failures: one fault that ends a whole batch is one fault.
const MORE_REPORTS: f64 = 2.0;
/// A step time that is older than this says nothing of how fast the instance is now.
const FRESH: Duration = Duration::from_secs(10);

/// Of things that can fail.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Share {
    failed: f64,
    whole: f64,
    /// With failures in them.
    reports: f64,
}

impl Share {
    pub(super) fn add(&mut self, failed: u64, whole: u64) {
        self.failed += failed as f64;
        self.whole += whole as f64;
        self.reports += f64::from(u8::from(failed > 0));
    }

    /// To be called before more is added at `now`; something was last added at `last`.
    pub(super) fn fade_since(&mut self, last: Instant, now: Instant) {
        let fade = fade(last, now);
        [&mut self.failed, &mut self.whole, &mut self.reports].into_iter().for_each(|sum| *sum *= fade);
    }

    /// How much of it failed, 0 to 1, if so much is known that it tells something. Something was last added at `last`.
    pub(super) fn known(&self, last: Instant, now: Instant) -> Option<f64> {
        let fade = fade(last, now);
        let enough = self.failed * fade >= FEWEST_FAILURES && self.reports * fade > MORE_REPORTS;
        enough.then(|| self.failed / (self.failed + self.whole))
    }

    /// The same for a comparison with others, for which half as many failures are enough; 0 while there are fewer.
    pub(super) fn compared(&self, last: Instant, now: Instant) -> f64 {
        let enough = self.failed * fade(last, now) >= FEWEST_FAILURES / 2.0;
        if enough { self.failed / (self.failed + self.whole) } else { 0.0 }
    }

    /// How many things it tells of, faded ones in part.
    pub(super) fn weight(&self, last: Instant, now: Instant) -> f64 {
        (self.failed + self.whole) * fade(last, now)
    }
}

/// What is left of the weight of something at `last`.
fn fade(last: Instant, now: Instant) -> f64 {
    (-now.saturating_duration_since(last).as_secs_f64() / FADING.as_secs_f64()).exp()
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Signals {
    incarnation: Incarnation,
    pub(super) beat: Beat,
    /// Of the last report.
    pub(super) at: Instant,
    requests: Share,
    transfers: Share,
    /// When it last told of decode steps, and which.
    steps: Option<(Instant, Steps)>,
    /// When it last got on, or had nothing to do.
    moved: Instant,
}

impl Signals {
    pub(super) fn new(now: Instant, incarnation: Incarnation, beat: &Beat) -> Self {
        Self {
            incarnation,
            beat: *beat,
            at: now,
            requests: Share::default(),
            transfers: Share::default(),
            steps: None,
            moved: now,
        }
    }

    /// Takes a report in.
    pub(super) fn observe(&mut self, now: Instant, incarnation: Incarnation, beat: &Beat) {
        let (before, after) = (self.beat.load, beat.load);
        if incarnation != self.incarnation || counts(&after).iter().zip(counts(&before)).any(|(a, b)| *a < b)
        {
            *self = Self::new(now, incarnation, beat);
            return;
        }
        for share in [&mut self.requests, &mut self.transfers] {
            share.fade_since(self.at, now);
        }
        let more = |of: fn(&InstanceLoad) -> u64| of(&after) - of(&before);
        // A request is prefilled here, or finished here, or both.
        let served = more(|load| load.prefilled_requests).max(more(|load| load.finished_requests));
        self.requests.add(more(|load| load.failed_requests), served);
        // What an instance says it has counted may be anything.
        let both = |out, into| more(out).saturating_add(more(into));
        let broken = both(|load| load.failed_transfers_out, |load| load.failed_transfers_in);
        let handed = both(|load| load.finished_transfers_out, |load| load.finished_transfers_in);
        self.transfers.add(broken, handed);
        if let Some(steps) = Steps::between(&before, &after) {
            self.steps = Some((now, steps));
        }
        if counts(&after) != counts(&before) || !is_at_work(beat) {
            self.moved = now;
        }
        (self.beat, self.at) = (*beat, now);
    }

    /// What comes is to be judged without what was. Only that it stands still goes on.
    pub(super) fn begin_anew(&mut self) {
        (self.requests, self.transfers, self.steps) = (Share::default(), Share::default(), None);
    }

    /// For how long it has had work and not got on, up to its last report: what it did since is not known.
    pub(super) fn still(&self) -> Duration {
        self.at.saturating_duration_since(self.moved)
    }

    pub(super) fn silent(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.at)
    }

    /// The share of its requests that failed by its own fault; none while too few did.
    pub(super) fn failing(&self, now: Instant) -> Option<f64> {
        self.requests.known(self.at, now)
    }

    /// The share of its handoffs that broke; none while too few did.
    pub(super) fn losing(&self, now: Instant) -> Option<f64> {
        self.transfers.known(self.at, now)
    }

    /// Both shares, requests first, for a comparison with others; 0 while little is known.
    pub(super) fn shares(&self, now: Instant) -> (f64, f64) {
        (self.requests.compared(self.at, now), self.transfers.compared(self.at, now))
    }

    /// None if it has not decoded lately.
    pub(super) fn steps(&self, now: Instant) -> Option<Steps> {
        let (at, steps) = self.steps?;
        (now.saturating_duration_since(at) <= FRESH).then_some(steps)
    }
}

/// Whether there is something that the instance could compute. What waits for a cache to come, or for blocks that a
/// transfer holds, waits for others.
fn is_at_work(beat: &Beat) -> bool {
    let load = &beat.load;
    let transfers = load.incoming_transfers > 0 || load.outgoing_transfers > 0;
    beat.phase != Phase::Loading
        && (load.running_sequences > 0 || (load.queued_prefill_tokens > 0 && !transfers))
}

/// All that an instance counts since it started. Instances of earlier versions do not know every one of them.
fn counts(load: &InstanceLoad) -> [u64; 15] {
    [
        load.progress,
        load.prefilled_requests,
        load.prefilled_tokens,
        load.decoded_tokens,
        load.decode_steps,
        load.finished_requests,
        load.finished_tokens,
        load.failed_requests,
        load.finished_transfers_out,
        load.finished_transfers_in,
        load.failed_transfers_out,
        load.failed_transfers_in,
        load.decode_micros,
        load.timed_decode_steps,
        load.decode_sequences,
    ]
}
