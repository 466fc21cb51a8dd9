//! The last resort of a fence. A transfer that failed promises that its memory is not written any more; where a library
//! cannot take the connection down, nothing can keep that promise but the end of the process, whose connections the driver
//! takes down.

use std::io;

/// Goes on only if the fence stands. A wrong KV block that nobody notices is worse than an instance that is replaced.
pub(super) fn established(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(%error, "{what}: memory may still be written by a transfer that failed; ending the process");
        // Also where no subscriber listens: the reason of an abort must be found.
        eprintln!(
            "{what}: memory may still be written by a transfer that failed; ending the process: {error}"
        );
        std::process::abort();
    }
}
