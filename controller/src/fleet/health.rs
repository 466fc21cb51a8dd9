//! Which instances do badly though they are there, judged by their reports: suspected, quarantined, back on probation.
//!
//! | signal | from | quarantined after |
//! |---|---|---|
//! | silent | no report for 2.5 beats | never: its lease ends |
//! | wedged | it has work, and nothing that it counts moves | `health.wedge` |
//! | failing | 5 failures or more in 3 reports or more, and more than `health.error_share` of its requests | 10 s |
//! | losing caches | the same of its KV handoffs, and it is at this end that they break; or most of its [links] do | 30 s |
//! | slow | a decode step takes `health.slow_factor` times as long as its peers', of whom there are 3 or more | 30 s |
//!
//! A signal must hold without a break; after half its time the instance is suspected, which on probation is enough. The
//! [`Verdict`] has the states. Old failures fade ([`signals`]), and what others suffer as well is not held against one
//! ([`compare`]). No more than half of a group is quarantined at a time: what ails the most of them is no instance's own.
//!
//! A process that is started again counts anew, and what it was quarantined for is remembered, over changes of leader
//! too ([`keep`]). What was only suspected of it is not: who is sick is soon found again.
//!
//! Pure: reports and time in, verdicts out. Whoever plans is to
//!
//! 1. call [`HealthBook::observe`] with every hello and beat,
//! 2. call [`HealthBook::look`] when time has passed, at [`HealthBook::next_look`] at the latest, and plan anew if it says
//!    that somebody has come out of or into quarantine,
//! 3. plan without those of whom [`HealthBook::is_quarantined`] says so, as without those whom operators have set aside,
//! 4. and never take the last prefill or the last decode instance out of service for it: a quarantine is a wish, and it is
//!    the planner's check of what stays covered that grants it. Who is left in service so is judged on, as it works.

use std::{collections::BTreeMap, time::Duration};

use baton_proto::{GroupName, InstanceId, InstanceSpec, LinkUse};
use tokio::time::Instant;
use tracing::{info, warn};

use super::Beat;
use crate::config::HealthConfig;

mod compare;
mod keep;
mod links;
mod signals;
mod verdict;

use compare::Peers;
use links::{Blame, LinkBook};
pub use links::{Ends, LinkChange};
use signals::Signals;
pub use verdict::Verdict;
use verdict::{Finding, Record};

/// Beats without a report before an instance is suspected.
const SILENT_BEATS: f64 = 2.5;
/// How long a signal has to hold.
const FAILING_FOR: Duration = Duration::from_secs(10);
const LOSING_FOR: Duration = Duration::from_secs(30);
const SLOW_FOR: Duration = Duration::from_secs(30);
/// Of a group's instances, those heard of within this time are there, for the share of them that may be quarantined.
const THERE: Duration = Duration::from_secs(60);

/// What is wrong with an instance.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Reason {
    #[error("no report for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("it has work and has computed nothing for {} s", .0.as_secs())]
    Wedged(Duration),
    /// The share of its requests, 0 to 1.
    #[error("{:.0} % of its requests fail by its own fault", .0 * 100.0)]
    Failing(f64),
    /// The share of its handoffs, 0 to 1.
    #[error("{:.0} % of its KV handoffs break", .0 * 100.0)]
    LosingCaches(f64),
    /// Times as long as its peers.
    #[error("a decode step takes {0:.1} times as long as its peers'")]
    Slow(f64),
}

impl Reason {
    /// For labels.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Silent(_) => "silent",
            Self::Wedged(_) => "wedged",
            Self::Failing(_) => "failing",
            Self::LosingCaches(_) => "losing_caches",
            Self::Slow(_) => "slow",
        }
    }

    /// What was measured: seconds, a share of 0 to 1, or times as long.
    fn measure(&self) -> f64 {
        match self {
            Self::Silent(time) | Self::Wedged(time) => time.as_secs_f64(),
            Self::Failing(share) | Self::LosingCaches(share) => *share,
            Self::Slow(times) => *times,
        }
    }

    /// Of what somebody is quarantined for, by its name. None for one that this build does not know.
    fn of(name: &str, measure: f64) -> Option<Self> {
        match name {
            "wedged" => Duration::try_from_secs_f64(measure).ok().map(Self::Wedged),
            "failing" => Some(Self::Failing(measure)),
            "losing_caches" => Some(Self::LosingCaches(measure)),
            "slow" => Some(Self::Slow(measure)),
            _ => None,
        }
    }
}

/// One instance, over its restarts.
#[derive(Debug, Clone)]
struct Health {
    group: GroupName,
    signals: Signals,
    /// Since when what comes and goes with the reports has been seen without a break: failing, losing caches, slow.
    since: [Option<Instant>; 3],
    record: Record,
}

/// What one look sees of an instance.
#[derive(Debug, Clone, Copy)]
struct Sight {
    silent: Option<Reason>,
    still: Duration,
    /// In the order of [`Health::since`].
    signs: [Option<Reason>; 3],
}

