//! What operators ask for, and what of it is kept: intents by instance, targets by group.
//!
//! A change is one more thing that plans depend on: it is stored, and the next plan follows it.

use std::collections::BTreeMap;

use baton_proto::{ApiError, Cordoned, ErrorCode, GroupName, InstanceId, Intent, Pinned, Role, Targets};

use super::{Reconciler, Record};
use crate::{fleet::Member, plan::compatible};

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The instance is to take no requests.
    Cordon {
        id: InstanceId,
        cordoned: Cordoned,
        only: Only,
    },
    Uncordon {
        id: InstanceId,
        only: Only,
    },
    /// The instance is to have this role, by whom; none = the planner chooses.
    Pin {
        id: InstanceId,
        pinned: Option<Pinned>,
    },
    /// The group is to be divided by these; none = as configured.
    Divide {
        group: GroupName,
        targets: Option<Targets>,
    },
    /// Small gains are worth a move this time.
    Rebalance {
        group: GroupName,
    },
}

/// What must hold of the instance's cordon when a change of it is made: whoever asked may have looked before somebody else
/// changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Only {
    /// The last word counts.
    Always,
    /// Nobody has cordoned it.
    Free,
    /// It is cordoned by them, for that reason.
    Held { by: String, reason: String },
}

impl Only {
    /// Errors: `AlreadyExists` if it is cordoned otherwise, `NotFound` if it is not cordoned any more.
    fn check(&self, id: &InstanceId, cordoned: Option<&Cordoned>) -> Result<(), ApiError> {
        match (self, cordoned) {
            (Self::Always, _) | (Self::Free, None) => Ok(()),
            (Self::Held { by, reason }, Some(held)) if held.by == *by && held.reason == *reason => Ok(()),
            (Self::Free | Self::Held { .. }, Some(held)) => {
                let message = format!("{id} is by now cordoned by {}", held.by);
                Err(ApiError::new(ErrorCode::AlreadyExists, message))
            }
            (Self::Held { .. }, None) => {
                Err(ApiError::new(ErrorCode::NotFound, format!("{id} is not cordoned any more")))
            }
        }
    }
}

impl Reconciler {
    /// What operators wanted when an earlier leader led.
    pub fn inherit_intents(
        &mut self,
        intents: BTreeMap<InstanceId, Intent>,
        targets: BTreeMap<GroupName, Targets>,
    ) {
        (self.intents, self.targets) = (intents, targets);
        self.plan_due = true;
    }

    /// What operators want of an instance.
    pub fn intent(&self, id: &InstanceId) -> Option<&Intent> {
        self.intents.get(id)
    }

    /// What operators want, of everyone of whom they want anything.
    pub fn intents(&self) -> &BTreeMap<InstanceId, Intent> {
        &self.intents
    }

    /// Takes a change in and says where it is kept, if it is; [`Self::conclude`] is to be called afterwards. Errors:
    /// `NotFound` for an instance or a group that is not known, `InvalidArgument` for a cordon that would leave nobody
    /// to serve, and what [`Only`] says.
    pub fn change(&mut self, change: Change) -> Result<Option<Record>, ApiError> {
        let record = match change {
            Change::Cordon { id, cordoned, only } => {
                only.check(&id, self.cordon_of(&id))?;
                if !cordoned.force {
                    self.check_that_others_serve(&id)?;
                }
                self.intend(&id, |intent| {
                    // Who only gives it another time takes no reason away.
                    let before = intent.cordoned.take().filter(|_| cordoned.reason.is_empty());
                    let reason = before.map_or(cordoned.reason, |before| before.reason);
                    intent.cordoned = Some(Cordoned { reason, ..cordoned });
                })?
            }
            Change::Uncordon { id, only } => {
                only.check(&id, self.cordon_of(&id))?;
                self.intend(&id, |intent| intent.cordoned = None)?
            }
            Change::Pin { id, pinned } => {
                let pinned = pinned.filter(|pinned| pinned.role != Role::None);
                self.intend(&id, |intent| intent.pinned = pinned)?
            }
            Change::Divide { group, targets } => {
                self.check_that_it_exists(&group)?;
                match targets {
                    Some(targets) => drop(self.targets.insert(group.clone(), targets)),
                    None => drop(self.targets.remove(&group)),
                }
                Record::Targets(group)
            }
            Change::Rebalance { group } => {
                self.check_that_it_exists(&group)?;
                self.rebalance(&group);
                self.plan_due = true;
                return Ok(None);
            }
        };
        self.plan_due = true;
        self.mark(record.clone());
        Ok(Some(record))
    }

    fn cordon_of(&self, id: &InstanceId) -> Option<&Cordoned> {
        self.intents.get(id).and_then(|intent| intent.cordoned.as_ref())
    }

    fn intend(&mut self, id: &InstanceId, change: impl FnOnce(&mut Intent)) -> Result<Record, ApiError> {
        let known = self.members.contains_key(id) || self.remembered.contains_key(id);
        if !known && !self.intents.contains_key(id) {
            return Err(ApiError::new(ErrorCode::NotFound, format!("no instance {id} is known")));
        }
        let most = self.sessions_config.max_instances;
        if self.intents.len() >= most && !self.intents.contains_key(id) {
            let message = format!("operators want something of {most} instances already, which is the limit");
            return Err(ApiError::new(ErrorCode::QueueFull, message));
        }
        let intent = self.intents.entry(id.clone()).or_default();
        change(intent);
        if intent.is_empty() {
            self.intents.remove(id);
        }
        Ok(Record::Intent(id.clone()))
    }

    fn check_that_it_exists(&self, group: &GroupName) -> Result<(), ApiError> {
        if self.members.values().any(|member| member.spec.group == *group) || self.targets.contains_key(group)
        {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::NotFound, format!("no instance is in a group {group}")))
    }

    /// Somebody of its group and of its kind must be there to take the instance's place.
    fn check_that_others_serve(&self, id: &InstanceId) -> Result<(), ApiError> {
        let Some(own) = self.members.get(id).filter(|member| member.serving_role().is_some()) else {
            return Ok(());
        };
        let replaces = |member: &Member| {
            member.spec.id != *id
                && member.spec.group == own.spec.group
                && member.session().is_some()
                && !member.is_loading()
                && member.stuck.is_none()
                && self.aside(member).is_none()
                && compatible(&member.spec, &own.spec)
        };
        if self.members.values().any(replaces) {
            return Ok(());
        }
        let message = format!(
            "nobody of group {} could serve in place of {id}: start another instance first, or cordon it by force",
            own.spec.group
        );
        Err(ApiError::new(ErrorCode::InvalidArgument, message))
    }
}
