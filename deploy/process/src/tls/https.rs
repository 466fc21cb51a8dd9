//! HTTPS for people's clients: TLS 1.3 with a certificate that says a host, as they expect, and no role.
//!
//! Who asks need not show a certificate unless an authority for theirs is named. The files are followed as those of our own
//! processes are; connections that stand go on.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::RwLock;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::{
    rustls::{
        self, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, pem::PemObject},
        server::{NoServerSessionStorage, WebPkiClientVerifier},
        sign::{CertifiedKey, SingleCertAndKey},
        version::TLS13,
    },
    server::TlsStream,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Counts, TlsError,
    credentials::{certificates, content, roots},
    follow,
    handshake::shake_hands,
    parting::why_in_plain_http,
};
use crate::Invalid;

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
    files: Arc<Followed>,
    counts: Counts,
}

impl fmt::Debug for Https {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Https").field(&self.files.config).finish()
    }
}

struct Followed {
    config: HttpsConfig,
    current: RwLock<(Files, Arc<ServerConfig>)>,
}

/// What the files hold, to tell whether they have changed.
#[derive(PartialEq, Eq)]
struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
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
        let files = Arc::new(Followed::read(config.clone())?);
        let counts = counts();
        let (followed, told) = (files.clone(), counts.clone());
        let refresh =
            move || Ok(followed.refresh()?.then(|| followed.config.cert_file.display().to_string()));
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(follow(refresh, told)));
        Ok(Some(Self { files, counts }))
    }

    /// Shakes hands with a client, within some seconds. None: it did not come to that; the client was told why, if it
    /// listened.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let config = self.files.current.read().1.clone();
        shake_hands(stream, config, why_in_plain_http, &self.counts).await
    }
}

impl Followed {
    fn read(config: HttpsConfig) -> Result<Self, TlsError> {
        let files = Files::read(&config)?;
        let made = Arc::new(files.server_config(&config)?);
        Ok(Self { config, current: RwLock::new((files, made)) })
    }

    /// Reads the files again; whether they have changed. After an error those before stay in use. Blocks.
    fn refresh(&self) -> Result<bool, TlsError> {
        let files = Files::read(&self.config)?;
        if files == self.current.read().0 {
            return Ok(false);
        }
        let made = Arc::new(files.server_config(&self.config)?);
        *self.current.write() = (files, made);
        Ok(true)
    }
}

impl Files {
    fn read(config: &HttpsConfig) -> Result<Self, TlsError> {
        let read = |key, path: &Path| match path.as_os_str().is_empty() {
            true => Ok(Vec::new()),
            false => {
                std::fs::read(path).map_err(|source| TlsError::Read { key, path: path.to_owned(), source })
            }
        };
        Ok(Self {
            cert: read(CERT, &config.cert_file)?,
            key: read(KEY, &config.key_file)?,
            client_ca: read(CLIENT_CA, &config.client_ca_file)?,
        })
    }

    fn server_config(&self, config: &HttpsConfig) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(CERT, &config.cert_file, &self.cert)?;
        let key_is = |problem: String| content(KEY, &config.key_file, problem);
        let key = PrivateKeyDer::from_pem_slice(&self.key);
        let key = key.map_err(|error| key_is(format!("holds no key: {error}")))?;
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
            let roots: Arc<RootCertStore> =
                Arc::new(roots(CLIENT_CA, &config.client_ca_file, &self.client_ca)?);
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
        Ok(made)
    }
}

#[cfg(test)]
mod tests;
