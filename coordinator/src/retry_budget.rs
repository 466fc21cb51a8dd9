//! How many requests of a model may be placed again because an attempt failed: so that a fleet that fails is not given
//! several times the work. Pure: time is an argument.
//!
//! Within any time: a fifth of the requests that came, ten for each second, and what was saved up before. What is not
//! spent of the seconds is saved for one, of the requests up to [`SAVED_MOST`].
//!
//! A request may have many attempts under way, one for each of its prompts and each choice that goes alone. One fault of an
//! instance fails all that are there: its [`Share`] takes no more than one out for them.

use std::time::Duration;

use tokio::time::Instant;

/// Of each request.
const SHARE: f64 = 0.2;
const PER_SECOND: f64 = 10.0;
/// As five hundred requests bring.
const SAVED_MOST: f64 = 100.0;
/// Failures that are so far apart at most may be of one fault: as long as it takes until all of a step's have been read.
const ONE_FAULT: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    saved: f64,
    at: Instant,
}

impl RetryBudget {
    pub fn new(now: Instant) -> Self {
        Self { saved: PER_SECOND, at: now }
    }

    /// A request has come.
    pub fn request(&mut self) {
        self.saved = (self.saved + SHARE).min(SAVED_MOST);
    }

    /// Takes one out. False: there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        if self.saved < PER_SECOND {
            self.saved = (self.saved + seconds * PER_SECOND).min(PER_SECOND);
        }
        // What is gathered from tenths and fifths may be a little less than the whole.
        let is_there = self.saved > 1.0 - 1e-6;
        self.saved -= f64::from(is_there);
        is_there
    }
}

/// What one request has been granted of a budget, for all of its attempts.
#[derive(Debug, Default)]
pub struct Share {
    granted: Option<Instant>,
    refused: bool,
}

/// Whether a request may be placed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    Granted,
    /// `first`: of the request.
    Refused {
        first: bool,
    },
}

impl Share {
    /// For an attempt that was placed at `placed` and has failed. Those that were under way when the last was granted may
    /// have failed by the same fault; one that was placed afterwards has met another.
    pub fn take(&mut self, budget: &mut RetryBudget, placed: Instant, now: Instant) -> Grant {
        let same =
            |granted: Instant| placed <= granted && now.saturating_duration_since(granted) <= ONE_FAULT;
        if self.granted.is_some_and(same) {
            return Grant::Granted;
        }
        if budget.take(now) {
            self.granted = Some(now);
            return Grant::Granted;
        }
        Grant::Refused { first: !std::mem::replace(&mut self.refused, true) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn taken(budget: &mut RetryBudget, now: Instant) -> usize {
        (0..1000).take_while(|_| budget.take(now)).count()
    }

    #[test]
    fn a_fifth_of_the_requests_and_ten_a_second_are_placed_again() {
        let mut now = Instant::now();
        let mut budget = RetryBudget::new(now);
        assert_eq!(taken(&mut budget, now), 10);
        (0..50).for_each(|_| budget.request());
        assert_eq!(taken(&mut budget, now), 10);
        (0..100_000).for_each(|_| budget.request());
        assert_eq!(taken(&mut budget, now), 100, "no more is saved");
        for (millis, many) in [(100, 1), (50, 0), (50, 1), (1000, 10), (60_000, 10)] {
            now += Duration::from_millis(millis);
            assert_eq!(taken(&mut budget, now), many, "after {millis} ms");
        }
        (0..250).for_each(|_| budget.request());
        now += Duration::from_secs(60);
        assert_eq!(taken(&mut budget, now), 50, "the seconds add nothing to what requests have saved");
    }

    #[test]
    fn one_fault_takes_one_of_a_request_however_many_attempts_it_fails() {
        let placed = Instant::now();
        let mut budget = RetryBudget::new(placed);
        let (mut share, fault) = (Share::default(), placed + Duration::from_millis(10));
        for later in 0..20 {
            let now = fault + Duration::from_millis(later * 40);
            assert_eq!(share.take(&mut budget, placed, now), Grant::Granted);
        }
        assert_eq!(taken(&mut budget.clone(), fault), 9);
        // What was placed since, or fails much later, has another.
        let again = fault + Duration::from_millis(50);
        assert_eq!(share.take(&mut budget, again, again), Grant::Granted);
        assert_eq!(taken(&mut budget.clone(), again), 8);
        let late = again + Duration::from_millis(1001);
        taken(&mut budget, late);
        assert_eq!(share.take(&mut budget, placed, late), Grant::Refused { first: true });
        assert_eq!(share.take(&mut budget, placed, late), Grant::Refused { first: false });
        // Others' are their own.
        assert_eq!(Share::default().take(&mut budget, placed, late), Grant::Refused { first: true });
    }

    proptest! {
        /// Each step: after so many milliseconds so many requests come and so many want to be placed again.
        #[test]
        fn no_more_is_placed_again_than_that(steps in prop::collection::vec((0u64..3000, 0u32..200, 0u32..100), 1..100)) {
            let began = Instant::now();
            let (mut budget, mut now) = (RetryBudget::new(began), began);
            let (mut requests, mut taken) = (0.0, 0.0);
            for (millis, came, wanted) in steps {
                now += Duration::from_millis(millis);
                (0..came).for_each(|_| budget.request());
                requests += f64::from(came);
                taken += (0..wanted).filter(|_| budget.take(now)).count() as f64;
                let seconds = (now - began).as_secs_f64();
                prop_assert!(taken <= SHARE * requests + PER_SECOND * (1.0 + seconds) + 1e-3);
            }
        }
    }
}
