//! Connections to a TLS port: accepted, hands shaken, and given to tonic together with who is at the other end.
//!
//! Handshakes run beside one another, each for a bounded time ([`super::handshake`]), and at most [`HANDSHAKES_MOST`] at
//! a time; of more, the oldest is given up: an honest one takes milliseconds, so that those who connect and say nothing
//! keep nobody out.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::{AbortHandle, JoinSet},
};
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

use super::{
    Counts, Identity, Peer,
    credentials::{Credentials, Held},
    handshake::shake_hands,
    parting::why_in_plaintext,
};

pub(super) const HANDSHAKES_MOST: usize = 256;
/// Connections accepted between two looks at those that have shaken hands.
const ACCEPTS: usize = 32;

/// See the module.
pub(crate) struct Incoming {
    tcp: TcpIncoming,
    credentials: Arc<Credentials>,
    without_certificate: bool,
    handshakes: JoinSet<Option<Secured>>,
    /// Those that run, the oldest first.
    running: VecDeque<AbortHandle>,
    counts: Counts,
}

impl Incoming {
    /// `without_certificate`: callers need not show who they are.
    pub(super) fn new(
        tcp: TcpIncoming,
        credentials: Arc<Credentials>,
        without_certificate: bool,
        counts: Counts,
    ) -> Self {
        let (handshakes, running) = (JoinSet::new(), VecDeque::new());
        Self { tcp, credentials, without_certificate, handshakes, running, counts }
    }

    fn begin(&mut self, stream: TcpStream) {
        self.running.retain(|handshake| !handshake.is_finished());
        if self.running.len() >= HANDSHAKES_MOST
            && let Some(oldest) = self.running.pop_front()
        {
            oldest.abort();
            self.counts.refused("crowded");
        }
        let (held, counts) = (self.credentials.current(), self.counts.clone());
        let handshake = take(stream, held, self.without_certificate, counts);
        self.running.push_back(self.handshakes.spawn(handshake));
    }
}

/// None: no connection that could be used.
async fn take(
    stream: TcpStream,
    held: Arc<Held>,
    without_certificate: bool,
    counts: Counts,
) -> Option<Secured> {
    let config = match held.accept(without_certificate) {
        Ok(config) => Arc::new(config),
        Err(error) => {
            tracing::error!(%error, "no connection can be taken");
            return None;
        }
    };
    let shaken = shake_hands(stream, config, why_in_plaintext, &counts).await?;
    Some(Secured::new(shaken, held.domain()))
}

impl Stream for Incoming {
    type Item = io::Result<Secured>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut accepted = false;
        // Those that have shaken hands first: however many come, they are not kept waiting.
        while let Poll::Ready(Some(joined)) = self.handshakes.poll_join_next(context) {
            if let Ok(Some(secured)) = joined {
                return Poll::Ready(Some(Ok(secured)));
            }
        }
        for _ in 0..ACCEPTS {
            match Pin::new(&mut self.tcp).poll_next(context) {
                Poll::Ready(Some(Ok(stream))) => self.begin(stream),
                // Tonic knows which of them are the listener's end.
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending if accepted => break,
                Poll::Pending => return Poll::Pending,
            }
            accepted = true;
        }
        // The new ones have not been looked at, and there may be more.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// A connection whose other end is known.
pub(crate) struct Secured {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Secured {
    fn new(stream: TlsStream<TcpStream>, domain: &str) -> Self {
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let peer = match shown.map(Identity::of) {
            None => Peer::Nameless("no certificate was shown".into()),
            Some(Err(error)) => Peer::Nameless(format!("of the certificate that was shown: {error}")),
            Some(Ok(identity)) if identity.domain != domain => {
                Peer::Nameless(format!("{identity} is of another trust domain"))
            }
            Some(Ok(identity)) => Peer::Named(Arc::new(identity)),
        };
        Self { stream, peer }
    }
}

/// What a request can be asked of its connection; taken apart by [`super::door`].
#[derive(Debug, Clone)]
pub(crate) struct ConnectInfo {
    pub(super) tcp: TcpConnectInfo,
    pub(super) peer: Peer,
}

impl Connected for Secured {
    type ConnectInfo = ConnectInfo;

    fn connect_info(&self) -> ConnectInfo {
        ConnectInfo { tcp: self.stream.get_ref().0.connect_info(), peer: self.peer.clone() }
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
