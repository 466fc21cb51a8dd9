//! Handshakes of connections that were taken in. One that fails is counted, is told why as far as it can be, and concerns
//! nobody else.

use std::{io, sync::Arc, time::Duration};

use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};

use super::{
    Counts,
    parting::{begins_tls, turn_away},
};

/// An honest handshake takes milliseconds.
pub(super) const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);

/// A handshake that failed.
struct Failed {
    why: &'static str,
    error: io::Error,
    /// The connection, if it can still be said on it why, and what is left to say.
    stream: Option<(TcpStream, Vec<u8>)>,
}

/// Shakes hands, within [`HANDSHAKE_WITHIN`]. None: it failed. `plaintext` is what is said to whoever does not begin TLS.
pub(super) async fn shake_hands(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    plaintext: fn() -> Vec<u8>,
    counts: &Counts,
) -> Option<TlsStream<TcpStream>> {
    let peer = stream.peer_addr().ok();
    let shaken = timeout(HANDSHAKE_WITHIN, try_shake(stream, config, plaintext)).await;
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

async fn try_shake(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    plaintext: fn() -> Vec<u8>,
) -> Result<TlsStream<TcpStream>, Failed> {
    let gone = |error| Failed { why: "handshake", error, stream: None };
    if !begins_tls(&stream).await.map_err(gone)? {
        let error = io::Error::other("it does not begin as TLS does");
        return Err(Failed { why: "plaintext", error, stream: Some((stream, plaintext())) });
    }
    let accepted = TlsAcceptor::from(config).accept(stream).into_fallible().await;
    accepted.map_err(|(error, stream)| Failed { why: "handshake", error, stream: Some((stream, Vec::new())) })
}
