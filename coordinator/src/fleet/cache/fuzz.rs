//! What a fuzz target says to a reader of an instance's cache, and what must hold of what it has taken then.

use super::{follow::BLOCKS_MOST, *};

/// As [`CacheReader`], without a connection.
pub(crate) struct Listener {
    follower: Follower,
    feed: Feed,
    over: bool,
}

impl Listener {
    pub(crate) fn new(incarnation: Incarnation, feed: Feed) -> Self {
        Self { follower: Follower::new(incarnation, None), feed, over: false }
    }

    /// The next message of the stream; the first that cannot be ends it.
    pub(crate) fn take(&mut self, message: v1::KvEvents) {
        if self.over {
            return;
        }
        let told = match self.follower.take(message) {
            Ok(News::Part { first, stored, whole }) => {
                if first {
                    self.feed.begin();
                }
                self.feed.store(&stored);
                whole.map_or(Ok(()), |dialect| self.feed.publish(dialect).map_err(End::from))
            }
            Ok(News::Change { stored, evicted }) => {
                self.feed.change(&stored, &evicted);
                Ok(())
            }
            Ok(News::GoesOn) => Ok(()),
            Err(fault) => Err(fault.into()),
        };
        if let Err(end) = told {
            assert!(!end.reason().is_empty());
            self.feed.forget();
            self.over = true;
        }
        assert!(self.feed.blocks_of_all() <= 2 * BLOCKS_MOST);
    }
}
