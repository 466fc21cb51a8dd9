//! What is done next to have as many replicas as a group wants: one step at a time. Pure; time is an argument.
//!
//! More are asked for at once. Fewer only after the group wanted fewer for a whole window, and one by one: an instance
//! is cordoned so that it drains, its pod is marked as the one to delete, the Deployment gets one replica less. Until that is
//! done it is taken back as soon as it is wanted again, or takes too long. A pod that is not ready and no instance serves
//! nobody: it goes without more ado.
//!
//! Everything but the window and the deadline is read from what is seen, so that whoever leads next goes on from there: the
//! cordon is stored with the fleet, the mark stands on the pod.
//!
//! Kubernetes has an order of its own in which pods go, and the mark decides only between those that are alike in it
//! ([`Pod::rank`]). So it is always one of the first that is chosen, and nothing is taken away while another would go.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use baton_proto::{InstanceId, Role};
use tokio::time::Instant;

use super::low::Low;
use crate::reconcile::Wanted;

/// Between what a group is scaled, and how cautiously.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub min: u32,
    pub max: u32,
    /// How long fewer must have been wanted without a break.
    pub stabilisation: Duration,
    /// How long one that is to go may take to drain, and its pod to be deleted.
    pub patience: Duration,
}

/// What a group wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    Measured(Wanted),
    /// Too little happens for it to be measured.
    Little,
    /// It is divided by a ratio: nobody measures.
    Unasked,
}

/// A group and its Deployment, at one time.
#[derive(Debug, Clone)]
pub struct Seen {
    pub demand: Demand,
    /// That the Deployment is to have.
    pub replicas: u32,
    /// Of the Deployment, by name.
    pub pods: BTreeMap<String, Pod>,
    /// Of the group, and those that were cordoned to be scaled in and are gone.
    pub instances: Vec<Instance>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// It is being deleted.
    pub leaving: bool,
    /// It has a node.
    pub placed: bool,
    pub running: bool,
    pub ready: bool,
    /// Which version of the Deployment it is of.
    pub template: String,
    /// It is the one to delete, by its annotation.
    pub marked: bool,
}

impl Pod {
    /// Pods of a lower rank are deleted before those of a higher one, whatever they are marked with.
    fn rank(&self) -> (bool, bool, bool) {
        (self.placed, self.running, self.ready)
    }
}

#[derive(Debug, Clone)]
pub struct Instance {
    pub id: InstanceId,
    /// None if it does not say.
    pub pod: Option<String>,
    /// It is registered.
    pub here: bool,
    /// What it serves now.
    pub role: Role,
    /// That run on it or wait.
    pub sequences: u32,
    /// It serves nothing, will not, and has nothing left to do.
    pub drained: bool,
    pub cordoned: Option<By>,
}

/// Who took an instance out of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// This, to scale in.
    Us,
    Others,
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
    /// As the pod to delete.
    Mark(String),
    Unmark(String),
    /// The pod is drained and marked.
    ScaleIn {
        to: u32,
        pod: String,
    },
}

/// Why an instance that was to go is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    Wanted,
    Unsure,
    Overdue,
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
            Self::Overtaken => "Kubernetes would delete another pod before its own",
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
    /// Who is to go, and since when.
    victim: Option<(InstanceId, Instant)>,
    /// Those that took too long: asked last.
    slow: BTreeSet<InstanceId>,
}

impl Scaler {
    pub fn new(limits: Limits) -> Self {
        let low = Low::new(limits.stabilisation);
        Self { limits, low, replicas: None, asked: None, victim: None, slow: BTreeSet::new() }
    }

