//! Why a checkpoint cannot be used. Every message names the file and, where one is at fault, the field.

use std::{io, path::PathBuf};

/// Why a model could not be opened or a tensor not be had.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} is not a model: {reason}; give a GGUF file or a directory with config.json, tokenizer.json and *.safetensors"
    )]
    NotAModel { path: PathBuf, reason: String },
    #[error("{path} is damaged or incomplete at {field}: {reason}; fetch the file again")]
    Damaged { path: PathBuf, field: String, reason: String },
    #[error("{path} cannot be served: {field} is {found}; supported: {supported}")]
    Unsupported { path: PathBuf, field: String, found: String, supported: String },
    #[error(
        "{path} lies at {lies_at}, which is not under {root}: move the file there, or set another root (`model.root`, of coordinators `model_root`)"
    )]
    Outside { path: PathBuf, lies_at: PathBuf, root: PathBuf },
    #[error("{path} has no tensor {tensor}")]
    NoTensor { path: PathBuf, tensor: String },
}
