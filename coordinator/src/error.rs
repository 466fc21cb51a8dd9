//! Why a coordinator does not start or had to stop. Failures of requests are [`baton_proto::ApiError`]s.

use baton_checkpoint::CheckpointError;
use baton_process::{ListenError, ProcessError, TlsError};
use baton_registry::{EtcdOpenError, StoreError};

use crate::text::TextError;

#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error("model.path: {0}")]
    Checkpoint(#[from] Box<CheckpointError>),
    #[error("model.path: {0}")]
    Text(#[from] TextError),
    #[error("{key}: {source}")]
    Listen { key: &'static str, source: ListenError },
    #[error("store: {0}")]
    Etcd(#[from] EtcdOpenError),
    #[error("store: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Id(#[from] baton_proto::IdError),
}
