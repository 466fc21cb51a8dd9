//! How long those who wait will wait, by how fast work was taken of late. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// What was longer ago counts for little, if there were turns enough since then.
const SPAN: Duration = Duration::from_secs(10);
/// What is left of the turns before with each turn, at least.
const KEPT_LEAST: f64 = 0.94;
/// Nothing is predicted from fewer turns.
const TURNS_LEAST: f64 = 3.0;

/// Counts only while somebody waits: what is taken at once says nothing of how fast a line gets shorter.
#[derive(Debug)]
pub(super) struct Drain {
    work: f64,
    seconds: f64,
    turns: f64,
    /// Up to when it is counted; `None`: nobody waits.
    last: Option<Instant>,
}

impl Drain {
    pub(super) const NEW: Self = Self { work: 0.0, seconds: 0.0, turns: 0.0, last: None };

    /// Somebody waits.
    pub(super) fn waits(&mut self, now: Instant) {
        self.last.get_or_insert(now);
    }

    /// Nobody waits any more.
    pub(super) fn rests(&mut self) {
        self.last = None;
    }

    /// One who waited has been taken.
    pub(super) fn took(&mut self, work: f64, now: Instant) {
        let passed = self.passed(now);
        let kept = (-passed / SPAN.as_secs_f64()).exp().max(KEPT_LEAST);
        self.work = self.work * kept + work;
        self.seconds = self.seconds * kept + passed;
        self.turns = self.turns * kept + 1.0;
        self.last = Some(now);
    }

    /// How long so much work takes to be taken; `None`: too little has been seen to tell.
    pub(super) fn takes(&self, work: f64, now: Instant) -> Option<Duration> {
        let seconds = work * (self.seconds + self.passed(now)) / self.work;
        (self.turns >= TURNS_LEAST).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    fn passed(&self, now: Instant) -> f64 {
        self.last.map_or(0.0, |last| now.saturating_duration_since(last).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ahead_takes_as_long_as_the_same_took_before() {
        let (mut drain, mut now) = (Drain::NEW, Instant::now());
        drain.waits(now);
        for turn in 0..40 {
            assert_eq!(drain.takes(10.0, now).is_some(), turn >= 4, "turn {turn}");
            now += Duration::from_millis(100);
            drain.took(2.0, now);
        }
        let took = |drain: &Drain, now| drain.takes(10.0, now).expect("much was seen").as_secs_f64();
        assert!((took(&drain, now) - 0.5).abs() < 1e-6);
        // One that is not taken for long says as much.
        assert!(took(&drain, now + Duration::from_secs(10)) > 1.0);
        // What passes while nobody waits says nothing.
        drain.rests();
        assert!((took(&drain, now + Duration::from_secs(3600)) - 0.5).abs() < 1e-6);
    }
}
