//! Growing pauses between attempts to reach one peer: to open its control stream ([`super::link`]), or a data path
//! ([`super::route`]).

use std::time::Duration;

use tokio::time::sleep;

/// Each pause is twice as long as the one before, up to [`Backoff::LONGEST`]; and longer by up to half at random, so that
/// peers which were cut off at once do not come back at once.
pub(super) struct Backoff {
    first: Duration,
    next: Duration,
}

impl Backoff {
    /// But for what is added at random.
    pub(super) const LONGEST: Duration = Duration::from_secs(2);

    /// `first` is the pause before the second attempt.
    pub(super) fn new(first: Duration) -> Self {
        Self { first, next: first }
    }

    pub(super) async fn pause(&mut self) {
        let pause = self.next();
        sleep(pause + pause.mul_f64(rand::random::<f64>() / 2.0)).await;
    }

    fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(Self::LONGEST);
        pause
    }

    /// What was reached stood, or was of use: the next pause is the first again.
    pub(super) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew() {
        let mut backoff = Backoff::new(Duration::from_millis(300));
        for _ in 0..2 {
            let pauses = [(); 5].map(|()| backoff.next().as_millis());
            assert_eq!(pauses, [300, 600, 1200, 2000, 2000]);
            backoff.reset();
        }
    }
}
