//! Why a server cannot start or go on. Failures of single requests are not here: they become `ApiError`s where they
//! happen and end their leg.

use baton_checkpoint::CheckpointError;
use baton_kvtransfer::TransferError;
use baton_process::{Invalid, ListenError, ProcessError, TlsError};
use baton_proto::IdError;
use baton_runtime::RuntimeError;

use crate::session::Replaced;

/// One line each, which says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(transparent)]
    Config(#[from] Invalid),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("{what}: {source}")]
    Listen { what: &'static str, source: ListenError },
    #[error("the address of {what} cannot be read: {source}")]
    Address { what: &'static str, source: std::io::Error },
    #[error("model.root: {0}")]
    ModelRoot(CheckpointError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the model cannot be loaded: {0}")]
    Runtime(#[from] RuntimeError),
    #[error("loading the model panicked; the log says where")]
    LoadPanicked,
    #[error("cannot start the KV transfer node: {0}")]
    Transfer(#[from] TransferError),
    #[error("cannot start the engine's thread: {0}")]
    Thread(std::io::Error),
    #[error("the engine's thread ended by itself; the log says where")]
    EngineDied,
    #[error(transparent)]
    Replaced(#[from] Replaced),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Process(#[from] ProcessError),
}
