//! Whether one instance is to be given requests, by how those that it was given ended. Pure: time is an argument.
//!
//! States: *closed* -> *open* (it failed too much, or is stuck) -> *half open*, once its pause is over: one request is let
//! through, and another after as long a pause again if nothing comes of it -> closed if it brings a token, or open if it
//! fails, for twice as long. One that fails again soon after it was closed is open for twice as long, too.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// So many faults within so long open it.
const FAULTS: usize = 5;
pub(super) const WITHIN: Duration = Duration::from_secs(10);
/// Of the last so many attempts, no older than that, more than half open it too, if they are enough to tell.
const ATTEMPTS_KEPT: usize = 20;
const ATTEMPTS_LEAST: usize = 10;
const ATTEMPTS_WITHIN: Duration = Duration::from_secs(60);
/// One that could have been tried for so long and was not is gone, most likely.
const UNWANTED: Duration = Duration::from_secs(600);
const PAUSE_LEAST: Duration = Duration::from_secs(1);
const PAUSE_MOST: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// A request has been let through then; the next one is at `next`.
    HalfOpen {
        since: Instant,
        next: Instant,
    },
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Breaker {
    state: State,
    /// When the last [`FAULTS`] came.
    faults: VecDeque<Instant>,
    /// When the last attempts ended, and whether they failed.
    attempts: VecDeque<(Instant, bool)>,
    /// For how long it was open last; zero = never.
    pause: Duration,
    /// When it was closed last.
    closed: Option<Instant>,
}

