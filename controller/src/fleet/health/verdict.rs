//! What is held of one instance, and for how long: quarantine with growing times, probation after it, forgetting.
//!
//! ```text
//!          suspicious                 bad
//! Healthy <----------> Suspect  ------------> Quarantined (30 s, then twice as long each time, at most 30 min)
//!    ^  └──────────── bad ──────────────────────^      │ its time is over
//!    │                                          │      v
//!    └── well all the while ───────────────── Probation: a suspicion is enough
//! ```
//! Times served are forgotten after as much good health as the longest quarantine takes. Pure; [`super`] finds out how
//! an instance does and asks [`Record::judge`].

use std::{fmt, time::Duration};

use tokio::time::Instant;

use super::Reason;
use crate::config::HealthConfig;

/// What is held of an instance.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Verdict {
    #[default]
    Healthy,
    /// It serves; if it goes on so it will be quarantined. Silence alone never leads there: its lease ends.
    Suspect(Reason),
    /// Out of service.
    Quarantined {
        until: Instant,
        reason: Reason,
        /// How often by now, this time included.
        times: u32,
    },
    /// Back in service, and quarantined again at once if it is as much as suspected.
    Probation { until: Instant },
}

impl Verdict {
    /// Whether it is to be out of service.
    pub fn is_quarantined(&self) -> bool {
        matches!(self, Self::Quarantined { .. })
    }

    /// For logs, labels and tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Suspect(_) => "suspect",
            Self::Quarantined { .. } => "quarantined",
            Self::Probation { .. } => "probation",
        }
    }
}

/// For people; times are said relatively, so by whoever knows what time it is.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Healthy | Self::Probation { .. } => f.write_str(self.name()),
            Self::Suspect(reason) => write!(f, "suspect: {reason}"),
            Self::Quarantined { reason, times: 1, .. } => write!(f, "quarantined: {reason}"),
            Self::Quarantined { reason, times, .. } => write!(f, "quarantined, {times} times now: {reason}"),
        }
    }
}

/// How an instance does, at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Finding {
    Well,
    /// Not heard of: nothing is known against it.
    Silent(Reason),
    Suspicious(Reason),
    Bad(Reason),
}

/// An instance's verdict and what it has behind it; kept over its restarts.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Record {
    pub(super) verdict: Verdict,
    /// Quarantines that are not forgotten.
    times: u32,
    /// Since when it has been well, in service and out of probation.
    well_since: Option<Instant>,
}

impl Record {
    /// Of an instance that an earlier leader knew.
    pub(super) fn inherited(verdict: Verdict, times: u32) -> Self {
        Self { verdict, times, well_since: None }
    }

    /// What is to outlive this leader: a quarantine or a probation, and how many quarantines there were. None if there
    /// is nothing to remember.
    pub(super) fn kept(&self) -> Option<(Verdict, u32)> {
        match self.verdict {
            Verdict::Quarantined { .. } | Verdict::Probation { .. } => Some((self.verdict, self.times)),
            Verdict::Healthy | Verdict::Suspect(_) => {
                (self.times > 0).then_some((Verdict::Healthy, self.times))
            }
        }
    }

    /// Whether a quarantine is over and [`Self::judge`] is about to say so.
    pub(super) fn is_released(&self, now: Instant) -> bool {
        matches!(self.verdict, Verdict::Quarantined { until, .. } if until <= now)
    }

    /// Draws the consequences. `may_quarantine` says whether others leave room for it. Calls come in order of time.
    pub(super) fn judge(
        &mut self,
        now: Instant,
        finding: Finding,
        may_quarantine: bool,
        config: &HealthConfig,
    ) {
        if self.is_released(now) {
            self.verdict = Verdict::Probation { until: now + config.probation };
        }
        if self.verdict.is_quarantined() {
            return;
        }
        match (self.verdict, finding) {
            (Verdict::Probation { .. }, Finding::Suspicious(reason) | Finding::Bad(reason))
            | (_, Finding::Bad(reason))
                if may_quarantine =>
            {
                self.quarantine(now, reason, config);
            }
            (Verdict::Probation { until }, _) => {
                if until <= now {
                    self.verdict = Verdict::Healthy;
                    self.well_since = Some(now);
                }
            }
            (_, Finding::Well) => {
                self.verdict = Verdict::Healthy;
                let since = *self.well_since.get_or_insert(now);
                if now.saturating_duration_since(since) >= config.quarantine_most {
                    self.times = 0;
                }
            }
            (_, Finding::Silent(reason)) => self.verdict = Verdict::Suspect(reason),
            (_, Finding::Suspicious(reason) | Finding::Bad(reason)) => {
                self.verdict = Verdict::Suspect(reason);
                self.well_since = None;
            }
        }
    }

    fn quarantine(&mut self, now: Instant, reason: Reason, config: &HealthConfig) {
        let until = now + length(self.times, config);
        self.times = self.times.saturating_add(1);
        self.well_since = None;
        self.verdict = Verdict::Quarantined { until, reason, times: self.times };
    }
}

/// Of a quarantine after `times` earlier ones.
fn length(times: u32, config: &HealthConfig) -> Duration {
    config.quarantine.saturating_mul(1 << times.min(30)).min(config.quarantine_most)
}
