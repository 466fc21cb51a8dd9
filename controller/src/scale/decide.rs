//! What is done next to have as many replicas as a group wants: one step at a time. Pure; time is an argument.
//!
//! More are asked for at once. Fewer only after the group wanted fewer for a whole window, and one by one: an instance
//! is cordoned so that it drains, by which its pod ceases to be ready, and then the Deployment gets one replica less. Until
//! that is done it is taken back as soon as it is wanted again, or takes too long.
//!
//! Everything but times is read from what is seen, so that whoever leads next goes on from there: the cordon is stored with
//! the fleet.
//!
//! Kubernetes chooses which pod goes, in an order of its own in which those that are not ready come first ([`seen`]). So
//! nothing is taken away unless each of those that it may choose is spare: drained and to go, or not ready and no instance.
//! If it is one of the latter, nothing is lost and who was to go waits for the next step, or is taken back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use baton_proto::{InstanceId, Role};
use tokio::time::Instant;

use super::low::Low;
use crate::plan::Split;

mod seen;

pub use seen::{By, Demand, Instance, Pod, Seen};

/// Between what a group is scaled, and how cautiously.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub min: u32,
    pub max: u32,
    /// How long fewer must have been wanted without a break.
    pub stabilisation: Duration,
    /// How long one that is to go may take to drain.
    pub patience: Duration,
    /// How long Kubernetes may take to see that its pod is not ready, and to delete it.
    pub notice: Duration,
    /// After this long all of Kubernetes has seen whether a pod is ready.
    pub known_after: Duration,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Wait,
    ScaleOut {
        to: u32,
    },
    /// So that it drains.
    Cordon(InstanceId),
    Uncordon(InstanceId, Release),
    /// One of these pods goes: there is nothing to lose in any.
    ScaleIn {
        to: u32,
        pods: Vec<String>,
    },
}

/// Why an instance that was to go is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    Wanted,
    Unsure,
    Overdue,
    Ready,
    Overtaken,
    Another,
    Gone,
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wanted => "it is wanted again",
            Self::Unsure => "it is not known yet whether it is wanted",
            Self::Overdue => "it took too long to drain, or its pod to be deleted",
            Self::Ready => "its pod is ready though it is drained: its readiness probe is to ask /readiness",
            Self::Overtaken => "Kubernetes might delete another pod in place of its own",
            Self::Another => "another is to go",
            Self::Gone => "its pod is gone",
        })
    }
}

/// What to do, and what was made of what was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub action: Action,
    /// How many instances the group wants now, within its limits; none if nobody can say.
    pub wanted: Option<u32>,
    /// For people: why it has more replicas than it wants.
    pub waits: Option<String>,
}

/// What is remembered of one group between looks.
#[derive(Debug, Clone)]
pub struct Scaler {
    limits: Limits,
    low: Low,
    /// Replicas when it was last looked at, and those that were asked for then.
    replicas: Option<u32>,
    asked: Option<u32>,
    victim: Option<Victim>,
    /// Whether pods are ready, and since when.
    readiness: BTreeMap<String, (bool, Instant)>,
    /// Those that took too long: asked last.
    slow: BTreeSet<InstanceId>,
}

/// Who is to go.
#[derive(Debug, Clone)]
struct Victim {
    id: InstanceId,
    drained: bool,
    /// Since when it is to drain, or has; or since its replica was taken away.
    since: Instant,
}

impl Scaler {
    pub fn new(limits: Limits) -> Self {
        let low = Low::new(limits.stabilisation);
        let (readiness, slow) = (BTreeMap::new(), BTreeSet::new());
        Self { limits, low, replicas: None, asked: None, victim: None, readiness, slow }
    }

    /// It cannot be cordoned, as nobody could serve in its place: others are asked first.
    pub fn refused(&mut self, id: InstanceId) {
        self.slow.insert(id);
    }