impl Breaker {
    /// Whether a request may be placed there.
    pub fn admits(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open { until: then } | State::HalfOpen { next: then, .. } => now >= then,
        }
    }

    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// For how long it was open last.
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// A request has been booked there, be it for want of anybody else. True: it is the one that is let through.
    pub fn booked(&mut self, now: Instant) -> bool {
        let is_trial = !self.is_closed() && self.admits(now);
        if is_trial {
            self.state = State::HalfOpen { since: now, next: now + self.pause };
        }
        is_trial
    }

    /// The one that was let through then has not been sent: another may be.
    pub fn unsent(&mut self, booked: Instant) {
        if matches!(self.state, State::HalfOpen { since, .. } if since == booked) {
            self.state = State::Open { until: booked };
        }
    }

    /// An attempt has failed there that was placed at `placed`. True: that opens it.
    pub fn fault(&mut self, placed: Instant, now: Instant) -> bool {
        match self.state {
            // It was placed there before.
            State::Open { .. } => return false,
            State::HalfOpen { since, .. } if placed < since => return false,
            State::HalfOpen { .. } => {}
            State::Closed => {
                self.faults.push_back(now);
                if self.faults.len() > FAULTS {
                    self.faults.pop_front();
                }
                self.ended(now, true);
                if !self.fails_too_much(now) {
                    return false;
                }
            }
        }
        self.open(now);
        true
    }

    /// It does not get on. True: that opens it; else it is open, and its pause begins anew.
    pub fn stuck(&mut self, now: Instant) -> bool {
        let opens = !matches!(self.state, State::Open { .. });
        if opens {
            self.open(now);
        }
        self.state = State::Open { until: now + self.pause };
        opens
    }

    fn open(&mut self, now: Instant) {
        let again = !self.is_closed() || self.closed.is_some_and(|closed| now < closed + PAUSE_MOST);
        self.pause = if again { self.pause * 2 } else { PAUSE_LEAST }.clamp(PAUSE_LEAST, PAUSE_MOST);
        self.state = State::Open { until: now + self.pause };
        self.faults.clear();
        self.attempts.clear();
    }

    /// An attempt has brought a token there that was placed at `placed`. True: that closes it.
    pub fn success(&mut self, placed: Instant, now: Instant) -> bool {
        match self.state {
            State::Closed => self.ended(now, false),
            // It was placed there before.
            State::Open { .. } => {}
            State::HalfOpen { since, .. } if placed < since => {}
            State::HalfOpen { .. } => {
                (self.state, self.closed) = (State::Closed, Some(now));
                return true;
            }
        }
        false
    }

    /// Whether it is as good as new.
    pub fn is_forgotten(&self, now: Instant) -> bool {
        let past = |then: &Instant| now.saturating_duration_since(*then) > ATTEMPTS_WITHIN;
        match self.state {
            State::Closed => self.closed.iter().all(past) && self.attempts.iter().all(|(at, _)| past(at)),
            State::Open { until: then } | State::HalfOpen { next: then, .. } => {
                now.saturating_duration_since(then) > UNWANTED
            }
        }
    }

    fn ended(&mut self, now: Instant, failed: bool) {
        self.attempts.push_back((now, failed));
        if self.attempts.len() > ATTEMPTS_KEPT {
            self.attempts.pop_front();
        }
    }

    fn fails_too_much(&self, now: Instant) -> bool {
        let since = |then: Instant| now.saturating_duration_since(then);
        let many =
            self.faults.len() == FAULTS && self.faults.front().is_some_and(|first| since(*first) <= WITHIN);
        let lately = || self.attempts.iter().filter(|(at, _)| since(*at) <= ATTEMPTS_WITHIN);
        let (all, failed) = (lately().count(), lately().filter(|(_, failed)| *failed).count());
        many || (all >= ATTEMPTS_LEAST && 2 * failed > all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Faults at these times, in seconds from `began`; whether the last opens it.
    fn after_faults(began: Instant, times: &[u32]) -> (Breaker, bool) {
        let mut breaker = Breaker::default();
        let opened = times.iter().map(|&at| breaker.fault(began + at * SECOND, began + at * SECOND)).last();
        (breaker, opened.unwrap_or(false))
    }

    #[test]
    fn five_faults_within_ten_seconds_open_it() {
        let began = Instant::now();
        let cases: [(&[u32], bool); 5] = [
            (&[0, 0, 0, 0], false),
            (&[0, 0, 0, 0, 0], true),
            (&[0, 2, 5, 7, 10], true),
            (&[0, 2, 5, 7, 11], false),
            (&[0, 2, 5, 7, 11, 12], true),
        ];
        for (times, opens) in cases {
            let (breaker, opened) = after_faults(began, times);
            assert_eq!((opened, breaker.is_closed()), (opens, !opens), "{times:?}");
        }
    }

    #[test]
    fn slow_faults_open_it_if_they_are_more_than_half_of_enough() {
        let began = Instant::now();
        for (period, opens) in [(2, false), (3, true)] {
            let mut breaker = Breaker::default();
            // A fault every third second at most, so that five take longer than ten seconds.
            let opened = (0..20).any(|turn| {
                let now = began + turn * 3 * SECOND;
                if turn % period == 0 {
                    breaker.success(now, now);
                    return false;
                }
                breaker.fault(now, now)
            });
            assert_eq!(opened, opens, "of {period}, {} fail", period - 1);
        }
        let (_, opened) = after_faults(began, &[0, 3, 6, 9, 12, 15, 18, 21, 24]);
        assert!(!opened, "nine are too few to tell");
        let (_, opened) = after_faults(began, &[0, 3, 6, 9, 12, 15, 18, 21, 24, 27]);
        assert!(opened);
        let (_, opened) = after_faults(began, &[0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70]);
        assert!(!opened, "those of a minute ago count no more");
    }

    #[test]
    fn half_open_lets_one_through_and_a_token_closes_it() {
        let began = Instant::now();
        let (mut breaker, _) = after_faults(began, &[0; 5]);
        let just_before = began + SECOND - Duration::from_nanos(1);
        assert!(!breaker.admits(began) && !breaker.admits(just_before));
        breaker.booked(just_before);
        assert!(
            !breaker.success(just_before, just_before),
            "what was placed before, or for want of others, is no trial"
        );
        let now = began + SECOND;
        assert!(breaker.admits(now));
        breaker.booked(now);
        assert!(!breaker.admits(now) && !breaker.is_closed());
        assert!(breaker.admits(now + SECOND), "nothing came of the first");
        assert!(breaker.success(now, now));
        assert!(breaker.admits(now) && breaker.is_closed());
        assert!(!breaker.fault(now, now), "one fault is none");
    }

    #[test]
    fn what_is_not_sent_is_no_trial() {
        let began = Instant::now();
        let (mut breaker, _) = after_faults(began, &[0; 5]);
        let now = began + SECOND;
        assert!(breaker.booked(now) && !breaker.booked(now));
        breaker.unsent(now);
        assert!(breaker.admits(now) && !breaker.is_closed());
        // Nothing has come of the first when the second is let through.
        let (first, second) = (now + SECOND, now + 2 * SECOND);
        assert!(breaker.booked(first) && breaker.booked(second));
        breaker.unsent(first);
        assert!(!breaker.admits(second) && breaker.success(second, second));
        breaker.unsent(second);
        assert!(breaker.is_closed());
    }

    #[test]
    fn the_pause_doubles_up_to_a_minute_and_is_forgotten_after_one() {
        let mut now = Instant::now();
        let (mut breaker, _) = after_faults(now, &[0; 5]);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(breaker.pause(), pause * SECOND);
            assert!(!breaker.admits(now + pause * SECOND - Duration::from_millis(1)));
            now += pause * SECOND;
            breaker.booked(now);
            assert!(breaker.fault(now, now));
        }
        let again = |breaker: &Breaker, pause: Duration| {
            let (mut breaker, mut at) = (breaker.clone(), now + 60 * SECOND);
            breaker.booked(at);
            assert!(breaker.success(at, at));
            at += pause;
            assert!((0..5).any(|_| breaker.fault(at, at)));
            breaker.pause()
        };
        assert_eq!(again(&breaker, SECOND), 60 * SECOND, "it gets no better by a token now and then");
        assert_eq!(again(&breaker, 60 * SECOND), SECOND);
    }

    #[test]
    fn what_was_placed_before_the_trial_says_nothing_of_it() {
        let began = Instant::now();
        let (mut breaker, _) = after_faults(began, &[0; 5]);
        let now = began + SECOND;
        breaker.booked(now);
        assert!(!breaker.success(began, now) && !breaker.is_closed());
        assert!(!breaker.fault(began, now) && breaker.pause() == SECOND);
        assert!(breaker.success(now, now) && breaker.is_closed());
    }

    #[test]
    fn one_that_is_stuck_is_left_out_until_it_gets_on() {
        let began = Instant::now();
        let mut breaker = Breaker::default();
        assert!(breaker.stuck(began));
        let looks = (1..40).map(|look| began + look * SECOND / 4);
        looks.for_each(|now| assert!(!breaker.stuck(now) && !breaker.admits(now + SECOND / 4)));
        let last = began + 39 * SECOND / 4;
        assert!(!breaker.admits(last + SECOND * 99 / 100) && breaker.admits(last + SECOND));
        breaker.booked(last + SECOND);
        assert!(breaker.stuck(last + 4 * SECOND), "the trial shows that it still is");
        assert_eq!(breaker.pause(), 2 * SECOND);
    }

    #[test]
    fn one_that_serves_is_forgotten_in_the_end() {
        let began = Instant::now();
        let (mut breaker, _) = after_faults(began, &[0]);
        breaker.success(began + SECOND, began + SECOND);
        assert!(!breaker.is_forgotten(began + 60 * SECOND));
        assert!(breaker.is_forgotten(began + 62 * SECOND));
        let (breaker, _) = after_faults(began, &[0; 5]);
        assert!(!breaker.is_forgotten(began + 600 * SECOND), "it has not been tried yet");
        assert!(breaker.is_forgotten(began + 602 * SECOND), "nobody has wanted it");
    }
}
