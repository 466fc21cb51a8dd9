//! When to stop. The first SIGTERM or SIGINT, or the end of standard input of a supervised process, begins a shutdown;
//! the second signal ends the process at once.

use std::io::Read;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::ProcessError;

/// Exit status of a process that was told twice to stop, as shells show an interrupt.
const AT_ONCE: i32 = 130;

/// Watches for signals until the process ends. Must be called within a tokio runtime.
pub(crate) fn watch(shutdown: CancellationToken) -> Result<(), ProcessError> {
    let failed =
        |source: std::io::Error| ProcessError::Setup { what: "signal handling", source: source.into() };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    // Lives as long as the runtime: the second signal must be heard during the shutdown that the first began.
    tokio::spawn(async move {
        let mut asked = false;
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if asked {
                tracing::warn!(signal = name, "asked again to stop: stopping at once");
                std::process::exit(AT_ONCE);
            }
            asked = true;
            tracing::info!(signal = name, "asked to stop: draining");
            shutdown.cancel();
        }
    });
    Ok(())
}

/// Begins a shutdown when standard input closes. A thread of its own, because a read from it cannot be called off.
pub(crate) fn watch_stdin(shutdown: CancellationToken) -> Result<(), ProcessError> {
    let watch = move || {
        let mut stdin = std::io::stdin().lock();
        let mut ignored = [0; 256];
        loop {
            match stdin.read(&mut ignored) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if !shutdown.is_cancelled() {
            tracing::info!("the supervisor is gone: draining");
            shutdown.cancel();
        }
    };
    let spawned = std::thread::Builder::new().name("supervisor-watch".to_owned()).spawn(watch);
    let failed = |source: std::io::Error| ProcessError::Setup {
        what: "the watch on standard input",
        source: source.into(),
    };
    spawned.map(drop).map_err(failed)
}
