//! How much may be taken in a minute: a bucket that refills evenly, as the generic cell rate algorithm keeps it. Pure.
//!
//! What is kept is one instant, at which the bucket would be full again. Taking moves it on by what was taken; nothing
//! needs to be done as time passes. A full bucket holds a minute's worth, so that much may come at once. [`Promised`] is
//! for what is not known beforehand: a promise takes nothing yet, but nobody else can take what is promised.

use std::{num::NonZeroU32, time::Duration};

use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);

/// So much in a minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub NonZeroU32);

impl Rate {
    /// How long the bucket takes to refill by this much.
    fn time_for(self, amount: u64) -> Duration {
        let nanos = u128::from(amount) * MINUTE.as_nanos() / u128::from(self.0.get());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// What it refills by in this time.
    fn amount_in(self, time: Duration) -> u64 {
        let amount = time.as_nanos() * u128::from(self.0.get()) / MINUTE.as_nanos();
        u64::try_from(amount).unwrap_or(u64::MAX)
    }
}

/// Why nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// It is there after this time, if nobody else takes it.
    Wait(Duration),
    /// It is more than a full bucket.
    Never,
}

/// How a bucket stands, as clients are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    pub limit: u32,
    /// What could be taken now.
    pub remaining: u32,
    /// Until it is full.
    pub reset: Duration,
}

/// See the module.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bucket {
    /// None = it always was.
    full_at: Option<Instant>,
}

impl Bucket {
    /// Until it is full.
    fn lacks(&self, now: Instant) -> Duration {
        self.full_at.map_or(Duration::ZERO, |full_at| full_at.saturating_duration_since(now))
    }

    /// Takes this much, if it is there.
    pub fn take(&mut self, amount: u64, rate: Rate, now: Instant) -> Result<(), Short> {
        self.look(amount, 0, rate, now)?;
        self.force(amount, rate, now);
        Ok(())
    }

    /// Takes it even if it is not there: the next ones wait for longer.
    fn force(&mut self, amount: u64, rate: Rate, now: Instant) {
        let lacks = self.lacks(now).saturating_add(rate.time_for(amount));
        // As far ahead as an instant can be told.
        self.full_at = now.checked_add(lacks).or(self.full_at);
    }

    /// Whether this much is there beside what is spoken for.
    fn look(&self, amount: u64, spoken_for: u64, rate: Rate, now: Instant) -> Result<(), Short> {
        if amount > u64::from(rate.0.get()) {
            return Err(Short::Never);
        }
        let wanted = self.lacks(now).saturating_add(rate.time_for(spoken_for.saturating_add(amount)));
        match wanted.checked_sub(MINUTE) {
            Some(wait) if !wait.is_zero() => Err(Short::Wait(wait)),
            _ => Ok(()),
        }
    }

    pub fn level(&self, rate: Rate, now: Instant) -> Level {
        self.level_beside(0, rate, now)
    }

    fn level_beside(&self, spoken_for: u64, rate: Rate, now: Instant) -> Level {
        let reset = self.lacks(now).saturating_add(rate.time_for(spoken_for));
        let there = rate.amount_in(MINUTE.saturating_sub(reset));
        Level { limit: rate.0.get(), remaining: u32::try_from(there).unwrap_or(u32::MAX), reset }
    }
}

/// A bucket from which more is promised than was taken yet.
#[derive(Debug, Clone, Copy, Default)]
pub struct Promised {
    bucket: Bucket,
    promised: u64,
}

impl Promised {
    /// Promises this much, if it is there. Each promise is to be [kept](Self::keep), whatever comes of it.
    pub fn promise(&mut self, amount: u64, rate: Rate, now: Instant) -> Result<(), Short> {
        self.bucket.look(amount, self.promised, rate, now)?;
        self.promised += amount;
        Ok(())
    }

    /// Of what was promised so much was used, less or more. Without a rate nothing is counted.
    pub fn keep(&mut self, promised: u64, used: u64, rate: Option<Rate>, now: Instant) {
        self.promised = self.promised.saturating_sub(promised);
        if let Some(rate) = rate {
            self.bucket.force(used, rate, now);
        }
    }

