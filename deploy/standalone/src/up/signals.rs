//! When `baton up` is to stop: Ctrl-C, SIGTERM, a closed terminal; the second time at once.

use std::io::Read;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::UpError;

/// The first signal cancels `stop`, the second `kill`. With `supervised`, the end of standard input counts as one.
pub(super) fn watch(
    stop: &CancellationToken,
    kill: &CancellationToken,
    supervised: bool,
) -> Result<(), UpError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(UpError::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(UpError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(UpError::Signals)?;
    let (stop_first, then_kill) = (stop.clone(), kill.clone());
    // Lives as long as the process: the second signal must be heard while the first is being obeyed.
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if stop_first.is_cancelled() {
                then_kill.cancel();
            }
            stop_first.cancel();
        }
    });
    if supervised {
        let stop = stop.clone();
        // A thread of its own, because a read of standard input cannot be called off.
        std::thread::spawn(move || {
            let mut stdin = std::io::stdin().lock();
            let mut ignored = [0; 256];
            while stdin.read(&mut ignored).is_ok_and(|read| read > 0) {}
            stop.cancel();
        });
    }
    Ok(())
}
