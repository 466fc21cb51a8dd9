//! Why a coordinator does not start or had to stop. Failures of requests are [`baton_proto::ApiError`]s.

use std::path::PathBuf;

use baton_checkpoint::CheckpointError;
use baton_process::{ListenError, ProcessError, TlsError, access::AccessError};
use baton_registry::{EtcdOpenError, StoreError};

use crate::{keys::file::KeyFileError, text::TextError};

#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error("model_root: {0}")]
    ModelRoot(Box<CheckpointError>),
    #[error("models[{index}].path: {source}")]
    Model { index: usize, source: ModelError },
    #[error("models[{index}].path: opening it met a bug: {source}")]
    Opening { index: usize, source: tokio::task::JoinError },
    #[error(
        "models[{index}].names: `{name}` is a name of models[{by}], too; give each model names of its own"
    )]
    NameTaken { index: usize, name: String, by: usize },
    #[error("{key}: {source}")]
    Listen { key: &'static str, source: ListenError },
    #[error("store: {0}")]
    Etcd(#[from] EtcdOpenError),
    #[error("store: {0}")]
    Store(#[from] StoreError),
    #[error("admin.tokens_file: {0}")]
    Access(#[from] AccessError),
    #[error("api_keys.file: {0}")]
    Keys(#[from] KeyFileError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Id(#[from] baton_proto::IdError),
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(
        "{path}: {field} must be {expected}, got {value}; mend the file, or have `generation_config = \"openai\"` for this model"
    )]
    Sampling { path: PathBuf, field: &'static str, value: String, expected: String },
}
