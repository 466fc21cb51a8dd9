//! A controller's embedded store, over gRPC: what a coordinator reads when there is no etcd.
//!
//! One connection per endpoint, made when first used and made again after a break. A read is tried on every endpoint,
//! twice; a change only where it is certain that it was not made. A broken watch is the reader's to resume.

use std::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use baton_proto::v1::{self, store_client::StoreClient};
use futures::{StreamExt, stream};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use super::{
    KeyRange, Lease, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, Watch, WatchBatch,
    WatchError,
    service::{LEASE_HEADER, MESSAGE_MAX_BYTES},
};

#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// host:port of controllers.
    pub endpoints: Vec<String>,
    pub connect_timeout: Duration,
    /// Of one try.
    pub timeout: Duration,
    /// A connection that is silent for this long is probed, and given up after as long again.
    pub keep_alive: Duration,
}

impl RemoteConfig {
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            connect_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            keep_alive: Duration::from_secs(5),
        }
    }
}

/// The store of the first controller that answers.
pub struct RemoteStore {
    clients: Vec<(String, StoreClient<Channel>)>,
    /// The one that answered last.
    preferred: AtomicUsize,
    timeout: Duration,
}

impl RemoteStore {
    /// Makes the clients; connects only when used. Needs a Tokio runtime.
    pub fn new(config: &RemoteConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(StoreError::Invalid(
                "no controller endpoint is given: name at least one host:port".into(),
            ));
        }
        let clients = config.endpoints.iter().map(|name| {
            let endpoint = Endpoint::from_shared(format!("http://{name}"))
                .map_err(|error| StoreError::Invalid(format!("{name:?} is not host:port: {error}")))?
                .connect_timeout(config.connect_timeout)
                .http2_keep_alive_interval(config.keep_alive)
                .keep_alive_timeout(config.keep_alive)
                .keep_alive_while_idle(true);
            let client =
                StoreClient::new(endpoint.connect_lazy()).max_decoding_message_size(MESSAGE_MAX_BYTES);
            Ok((name.clone(), client))
        });
        let clients = clients.collect::<Result<_, StoreError>>()?;
        Ok(Self { clients, preferred: AtomicUsize::new(0), timeout: config.timeout })
    }

    /// Calls endpoint after endpoint, from the one that answered last, until one answers.
    async fn call<R, F>(
        &self,
        safe_to_repeat: bool,
        call: impl Fn(StoreClient<Channel>) -> F,
    ) -> Result<R, StoreError>
    where
        F: Future<Output = Result<R, Status>>,
    {
        let count = self.clients.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = StoreError::Unavailable("no endpoint was tried".into());
        for attempt in 0..2 * count {
            let index = (first + attempt) % count;
            let (name, client) = &self.clients[index];
            let result = match tokio::time::timeout(self.timeout, call(client.clone())).await {
                Ok(result) => result,
                Err(_) => Err(Status::deadline_exceeded(format!("no answer within {:?}", self.timeout))),
            };
            match result {
                Ok(answer) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(status) => {
                    let never_sent = was_never_sent(&status);
                    last = error_of(name, &status, safe_to_repeat || never_sent);
                    let passing = matches!(last, StoreError::Unavailable(_));
                    if !passing {
                        return Err(last);
                    }
                }
            }
        }
        Err(last)
    }
}

/// Whether the connection could not even be made.
fn was_never_sent(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused)
            || error.is::<tonic::ConnectError>()
        {
            return true;
        }
        source = error.source();
    }
    false
}

/// What a status means. `nothing_done` if it is certain, or of no matter, that nothing was.
fn error_of(endpoint: &str, status: &Status, nothing_done: bool) -> StoreError {
    let message = format!("{endpoint}: {}", status.message());
    match status.code() {
        Code::NotFound => {
            match status.metadata().get(LEASE_HEADER).and_then(|id| id.to_str().ok()?.parse().ok()) {
                Some(lease) => StoreError::LeaseNotFound(LeaseId(lease)),
                None => StoreError::Invalid(message),
            }
        }
        Code::InvalidArgument | Code::OutOfRange => StoreError::Invalid(message),
        Code::FailedPrecondition | Code::ResourceExhausted | Code::PermissionDenied | Code::Unimplemented => {
            StoreError::Refused(message)
        }
        _ if nothing_done => StoreError::Unavailable(message),
        _ => StoreError::Unknown(message),
    }
}

impl fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.clients.iter().map(|(name, _)| name)).finish()
    }
}

#[async_trait]
impl Store for RemoteStore {
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError> {
        let request = v1::RangeRequest::from(range);
        let call = |mut client: StoreClient<Channel>| {
            let request = request.clone();
            async move { client.range(request).await }
        };
        Ok(self.call(true, call).await?.into_inner().into())
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let request = v1::TxnRequest::from(txn);
        let call = |mut client: StoreClient<Channel>| {
            let request = request.clone();
            async move { client.txn(request).await }
        };
        let answer = self.call(false, call).await?.into_inner();
        Ok(TxnOutcome { succeeded: answer.succeeded, revision: Revision(answer.revision) })
    }

    async fn watch(&self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError> {
        let range = v1::RangeRequest::from(range);
        let request = v1::WatchRequest {
            prefix: range.prefix,
            exact: range.exact,
            from_revision: from.map_or(0, |from| from.0),
        };
        let call = |mut client: StoreClient<Channel>| {
            let request = request.clone();
            async move {
                let mut stream = client.watch(request).await?.into_inner();
                let first =
                    stream.message().await?.ok_or_else(|| Status::unavailable("the watch ended at once"))?;
                Ok((first, stream))
            }
        };
        let (first, rest) = self.call(true, call).await?;
        let batches =
            stream::iter([Ok(first)]).chain(rest).filter_map(|message| std::future::ready(take(message)));
        Ok(Watch::new(batches))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let request =
            v1::GrantLeaseRequest { ttl_millis: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX) };
        // A lease granted and not heard of ends by itself.
        let call = |mut client: StoreClient<Channel>| async move { client.grant_lease(request).await };
        let answer = self.call(true, call).await?.into_inner();
        Ok(Lease { id: LeaseId(answer.lease), ttl: Duration::from_millis(answer.ttl_millis) })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let request = v1::KeepAliveRequest { lease: lease.0 };
        let call = |mut client: StoreClient<Channel>| async move { client.keep_alive(request).await };
        match self.call(true, call).await?.into_inner().ttl_millis {
            0 => Err(StoreError::LeaseNotFound(lease)),
            millis => Ok(Duration::from_millis(millis)),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        let request = v1::RevokeLeaseRequest { lease: lease.0 };
        let call = |mut client: StoreClient<Channel>| async move { client.revoke_lease(request).await };
        self.call(true, call).await.map(|_| ())
    }
}

/// What one message of a watch means to its reader.
fn take(message: Result<v1::WatchResponse, Status>) -> Option<Result<WatchBatch, WatchError>> {
    match message {
        Ok(message) if message.compacted_to != 0 => {
            Some(Err(WatchError::Compacted(Revision(message.compacted_to))))
        }
        Ok(message) if message.created => None,
        Ok(message) => Some(Ok(message.into())),
        Err(status) => Some(Err(WatchError::Broken(status.message().to_owned()))),
    }
}