    /// The next step. What it says is to be done, and then it is to be asked again with a new look.
    pub fn decide(&mut self, seen: &Seen, now: Instant) -> Decision {
        self.slow.retain(|id| seen.instances.iter().any(|instance| instance.id == *id));
        self.readiness.retain(|name, (ready, _)| seen.pods.get(name).is_some_and(|pod| pod.ready == *ready));
        for (name, pod) in &seen.pods {
            self.readiness.entry(name.clone()).or_insert((pod.ready, now));
        }
        let wanted = self.note(seen, now);
        let (action, waits) = match self.step(seen, wanted, now) {
            Ok(action) => (action, None),
            Err(waits) => (Action::Wait, waits),
        };
        if let Action::ScaleOut { to } | Action::ScaleIn { to, .. } = action {
            self.asked = Some(to);
        }
        Decision { action, wanted, waits }
    }

    /// How many it wants now, and what that does to the window.
    fn note(&mut self, seen: &Seen, now: Instant) -> Option<u32> {
        let Limits { min, max, .. } = self.limits;
        let before = self.replicas.replace(seen.replicas);
        let ours = before == Some(seen.replicas) || self.asked == Some(seen.replicas);
        if before.is_some() && !ours {
            // Somebody else set them, and is not contradicted at once.
            self.low.begin_again();
        }
        // Those that serve nothing because they do badly come on top.
        let lost = seen.quarantined();
        let of_serving = |wanted: u32| wanted.clamp(min, max).saturating_add(lost).min(max);
        let wanted = match seen.demand {
            // Somebody has switched the group off.
            _ if seen.replicas == 0 => None,
            Demand::Measured(Split { prefill, decode }) => {
                Some(of_serving(u32::try_from(prefill.saturating_add(decode)).unwrap_or(u32::MAX)))
            }
            // Nobody can say how many are too few; those without work are too many.
            Demand::Little => {
                let busy = |it: &&Instance| it.sequences > 0 && !it.quarantined;
                let busy = u32::try_from(seen.instances.iter().filter(busy).count()).unwrap_or(u32::MAX);
                Some(of_serving(busy.min(seen.replicas.saturating_sub(lost))))
            }
            // One at a time: the next once that one serves.
            Demand::Congested => {
                let serves = |it: &&Instance| it.here && it.role != Role::None && !it.quarantined;
                let serving = u32::try_from(seen.instances.iter().filter(serves).count()).unwrap_or(u32::MAX);
                let more = serving.saturating_add(1);
                Some(of_serving(more.max(seen.replicas.saturating_sub(lost))))
            }
            Demand::Unasked => Some(seen.replicas.clamp(min, max)),
            Demand::Unknown => (seen.replicas < min).then_some(min),
        };
        match wanted {
            Some(wanted) => self.low.note(wanted, now),
            None => self.low.begin_again(),
        }
        wanted
    }

    /// `Err` = to wait, and for what if it has too many.
    fn step(&mut self, seen: &Seen, wanted: Option<u32>, now: Instant) -> Result<Action, Option<String>> {
        if let Some(gone) = seen.instances.iter().find(|instance| seen.is_gone(instance)) {
            return Ok(Action::Uncordon(gone.id.clone(), Release::Gone));
        }
        let victim = self.victim(seen, now);
        // The Deployment has one replica less, and Kubernetes has yet to delete a pod.
        let surplus = seen.alive().len() > seen.replicas as usize;
        let going = surplus && victim.is_none_or(|(victim, pod)| victim.drained && !pod.ready);
        if let Some(to) = wanted.filter(|wanted| *wanted > seen.replicas) {
            return Ok(match victim {
                Some((victim, _)) if !going => Action::Uncordon(victim.id.clone(), Release::Wanted),
                _ => Action::ScaleOut { to },
            });
        }
        if let Some((victim, pod)) = victim.filter(|_| self.is_overdue(now)) {
            self.slow.insert(victim.id.clone());
            self.low.begin_again();
            let why = if victim.drained && pod.ready { Release::Ready } else { Release::Overdue };
            return Ok(Action::Uncordon(victim.id.clone(), why));
        }
        if going {
            return Err(Some("Kubernetes has yet to delete a pod".to_owned()));
        }
        let most = self.low.most();
        if most.is_none_or(|most| most >= seen.replicas) {
            if let Some((victim, _)) = victim {
                let why = if most.is_some() { Release::Wanted } else { Release::Unsure };
                return Ok(Action::Uncordon(victim.id.clone(), why));
            }
            return Err(None);
        }
        seen.check_that_it_rests()?;
        match victim {
            Some((victim, pod)) => self.go_on(seen, victim, pod, now),
            None => self.begin(seen, now),
        }
    }

