//! Why a model's text side cannot be used, or a text not be turned into tokens.

use std::path::PathBuf;

use baton_checkpoint::CheckpointError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    #[error("cannot use the tokeniser of {path}: {source}")]
    Tokenizer { path: PathBuf, source: TokenizerError },
    #[error("cannot use the chat template of {path}: {source}")]
    Template { path: PathBuf, source: minijinja::Error },
    /// The template itself refuses the messages, by `raise_exception`.
    #[error("the model's chat template refuses these messages: {reason}")]
    Refused { reason: String },
    #[error("this model has no chat template: use /v1/completions")]
    NoTemplate,
    #[error("the model's chat template fails on these messages: {0}")]
    Render(#[source] minijinja::Error),
    #[error("cannot tokenise the text: {0}")]
    Encode(#[source] tokenizers::Error),
}

/// What is wrong with a tokeniser's files, or not supported.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("tokenizer.ggml.model is {0:?}; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)")]
    UnknownModel(String),
    #[error("tokenizer.ggml.pre is {found:?}; supported: {supported}")]
    UnknownSplits { found: String, supported: &'static str },
    #[error("tokenizer.ggml.merges[{at}] is {merge:?}, not two tokens")]
    BadMerge { at: usize, merge: String },
    #[error("tokenizer.ggml.scores is not there; SentencePiece needs one for each token")]
    NoScores,
    #[error("its decoder is none of ByteLevel, ByteFallback and Metaspace")]
    UnknownDecoder,
    #[error("its decoder cannot be read: {0}")]
    Decoder(#[from] serde_json::Error),
    #[error("it knows {knows} tokens, the model {rows}; the files are not of one model")]
    OtherModel { knows: u32, rows: u32 },
    #[error("{0}")]
    Tables(#[from] tokenizers::Error),
}
