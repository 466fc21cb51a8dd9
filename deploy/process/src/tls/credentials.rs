//! The three files as they were last read and found good, and what each handshake is made of.

use std::{path::Path, sync::Arc};

use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use webpki::{EndEntityCert, KeyUsage};

use super::{
    Identity, Role, Shown, TlsConfig, TlsError,
    expiry::believed_until,
    files::{Contents, Followed},
};

const CERT: &str = "tls.cert_file";

/// Whose files they are.
#[derive(Debug, Clone)]
pub(super) enum Owner {
    /// Has a certificate, which names this role.
    Service(Role),
    /// May have one; without, it has to know the trust domain of the others.
    Operator { domain: Option<String> },
}

/// Kept fresh by [`Credentials::refresh`].
pub(super) struct Credentials {
    config: TlsConfig,
    held: Followed<Held>,
}

/// What was read of them.
pub(super) struct Held {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    own: Option<Own>,
    domain: String,
}

/// What is shown to peers.
struct Own {
    identity: Identity,
    key: Arc<SingleCertAndKey>,
    until: Option<UnixTime>,
}

impl Credentials {
    pub(super) fn read(config: TlsConfig, owner: Owner) -> Result<Self, TlsError> {
        let (paths, of) = (config.files().map(|(key, path)| (key, path.clone())), config.clone());
        let held = Followed::read(paths, move |contents| Held::new(contents, &of, &owner))?;
        Ok(Self { config, held })
    }

    /// Reads the files again; what is shown from now on, if they have changed. After an error those before stay in use. Blocks.
    pub(super) fn refresh(&self) -> Result<Option<Shown>, TlsError> {
        Ok(self.held.refresh()?.and_then(|held| held.shown()))
    }

    /// None: nobody is shown any.
    pub(super) fn shown(&self) -> Option<Shown> {
        self.current().shown()
    }

    pub(super) fn current(&self) -> Arc<Held> {
        self.held.current()
    }

    pub(super) fn config(&self) -> &TlsConfig {
        &self.config
    }
}

pub(super) fn content(key: &'static str, path: &Path, problem: impl Into<String>) -> TlsError {
    TlsError::Content { key, path: path.to_owned(), problem: problem.into() }
}

/// At least one.
pub(super) fn certificates(
    key: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let read = read.map_err(|error| content(key, path, format!("is no PEM file: {error}")))?;
    if read.is_empty() { Err(content(key, path, "holds no certificate (PEM)")) } else { Ok(read) }
}

/// Those of a PEM file, for a fuzz target.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let _ = roots("tls.ca_file", path, pem);
    certificates("tls.ca_file", path, pem)
}

/// Authorities: at least one.
pub(super) fn roots(key: &'static str, path: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(key, path, pem)? {
        let problem = |error| format!("holds a certificate that cannot sign others: {error}");
        roots.add(authority).map_err(|error| content(key, path, problem(error)))?;
    }
    Ok(roots)
}

