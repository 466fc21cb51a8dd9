//! A controller's embedded store, over gRPC: what a coordinator reads when there is no etcd.
//!
//! One connection per endpoint, made when first used and made again after a break. What is tried again, and where, is
//! `failover`'s. A broken watch is the reader's to resume.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use baton_process::{
    Tls,
    tls::{Dial, Role},
};
use baton_proto::v1::{self, store_client::StoreClient};
use futures::{StreamExt, stream};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use super::{
    KeyRange, Lease, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, Watch, WatchBatch,
    WatchError,
    failover::{self, Failover, Failure, Repeat},
    service::{LEASE_HEADER, MESSAGE_MAX_BYTES},
};

#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// host:port of controllers.
    pub endpoints: Vec<String>,
    /// The way to them.
    pub dial: Dial,
    pub connect_timeout: Duration,
    /// Of one try.
    pub timeout: Duration,
    /// A connection that is silent for this long is probed, and given up after as long again.
    pub keep_alive: Duration,
}

impl RemoteConfig {
    /// In plaintext.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            dial: Tls::plaintext().dial(Role::Controller),
            connect_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            keep_alive: Duration::from_secs(5),
        }
    }
}

/// The store of the first controller that answers.
pub struct RemoteStore {
    clients: Failover<StoreClient<Channel>>,
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
            let channel = config.dial.connect_lazy(&endpoint);
            let client = StoreClient::new(channel).max_decoding_message_size(MESSAGE_MAX_BYTES);
            Ok((name.clone(), client))
        });
        Ok(Self { clients: Failover::new(clients.collect::<Result<_, StoreError>>()?, config.timeout) })
    }

    async fn call<R, F>(
        &self,
        repeat: Repeat,
        call: impl Fn(StoreClient<Channel>) -> F,
    ) -> Result<R, StoreError>
    where
        F: Future<Output = Result<R, Status>>,
    {
        let call = |client: &StoreClient<Channel>| {
            let answer = call(client.clone());
            async move { answer.await.map_err(|status| failure_of(&status)) }
        };
        self.clients.call(repeat, call).await
    }
}

/// What a status of [`super::StoreService`] or of the connection means.
fn failure_of(status: &Status) -> Failure {
    let message = status.message().to_owned();
    let lease = status.metadata().get(LEASE_HEADER).and_then(|id| id.to_str().ok()?.parse().ok());
    match (status.code(), lease) {
        (Code::NotFound, Some(lease)) => Failure::Final(StoreError::LeaseNotFound(LeaseId(lease))),
        (Code::NotFound | Code::InvalidArgument | Code::OutOfRange, _) => {
            Failure::Final(StoreError::Invalid(message))
        }
        (
            Code::FailedPrecondition | Code::ResourceExhausted | Code::PermissionDenied | Code::Unimplemented,
            _,
        ) => Failure::Final(StoreError::Refused(message)),
        _ => failover::passing(status),
    }
}

impl fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RemoteStore ")?;
        f.debug_list().entries(self.clients.names()).finish()
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
        Ok(self.call(Repeat::Harmless, call).await?.into_inner().into())
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let request = v1::TxnRequest::from(txn);
        let call = |mut client: StoreClient<Channel>| {
            let request = request.clone();
            async move { client.txn(request).await }
        };
        let answer = self.call(Repeat::Never, call).await?.into_inner();
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
        let (first, rest) = self.call(Repeat::Harmless, call).await?;
        let batches =
            stream::iter([Ok(first)]).chain(rest).filter_map(|message| std::future::ready(take(message)));
        Ok(Watch::new(batches))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let request =
            v1::GrantLeaseRequest { ttl_millis: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX) };
        // A lease granted and not heard of ends by itself.
        let call = |mut client: StoreClient<Channel>| async move { client.grant_lease(request).await };
        let answer = self.call(Repeat::Harmless, call).await?.into_inner();
        Ok(Lease { id: LeaseId(answer.lease), ttl: Duration::from_millis(answer.ttl_millis) })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let request = v1::KeepAliveRequest { lease: lease.0 };
        let call = |mut client: StoreClient<Channel>| async move { client.keep_alive(request).await };
        match self.call(Repeat::Harmless, call).await?.into_inner().ttl_millis {
            0 => Err(StoreError::LeaseNotFound(lease)),
            millis => Ok(Duration::from_millis(millis)),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        let request = v1::RevokeLeaseRequest { lease: lease.0 };
        let call = |mut client: StoreClient<Channel>| async move { client.revoke_lease(request).await };
        self.call(Repeat::Harmless, call).await.map(|_| ())
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
