//! What can go wrong with a controller as a whole.

use baton_process::{ListenError, ProcessError, TlsError, access::AccessError};
use baton_registry::{EtcdOpenError, StoreError};

#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Etcd(#[from] EtcdOpenError),
    #[cfg(feature = "kubernetes")]
    #[error(transparent)]
    Kubernetes(#[from] crate::scale::OpenError),
    #[error("admin.tokens_file: {0}")]
    Access(#[from] AccessError),
    #[error("{0:?} cannot be this controller's name: set controller_id")]
    Name(String),
    #[error("cannot find out where this controller listens: {0}")]
    Address(std::io::Error),
}