impl Held {
    /// Of the contents of [`TlsConfig::files`].
    fn new([ca, cert, key]: &Contents, config: &TlsConfig, owner: &Owner) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let roots = roots("tls.ca_file", &config.ca_file, ca)?;
        let own = match owner {
            Owner::Operator { .. } if cert.is_empty() => None,
            Owner::Operator { .. } | Owner::Service(_) => {
                Some(Self::own((cert, key), config, owner, (&provider, &roots))?)
            }
        };
        let given = match owner {
            Owner::Operator { domain } => domain.clone(),
            Owner::Service(_) => None,
        };
        let named = own.as_ref().map(|own| own.identity.domain.clone());
        let domain = match (given, named) {
            (None, None) => return Err(TlsError::NoDomain),
            (Some(given), Some(named)) if given != named => {
                return Err(TlsError::OtherDomain { path: config.cert_file.clone(), named, given });
            }
            (Some(domain), _) | (None, Some(domain)) => domain,
        };
        Ok(Self { provider, roots: Arc::new(roots), own, domain })
    }

    fn own(
        (cert, key): (&[u8], &[u8]),
        config: &TlsConfig,
        owner: &Owner,
        (provider, roots): (&CryptoProvider, &RootCertStore),
    ) -> Result<Own, TlsError> {
        let path = || config.cert_file.clone();
        let chain = certificates(CERT, &config.cert_file, cert)?;
        let identity =
            Identity::of(&chain[0]).map_err(|source| TlsError::Nameless { path: path(), source })?;
        if let Owner::Service(own) = owner
            && identity.role != *own
        {
            return Err(TlsError::WrongRole { path: path(), named: identity.role, own: *own });
        }
        // Services are dialled and dial.
        let usages = match owner {
            Owner::Service(_) => &[KeyUsage::server_auth(), KeyUsage::client_auth()][..],
            Owner::Operator { .. } => &[KeyUsage::client_auth()],
        };
        // Peers look at it as this does; better said here than guessed from their refusals.
        let believed = EndEntityCert::try_from(&chain[0]).and_then(|own| {
            let (algorithms, now) = (provider.signature_verification_algorithms.all, UnixTime::now());
            usages.iter().try_for_each(|usage| {
                own.verify_for_usage(algorithms, &roots.roots, &chain[1..], now, *usage, None, None).map(drop)
            })
        });
        believed.map_err(|error| {
            let why = match error {
                webpki::Error::CertExpired { .. } => "it has expired".to_owned(),
                webpki::Error::CertNotValidYet { .. } => "by this clock it is not valid yet".to_owned(),
                webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                    "none of them has signed it".to_owned()
                }
                other => other.to_string(),
            };
            TlsError::Unbelievable { path: path(), ca: config.ca_file.clone(), why }
        })?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|error| content("tls.key_file", &config.key_file, format!("holds no key: {error}")))?;
        let of = |source| TlsError::Key { path: config.key_file.clone(), cert: path(), source };
        let until = believed_until(&chain, &roots.roots, KeyUsage::client_auth());
        let certified = CertifiedKey::from_der(chain, key, provider).map_err(of)?;
        Ok(Own { identity, key: Arc::new(certified.into()), until })
    }

    fn shown(&self) -> Option<Shown> {
        let Own { identity, until, .. } = self.own.as_ref()?;
        Some(Shown { file: CERT, named: identity.to_string(), until: *until })
    }

    /// The trust domain of everyone that is believed.
    pub(super) fn domain(&self) -> &str {
        &self.domain
    }

    /// For a connection taken in. No session is resumed: each connection shows its certificate anew.
    pub(super) fn accept(&self, without_certificate: bool) -> Result<ServerConfig, TlsError> {
        let setup = |error: String| TlsError::Setup(rustls::Error::General(error));
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone());
        let verifier = if without_certificate { verifier.allow_unauthenticated() } else { verifier }.build();
        let verifier = verifier.map_err(|error| setup(error.to_string()))?;
        let own = self.own.as_ref().ok_or_else(|| setup("without a certificate".into()))?;
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(own.key.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For a connection to a peer, whose identity is left to who connects.
    pub(super) fn connect(&self) -> Result<ClientConfig, TlsError> {
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .dangerous()
            .with_custom_certificate_verifier(self.signed_by_ours()?);
        let mut config = match &self.own {
            Some(own) => builder.with_client_cert_resolver(own.key.clone()),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    fn signed_by_ours(&self) -> Result<Arc<SignedByOurs>, TlsError> {
        let built = WebPkiServerVerifier::builder_with_provider(self.roots.clone(), self.provider.clone());
        let inner =
            built.build().map_err(|error| TlsError::Setup(rustls::Error::General(error.to_string())))?;
        Ok(Arc::new(SignedByOurs { inner, roots: self.roots.clone(), provider: self.provider.clone() }))
    }
}

/// Believes whoever our authorities signed for, whatever host they are at.
#[derive(Debug)]
struct SignedByOurs {
    inner: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for SignedByOurs {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.inner.root_hint_subjects()
    }
}
