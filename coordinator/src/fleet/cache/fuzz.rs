//! What a fuzz target says to a reader of an instance's cache, and what must hold of what it has taken then.

use super::{follow::BLOCKS_MOST, *};

/// As [`CacheReader`], without a connection.
pub(crate) struct Listener {
    incarnation: Incarnation,
    follower: Follower,
    known: Remembered,
    over: bool,
}

impl Listener {
    pub(crate) fn new(incarnation: Incarnation, feed: Feed) -> Self {
        let known = Remembered { feed, position: None, lost: None };
        Self { incarnation, follower: Follower::new(incarnation, None), known, over: false }
    }

    /// The next message of the stream. The first that does not fit ends it, and another goes on from what is known; the first
    /// that cannot be ends them all.
    pub(crate) fn take(&mut self, message: v1::KvEvents) {
        if self.over {
            return;
        }
        let Remembered { feed, position, .. } = &mut self.known;
        let told = match self.follower.take(message) {
            Ok(News::Part { first, stored, whole }) => {
                if first {
                    feed.begin();
                }
                feed.store(&stored);
                whole.map_or(Ok(()), |dialect| feed.publish(dialect).map_err(End::from))
            }
            Ok(News::Change { stored, evicted }) => {
                feed.change(&stored, &evicted);
                Ok(())
            }
            Ok(News::GoesOn | News::Nothing) => Ok(()),
            Err(fault) => Err(fault.into()),
        };
        match told {
            Ok(()) => *position = self.follower.position().or(*position),
            Err(end) if end.is_nonsense() => {
                self.known.forget();
                self.over = true;
            }
            Err(end) => {
                assert!(!end.reason().is_empty());
                self.follower = Follower::new(self.incarnation, *position);
            }
        }
        assert!(self.known.feed.blocks_of_all() <= 2 * BLOCKS_MOST);
    }
}
