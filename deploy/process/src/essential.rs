//! Tasks without which a process is of no use: whatever ends one of them ends the process, so that it is started again.
//!
//! Handed out by [`crate::Process`] to whoever starts such tasks. The first that fails is the error that the process ends with.

use std::{fmt::Display, future::Future, sync::Arc};

use parking_lot::Mutex;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::ProcessError;

/// Spawns them. Clones are of one process.
#[derive(Debug, Clone)]
pub struct Essential {
    tasks: TaskTracker,
    shutdown: CancellationToken,
    failure: Arc<Mutex<Option<ProcessError>>>,
}

impl Essential {
    /// What they are spawned on, and what is cancelled when one of them fails.
    pub fn new(tasks: TaskTracker, shutdown: CancellationToken) -> Self {
        Self { tasks, shutdown, failure: Arc::default() }
    }

    /// A task that serves until a shutdown: its error or panic stops the process with status 1, and so does its end before that.
    pub fn serve<F, E>(&self, name: &'static str, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let shutdown = self.shutdown.clone();
        let failed = move |end: Result<Result<(), E>, JoinError>| match end {
            Ok(Ok(())) if shutdown.is_cancelled() => None,
            Ok(Ok(())) => Some("it ended by itself".to_owned()),
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => of_panic(&error),
        };
        self.watch(name, self.tasks.spawn(task), failed);
    }

    /// A task that keeps something up to date for as long as it is needed: its panic stops the process with status 1.
    pub fn keep<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.watch(name, self.tasks.spawn(task), |end| of_panic(&end.err()?));
    }

    fn watch<R: Send + 'static>(
        &self,
        name: &'static str,
        task: JoinHandle<R>,
        failed: impl FnOnce(Result<R, JoinError>) -> Option<String> + Send + 'static,
    ) {
        let Self { shutdown, failure, .. } = self.clone();
        self.tasks.spawn(async move {
            let Some(reason) = failed(task.await) else { return };
            tracing::error!(task = name, %reason, "essential task failed: stopping");
            failure.lock().get_or_insert(ProcessError::Essential { task: name, reason });
            shutdown.cancel();
        });
    }

    /// The error of the first that failed, once.
    pub(crate) fn take_failure(&self) -> Option<ProcessError> {
        self.failure.lock().take()
    }
}

/// Why, if it panicked.
fn of_panic(error: &JoinError) -> Option<String> {
    error.is_panic().then(|| "it panicked; the log says where".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_keeper_may_end_but_not_panic() {
        let essential = Essential::new(TaskTracker::new(), CancellationToken::new());
        essential.keep("sound", async {});
        essential.tasks.close();
        essential.tasks.wait().await;
        assert!(!essential.shutdown.is_cancelled() && essential.take_failure().is_none());
        essential.keep("broken", async { panic!("as the test wants it") });
        essential.tasks.wait().await;
        assert!(essential.shutdown.is_cancelled());
        let failure = essential.take_failure().expect("is told").to_string();
        assert!(failure.contains("broken"), "{failure}");
    }
}
