//! What strangers say to a port that they reach: nothing, too little of it, or what makes no sense; in plaintext, or within TLS.

use std::{
    fmt::{self, Debug},
    sync::Arc,
    time::{Duration, Instant},
};

use baton_process::TlsConfig;
use futures::future::join_all;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    },
};

/// HTTP/2's first bytes, and settings without any.
const HTTP_2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// By then whoever does not get on is turned away: twenty seconds for a first call or signs of life, and five to leave; a busy
/// machine's delay comes on top.
const TURNED_AWAY_WITHIN: Duration = Duration::from_secs(35);

/// How a connection goes on after its first bytes.
#[derive(Debug, Clone, Copy)]
enum Then {
    Silence,
    /// One more byte of this every second.
    Drip(u8),
}

/// What a stranger says.
#[derive(Clone)]
pub struct Words {
    first: Vec<u8>,
    then: Then,
}

impl Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, bytes) = (String::from_utf8_lossy(&self.first), self.first.len());
        write!(f, "{first:.60?} ({bytes} bytes), then {:?}", self.then)
    }
}

fn words(first: &[u8], then: Then) -> Words {
    Words { first: first.to_vec(), then }
}

fn garbage() -> Vec<u8> {
    (0..2000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// A frame of headers that is announced to be longer than what comes of it.
fn unfinished() -> Vec<u8> {
    [HTTP_2, b"\0\x01\0\x01\x04\0\0\0\x01"].concat()
}

/// To a gRPC port.
pub fn of_grpc() -> Vec<Words> {
    // A frame of 16 MiB, which nobody has allowed; settings, though there is no stream of that number.
    let enormous = [HTTP_2, b"\xff\xff\xff\0\0\0\0\0\x01"].concat();
    let wrong = [HTTP_2, b"\0\0\0\x04\0\0\0\0\x05"].concat();
    vec![
        words(b"", Then::Silence),
        words(b"P", Then::Drip(b'R')),
        words(&garbage(), Then::Silence),
        words(&unfinished(), Then::Drip(0)),
        words(&enormous, Then::Silence),
        words(&wrong, Then::Silence),
    ]
}

/// To an HTTP port.
pub fn of_http() -> Vec<Words> {
    let negative = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n";
    vec![
        words(b"", Then::Silence),
        words(b"GET / HTTP/1.1\r\nx: ", Then::Drip(b'a')),
        words(&garbage(), Then::Silence),
        words(negative, Then::Silence),
        words(&unfinished(), Then::Drip(0)),
    ]
}

/// To a port that speaks TLS, before it: nothing, a byte at a time of a handshake's first record, and what is none.
pub fn before_tls() -> Vec<Words> {
    vec![
        words(b"", Then::Silence),
        words(b"\x16\x03\x01\x02\x00\x01", Then::Drip(0)),
        words(b"\x16\x03\x01\xff\xff", Then::Silence),
        words(&garbage(), Then::Silence),
    ]
}

/// How strangers connect. Cheap to clone.
#[derive(Clone)]
pub enum Way {
    Plaintext,
    Tls(TlsConnector),
}

impl Way {
    /// Within TLS, whoever is at the other end, showing this certificate or none.
    pub fn tls(shown: Option<&TlsConfig>) -> Self {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(BelievesAll(provider)));
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let pem = std::fs::read(&files.cert_file).expect("a file");
                let chain =
                    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().expect("a certificate");
                let key = PrivateKeyDer::from_pem_file(&files.key_file).expect("a key");
                builder.with_client_auth_cert(chain, key).expect("its key")
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::Tls(TlsConnector::from(Arc::new(config)))
    }

    async fn connect(&self, address: &str) -> Box<dyn Stream> {
        let stream = TcpStream::connect(address).await.expect("it listens");
        match self {
            Self::Plaintext => Box::new(stream),
            Self::Tls(connector) => {
                let name = ServerName::try_from("localhost").expect("a name");
                Box::new(connector.connect(name, stream).await.expect("it shakes hands"))
            }
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Connects and says this; how long it took until the port hung up.
async fn turned_away(address: &str, way: &Way, said: &Words) -> Duration {
    let took = timeout(TURNED_AWAY_WITHIN, until_it_hangs_up(address, way, said)).await;
    took.unwrap_or_else(|_| panic!("{address}: {said:?}: it is still open"))
}

async fn until_it_hangs_up(address: &str, way: &Way, said: &Words) -> Duration {
    let mut stream = way.connect(address).await;
    let (began, mut heard) = (Instant::now(), [0; 1 << 12]);
    // Or it has hung up at once.
    let _ = stream.write_all(&said.first).await;
    let _ = stream.flush().await;
    loop {
        match timeout(Duration::from_secs(1), stream.read(&mut heard)).await {
            Ok(Ok(0) | Err(_)) => return began.elapsed(),
            Ok(Ok(_)) => {}
            Err(_) => {
                if let Then::Drip(byte) = said.then {
                    // That it is closed is seen by reading.
                    let _ = stream.write_all(&[byte]).await;
                    let _ = stream.flush().await;
                }
            }
        }
    }
}

/// So many of each at once say it to each of these ports; how long the last of them was let be.
pub async fn crowd(ports: &[String], way: &Way, each: usize, said: Vec<Words>) -> Duration {
    let mut all = Vec::new();
    for port in ports {
        for words in &said {
            all.extend((0..each).map(|_| turned_away(port, way, words)));
        }
    }
    join_all(all).await.into_iter().max().unwrap_or_default()
}

/// Asks nobody for anything: a stranger talks to whoever listens.
#[derive(Debug)]
struct BelievesAll(Arc<CryptoProvider>);

impl ServerCertVerifier for BelievesAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
