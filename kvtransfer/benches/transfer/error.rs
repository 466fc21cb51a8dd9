//! Why something could not be measured.

use std::{error::Error, io, path::PathBuf, time::Duration};

use baton_kvtransfer::TransferError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("interrupted")]
    Interrupted,
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
    #[error("cannot start {program}: is it the path of a program, and are its libraries here?")]
    Start { program: PathBuf, source: io::Error },
    #[error(
        "{what} took longer than {limit:?}; a machine that busy measures nothing, run it again when it is quiet"
    )]
    Late { what: String, limit: Duration },
    #[error("{what} ended early or was not understood; it said: {words}")]
    Said { what: String, words: String },
    #[error("a transfer failed")]
    Transfer(#[from] TransferError),
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

/// An error and what it came from, on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