    /// The next step. What it says is to be done, and then it is to be asked again with a new look.
    pub fn decide(&mut self, seen: &Seen, now: Instant) -> Decision {
        self.slow.retain(|id| seen.instances.iter().any(|instance| instance.id == *id));
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
        let wanted = match seen.demand {
            // Somebody has switched the group off.
            _ if seen.replicas == 0 => None,
            Demand::Measured(Wanted { prefill, decode }) => {
                Some(u32::try_from(prefill.saturating_add(decode)).unwrap_or(u32::MAX))
            }
            // Nobody can say how many are too few; those without work are too many.
            Demand::Little => {
                let busy = seen.instances.iter().filter(|instance| instance.sequences > 0).count();
                Some(u32::try_from(busy).unwrap_or(u32::MAX).min(seen.replicas))
            }
            Demand::Unasked => None,
        };
        let wanted = wanted.map(|wanted| wanted.clamp(min, max));
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
        // The Deployment has one replica less, and Kubernetes has yet to delete the marked pod.
        let surplus = seen.alive().len() > seen.replicas as usize;
        let going = surplus && victim.is_none_or(|(_, pod)| pod.marked);
        if let Some(to) = wanted.filter(|wanted| *wanted > seen.replicas) {
            return Ok(match victim {
                Some((victim, _)) if !going => Action::Uncordon(victim.id.clone(), Release::Wanted),
                _ => Action::ScaleOut { to },
            });
        }
        if let Some((victim, _)) = victim
            && self
                .victim
                .as_ref()
                .is_some_and(|(_, since)| now.duration_since(*since) >= self.limits.patience)
        {
            self.slow.insert(victim.id.clone());
            self.low.begin_again();
            return Ok(Action::Uncordon(victim.id.clone(), Release::Overdue));
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
            return seen.unmark(None).ok_or(None);
        }
        seen.check_that_it_rests()?;
        match victim {
            Some((victim, pod)) => self.go_on(seen, victim, pod, now),
            None => self.begin(seen),
        }
    }

