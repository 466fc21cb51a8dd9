//! How long a node and its tasks live: until it is told to shut down, and a moment longer for its peers to hear of it.

use std::time::Duration;

use tokio::{runtime::Handle, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::TransferError;

pub(super) struct Lifetime {
    pub(super) tasks: TaskTracker,
    /// Threads that touch the pool for data connections, or that a library holds: they may outlive the task that they
    /// belong to.
    pub(super) threads: TaskTracker,
    /// Where tasks run: transfers are offered from threads that belong to no runtime, too.
    runtime: Handle,
    /// Given by the owner: take nothing new, abort what there is.
    pub(super) shutdown: CancellationToken,
    /// Ours, a moment later: end every stream and connection.
    pub(super) stop: CancellationToken,
}

impl Lifetime {
    pub(super) fn new(runtime: Handle, shutdown: CancellationToken) -> Self {
        Self {
            tasks: TaskTracker::new(),
            threads: TaskTracker::new(),
            runtime,
            shutdown,
            stop: CancellationToken::new(),
        }
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

    /// Once every task has ended after shutdown, and every thread, which is waited for no longer than `patience`: a
    /// library may never return.
    pub(super) async fn over(&self, patience: Duration) {
        self.shutdown.cancelled().await;
        self.tasks.wait().await;
        self.threads.close();
        if timeout(patience, self.threads.wait()).await.is_err() {
            let threads = self.threads.len();
            tracing::warn!(threads, "threads of data connections have not ended; not waited for any longer");
        }
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(2);

    #[tokio::test]
    async fn threads_are_waited_for_but_not_for_ever() {
        let lifetime = Lifetime::new(Handle::current(), CancellationToken::new());
        lifetime.tasks.close();
        lifetime.shutdown.cancel();
        let started = tokio::time::Instant::now();
        let thread = lifetime.threads.token();
        let ends = async {
            tokio::time::sleep(PATIENCE / 2).await; // as the thread goes on
            drop(thread);
        };
        tokio::join!(lifetime.over(PATIENCE), ends);
        assert!((PATIENCE / 2..PATIENCE).contains(&started.elapsed()));

        let (started, _stuck) = (tokio::time::Instant::now(), lifetime.threads.token());
        lifetime.over(PATIENCE).await;
        assert!((PATIENCE..PATIENCE * 5).contains(&started.elapsed()));
    }
}
