//! When a process that died is started again. Pure: deaths in, decisions out.

use std::time::Duration;

/// A process that lived this long was well: its next death counts as the first again.
pub(super) const HEALTHY_AFTER: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Deaths in a row, before the cluster has ever served, after which the cause is taken to be permanent.
pub(super) const DEATHS_AT_START: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    StartAfter(Duration),
    /// It has never worked and will not by being tried again.
    GiveUp {
        deaths: u32,
    },
}

/// What is remembered of one process between its lives.
#[derive(Debug, Default)]
pub(super) struct RestartPolicy {
    deaths_in_a_row: u32,
}

impl RestartPolicy {
    /// A process died after `lived`. A cluster that has served once is never given up: what broke may mend.
    pub(super) fn died(&mut self, lived: Duration, cluster_has_served: bool) -> Decision {
        if lived >= HEALTHY_AFTER {
            self.deaths_in_a_row = 0;
        }
        self.deaths_in_a_row = self.deaths_in_a_row.saturating_add(1);
        if !cluster_has_served && self.deaths_in_a_row >= DEATHS_AT_START {
            return Decision::GiveUp { deaths: self.deaths_in_a_row };
        }
        let doublings = (self.deaths_in_a_row - 1).min(16);
        Decision::StartAfter(FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(5);

    #[test]
    fn pauses_double_up_to_a_bound_and_begin_anew_after_a_healthy_life() {
        let mut policy = RestartPolicy::default();
        let pauses: Vec<u64> = (0..9)
            .map(|_| match policy.died(SHORT, true) {
                Decision::StartAfter(pause) => pause.as_millis() as u64,
                Decision::GiveUp { .. } => panic!("a cluster that served is never given up"),
            })
            .collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(policy.died(HEALTHY_AFTER, true), Decision::StartAfter(FIRST_PAUSE));
        assert_eq!(policy.died(SHORT, true), Decision::StartAfter(2 * FIRST_PAUSE));
    }

    #[test]
    fn what_never_worked_is_given_up() {
        let mut policy = RestartPolicy::default();
        for _ in 1..DEATHS_AT_START {
            assert!(matches!(policy.died(SHORT, false), Decision::StartAfter(_)));
        }
        assert_eq!(policy.died(SHORT, false), Decision::GiveUp { deaths: DEATHS_AT_START });
    }

    #[test]
    fn a_long_load_is_not_held_against_it() {
        let mut policy = RestartPolicy::default();
        for _ in 0..10 {
            assert!(matches!(policy.died(HEALTHY_AFTER, false), Decision::StartAfter(_)));
        }
    }

    #[test]
    fn any_number_of_deaths_is_survived() {
        let mut policy = RestartPolicy { deaths_in_a_row: u32::MAX };
        assert_eq!(policy.died(SHORT, true), Decision::StartAfter(LONGEST_PAUSE));
    }
}
