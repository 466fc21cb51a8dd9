//! The way to a gRPC port of ours: a connector for tonic's `Endpoint` that shakes hands with what the files hold at that
//! moment, and turns away whoever has not the role that is asked for.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{io::AsyncBufReadExt, net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{self, pki_types::ServerName},
};
use tonic::transport::{Channel, Endpoint};

use super::{Identity, IdentityError, Role, credentials::Credentials};

/// For a connection and its handshake, if the endpoint says nothing shorter.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Why the other end is not who was asked for.
#[derive(Debug, thiserror::Error)]
enum WrongPeer {
    #[error("the other side does not speak TLS: give it its certificate (`tls`), or take this side's away")]
    Plaintext,
    #[error("the other side's certificate: {0}")]
    Nameless(#[from] IdentityError),
    #[error("the other side is {found}, and {wanted} was asked for")]
    Other { found: Identity, wanted: String },
    #[error("no connection and handshake in time")]
    Slow,
}

/// Dials peers of one role. Cheap to clone.
#[derive(Clone)]
pub struct Dial {
    credentials: Option<Arc<Credentials>>,
    role: Role,
    name: Option<String>,
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dial")
            .field("tls", &self.credentials.is_some())
            .field("role", &self.role)
            .field("name", &self.name)
            .finish()
    }
}

impl Dial {
    pub(super) fn new(credentials: Option<Arc<Credentials>>, role: Role) -> Self {
        Self { credentials, role, name: None }
    }

    /// The one of this name, where certificates name theirs.
    pub fn named(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Connects. The endpoint is `http://HOST:PORT`, whether by TLS or not.
    pub async fn connect(&self, endpoint: Endpoint) -> Result<Channel, tonic::transport::Error> {
        match self.credentials.clone() {
            None => endpoint.connect().await,
            Some(credentials) => endpoint.connect_with_connector(self.connector(credentials)).await,
        }
    }

    /// Connects when first used, and again after a break.
    pub fn connect_lazy(&self, endpoint: &Endpoint) -> Channel {
        match self.credentials.clone() {
            None => endpoint.connect_lazy(),
            Some(credentials) => endpoint.connect_with_connector_lazy(self.connector(credentials)),
        }
    }

    fn connector(&self, credentials: Arc<Credentials>) -> Connector {
        Connector { dial: self.clone(), credentials }
    }

    async fn open(
        &self,
        uri: &http::Uri,
        credentials: &Credentials,
    ) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{uri}: {what}"));
        let host = uri.host().ok_or_else(|| invalid("no host"))?.trim_matches(['[', ']']);
        let port = uri.port_u16().ok_or_else(|| invalid("no port"))?;
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let held = credentials.current();
        let config = held.connect().map_err(io::Error::other)?;
        // It is sent to the other side, which has one certificate for all; who answers is told by that.
        let name = ServerName::try_from(host.to_owned()).map_err(|_| invalid("no host"))?;
        let mut stream =
            TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(said_clearly)?;
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let found = shown.map_or(Err(IdentityError::Missing), Identity::of);
        self.recognise(found, held.domain()).map_err(io::Error::other)?;
        // The other side looks at this one's certificate after it has shown its own (RFC 8446, 2): its first word, which
        // in HTTP/2 it says unasked, or its alert tells whether this one is let in.
        if stream.fill_buf().await?.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the connection was closed without a word",
            ));
        }
        Ok(TokioIo::new(stream))
    }

    /// Whether this is who was asked for.
    fn recognise(&self, found: Result<Identity, IdentityError>, domain: &str) -> Result<(), WrongPeer> {
        let found = found?;
        let of_name = match (&self.name, &found.name) {
            (Some(wanted), Some(name)) => wanted == name,
            _ => true,
        };
        if found.role == self.role && found.domain == domain && of_name {
            return Ok(());
        }
        let name = self.name.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
        Err(WrongPeer::Other { found, wanted: format!("spiffe://{domain}/baton/{}{name}", self.role) })
    }
}

struct Connector {
    dial: Dial,
    credentials: Arc<Credentials>,
}

impl tower::Service<http::Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        let (dial, credentials) = (self.dial.clone(), self.credentials.clone());
        Box::pin(async move {
            let opened = timeout(CONNECT_WITHIN, dial.open(&uri, &credentials)).await;
            opened.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, WrongPeer::Slow)))
        })
    }
}

/// What is not TLS at all is said to be corrupt by the library.
fn said_clearly(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidMessage(_)) => io::Error::other(WrongPeer::Plaintext),
        _ => error,
    }
}
