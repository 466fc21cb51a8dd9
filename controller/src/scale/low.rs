//! How many instances a group has wanted at most for a whole while: what it may be scaled in to. Pure.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// The most that was wanted within the last window, once it was watched for as long without a break.
///
/// Holds only what may still become the most: each count is smaller than the one before it, so that there are never more
/// than different counts, and they are few between the bounds of a group.
#[derive(Debug, Clone)]
pub struct Low {
    window: Duration,
    /// The last time that each was wanted.
    counts: VecDeque<(Instant, u32)>,
    /// Since when it is watched, and when it last was.
    watched: Option<(Instant, Instant)>,
}

impl Low {
    pub fn new(window: Duration) -> Self {
        Self { window, counts: VecDeque::new(), watched: None }
    }

    /// The group wants so many now. After half a window in which nobody looked, the window begins again.
    pub fn note(&mut self, wanted: u32, now: Instant) {
        if self.watched.is_some_and(|(_, last)| now.saturating_duration_since(last) > self.window / 2) {
            self.begin_again();
        }
        let since = self.watched.map_or(now, |(since, _)| since);
        self.watched = Some((since, now));
        while self.counts.back().is_some_and(|(_, count)| *count <= wanted) {
            self.counts.pop_back();
        }
        self.counts.push_back((now, wanted));
        while self.counts.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > self.window) {
            self.counts.pop_front();
        }
    }

    /// What was wanted until now says nothing any more.
    pub fn begin_again(&mut self) {
        self.counts.clear();
        self.watched = None;
    }

    /// None until a whole window was watched.
    pub fn most(&self) -> Option<u32> {
        let (since, last) = self.watched?;
        let whole = last.saturating_duration_since(since) >= self.window;
        self.counts.front().filter(|_| whole).map(|(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_secs(60);

    proptest! {
        #[test]
        fn it_is_the_most_of_the_window_and_nothing_before_that_is_over(
            steps in prop::collection::vec((1u64..25, 2u32..9), 1..60),
        ) {
            let (began, mut low, mut told) = (Instant::now(), Low::new(WINDOW), Vec::new());
            let mut now = began;
            for (seconds, wanted) in steps {
                now += Duration::from_secs(seconds);
                low.note(wanted, now);
                told.push((now, wanted));
                let first = told[0].0;
                let within = told.iter().filter(|(at, _)| now - *at <= WINDOW);
                let most = within.map(|(_, wanted)| *wanted).max().filter(|_| now - first >= WINDOW);
                prop_assert_eq!(low.most(), most);
                prop_assert!(low.counts.len() <= 7, "as many as there are different counts");
            }
        }
    }

    #[test]
    fn a_time_in_which_nobody_looked_is_no_quiet_time() {
        let (mut now, mut low) = (Instant::now(), Low::new(WINDOW));
        for _ in 0..=6 {
            low.note(3, now);
            now += WINDOW / 6;
        }
        assert_eq!(low.most(), Some(3));
        low.note(3, now + WINDOW / 2);
        assert_eq!(low.most(), None);
    }
}
