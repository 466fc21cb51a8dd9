//! Accepting connections, whatever they are for: so many at a time, each in a task of its own, until told to stop.

use std::{fmt, io, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream, unix},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::guests::{Bound, Guest, Guests};

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

/// Accepts connections until `stop`. Each is held by a `converse`, which is to have its guest proven as soon as it has
/// shown what it belongs to, and is dropped if newer ones take its place before. Its error is why it was closed from this
/// side: logged here, as a warning unless `quiet` takes it for a mere end.
pub(super) async fn accept<L, C, E>(
    listener: L,
    bound: Bound,
    tasks: TaskTracker,
    stop: CancellationToken,
    converse: impl Fn(L::Stream, Guest) -> C,
    quiet: fn(&E) -> bool,
) where
    L: Listener,
    C: Future<Output = Result<(), E>> + Send + 'static,
    E: fmt::Display + Send + 'static,
{
    let guests = Guests::new(bound);
    let what = guests.what();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept {what} connections for the moment");
                sleep(PAUSE).await;
                continue;
            }
        };
        let guest = guests.enter();
        let (cut, conversation) = (guest.cut(), converse(stream, guest));
        tasks.spawn(async move {
            match cut.run_until_cancelled(conversation).await {
                None => tracing::warn!(
                    ?peer,
                    "{what} connection cut: it had shown nothing yet, and newer ones came"
                ),
                Some(Ok(())) => {}
                Some(Err(reason)) if quiet(&reason) => {
                    tracing::debug!(?peer, %reason, "{what} connection ended")
                }
                Some(Err(reason)) => tracing::warn!(?peer, %reason, "{what} connection closed"),
            }
        });
    }
}
