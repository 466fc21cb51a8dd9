//! How a TLS port parts with those whom it does not let in: so that they learn why, in plaintext HTTP/2 if that is what they
//! speak (HTTP/1.1 where people's clients are served), by TLS's own alerts otherwise.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// The first byte of every TLS connection: a record of a handshake (RFC 8446, 5.1).
const HANDSHAKE_RECORD: u8 = 0x16;
/// An empty SETTINGS frame, with which HTTP/2 begins (RFC 9113, 3.4).
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// INADEQUATE_SECURITY (RFC 9113, 7).
const INADEQUATE_SECURITY: u32 = 0xc;
const MESSAGE: &str =
    "this port speaks mutual TLS: give the caller a certificate, `tls` in its configuration";
const PLAIN_HTTP: &str = "this port speaks HTTPS: begin the address with https://\n";
/// For the caller to read it and leave.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// As much as is read of who goes on talking.
const READ_MOST: u64 = 64 << 10;

/// Whether TLS begins here. Waits for the first byte, and leaves it where it is.
pub(super) async fn begins_tls(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0];
    let read = stream.peek(&mut first).await?;
    Ok(read == 0 || first[0] == HANDSHAKE_RECORD)
}

/// What is said to whoever does not begin TLS.
pub(super) fn why_in_plaintext() -> Vec<u8> {
    let length = u32::try_from(8 + MESSAGE.len()).unwrap_or(8);
    let mut words = SETTINGS.to_vec();
    words.extend_from_slice(&length.to_be_bytes()[1..]);
    // GOAWAY, no flags, stream 0; no stream was taken.
    words.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    words.extend_from_slice(&INADEQUATE_SECURITY.to_be_bytes());
    words.extend_from_slice(MESSAGE.as_bytes());
    words
}

/// The same to whoever speaks HTTP/1.1.
pub(super) fn why_in_plain_http() -> Vec<u8> {
    let length = PLAIN_HTTP.len();
    let head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close";
    format!("{head}\r\ncontent-length: {length}\r\n\r\n{PLAIN_HTTP}").into_bytes()
}

/// Says something, after what has been said already, and closes once the other side has, for at most [`LEAVE_WITHIN`].
/// A close with unread bytes would be a reset, which takes the words away from who has not read them yet.
pub(super) async fn turn_away(mut stream: impl AsyncRead + AsyncWrite + Unpin, words: &[u8]) {
    let parting = async {
        stream.write_all(words).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(READ_MOST), &mut tokio::io::sink()).await
    };
    // Who has gone already is told nothing.
    let _ = timeout(LEAVE_WITHIN, parting).await;
}