    /// The instance that was cordoned to go, and its pod; of several, the one that is known.
    fn victim<'a>(&mut self, seen: &'a Seen, now: Instant) -> Option<(&'a Instance, &'a Pod)> {
        let known = self.victim.take();
        let mut all: Vec<_> = seen.instances.iter().filter_map(|it| Some((it, seen.to_go(it)?))).collect();
        all.sort_by_key(|(it, _)| (known.as_ref().is_none_or(|(id, _)| *id != it.id), &it.id));
        let first = all.first().copied();
        self.victim = first.map(|(instance, _)| {
            known.filter(|(id, _)| *id == instance.id).unwrap_or_else(|| (instance.id.clone(), now))
        });
        first
    }

    fn go_on(
        &mut self,
        seen: &Seen,
        victim: &Instance,
        pod: &Pod,
        now: Instant,
    ) -> Result<Action, Option<String>> {
        let id = victim.id.clone();
        if let Some(other) = seen.instances.iter().find(|it| it.id != id && seen.to_go(it).is_some()) {
            return Ok(Action::Uncordon(other.id.clone(), Release::Another));
        }
        let Some(name) = victim.pod.clone() else { return Err(None) };
        if !victim.drained {
            return Err(Some(format!("{id} drains")));
        }
        if !seen.goes_first(pod) {
            return Ok(Action::Uncordon(id, Release::Overtaken));
        }
        if let Some(unmark) = seen.unmark(Some(&name)) {
            return Ok(unmark);
        }
        if !pod.marked {
            return Ok(Action::Mark(name));
        }
        self.victim = Some((id, now));
        Ok(Action::ScaleIn { to: seen.replicas - 1, pod: name })
    }

    /// Chooses who goes.
    fn begin(&self, seen: &Seen) -> Result<Action, Option<String>> {
        let idle = seen
            .alive()
            .into_iter()
            .find(|(name, pod)| !pod.ready && seen.goes_first(pod) && seen.instance_of(name).is_none());
        if let Some((name, pod)) = idle {
            return Ok(match seen.unmark(Some(name)) {
                Some(unmark) => unmark,
                None if pod.marked => Action::ScaleIn { to: seen.replicas - 1, pod: name.to_owned() },
                None => Action::Mark(name.to_owned()),
            });
        }
        if let Some(unmark) = seen.unmark(None) {
            return Ok(unmark);
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

impl Seen {
    /// Pods that stay, for all that is known.
    fn alive(&self) -> Vec<(&str, &Pod)> {
        self.pods.iter().filter(|(_, pod)| !pod.leaving).map(|(name, pod)| (name.as_str(), pod)).collect()
    }

    fn pod_of(&self, instance: &Instance) -> Option<&Pod> {
        self.pods.get(instance.pod.as_ref()?)
    }

    fn instance_of(&self, pod: &str) -> Option<&Instance> {
        self.instances.iter().find(|it| it.here && it.pod.as_deref() == Some(pod))
    }

    /// It was cordoned to go, and went.
    fn is_gone(&self, instance: &Instance) -> bool {
        instance.cordoned == Some(By::Us) && !instance.here && self.pod_of(instance).is_none()
    }

    /// The pod of one that was cordoned to go and has not been deleted.
    fn to_go(&self, instance: &Instance) -> Option<&Pod> {
        let ours = instance.cordoned == Some(By::Us);
        self.pod_of(instance).filter(|pod| ours && !pod.leaving)
    }

    /// No pod would be deleted before this one, but for marks.
    fn goes_first(&self, pod: &Pod) -> bool {
        self.alive().iter().all(|(_, other)| pod.rank() <= other.rank())
    }

    /// A mark that is on another pod than it should be.
    fn unmark(&self, but: Option<&str>) -> Option<Action> {
        let marked = |(name, pod): &(&str, &Pod)| pod.marked && Some(*name) != but;
        self.alive().into_iter().find(marked).map(|(name, _)| Action::Unmark(name.to_owned()))
    }

    /// Whether Kubernetes has done what it was asked for, so that one replica less is one pod less.
    fn check_that_it_rests(&self) -> Result<(), Option<String>> {
        let alive = self.alive();
        if alive.len() != self.replicas as usize {
            return Err(Some(format!("there are {} pods for {} replicas", alive.len(), self.replicas)));
        }
        let templates: BTreeSet<&str> = alive.iter().map(|(_, pod)| pod.template.as_str()).collect();
        if templates.len() > 1 {
            return Err(Some("the Deployment is being rolled out".to_owned()));
        }
        let leaves = |it: &&Instance| it.here && self.pod_of(it).is_some_and(|pod| pod.leaving);
        match self.instances.iter().find(leaves) {
            Some(leaving) => Err(Some(format!("{} is being deleted", leaving.id))),
            None => Ok(()),
        }
    }

    /// Whether it can be cordoned to go: nobody else holds it, and prefill and decode are served without it.
    fn may_go(&self, instance: &Instance) -> bool {
        let first = self.pod_of(instance).is_some_and(|pod| !pod.leaving && self.goes_first(pod));
        let others = |role| self.serving(role, Some(&instance.id)) > 0;
        let spared = instance.role == Role::None || (others(Role::Prefill) && others(Role::Decode));
        instance.here && instance.cordoned.is_none() && first && spared
    }

    /// How many serve a phase, but for one.
    fn serving(&self, phase: Role, but: Option<&InstanceId>) -> usize {
        let serves = |it: &&Instance| {
            let leaving = self.pod_of(it).is_some_and(|pod| pod.leaving);
            it.here && it.cordoned.is_none() && !leaving && (it.role == phase || it.role == Role::Mixed)
        };
        self.instances.iter().filter(serves).filter(|it| Some(&it.id) != but).count()
    }

    /// Whether there are more of a role than are wanted.
    fn has_many(&self, role: Role) -> bool {
        let (prefill, decode) = match self.demand {
            Demand::Measured(Wanted { prefill, decode }) => (prefill, decode),
            Demand::Little | Demand::Unasked => (1, 1),
        };
        match role {
            Role::Prefill => self.serving(Role::Prefill, None) > prefill,
            Role::Decode => self.serving(Role::Decode, None) > decode,
            Role::Mixed | Role::None => true,
        }
    }

    fn why_nobody(&self) -> String {
        let known = self.alive().iter().any(|(name, _)| self.instance_of(name).is_some());
        if known {
            "no instance can go: others hold them, or prefill or decode would not be served".to_owned()
        } else {
            "no pod of the Deployment is an instance of the group: see `kubernetes.pod_label`".to_owned()
        }
    }
}

#[cfg(test)]
mod tests;
