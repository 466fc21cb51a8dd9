//! Why a model cannot be loaded or a batch not be run.

use std::path::PathBuf;

use baton_checkpoint::CheckpointError;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("cannot allocate {bytes} bytes for the KV cache: lower the number of KV blocks")]
    KvPool { bytes: usize },
    #[error("cannot allocate {bytes} bytes for weights: the model is too large for this machine's memory")]
    Memory { bytes: usize },
    #[error("cannot allocate {bytes} bytes for activations: lower the number of tokens in a batch")]
    Activations { bytes: usize },
    #[error("cannot start the compute threads: {0}; lower the number of threads")]
    Threads(#[source] std::io::Error),
    #[error("the packed copy {} of the weights is damaged: {reason}", path.display())]
    PackedCopy { path: PathBuf, reason: String },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("tensor {tensor} cannot be loaded: {reason}")]
    Tensor { tensor: String, reason: String },
    #[error("load option {option} is {found}, must be {wanted}")]
    Option { option: &'static str, found: u64, wanted: &'static str },
    #[error("invalid batch: {0}")]
    Batch(#[source] BatchFault),
    #[error("invalid batch: sequence {sequence}: {fault}")]
    Sequence {
        sequence: usize,
        #[source]
        fault: BatchFault,
    },
}

/// What is wrong with a batch. The batch was refused as a whole: nothing was computed or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchFault {
    #[error("it is empty")]
    Empty,
    #[error("it has {tokens} tokens, at most {limit} fit")]
    TooManyTokens { tokens: usize, limit: usize },
    #[error("it has no tokens")]
    NoTokens,
    #[error("token {token} is not in the vocabulary of {vocabulary}")]
    UnknownToken { token: u32, vocabulary: u32 },
    #[error("it ends at position {end}, the context holds {context_tokens} tokens")]
    BeyondContext { end: u64, context_tokens: u32 },
    #[error("it has {blocks} KV blocks, {needed} are needed")]
    TooFewBlocks { blocks: usize, needed: usize },
    #[error("KV block {block} is outside the pool of {blocks}")]
    NoSuchBlock { block: u32, blocks: u32 },
    #[error("KV block {block} would be written twice")]
    BlockShared { block: u32 },
}
