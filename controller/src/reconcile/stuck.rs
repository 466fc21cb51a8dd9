//! Moves that do not come to their end: an instance that never takes its role on, a record that the store refuses.
//!
//! Such an instance is shown as stuck, with the reason, and the others of its group are planned without it. It counts
//! again once it has arrived; a refused record is tried again, when nobody else of the group is on the way.

use std::time::Duration;

use baton_proto::InstanceId;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Reconciler, Record};
use crate::{
    fleet::{Member, Stuck},
    journal::NewsKind,
};

/// Before a record that the store refused is written again.
pub(super) const REFUSED_AGAIN: Duration = Duration::from_secs(10);

impl Reconciler {
    /// How long an instance may take from an order to its role.
    pub(super) fn patience(&self, member: &Member) -> Duration {
        let drain = member.desired.as_ref().and_then(|desired| desired.drain);
        drain.unwrap_or(self.roles_config.drain) + self.roles_config.switch_grace
    }

    /// To be called after anything that concerns the member's way to its role.
    pub(super) fn follow(&mut self, id: &InstanceId, now: Instant) {
        let Some(member) = self.members.get(id) else { return };
        let overdue = now + self.patience(member);
        let Some(member) = self.members.get_mut(id) else { return };
        let under_way = member.knows_its_role() && member.is_on_its_way() && !member.is_loading();
        if under_way {
            member.late_since.get_or_insert(now);
            self.check_at = self.check_at.min(overdue);
        } else {
            member.late_since = None;
            if matches!(member.stuck, Some(Stuck::Overdue(_))) {
                info!(instance = %id, "no longer stuck");
                member.stuck = None;
                self.plan_due = true;
            }
        }
    }

    /// Notices moves that should have ended, and takes refused records up again.
    pub(super) fn find_stuck(&mut self, now: Instant) {
        let late = |member: &Member| {
            let patience = self.patience(member);
            let overdue = member.late_since.is_some_and(|since| now.duration_since(since) >= patience);
            (overdue && member.stuck.is_none()).then_some(Stuck::Overdue(patience))
        };
        let late: Vec<_> =
            self.members.iter().filter_map(|(id, member)| Some((id.clone(), late(member)?))).collect();
        for (id, stuck) in late {
            warn!(instance = %id, %stuck, "others go on without an instance");
            self.tell(NewsKind::InstanceStuck, &id, stuck.to_string());
            if let Some(member) = self.members.get_mut(&id) {
                member.stuck = Some(stuck);
            }
            self.plan_due = true;
        }
        let due: Vec<_> =
            self.refused.iter().filter(|(_, at)| **at <= now).map(|(record, _)| record.clone()).collect();
        for record in due {
            if let Record::Role(id) = &record {
                if self.others_are_on_their_way(id) {
                    self.refused.insert(record, now + REFUSED_AGAIN);
                    continue;
                }
                if let Some(member) = self.members.get_mut(id) {
                    member.stuck = None;
                }
            }
            self.refused.remove(&record);
            self.mark(record);
        }
    }

    fn others_are_on_their_way(&self, id: &InstanceId) -> bool {
        let Some(group) = self.members.get(id).map(|member| &member.spec.group) else { return false };
        self.members.iter().any(|(other, member)| {
            other != id && member.spec.group == *group && member.stuck.is_none() && member.is_on_its_way()
        })
    }

    /// The store will not have a record.
    pub(super) fn refused(&mut self, record: Record, reason: String, now: Instant) {
        if let Record::Role(id) = &record
            && let Some(member) = self.members.get_mut(id)
        {
            let stuck = Stuck::Unwritable(reason);
            member.stuck = Some(stuck.clone());
            self.plan_due = true;
            let id = id.clone();
            self.tell(NewsKind::InstanceStuck, &id, stuck.to_string());
        }
        self.refused.insert(record, now + REFUSED_AGAIN);
        self.check_at = self.check_at.min(now + REFUSED_AGAIN);
    }
}
