//! What of the book outlives the leader that keeps it: quarantines, probations, and how often there was one. It is stored
//! when it changes, which is a few times for each quarantine, and never by a beat that only confirms it.
//!
//! Controllers' clocks may differ. A record says how long its standing lasts yet and until when by the writer's clock, and
//! the shorter of both counts: no quarantine is longer for a change of leader, and one that a clock ends early is followed
//! by its probation all the same.

use std::collections::BTreeMap;

use baton_proto::{Incarnation, InstanceId};
use baton_registry::{HealthRecord, Standing};
use tokio::time::Instant;

use super::{Health, HealthBook, Reason, Verdict, signals::Signals, verdict::Record};
use crate::fleet::Beat;

/// As an instance is judged by until it is heard. No process has this incarnation: whatever it counts is counted anew.
const UNHEARD: Incarnation = Incarnation(0);

impl HealthBook {
    /// What the store should say of an instance; none = nothing. `unix_millis` is the time of `now`.
    pub fn record(&self, id: &InstanceId, now: Instant, unix_millis: u64) -> Option<HealthRecord> {
        let health = self.members.get(id)?;
        let (verdict, times) = health.record.kept()?;
        let (standing, until) = match verdict {
            Verdict::Quarantined { until, reason, .. } => {
                let (reason, measure) = (reason.name().to_owned(), reason.measure());
                (Standing::Quarantined { reason, measure }, until)
            }
            Verdict::Probation { until } => (Standing::Probation, until),
            Verdict::Healthy | Verdict::Suspect(_) => (Standing::Well, now),
        };
        let left = until.saturating_duration_since(now);
        let millis = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        let until_unix_millis = unix_millis.saturating_add(millis);
        Some(HealthRecord { group: health.group.clone(), times, standing, left, until_unix_millis })
    }

    /// Takes over what earlier leaders held of instances, as it is by `unix_millis`, the time of `now`. Says whose records
    /// are of no use.
    pub fn inherit(
        &mut self,
        records: BTreeMap<InstanceId, HealthRecord>,
        beat: &Beat,
        now: Instant,
        unix_millis: u64,
    ) -> Vec<InstanceId> {
        let mut useless = Vec::new();
        for (id, kept) in records {
            let until = now + kept.left(unix_millis).min(self.config.quarantine_most);
            let verdict = match &kept.standing {
                Standing::Quarantined { reason, measure } => Reason::of(reason, *measure)
                    .map(|reason| Verdict::Quarantined { until, reason, times: kept.times }),
                Standing::Probation => Some(Verdict::Probation { until }),
                Standing::Well => Some(Verdict::Healthy),
            };
            let Some(verdict) = verdict.filter(|_| self.config.enabled) else {
                useless.push(id);
                continue;
            };
            let signals = Signals::new(now, UNHEARD, beat);
            let record = Record::inherited(verdict, kept.times);
            self.looked.get_or_insert(now);
            self.members.insert(id, Health { group: kept.group, signals, since: [None; 3], record });
        }
        useless
    }
}
