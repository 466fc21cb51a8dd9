//! How long a node and its tasks live: until it is told to shut down, and a moment longer for its peers to hear of it.

use tokio::runtime::Handle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::TransferError;

pub(super) struct Lifetime {
    pub(super) tasks: TaskTracker,
    /// Where tasks run: transfers are offered from threads that belong to no runtime, too.
    runtime: Handle,
    /// Given by the owner: take nothing new, abort what there is.
    pub(super) shutdown: CancellationToken,
    /// Ours, a moment later: end every stream and connection.
    pub(super) stop: CancellationToken,
}

impl Lifetime {
    pub(super) fn new(runtime: Handle, shutdown: CancellationToken) -> Self {
        Self { tasks: TaskTracker::new(), runtime, shutdown, stop: CancellationToken::new() }
    }

    /// # Errors
    /// `ShuttingDown`: the node takes nothing new.
    pub(super) fn check_running(&self) -> Result<(), TransferError> {
        if self.shutdown.is_cancelled() { Err(TransferError::ShuttingDown) } else { Ok(()) }
    }

    /// Runs a task of the node's, from any thread. It is to end upon `stop`.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(task, &self.runtime);
    }

    /// Once every task has ended after shutdown.
    pub(super) async fn over(&self) {
        self.shutdown.cancelled().await;
        self.tasks.wait().await;
    }
}
