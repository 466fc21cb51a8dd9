//! How many serving instances of a group are given another role in a while: `roles.moves_most` in `roles.moves_period`.
//!
//! Each move empties an instance, so a plan that changes its mind, or a ratio that is set far from the present one, is
//! followed at a bounded pace, whatever the policy. Three kinds of moves are made, and counted, without asking for room:
//! one that brings a phase which nobody else serves who is to go on serving, one to the role that an operator pinned the
//! instance to, and those of a rebalance. Who does not serve, or is to serve no more, is not moved in this sense.
//!
//! A new leader begins with no move made.

use std::{collections::VecDeque, ops::Add, time::Duration};

use baton_proto::{GroupName, Role};
use tokio::time::Instant;

use super::{Reconciler, cover::phases};
use crate::{
    fleet::Member,
    plan::{Split, compatible},
};

/// When a group's last moves were made, the latest last; as many as there may be in a period.
#[derive(Debug, Clone, Default)]
pub(super) struct Moves(VecDeque<Instant>);

impl Moves {
    pub(super) fn made(&mut self, now: Instant, most: usize) {
        self.0.push_back(now);
        while self.0.len() > most {
            self.0.pop_front();
        }
    }

    fn budget(&self, now: Instant, most: usize, period: Duration) -> Budget {
        let left = |at: &Instant| (*at + period).saturating_duration_since(now);
        let recent: Vec<Duration> = self.0.iter().map(left).filter(|left| !left.is_zero()).collect();
        let wait = recent.first().copied().filter(|_| recent.len() >= most).unwrap_or_default();
        Budget { made: recent.len(), most, period, wait }
    }
}

/// What a group has had of the moves that it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// In the last `period`; at most `most` are counted.
    pub made: usize,
    pub most: usize,
    pub period: Duration,
    /// Until the next may be made; zero = now.
    pub wait: Duration,
}

impl Reconciler {
    pub(super) fn budget_of(&self, group: &GroupName, now: Instant) -> Budget {
        let (most, period) = (self.roles_config.moves_most, self.roles_config.moves_period);
        self.groups.get(group).map_or_else(
            || Moves::default().budget(now, most, period),
            |group| group.moves.budget(now, most, period),
        )
    }

    /// Whether a serving member of the group may be given the role now, as far as the number of moves goes.
    pub(super) fn has_room(&self, budget: &Budget, group: &[&Member], member: &Member, role: Role) -> bool {
        let asked_for = || {
            let intent = self.intents.get(&member.spec.id);
            let rebalances = self.groups.get(&member.spec.group).is_some_and(|group| group.rebalance > 0);
            rebalances
                || intent.and_then(|intent| intent.pinned.as_ref()).is_some_and(|pinned| pinned.role == role)
        };
        role == Role::None || budget.wait.is_zero() || asked_for() || self.is_needed(group, member, role)
    }

    /// Whether the role has a phase that the member does not serve yet, nor anyone else of those who are to go on.
    fn is_needed(&self, group: &[&Member], member: &Member, role: Role) -> bool {
        let serves = |other: &&&Member| {
            other.is_serving()
                && other.stuck.is_none()
                && compatible(&other.spec, &member.spec)
                && (other.spec.id == member.spec.id || self.aside(other).is_none())
        };
        let served = group.iter().filter(serves).map(|other| phases(other.beat.role));
        let served = served.fold(Split::default(), |sum, more| sum.with(more, usize::add));
        let brings = phases(role);
        (brings.prefill > 0 && served.prefill == 0) || (brings.decode > 0 && served.decode == 0)
    }
}