/// What a look has changed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Looked {
    /// Who has been quarantined and who is back from it.
    pub moved: Vec<(InstanceId, Verdict)>,
    /// Of whom the store should say something else.
    pub kept: Vec<InstanceId>,
    pub links: Vec<LinkChange>,
}

/// All instances; see the module.
#[derive(Debug, Clone)]
pub struct HealthBook {
    config: HealthConfig,
    /// How often instances report, and are looked at.
    beat: Duration,
    members: BTreeMap<InstanceId, Health>,
    links: LinkBook,
    looked: Option<Instant>,
    /// Instances that are known at a time.
    most: usize,
    /// Who made room for others though the store knows of them, since the last look.
    dropped: Vec<InstanceId>,
}

impl HealthBook {
    /// `beat` is how often instances report. At most `most` of them are known: one more, and the one that was silent for
    /// longest is forgotten, of those first who have no quarantine to remember.
    pub fn new(config: HealthConfig, beat: Duration, most: usize) -> Self {
        let dropped = Vec::new();
        Self {
            config,
            beat,
            most,
            dropped,
            members: BTreeMap::new(),
            links: LinkBook::default(),
            looked: None,
        }
    }

    /// An instance has reported, by a hello or a beat.
    pub fn observe(&mut self, now: Instant, spec: &InstanceSpec, beat: &Beat) {
        if !self.config.enabled {
            return;
        }
        self.looked.get_or_insert(now);
        match self.members.get_mut(&spec.id) {
            Some(health) => {
                health.signals.observe(now, spec.incarnation, beat);
                if health.group != spec.group {
                    health.group = spec.group.clone();
                }
            }
            None => {
                self.make_room(now);
                let signals = Signals::new(now, spec.incarnation, beat);
                let (group, since, record) = (spec.group.clone(), [None; 3], Record::default());
                self.members.insert(spec.id.clone(), Health { group, signals, since, record });
            }
        }
    }

    fn make_room(&mut self, now: Instant) {
        let claim = |(_, health): &(&InstanceId, &Health)| {
            (health.record.kept().is_none(), health.signals.silent(now))
        };
        if self.members.len() >= self.most
            && let Some((id, health)) = self.members.iter().max_by_key(claim)
        {
            let (id, kept) = (id.clone(), health.record.kept());
            self.dropped.extend(kept.map(|_| id.clone()));
            self.members.remove(&id);
        }
    }

    /// A coordinator has seen more handoffs: of each link, how many went well and how many failed.
    pub fn observe_handoffs(&mut self, now: Instant, links: &[LinkUse]) {
        let are_here = |link: &&LinkUse| {
            self.members.contains_key(&link.prefill) && self.members.contains_key(&link.decode)
        };
        links.iter().filter(are_here).for_each(|link| self.links.observe(now, link));
    }

    /// Links that are degraded, and the share of their handoffs that fail, 0 to 1.
    pub fn degraded_links(&self, now: Instant) -> impl Iterator<Item = (&Ends, f64)> {
        self.links.degraded(now)
    }

    /// When [`Self::look`] next has something to do; none while there is nobody to look at.
    pub fn next_look(&self) -> Option<Instant> {
        self.looked.filter(|_| !self.members.is_empty()).map(|looked| looked + self.beat)
    }

    /// Judges everybody, if it is time for that.
    pub fn look(&mut self, now: Instant) -> Looked {
        let mut looked = Looked::default();
        if self.next_look().is_none_or(|at| now < at) {
            return looked;
        }
        let since_last = self.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        self.looked = Some(now);
        // As long in good health would have cleared it, too.
        let memory = self.config.quarantine_most.max(THERE);
        looked.kept.append(&mut self.dropped);
        self.members.retain(|id, health| {
            let remembered = health.signals.silent(now) < memory;
            if !remembered && health.record.kept().is_some() {
                looked.kept.push(id.clone());
            }
            remembered
        });
        let members = &self.members;
        looked.links = self.links.look(now, self.config.error_share, |id| members.contains_key(id));
        let sights = self.sights(now);
        let mut room = self.room(now);
        let unwatched = since_last > self.beat.mul_f64(SILENT_BEATS);
        let patience = self.config.wedge.max(self.beat * 3);
        for ((id, health), sight) in self.members.iter_mut().zip(sights) {
            if unwatched {
                // Nobody knows what held meanwhile.
                health.since = [None; 3];
            }
            let room = room.get_mut(&health.group);
            let may_quarantine = room.as_ref().is_some_and(|room| **room > 0);
            let (before, kept) = (health.record.verdict, health.record.kept());
            health.judge(now, sight, patience, may_quarantine, &self.config);
            let after = health.record.verdict;
            if after.is_quarantined()
                && after != before
                && let Some(room) = room
            {
                *room -= 1;
            }
            if before.is_quarantined() != after.is_quarantined() {
                looked.moved.push((id.clone(), after));
            }
            if health.record.kept() != kept {
                looked.kept.push(id.clone());
            }
            tell(id, &before, &after, now);
        }
        looked
    }

