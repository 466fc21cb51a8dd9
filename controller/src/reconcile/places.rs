//! What time ends: leases of the silent, places of the lost, memories of the gone.

use std::time::Duration;

use baton_proto::InstanceId;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Command, Reconciler, Record, Remembered};
use crate::fleet::{Contact, Member};
use crate::journal::NewsKind;

/// Never shorter than this, so that a wait of zero cannot spin.
pub(super) const SHORTEST_WAIT: Duration = Duration::from_millis(1);

impl Reconciler {
    /// Leases do not run while this process is stopped, or starved: nobody could be heard meanwhile.
    pub(super) fn make_up_for_a_stall(&mut self, now: Instant) {
        let asleep = now.duration_since(self.awake);
        self.awake = now;
        if asleep < self.sessions_config.lease / 2 {
            return;
        }
        let listening = self.members.values_mut().filter(|member| member.is_registered());
        let mut made_up_for = 0;
        for member in listening {
            member.last_beat = (member.last_beat + asleep).min(now);
            made_up_for += 1;
        }
        if made_up_for > 0 {
            warn!(
                ?asleep,
                instances = made_up_for,
                "this controller stood still: leases are longer by that time"
            );
        }
    }

    /// Ends registrations whose lease has run out.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Command> {
        let lease = self.sessions_config.lease;
        let mut commands = Vec::new();
        let silent: Vec<InstanceId> = self
            .members
            .iter()
            .filter(|(_, member)| member.is_registered() && now.duration_since(member.last_beat) >= lease)
            .map(|(id, _)| id.clone())
            .collect();
        for id in silent {
            let Some(member) = self.members.get_mut(&id) else { continue };
            let since = match member.contact {
                Contact::Silent { since } => since,
                _ => member.last_beat,
            };
            if let Contact::Connected(session) = member.contact {
                self.sessions.remove(&session);
                commands.push(Command::Close(session));
            }
            let silent = now.duration_since(member.last_beat);
            info!(instance = %id, ?silent, "an instance is lost");
            member.contact = Contact::Lost { since };
            self.tell(NewsKind::InstanceLost, &id, format!("silent for {:.1} s", silent.as_secs_f64()));
            self.unregister(&id);
        }
        commands
    }

    /// Gives up the places of those that did not come back in time, and in the end the memory of their roles.
    pub(super) fn give_up(&mut self, now: Instant) {
        let grace = self.roles_config.lost_grace;
        let overdue = |member: &Member| matches!(member.contact, Contact::Lost { since } if now.duration_since(since) >= grace);
        let gone: Vec<_> =
            self.members.iter().filter(|(_, member)| overdue(member)).map(|(id, _)| id.clone()).collect();
        for id in gone {
            info!(instance = %id, "its place is given up");
            self.plan_due = true;
            if let Some(member) = self.members.remove(&id) {
                self.remember(id, member, now);
            }
        }
        let memory = self.roles_config.memory;
        let faded = |remembered: &Remembered| now.duration_since(remembered.since) >= memory;
        let forgotten: Vec<_> =
            self.remembered.iter().filter(|(_, it)| faded(it)).map(|(id, _)| id.clone()).collect();
        forgotten.iter().for_each(|id| self.forget(id));
    }

    pub(super) fn remember(&mut self, id: InstanceId, member: Member, now: Instant) {
        if let Some(desired) = member.desired {
            let remembered = Remembered { desired, stored: member.stored, since: now };
            self.remembered.insert(id, remembered);
            self.check_at = self.check_at.min(now + self.roles_config.memory);
            // Names that never come back must not fill the store: the longest gone is forgotten first.
            if self.remembered.len() > self.sessions_config.max_instances
                && let Some(oldest) = self.remembered.iter().min_by_key(|(_, gone)| gone.since)
            {
                let oldest = oldest.0.clone();
                self.forget(&oldest);
            }
        }
    }

    fn forget(&mut self, id: &InstanceId) {
        self.remembered.remove(id);
        self.mark(Record::Role(id.clone()));
    }

    /// When the next lease, place, move or memory may end. Later beats only put it off, so it need not follow them.
    pub(super) fn next_check(&self, now: Instant) -> Instant {
        let leases = self.members.values().map(|member| match member.contact {
            Contact::Lost { since } => since + self.roles_config.lost_grace,
            _ => member.last_beat + self.sessions_config.lease,
        });
        let moves = self.members.values().filter(|member| member.stuck.is_none());
        let moves = moves.filter_map(|member| Some(member.late_since? + self.patience(member)));
        let refused = self.refused.values().copied();
        let memories = self.remembered.values().map(|remembered| remembered.since + self.roles_config.memory);
        // Often enough to tell a stall from a quiet time.
        let often = now + self.sessions_config.lease / 4;
        let never = if self.members.is_empty() { now + Duration::from_secs(24 * 3600) } else { often };
        leases
            .chain(memories)
            .chain(moves)
            .chain(refused)
            .chain([never])
            .min()
            .unwrap_or(never)
            .max(now + SHORTEST_WAIT)
    }
}
