//! How many legs are in the instance, from their dispatch until their last block is free.
//!
//! Taken by [`crate::inference`] for each leg and dropped with its sequence; [`crate::duty`] waits for all of them when
//! a role is to change. A permit is taken before the role is checked, so none can slip in behind that wait.

use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

/// Cheap to clone; all clones count together.
#[derive(Debug, Clone)]
pub struct Permits {
    tracker: TaskTracker,
}

impl Default for Permits {
    fn default() -> Self {
        let tracker = TaskTracker::new();
        // A tracker's wait ends only if it is closed; closing it keeps nobody from taking a token.
        tracker.close();
        Self { tracker }
    }
}

impl Permits {
    pub fn take(&self) -> TaskTrackerToken {
        self.tracker.token()
    }

    /// Legs at present.
    pub fn taken(&self) -> usize {
        self.tracker.len()
    }

    /// Resolves once there is no leg.
    pub async fn none_taken(&self) {
        self.tracker.wait().await;
    }
}
