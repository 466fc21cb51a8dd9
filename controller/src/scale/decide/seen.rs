//! A group and its Deployment at one time, and what follows from that alone. Pure.
//!
//! Kubernetes deletes pods in an order of its own: those without a node first, then those that do not run, then those that
//! are not ready ([`Pod::rank`]). Among pods of a rank it may take any.

use std::collections::{BTreeMap, BTreeSet};

use baton_proto::{InstanceId, Role};

use crate::plan::Split;

/// What a group wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    Measured(Split),
    /// Too little happens for it to be measured.
    Little,
    /// Too little is known of it, but that its prompts wait for too long.
    Congested,
    /// It is divided by a ratio: nobody measures, and people say how many it has.
    Unasked,
    /// Nothing is planned for it, as it has no members.
    Unknown,
}

/// A group and its Deployment, at one time.
#[derive(Debug, Clone)]
pub struct Seen {
    pub demand: Demand,
    /// That the Deployment is to have.
    pub replicas: u32,
    /// Of the Deployment, by name.
    pub pods: BTreeMap<String, Pod>,
    /// Of the group, and those that are cordoned and gone.
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
}

impl Pod {
    /// Pods of a lower rank are deleted before those of a higher one.
    pub(super) fn rank(&self) -> (bool, bool, bool) {
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
    /// It does badly, and is given nothing to do for that.
    pub quarantined: bool,
    pub cordoned: Option<By>,
}

/// Who took an instance out of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// This, to scale in.
    Us,
    Others,
}

impl Seen {
    /// Pods that stay, for all that is known.
    pub(super) fn alive(&self) -> Vec<(&str, &Pod)> {
        self.pods.iter().filter(|(_, pod)| !pod.leaving).map(|(name, pod)| (name.as_str(), pod)).collect()
    }

    /// The pods of which Kubernetes would delete one.
    pub(super) fn first_to_go(&self) -> Vec<(&str, &Pod)> {
        let mut alive = self.alive();
        let lowest = alive.iter().map(|(_, pod)| pod.rank()).min();
        alive.retain(|(_, pod)| Some(pod.rank()) == lowest);
        alive
    }

    fn pod_of(&self, instance: &Instance) -> Option<&Pod> {
        self.pods.get(instance.pod.as_ref()?)
    }

    fn instances_of(&self, pod: &str) -> impl Iterator<Item = &Instance> {
        self.instances.iter().filter(move |it| it.pod.as_deref() == Some(pod))
    }

    /// Whether nothing would be missed if the pod were deleted: it is not ready, nobody else holds it, and its instance is
    /// drained, to go, or there is none. One without an instance may be that of one which people hold and which is gone, if
    /// nobody knows any more what pod that had.
    pub(super) fn is_spare(&self, name: &str, pod: &Pod) -> bool {
        let spare = |it: &Instance| match it.cordoned {
            Some(By::Us) => it.drained || !it.here,
            Some(By::Others) => false,
            None => !it.here,
        };
        let lost = |it: &Instance| it.cordoned == Some(By::Others) && it.pod.is_none();
        let may_be_lost = || self.instances_of(name).next().is_none() && self.instances.iter().any(lost);
        !pod.ready && self.instances_of(name).all(spare) && !may_be_lost()
    }

    /// It was cordoned to go, and went.
    pub(super) fn is_gone(&self, instance: &Instance) -> bool {
        instance.cordoned == Some(By::Us) && !instance.here && self.pod_of(instance).is_none()
    }

    /// The pod of one that was cordoned to go and has not been deleted.
    pub(super) fn to_go(&self, instance: &Instance) -> Option<&Pod> {
        let ours = instance.cordoned == Some(By::Us);
        self.pod_of(instance).filter(|pod| ours && !pod.leaving)
    }

    /// Instances that have a pod and serve nothing because they do badly.
    pub(super) fn quarantined(&self) -> u32 {
        let stays = |it: &&Instance| it.quarantined && self.pod_of(it).is_some_and(|pod| !pod.leaving);
        u32::try_from(self.instances.iter().filter(stays).count()).unwrap_or(u32::MAX)
    }

    /// Whether Kubernetes has done what it was asked for, so that one replica less is one pod less.
    pub(super) fn check_that_it_rests(&self) -> Result<(), Option<String>> {
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

    /// Whether it can be cordoned to go: nobody else holds it, no pod would be deleted before its own, and prefill and
    /// decode are served without it.
    pub(super) fn may_go(&self, instance: &Instance) -> bool {
        let goes_first = |pod: &Pod| self.first_to_go().iter().any(|(_, first)| first.rank() == pod.rank());
        let first = self.pod_of(instance).is_some_and(|pod| !pod.leaving && goes_first(pod));
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
    pub(super) fn has_many(&self, role: Role) -> bool {
        let (prefill, decode) = match self.demand {
            Demand::Measured(Split { prefill, decode }) => (prefill, decode),
            Demand::Little | Demand::Congested | Demand::Unasked | Demand::Unknown => (1, 1),
        };
        match role {
            Role::Prefill => self.serving(Role::Prefill, None) > prefill,
            Role::Decode => self.serving(Role::Decode, None) > decode,
            Role::Mixed | Role::None => true,
        }
    }

    /// For people: why nobody can be chosen to go.
    pub(super) fn why_nobody(&self) -> String {
        let known = self.alive().iter().any(|(name, _)| self.instances_of(name).any(|it| it.here));
        if known {
            "no instance can go: others hold them, or prefill or decode would not be served".to_owned()
        } else {
            "no pod of the Deployment is an instance of the group: see `kubernetes.pod_label`".to_owned()
        }
    }
}
