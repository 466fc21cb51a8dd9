//! Handshakes of connections that were taken in. One that fails is counted, is told why as far as it can be, and concerns
//! nobody else.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};

use super::{
    Counts,
    parting::{begins_tls, turn_away},
};

/// An honest handshake takes milliseconds.
pub(super) const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);

/// A handshake that failed.
struct Failed<S> {
    why: &'static str,
    error: io::Error,
    /// The connection, if it can still be said on it why, and what is left to say.
    stream: Option<(S, Vec<u8>)>,
}

/// Shakes hands, within [`HANDSHAKE_WITHIN`], over what is `made` of the socket. None: it failed. `plaintext` is what is said to
/// whoever does not begin TLS.
pub(super) async fn shake_hands<S: AsyncRead + AsyncWrite + Unpin>(
    stream: TcpStream,
    made: impl FnOnce(TcpStream) -> S,
    config: Arc<ServerConfig>,
    plaintext: fn() -> Vec<u8>,
    counts: &Counts,
) -> Option<TlsStream<S>> {
    let peer = stream.peer_addr().ok();
    let shaken = timeout(HANDSHAKE_WITHIN, try_shake(stream, made, config, plaintext)).await;
    let slow = |_| Failed { why: "slow", error: io::ErrorKind::TimedOut.into(), stream: None };
    let Failed { why, error, stream } = match shaken.map_err(slow).flatten() {
        Ok(stream) => return Some(stream),
        Err(failed) => failed,
    };
    counts.refused(why);
    tracing::debug!(?peer, why, %error, "a connection is refused");
    if let Some((stream, words)) = stream {
        turn_away(stream, &words).await;
    }
    None
}

async fn try_shake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: TcpStream,
    made: impl FnOnce(TcpStream) -> S,
    config: Arc<ServerConfig>,
    plaintext: fn() -> Vec<u8>,
) -> Result<TlsStream<S>, Failed<S>> {
    let gone = |error| Failed { why: "handshake", error, stream: None };
    if !begins_tls(&stream).await.map_err(gone)? {
        let error = io::Error::other("it does not begin as TLS does");
        return Err(Failed { why: "plaintext", error, stream: Some((made(stream), plaintext())) });
    }
    let accepted = TlsAcceptor::from(config).accept(made(stream)).into_fallible().await;
    accepted.map_err(|(error, stream)| Failed { why: "handshake", error, stream: Some((stream, Vec::new())) })
}
