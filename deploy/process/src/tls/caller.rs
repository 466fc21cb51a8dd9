//! Who is at the other end of a connection to a gRPC port: found out when it is taken in, and put to each of its requests.

use std::{convert::identity, net::SocketAddr, sync::Arc};

use http::Request;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tonic::transport::server::TcpConnectInfo;

use super::{Door, Identity, Peer, Tls, handshake::shake_hands, parting::why_in_plaintext};

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    address: TcpConnectInfo,
    peer: Peer,
}

/// What a connection is spoken over.
pub(crate) type Spoken = Either<TlsStream<TcpStream>, TcpStream>;

impl Tls {
    /// Takes a connection in, after a handshake within some seconds where the port speaks TLS. None: it did not come to that;
    /// the caller was told why, if it listened.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        door: Door,
    ) -> Option<(Spoken, Caller)> {
        let address = TcpConnectInfo { local_addr: stream.local_addr().ok(), remote_addr: Some(from) };
        let Some(credentials) = &self.credentials else {
            return Some((Either::Right(stream), Caller { address, peer: Peer::Plaintext }));
        };
        let held = credentials.current();
        let config = match held.accept(door.without_certificate) {
            Ok(config) => Arc::new(config),
            Err(error) => {
                tracing::error!(%error, "no connection can be taken");
                return None;
            }
        };
        let shaken = shake_hands(stream, identity, config, why_in_plaintext, &self.counts).await?;
        let peer = shown(&shaken, held.domain());
        Some((Either::Left(shaken), Caller { address, peer }))
    }
}

fn shown(stream: &TlsStream<TcpStream>, domain: &str) -> Peer {
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    match shown.map(Identity::of) {
        None => Peer::Nameless("no certificate was shown".into()),
        Some(Err(error)) => Peer::Nameless(format!("of the certificate that was shown: {error}")),
        Some(Ok(identity)) if identity.domain != domain => {
            Peer::Nameless(format!("{identity} is of another trust domain"))
        }
        Some(Ok(identity)) => Peer::Named(Arc::new(identity)),
    }
}

impl Caller {
    /// Whether it is somebody that it should be, as far as the port asks for that.
    pub(crate) fn is_known(&self) -> bool {
        !matches!(self.peer, Peer::Nameless(_))
    }

    /// Tells a request who makes it; [`Peer::of`] reads it.
    pub(crate) fn introduce<B>(&self, request: &mut Request<B>) {
        request.extensions_mut().insert(self.address.clone());
        request.extensions_mut().insert(self.peer.clone());
    }

    /// Somebody on this machine.
    #[cfg(test)]
    pub(crate) fn of_test(peer: Peer) -> Self {
        Self { address: TcpConnectInfo { local_addr: None, remote_addr: None }, peer }
    }
}
