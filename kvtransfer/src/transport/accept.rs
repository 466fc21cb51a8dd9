//! Accepting connections, whatever they are for: so many at a time, each in a task of its own, until told to stop.

use std::{fmt, io, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream, unix},
    sync::Semaphore,
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Pause after `accept` itself failed, e.g. for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Where connections come in.
pub(super) trait Listener {
    type Stream;
    type Peer: fmt::Debug + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    type Peer = std::net::SocketAddr;

    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, Self::Peer)>> + Send {
        self.accept()
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;
    type Peer = unix::SocketAddr;

    fn accept(&self) -> impl Future<Output = io::Result<(UnixStream, Self::Peer)>> + Send {
        self.accept()
    }
}

/// What there may be of connections of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound {
    /// What they are for, as the log says it.
    pub(super) what: &'static str,
    pub(super) connections: usize,
}

/// Accepts connections until `stop`; over the bound, one is closed at once. Each is held by a `converse`, whose error is
/// why it was closed from this side: logged here, as a warning unless `quiet` takes it for a mere end.
pub(super) async fn accept<L, C, E>(
    listener: L,
    bound: Bound,
    tasks: TaskTracker,
    stop: CancellationToken,
    converse: impl Fn(L::Stream) -> C,
    quiet: fn(&E) -> bool,
) where
    L: Listener,
    C: Future<Output = Result<(), E>> + Send + 'static,
    E: fmt::Display + Send + 'static,
{
    let Bound { what, connections } = bound;
    let permits = Arc::new(Semaphore::new(connections));
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept {what} connections for the moment");
                sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            tracing::warn!(?peer, limit = connections, "{what} connection refused: too many are open");
            continue;
        };
        let conversation = converse(stream);
        tasks.spawn(async move {
            let _permit = permit;
            match conversation.await {
                Ok(()) => {}
                Err(reason) if quiet(&reason) => tracing::debug!(?peer, %reason, "{what} connection ended"),
                Err(reason) => tracing::warn!(?peer, %reason, "{what} connection closed"),
            }
        });
    }
}
