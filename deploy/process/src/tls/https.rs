//! HTTPS for people's clients: TLS 1.3 with a certificate that says a host, as they expect, and no role.
//!
//! Who asks need not show a certificate unless an authority for theirs is named. The files are followed as those of our own
//! processes are; connections that stand go on.

use std::{fmt, path::PathBuf, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::{
    rustls::{
        self, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, UnixTime, pem::PemObject},
        server::{NoServerSessionStorage, WebPkiClientVerifier},
        sign::{CertifiedKey, SingleCertAndKey},
        version::TLS13,
    },
    server::TlsStream,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use webpki::KeyUsage;

use super::{
    Counts, Shown, TlsError,
    credentials::{certificates, content, roots},
    expiry::believed_until,
    files::{Contents, Followed, Paths},
    follow_files,
    handshake::shake_hands,
    parting::why_in_plain_http,
};
use crate::{Invalid, http::express::Connection};

/// Files by which clients are served. None of them = plaintext.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpsConfig {
    /// The certificate (PEM) that clients are shown, and those between it and its signer; with it, clients are served by
    /// [TLS 1.3](../../README.md#security) and by nothing else. Empty = plaintext.
    pub cert_file: PathBuf,
    /// The key (PEM) of `cert_file`.
    pub key_file: PathBuf,
    /// Certificates (PEM) of who signs those of clients: who shows none of theirs is turned away. Empty = clients need
    /// none.
    pub client_ca_file: PathBuf,
}

const CERT: &str = "https.cert_file";
const KEY: &str = "https.key_file";
const CLIENT_CA: &str = "https.client_ca_file";

impl HttpsConfig {
    pub fn is_on(&self) -> bool {
        !self.cert_file.as_os_str().is_empty()
    }

    fn files(&self) -> Paths {
        let Self { cert_file, key_file, client_ca_file } = self.clone();
        [(CERT, cert_file), (KEY, key_file), (CLIENT_CA, client_ca_file)]
    }

    /// There is no key without a certificate, nor the reverse, and without both nobody's certificate is looked at.
    pub fn validate(&self) -> Result<(), Invalid> {
        let [cert, key, client_ca] =
            [&self.cert_file, &self.key_file, &self.client_ca_file].map(|path| !path.as_os_str().is_empty());
        let missing = match (cert, key, client_ca) {
            (false, true, _) | (false, _, true) => CERT,
            (true, false, _) => KEY,
            _ => return Ok(()),
        };
        Err(Invalid::new(missing, "expected a file, as another of `https` is given"))
    }
}

/// What clients of a port are spoken to with, kept fresh. Cheap to clone.
#[derive(Clone)]
pub struct Https {
    config: HttpsConfig,
    made: Arc<Followed<Made>>,
    counts: Counts,
}

/// What was made of the files.
struct Made {
    server: Arc<ServerConfig>,
    shown: Shown,
}

impl fmt::Debug for Https {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Https").field(&self.config).finish()
    }
}

impl Https {
    /// Reads the files, and follows them until the shutdown. None: no files, plaintext. Errors name the key and the file.
    pub(crate) fn start(
        config: &HttpsConfig,
        counts: impl FnOnce() -> Counts,
        shutdown: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Option<Self>, TlsError> {
        if !config.is_on() {
            return Ok(None);
        }
        let (config, made) = (config.clone(), Arc::new(read(config)?));
        let counts = counts();
        counts.shows(&made.current().shown);
        let (followed, told) = (made.clone(), counts.clone());
        let refresh = move || Ok(followed.refresh()?.map(|made| made.shown.clone()));
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(follow_files(refresh, told)));
        Ok(Some(Self { config, made, counts }))
    }

    /// Shakes hands with a client, within some seconds. None: it did not come to that; the client was told why, if it
    /// listened.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Option<TlsStream<Connection>> {
        let over = |stream| Connection::new(stream).0;
        let server = self.made.current().server.clone();
        shake_hands(stream, over, server, why_in_plain_http, &self.counts).await
    }
}

fn read(config: &HttpsConfig) -> Result<Followed<Made>, TlsError> {
    let of = config.clone();
    Followed::read(config.files(), move |contents| make(contents, &of))
}

/// Of the contents of [`HttpsConfig::files`].
fn make([cert, key, client_ca]: &Contents, config: &HttpsConfig) -> Result<Made, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let chain = certificates(CERT, &config.cert_file, cert)?;
    let key_is = |problem: String| content(KEY, &config.key_file, problem);
    let key = PrivateKeyDer::from_pem_slice(key);
    let key = key.map_err(|error| key_is(format!("holds no key: {error}")))?;
    // Whom clients believe is not known here.
    let until = believed_until(&chain, &[], KeyUsage::server_auth());
    if until.is_some_and(|until| until < UnixTime::now()) {
        return Err(content(CERT, &config.cert_file, "has expired, or what it was signed by"));
    }
    let not_of = |error| key_is(format!("is not the key of {}: {error}", config.cert_file.display()));
    let certified = CertifiedKey::from_der(chain, key, &provider).map_err(not_of)?;
    let own = Arc::new(SingleCertAndKey::from(certified));
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Setup)?;
    // By the setting: a file that has become empty lets nobody in who could not come in before.
    let mut made = if config.client_ca_file.as_os_str().is_empty() {
        let mut made = builder.with_no_client_auth().with_cert_resolver(own);
        made.ticketer = ring::Ticketer::new().map_err(TlsError::Setup)?;
        made
    } else {
        let roots: Arc<RootCertStore> = Arc::new(roots(CLIENT_CA, &config.client_ca_file, client_ca)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
        let setup = |error: String| TlsError::Setup(rustls::Error::General(error));
        let verifier = verifier.map_err(|error| setup(error.to_string()))?;
        let mut made = builder.with_client_cert_verifier(verifier).with_cert_resolver(own);
        // Each connection shows its certificate anew: one that has expired, or that is not believed any more, ends with
        // the connection.
        made.session_storage = Arc::new(NoServerSessionStorage {});
        made.send_tls13_tickets = 0;
        made
    };
    made.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let shown = Shown { file: CERT, named: config.cert_file.display().to_string(), until };
    Ok(Made { server: Arc::new(made), shown })
}

#[cfg(test)]
mod tests;
