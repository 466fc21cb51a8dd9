//! Blocking work for one connection, on a thread of its own.

use std::{io, net::Shutdown};

use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A connection that can be shut from another thread.
pub(crate) trait Shut {
    fn shut(&self) -> io::Result<()>;
}

impl Shut for std::os::unix::net::UnixStream {
    fn shut(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

impl Shut for std::net::TcpStream {
    fn shut(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

/// Runs `work`, which ends when its connection is shut: by the peer, or here, through `handle`, when `over` is cancelled.
/// Dropping the future shuts it as well, and leaves the thread to end by itself: `threads` counts it until it has.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    handle: impl Shut,
    over: &CancellationToken,
    threads: &TaskTracker,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let handle = ShutOnDrop(handle);
    let (ended, mut end) = oneshot::channel();
    let counted = threads.token();
    let work = move || {
        let _counted = counted;
        let _ = ended.send(work());
    };
    std::thread::Builder::new().name(name.into()).spawn(work)?;
    let died = |_| io::Error::other("the thread of a data connection panicked");
    tokio::select! {
        result = &mut end => return result.map_err(died),
        () = over.cancelled() => {}
    }
    drop(handle);
    end.await.map_err(died) // at the latest when the run in hand is copied
}

struct ShutOnDrop<H: Shut>(H);

impl<H: Shut> Drop for ShutOnDrop<H> {
    fn drop(&mut self) {
        let _ = self.0.shut();
    }
}