    pub fn level(&self, rate: Rate, now: Instant) -> Level {
        self.bucket.level_beside(self.promised, rate, now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(per_minute: u32) -> Rate {
        Rate(NonZeroU32::new(per_minute).expect("not 0"))
    }

    #[test]
    fn a_minutes_worth_comes_at_once_and_then_evenly() {
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        for left in (0..6).rev() {
            bucket.take(1, rate(6), start).expect("is there");
            assert_eq!(bucket.level(rate(6), start).remaining, left);
        }
        assert_eq!(bucket.take(1, rate(6), start), Err(Short::Wait(Duration::from_secs(10))));
        let level = Level { limit: 6, remaining: 0, reset: MINUTE };
        assert_eq!(bucket.level(rate(6), start), level);
        let later = start + Duration::from_secs(25);
        assert_eq!(bucket.level(rate(6), later).remaining, 2);
        assert_eq!(bucket.take(3, rate(6), later), Err(Short::Wait(Duration::from_secs(5))));
        assert_eq!(bucket.take(2, rate(6), later), Ok(()));
        assert_eq!(bucket.take(7, rate(6), later + MINUTE * 9), Err(Short::Never));
        assert_eq!(bucket.level(rate(6), later + MINUTE).remaining, 6, "never more than a minute's worth");
    }

    #[test]
    fn what_is_promised_is_nobody_elses_and_what_was_used_counts() {
        let (mut tokens, now) = (Promised::default(), Instant::now());
        tokens.promise(80, rate(100), now).expect("is there");
        assert_eq!(tokens.level(rate(100), now).remaining, 20);
        assert_eq!(tokens.promise(50, rate(100), now), Err(Short::Wait(Duration::from_secs(18))));
        tokens.keep(80, 10, Some(rate(100)), now);
        assert_eq!(tokens.level(rate(100), now).remaining, 90);
        // More than was promised: the next wait until it has been made up for.
        tokens.promise(90, rate(100), now).expect("is there");
        tokens.keep(90, 190, Some(rate(100)), now);
        assert_eq!(tokens.level(rate(100), now).remaining, 0);
        assert_eq!(tokens.promise(1, rate(100), now), Err(Short::Wait(Duration::from_millis(60_600))));
        let later = now + Duration::from_secs(61);
        assert_eq!(tokens.promise(1, rate(100), later), Ok(()));
    }

    #[test]
    fn another_rate_holds_from_now_on() {
        let (mut bucket, now) = (Bucket::default(), Instant::now());
        bucket.take(30, rate(60), now).expect("is there");
        // Half of the bucket is gone, however large it is by now.
        assert_eq!(bucket.level(rate(600), now).remaining, 300);
        assert_eq!(bucket.take(4, rate(6), now), Err(Short::Wait(Duration::from_secs(10))));
    }

    /// Takes at these times, each so many milliseconds after the last.
    fn takes() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0u64..20_000, 1u64..40), 1..80)
    }

    proptest! {
        /// In no stretch of time more is taken than a full bucket and what comes in that time.
        #[test]
        fn no_stretch_of_time_has_more_than_its_share(per_minute in 40u32..600, takes in takes()) {
            let (mut bucket, mut now) = (Bucket::default(), Instant::now());
            let mut taken = Vec::new();
            for (pause, amount) in takes {
                now += Duration::from_millis(pause);
                let there = bucket.level(rate(per_minute), now).remaining;
                match bucket.take(amount, rate(per_minute), now) {
                    Ok(()) => {
                        prop_assert!(u64::from(there) + 1 >= amount, "{} were told, {} taken", there, amount);
                        taken.push((now, amount));
                    }
                    Err(Short::Wait(wait)) => {
                        prop_assert!(u64::from(there) < amount);
                        let mut then = bucket;
                        prop_assert_eq!(then.take(amount, rate(per_minute), now + wait), Ok(()));
                    }
                    Err(Short::Never) => prop_assert!(false, "less than a full bucket"),
                }
            }
            for (first, (from, _)) in taken.iter().enumerate() {
                let mut sum = 0;
                for (to, amount) in &taken[first..] {
                    sum += amount;
                    let share = f64::from(per_minute) * (1.0 + (*to - *from).as_secs_f64() / 60.0);
                    prop_assert!(sum as f64 <= share + 0.01, "{} over {}", sum, share);
                }
            }
        }

        /// Promises come and go in any order: what was used is what counts in the end.
        #[test]
        fn promises_leave_what_was_used(
            promises in prop::collection::vec((1u64..100, 0u64..200), 1..40),
            order in any::<u64>(),
        ) {
            let (now, rate) = (Instant::now(), rate(1_000_000));
            let (mut tokens, mut open, mut used_in_all) = (Promised::default(), Vec::new(), 0);
            for (index, promise) in promises.iter().enumerate() {
                tokens.promise(promise.0, rate, now).expect("is there");
                open.push(*promise);
                if (order >> (index % 64)) & 1 == 1 {
                    let (promised, used) = open.remove(order as usize % open.len());
                    tokens.keep(promised, used, Some(rate), now);
                    used_in_all += used;
                }
            }
            for (promised, used) in open {
                tokens.keep(promised, used, Some(rate), now);
                used_in_all += used;
            }
            let remaining = u64::from(tokens.level(rate, now).remaining);
            prop_assert!(1_000_000 - remaining - used_in_all <= 1, "rounded down at most once");
        }
    }
}
