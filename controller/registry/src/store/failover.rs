//! Calls over several endpoints: which is tried next, when, and what may be tried again.
//!
//! Used by the stores that are reached over gRPC, as neither client tries another endpoint by itself. A call that
//! reads, or that does no harm twice, is tried on every endpoint, `rounds` times over. A change is tried again only
//! where it is certain that nothing was done; else the caller learns that it is unknown.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tonic::Status;

use super::StoreError;

/// How often every endpoint is tried.
const ROUNDS: usize = 3;
/// Between rounds: long enough for a connection to be made again or a new etcd leader to stand, short for a caller.
const PAUSE: Duration = Duration::from_millis(100);

/// Why one try failed.
pub(super) enum Failure {
    /// Another try, anywhere, will not help.
    Final(StoreError),
    /// It did not reach the store.
    NotDone(String),
    /// It may have.
    Unclear(String),
}

/// Whether a call does no harm when it is done twice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    Harmless,
    Never,
}

pub(super) struct Failover<C> {
    endpoints: Vec<(String, C)>,
    /// The one that answered last.
    preferred: AtomicUsize,
    /// Of one try.
    timeout: Duration,
}

impl<C> Failover<C> {
    /// `endpoints` is not empty.
    pub(super) fn new(endpoints: Vec<(String, C)>, timeout: Duration) -> Self {
        Self { endpoints, preferred: AtomicUsize::new(0), timeout }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.endpoints.iter().map(|(name, _)| name.as_str())
    }

    /// Tries endpoint after endpoint, from the one that answered last, until one answers.
    pub(super) async fn call<'a, R, F>(
        &'a self,
        repeat: Repeat,
        call: impl Fn(&'a C) -> F,
    ) -> Result<R, StoreError>
    where
        F: Future<Output = Result<R, Failure>>,
    {
        let count = self.endpoints.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = String::new();
        for attempt in 0..ROUNDS * count {
            if attempt > 0 && attempt % count == 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let index = (first + attempt) % count;
            let (name, client) = &self.endpoints[index];
            let silent = || Failure::Unclear(format!("no answer within {:?}", self.timeout));
            match tokio::time::timeout(self.timeout, call(client)).await.unwrap_or_else(|_| Err(silent())) {
                Ok(answer) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Unclear(error)) if repeat == Repeat::Never => {
                    // The next call had better ask another.
                    self.preferred.store((index + 1) % count, Ordering::Relaxed);
                    return Err(StoreError::Unknown(format!("{name}: {error}")));
                }
                Err(Failure::NotDone(error) | Failure::Unclear(error)) => last = format!("{name}: {error}"),
            }
            tracing::debug!(endpoint = name, error = last, "the state store did not answer here");
        }
        Err(StoreError::Unavailable(last))
    }
}

/// What a status that says "not now" means: whether the connection could not even be made.
pub(super) fn passing(status: &Status) -> Failure {
    let message = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return Failure::NotDone(format!("{message}: {}", root_of(error)));
        }
        source = error.source();
    }
    Failure::Unclear(message)
}

/// The last of the causes, which is the one that says something.
fn root_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut root = error;
    while let Some(cause) = root.source() {
        root = cause;
    }
    root.to_string()
}
