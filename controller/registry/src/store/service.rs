//! Serves any [`Store`] over gRPC: how a controller offers its embedded store.
//!
//! Thin: messages in, the contract's types to the store, its answer out. Mounted by the controller beside its other
//! services, for coordinators, which only read: whoever reaches the port may list and watch, and change nothing.

use std::{sync::Arc, time::Duration};

use baton_proto::{
    ApiError, ErrorCode,
    v1::{self, store_server},
};
use futures::{Stream, StreamExt, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{KeyRange, LeaseId, Revision, Store, StoreError, WatchError, wire};

/// The largest message either way: a listing of a fleet of thousands is a few megabytes.
pub(super) const MESSAGE_MAX_BYTES: usize = 64 << 20;

/// The largest request of those who only read: a prefix and a revision. What a write might carry is not even taken in.
const READ_MAX_BYTES: usize = 64 << 10;

/// Names the lease that a "not found" is about.
pub(super) const LEASE_HEADER: &str = "baton-lease";

/// The gRPC service `baton.v1.Store` over a store.
#[derive(Debug, Clone)]
pub struct StoreService {
    store: Arc<dyn Store>,
    writable: bool,
    shutdown: CancellationToken,
}

impl StoreService {
    /// For reading only. Watches end on `shutdown`, so that a server that drains need not wait for their readers.
    pub fn new(store: Arc<dyn Store>, shutdown: CancellationToken) -> Self {
        Self { store, writable: false, shutdown }
    }

    /// The whole contract, for tests of it. No one asks callers who they are: whoever reaches the port can write.
    pub fn writable(self) -> Self {
        Self { writable: true, ..self }
    }

    /// As a service to mount.
    pub fn into_server(self) -> store_server::StoreServer<Self> {
        let request_max_bytes = if self.writable { MESSAGE_MAX_BYTES } else { READ_MAX_BYTES };
        store_server::StoreServer::new(self)
            .max_decoding_message_size(request_max_bytes)
            .max_encoding_message_size(MESSAGE_MAX_BYTES)
    }

    /// The store, for a call that changes it.
    fn to_write(&self) -> Result<&dyn Store, Status> {
        if self.writable {
            return Ok(&*self.store);
        }
        let message =
            "the state can only be read here: the controller that keeps it is the only one to change it";
        Err(ApiError::new(ErrorCode::Unsupported, message).into())
    }
}

fn status(error: StoreError) -> Status {
    let code = match &error {
        StoreError::Unavailable(_) => ErrorCode::Unavailable,
        StoreError::Unknown(_) => ErrorCode::DeadlineExceeded,
        StoreError::LeaseNotFound(_) => ErrorCode::NotFound,
        StoreError::Invalid(_) => ErrorCode::InvalidArgument,
        StoreError::Refused(_) => ErrorCode::QueueFull,
    };
    let mut status = Status::from(ApiError::new(code, error.to_string()));
    if let StoreError::LeaseNotFound(lease) = error {
        status.metadata_mut().insert(LEASE_HEADER, lease.0.into());
    }
    status
}

#[tonic::async_trait]
impl store_server::Store for StoreService {
    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        let range = KeyRange::from(request.into_inner());
        Ok(Response::new(self.store.range(range).await.map_err(status)?.into()))
    }

    async fn txn(&self, request: Request<v1::TxnRequest>) -> Result<Response<v1::TxnResponse>, Status> {
        let store = self.to_write()?;
        let txn = request.into_inner().try_into().map_err(status)?;
        let outcome = store.txn(txn).await.map_err(status)?;
        Ok(Response::new(v1::TxnResponse { succeeded: outcome.succeeded, revision: outcome.revision.0 }))
    }

    type WatchStream = std::pin::Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let range = KeyRange::from(v1::RangeRequest { prefix: request.prefix, exact: request.exact });
        let from = (request.from_revision != 0).then_some(Revision(request.from_revision));
        let watch = self.store.watch(range, from).await.map_err(status)?;
        let created = v1::WatchResponse { created: true, ..Default::default() };
        let batches = stream::unfold(Some(watch), |watch| async move {
            let mut watch = watch?;
            Some(match watch.next().await {
                Ok(batch) => (Ok(batch.into()), Some(watch)),
                Err(WatchError::Compacted(revision)) => {
                    (Ok(v1::WatchResponse { compacted_to: revision.0, ..Default::default() }), None)
                }
                Err(WatchError::Broken(error)) => (Err(Status::unavailable(error)), None),
            })
        });
        let shutdown = self.shutdown.clone().cancelled_owned();
        Ok(Response::new(stream::iter([Ok(created)]).chain(batches).take_until(shutdown).boxed()))
    }

    async fn grant_lease(
        &self,
        request: Request<v1::GrantLeaseRequest>,
    ) -> Result<Response<v1::GrantLeaseResponse>, Status> {
        let ttl = Duration::from_millis(request.into_inner().ttl_millis);
        let lease = self.to_write()?.grant_lease(ttl).await.map_err(status)?;
        let ttl_millis = u64::try_from(lease.ttl.as_millis()).unwrap_or(u64::MAX);
        Ok(Response::new(v1::GrantLeaseResponse { lease: lease.id.0, ttl_millis }))
    }

    async fn keep_alive(
        &self,
        request: Request<v1::KeepAliveRequest>,
    ) -> Result<Response<v1::KeepAliveResponse>, Status> {
        let store = self.to_write()?;
        let ttl = match wire::lease_from(request.into_inner().lease) {
            Some(lease) => store.keep_alive(lease).await,
            None => Err(StoreError::LeaseNotFound(LeaseId(0))),
        };
        let ttl_millis = match ttl {
            Ok(ttl) => u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            Err(StoreError::LeaseNotFound(_)) => 0,
            Err(error) => return Err(status(error)),
        };
        Ok(Response::new(v1::KeepAliveResponse { ttl_millis }))
    }

    async fn revoke_lease(
        &self,
        request: Request<v1::RevokeLeaseRequest>,
    ) -> Result<Response<v1::RevokeLeaseResponse>, Status> {
        let store = self.to_write()?;
        if let Some(lease) = wire::lease_from(request.into_inner().lease) {
            store.revoke_lease(lease).await.map_err(status)?;
        }
        Ok(Response::new(v1::RevokeLeaseResponse {}))
    }
}