    /// Of an instance that nothing is known of, that it is healthy.
    pub fn verdict(&self, id: &InstanceId) -> Verdict {
        self.members.get(id).map_or(Verdict::Healthy, |health| health.record.verdict)
    }

    /// Whether an instance is to be out of service.
    pub fn is_quarantined(&self, id: &InstanceId) -> bool {
        self.verdict(id).is_quarantined()
    }

    /// Those of whom something is known, by id.
    pub fn verdicts(&self) -> impl Iterator<Item = (&InstanceId, Verdict)> {
        self.members.iter().map(|(id, health)| (id, health.record.verdict))
    }

    /// By member.
    fn sights(&self, now: Instant) -> Vec<Sight> {
        let silent_after = self.beat.mul_f64(SILENT_BEATS);
        let heard = self.members.values().filter(|health| health.signals.silent(now) <= silent_after);
        let peers = Peers::new(now, heard.map(|health| (health.group.as_str(), &health.signals)));
        let blame = self.links.blame(now, self.config.error_share);
        let sight = |(id, health): (&InstanceId, &Health)| {
            let (group, signals) = (health.group.as_str(), &health.signals);
            let silent = signals.silent(now);
            let silent = (silent > silent_after).then_some(Reason::Silent(silent));
            let much = |share: &f64| *share > self.config.error_share;
            let failing =
                signals.failing(now).filter(much).filter(|_| peers.fails_alone(now, group, signals));
            let losing = match blame.get(id) {
                Some(Blame::Own(share)) => Some(*share).filter(much),
                Some(Blame::Peers) => None,
                None => signals.losing(now).filter(much).filter(|_| peers.loses_alone(now, group, signals)),
            };
            let slow = peers.slowness(now, group, signals).filter(|times| *times > self.config.slow_factor);
            let signs =
                [failing.map(Reason::Failing), losing.map(Reason::LosingCaches), slow.map(Reason::Slow)];
            Sight { silent, still: signals.still(), signs }
        };
        self.members.iter().map(sight).collect()
    }

    /// How many more instances may be quarantined now, by group.
    fn room(&self, now: Instant) -> BTreeMap<GroupName, usize> {
        let mut counts: BTreeMap<GroupName, (usize, usize)> = BTreeMap::new();
        for health in self.members.values() {
            let out = health.record.verdict.is_quarantined() && !health.record.is_released(now);
            if health.signals.silent(now) <= THERE || out {
                let (there, quarantined) = counts.entry(health.group.clone()).or_default();
                *there += 1;
                *quarantined += usize::from(out);
            }
        }
        counts.into_iter().map(|(group, (there, out))| (group, (there / 2).saturating_sub(out))).collect()
    }
}

impl Health {
    fn judge(
        &mut self,
        now: Instant,
        mut sight: Sight,
        patience: Duration,
        may_quarantine: bool,
        config: &HealthConfig,
    ) {
        if self.record.is_released(now) {
            self.signals.begin_anew();
            (self.since, sight.signs) = ([None; 3], [None; 3]);
        }
        let finding = self.find(now, sight, patience);
        self.record.judge(now, finding, may_quarantine, config);
    }

    fn find(&mut self, now: Instant, sight: Sight, patience: Duration) -> Finding {
        if let Some(reason) = sight.silent {
            // What its last reports said may be over.
            self.since = [None; 3];
            return Finding::Silent(reason);
        }
        let mut held = vec![(sight.still, patience, Reason::Wedged(sight.still))];
        let patience = [FAILING_FOR, LOSING_FOR, SLOW_FOR];
        for ((since, sign), patience) in self.since.iter_mut().zip(sight.signs).zip(patience) {
            match sign {
                Some(reason) => {
                    let since = *since.get_or_insert(now);
                    held.push((now.saturating_duration_since(since), patience, reason));
                }
                None => *since = None,
            }
        }
        let after = |share: f64| {
            let long = held.iter().find(|(held, patience, _)| *held >= patience.mul_f64(share));
            long.map(|(_, _, reason)| *reason)
        };
        after(1.0).map(Finding::Bad).or_else(|| after(0.5).map(Finding::Suspicious)).unwrap_or(Finding::Well)
    }
}

/// Says in the log what has changed.
fn tell(id: &InstanceId, before: &Verdict, after: &Verdict, now: Instant) {
    match after {
        Verdict::Quarantined { until, reason, times } if before != after => {
            let length = until.saturating_duration_since(now);
            warn!(instance = %id, %reason, times, ?length, "an instance is quarantined");
        }
        Verdict::Probation { .. } if before.is_quarantined() => {
            info!(instance = %id, "its quarantine is over; it is on probation");
        }
        Verdict::Healthy if matches!(before, Verdict::Probation { .. }) => {
            info!(instance = %id, "it has passed its probation");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
