//! Why something could not be measured.

use std::{io, path::PathBuf, time::Duration};

use baton_coordinator::ModelError;
use baton_registry::StoreError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("cannot start {}: {source}", .program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("cannot open the model: {0}")]
    Model(#[from] ModelError),
    #[error("{} cannot be given a longer context: it has no llama.context_length of 32 bits", .0.display())]
    Context(PathBuf),
    #[error("the model has only {words} tokens that are a word of their own: too few to make text of")]
    Words { words: usize },
    #[error("the store refuses the instances: {0}")]
    Store(#[from] StoreError),
    #[error("{what} took longer than {limit:?}")]
    Late { what: String, limit: Duration },
    #[error("{what} ended, or said what was not understood: {words}")]
    Said { what: String, words: String },
    #[error("{target} does not answer as it should: {fault}")]
    Answer { target: &'static str, fault: String },
}

impl BenchError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn said(what: impl Into<String>, words: impl Into<String>) -> Self {
        Self::Said { what: what.into(), words: words.into() }
    }
}
