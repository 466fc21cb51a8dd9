//! An open way to one peer: its connections stand and fall together.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::{CancellationToken, DropGuard};

/// Connections that carry an outbox's slices to one peer. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Path {
    end: PathEnd,
    _guard: DropGuard,
}

impl Path {
    /// Ends with `stop`, with the first of its connections, or when dropped.
    pub(crate) fn new(stop: &CancellationToken) -> Self {
        let end = PathEnd { ended: stop.child_token(), why: Arc::default() };
        let _guard = end.ended.clone().drop_guard();
        Self { end, _guard }
    }

    /// For the tasks of its connections.
    pub(crate) fn end(&self) -> PathEnd {
        self.end.clone()
    }

    /// Resolves once it is over; why.
    pub(crate) async fn broken(&self) -> &str {
        self.end.ended.cancelled().await;
        self.end.why.get().map_or("it is not needed any more", String::as_str)
    }
}

/// What a connection knows of its path.
#[derive(Debug, Clone)]
pub(crate) struct PathEnd {
    ended: CancellationToken,
    why: Arc<OnceLock<String>>,
}

impl PathEnd {
    /// Cancelled when the path is over.
    pub(crate) fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// Ends the whole path. The first reason counts.
    pub(crate) fn broken(&self, why: String) {
        let _ = self.why.set(why);
        self.ended.cancel();
    }
}