    /// The instance that was cordoned to go, and its pod; of several, the one that is known.
    fn victim<'a>(&mut self, seen: &'a Seen, now: Instant) -> Option<(&'a Instance, &'a Pod)> {
        let known = self.victim.take();
        let mut all: Vec<_> = seen.instances.iter().filter_map(|it| Some((it, seen.to_go(it)?))).collect();
        all.sort_by_key(|(it, _)| (known.as_ref().is_none_or(|known| known.id != it.id), &it.id));
        let first = all.first().copied();
        self.victim = first.map(|(instance, _)| {
            let Instance { id, drained, .. } = instance.clone();
            // Each step has a time of its own.
            let same = known.filter(|known| known.id == id && known.drained >= drained);
            same.unwrap_or(Victim { id, drained, since: now })
        });
        first
    }

    /// Whether who is to go has taken too long for its present step.
    fn is_overdue(&self, now: Instant) -> bool {
        let Limits { patience, notice, .. } = self.limits;
        let late = |victim: &Victim| {
            now.duration_since(victim.since) >= if victim.drained { notice } else { patience }
        };
        self.victim.as_ref().is_some_and(late)
    }

    fn go_on(
        &mut self,
        seen: &Seen,
        victim: &Instance,
        pod: &Pod,
        now: Instant,
    ) -> Result<Action, Option<String>> {
        let id = &victim.id;
        if let Some(other) = seen.instances.iter().find(|it| it.id != *id && seen.to_go(it).is_some()) {
            return Ok(Action::Uncordon(other.id.clone(), Release::Another));
        }
        let first = seen.first_to_go();
        let own = |name: &str| victim.pod.as_deref() == Some(name);
        if first.iter().any(|(name, pod)| !pod.ready && !own(name) && !seen.is_spare(name, pod)) {
            return Ok(Action::Uncordon(id.clone(), Release::Overtaken));
        }
        if let Some(pods) = self.spare(seen, now)? {
            if let Some(victim) = &mut self.victim {
                victim.since = now;
            }
            return Ok(Action::ScaleIn { to: seen.replicas - 1, pods });
        }
        Err(Some(if victim.drained && pod.ready {
            format!("{id} is drained, and its pod has yet to be seen not ready")
        } else {
            format!("{id} drains")
        }))
    }

    /// The pods of which one would go, if there is nothing to lose in any. `Err` = soon.
    fn spare(&self, seen: &Seen, now: Instant) -> Result<Option<Vec<String>>, Option<String>> {
        let first = seen.first_to_go();
        if !first.iter().all(|(name, pod)| seen.is_spare(name, pod)) {
            return Ok(None);
        }
        let known = |name: &str| {
            let since = self.readiness.get(name);
            since.is_some_and(|(_, since)| now.duration_since(*since) >= self.limits.known_after)
        };
        if let Some((name, pod)) = seen.alive().into_iter().find(|(name, _)| !known(name)) {
            let is = if pod.ready { "become" } else { "ceased to be" };
            return Err(Some(format!("{name} has only just {is} ready")));
        }
        Ok(Some(first.into_iter().map(|(name, _)| name.to_owned()).collect()))
    }

    /// Chooses who goes.
    fn begin(&self, seen: &Seen, now: Instant) -> Result<Action, Option<String>> {
        if let Some(pods) = self.spare(seen, now)? {
            return Ok(Action::ScaleIn { to: seen.replicas - 1, pods });
        }
        let mut candidates: Vec<&Instance> =
            seen.instances.iter().filter(|instance| seen.may_go(instance)).collect();
        candidates.sort_by_key(|it| {
            let slow = self.slow.contains(&it.id);
            (slow, it.role != Role::None, !seen.has_many(it.role), it.sequences, &it.id)
        });
        match candidates.first() {
            Some(instance) => Ok(Action::Cordon(instance.id.clone())),
            None => Err(Some(seen.why_nobody())),
        }
    }
}

#[cfg(test)]
mod tests;
