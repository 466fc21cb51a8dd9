//! Instances beside their like: who is slow, and whose failures are its own.
//!
//! What ails most of a role's instances is not the fault of one of them: a request that no model survives, a peer that
//! is gone, a network that is down. So a share of failures counts against an instance only if it stands out, and what
//! breaks between two instances only against the one that has clearly more of it than anybody at the other end.

use std::collections::BTreeMap;

use baton_proto::{Phase, Role};
use tokio::time::Instant;

use super::signals::Signals;
use crate::steps::Steps;

/// Fewer others of the same role than this do not say how long a step takes.
const FEWEST_PEERS: usize = 3;
/// A share stands out if it is this many times the median of the others of its role.
const STANDS_OUT: f64 = 2.0;
/// What breaks is this end's fault if its share is this many times the largest at the other end.
const THIS_END: f64 = 1.5;

/// Figures of the instances of one role in one group, each in ascending order.
#[derive(Debug, Default)]
struct Figures {
    step_seconds: Vec<f64>,
    step_sequences: Vec<f64>,
    failing: Vec<f64>,
    losing: Vec<f64>,
}

/// All instances that are heard of, at one time.
#[derive(Debug, Default)]
pub(super) struct Peers<'a>(BTreeMap<(&'a str, Role), Figures>);

impl<'a> Peers<'a> {
    /// Of groups and their instances' signals.
    pub(super) fn new(now: Instant, members: impl Iterator<Item = (&'a str, &'a Signals)>) -> Self {
        let mut by_role: BTreeMap<_, Figures> = BTreeMap::new();
        for (group, signals) in members {
            let figures = by_role.entry((group, signals.beat.role)).or_default();
            let (failing, losing) = signals.shares(now);
            figures.failing.push(failing);
            figures.losing.push(losing);
            if let Some(steps) = steps_of(signals, now) {
                figures.step_seconds.push(steps.seconds);
                figures.step_sequences.push(steps.sequences);
            }
        }
        for figures in by_role.values_mut() {
            let Figures { step_seconds, step_sequences, failing, losing } = figures;
            [step_seconds, step_sequences, failing, losing]
                .into_iter()
                .for_each(|figures| figures.sort_unstable_by(f64::total_cmp));
        }
        Self(by_role)
    }

    /// How many times as long as its peers' a decode step of this instance takes; none if there are too few to tell.
    ///
    /// A larger batch is allowed a time in proportion, which is the most that it can cost.
    pub(super) fn slowness(&self, now: Instant, group: &str, signals: &Signals) -> Option<f64> {
        let own = steps_of(signals, now)?;
        let figures = self.0.get(&(group, signals.beat.role))?;
        if figures.step_seconds.len() <= FEWEST_PEERS {
            return None;
        }
        let seconds = median_of_others(&figures.step_seconds, own.seconds)?;
        let sequences = median_of_others(&figures.step_sequences, own.sequences)?;
        Some(own.seconds / (seconds * (own.sequences / sequences).max(1.0)))
    }

    /// Whether it is this instance that fails, and not what it is asked for.
    pub(super) fn fails_alone(&self, now: Instant, group: &str, signals: &Signals) -> bool {
        let figures = self.0.get(&(group, signals.beat.role));
        figures.is_none_or(|figures| stands_out(&figures.failing, signals.shares(now).0))
    }

    /// Whether the handoffs break at this end.
    pub(super) fn loses_alone(&self, now: Instant, group: &str, signals: &Signals) -> bool {
        let (role, own) = (signals.beat.role, signals.shares(now).1);
        let others = Role::ALL.into_iter().filter(|other| *other != role);
        let other_end = others
            .filter_map(|other| self.0.get(&(group, other))?.losing.last())
            .fold(0.0, |a, b| f64::max(a, *b));
        let figures = self.0.get(&(group, role));
        own >= other_end * THIS_END && figures.is_none_or(|figures| stands_out(&figures.losing, own))
    }
}

/// Instances on their way from one role to another are not compared.
fn steps_of(signals: &Signals, now: Instant) -> Option<Steps> {
    signals.steps(now).filter(|_| signals.beat.phase == Phase::Ready)
}

fn stands_out(sorted: &[f64], own: f64) -> bool {
    median_of_others(sorted, own).is_none_or(|median| own >= median * STANDS_OUT)
}

/// The lower median of what is left without one `own`, which is among them; none if nothing is.
fn median_of_others(sorted: &[f64], own: f64) -> Option<f64> {
    let middle = sorted.len().checked_sub(2)? / 2;
    let index = sorted.partition_point(|value| *value < own);
    sorted.get(if middle < index { middle } else { middle + 1 }).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_leaves_oneself_out() {
        assert_eq!(median_of_others(&[], 1.0), None);
        assert_eq!(median_of_others(&[1.0], 1.0), None);
        assert_eq!(median_of_others(&[1.0, 9.0], 1.0), Some(9.0));
        assert_eq!(median_of_others(&[1.0, 9.0], 9.0), Some(1.0));
        assert_eq!(median_of_others(&[1.0, 2.0, 3.0, 9.0], 9.0), Some(2.0));
        assert_eq!(median_of_others(&[1.0, 2.0, 3.0, 9.0], 1.0), Some(3.0));
        assert_eq!(median_of_others(&[2.0, 2.0, 2.0], 2.0), Some(2.0));
    }
}
