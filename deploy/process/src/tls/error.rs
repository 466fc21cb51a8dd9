//! What can be wrong with a process's TLS files. Each message is one line that names the key and the file.

use std::path::PathBuf;

use super::{IdentityError, Role};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{key}: {path} cannot be read: {source}", path = .path.display())]
    Read { key: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{key}: {path} {problem}", path = .path.display())]
    Content { key: &'static str, path: PathBuf, problem: String },
    #[error("tls.key_file: {path} is not the key of {cert}: {source}", path = .path.display(), cert = .cert.display())]
    Key { path: PathBuf, cert: PathBuf, source: tokio_rustls::rustls::Error },
    #[error(
        "tls.cert_file: {path} would be believed by nobody who has the authorities of {ca}: {why}",
        path = .path.display(), ca = .ca.display()
    )]
    Unbelievable { path: PathBuf, ca: PathBuf, why: String },
    #[error("tls.cert_file: {path}: {source}", path = .path.display())]
    Nameless { path: PathBuf, source: IdentityError },
    #[error(
        "tls.cert_file: {path} is the certificate of a {named}, and this is a {own}: give it one with \
         spiffe://DOMAIN/baton/{own}/NAME among its names, as `deploy/certificates issue {own} NAME` makes",
        path = .path.display()
    )]
    WrongRole { path: PathBuf, named: Role, own: Role },
    #[error("tls.cert_file: {path} is of the trust domain {named}, and {given} was asked for", path = .path.display())]
    OtherDomain { path: PathBuf, named: String, given: String },
    #[error("without a certificate of one's own the trust domain of the others has to be said")]
    NoDomain,
    #[error("TLS cannot be set up: {0}")]
    Setup(#[source] tokio_rustls::rustls::Error),
}
