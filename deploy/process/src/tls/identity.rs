//! Who holds a certificate: a role, and perhaps a name, in a trust domain. It stands among the certificate's subject
//! alternative names as the URI `spiffe://DOMAIN/baton/ROLE` or `spiffe://DOMAIN/baton/ROLE/NAME`, so that SPIRE,
//! cert-manager and `deploy/certificates` can all issue it.

use std::{fmt, str::FromStr, sync::Arc};

use tokio_rustls::rustls::pki_types::CertificateDer;
use tonic::{Request, Status};

/// What a process or a person is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Controller,
    Coordinator,
    Server,
    /// A person who may change things.
    Admin,
    /// A person who may look.
    Viewer,
}

impl Role {
    const ALL: [Self; 5] = [Self::Controller, Self::Coordinator, Self::Server, Self::Admin, Self::Viewer];

    pub fn name(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Coordinator => "coordinator",
            Self::Server => "server",
            Self::Admin => "admin",
            Self::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a certificate names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("it is no certificate that can be read")]
    Unreadable,
    #[error("it names no role: expected spiffe://DOMAIN/baton/ROLE/NAME among its names (URI)")]
    Missing,
    #[error("it names several roles: expected one")]
    Several,
    #[error(
        "{0:?} names no role: expected spiffe://DOMAIN/baton/ROLE/NAME, with controller, coordinator, server, admin \
         or viewer as ROLE; /NAME may be left out"
    )]
    Malformed(String),
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The trust domain: peers are of the same one, so that clusters may share an authority.
    pub domain: String,
    pub role: Role,
    /// Of an instance: its id. None = any of the role.
    pub name: Option<String>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/baton/{}", self.domain, self.role)?;
        self.name.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let malformed = || IdentityError::Malformed(uri.to_owned());
        let parts: Vec<&str> = uri.strip_prefix("spiffe://").ok_or_else(malformed)?.split('/').collect();
        let (domain, role, name) = match parts[..] {
            [domain, "baton", role] => (domain, role, None),
            [domain, "baton", role, name] => (domain, role, Some(name)),
            _ => return Err(malformed()),
        };
        let plain = |part: &str| {
            !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._".contains(&c))
        };
        let role = Role::ALL.into_iter().find(|known| known.name() == role).ok_or_else(malformed)?;
        if !plain(domain) || !name.is_none_or(plain) {
            return Err(malformed());
        }
        Ok(Self { domain: domain.to_owned(), role, name: name.map(str::to_owned) })
    }
}

impl Identity {
    /// Whom a certificate names. Whether it is to be believed is another question.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let certificate =
            webpki::EndEntityCert::try_from(certificate).map_err(|_| IdentityError::Unreadable)?;
        let mut ours = certificate.valid_uri_names().filter(|uri| is_ours(uri));
        let uri = ours.next().ok_or(IdentityError::Missing)?;
        if ours.next().is_some() {
            return Err(IdentityError::Several);
        }
        uri.parse()
    }
}

/// Other systems name their own roles in the same way.
fn is_ours(uri: &str) -> bool {
    uri.strip_prefix("spiffe://").and_then(|rest| rest.split('/').nth(1)) == Some("baton")
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Nobody asked: the port speaks plaintext.
    Plaintext,
    /// Nobody that is known, and why.
    Nameless(String),
    Named(Arc<Identity>),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plaintext => f.write_str("somebody"),
            Self::Nameless(why) => write!(f, "nobody known ({why})"),
            Self::Named(identity) => identity.fmt(f),
        }
    }
}

impl Peer {
    /// Who makes this call.
    pub fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or(Self::Plaintext)
    }

    /// Refuses who calls itself otherwise than its certificate does, where that says a name.
    pub fn speaks_as(&self, name: &str) -> Result<(), Status> {
        match self {
            Self::Named(identity) if identity.name.as_deref().is_some_and(|own| own != name) => {
                Err(Status::permission_denied(format!(
                    "{name} says hello with the certificate of another: {self}"
                )))
            }
            Self::Named(_) | Self::Plaintext | Self::Nameless(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_read_and_written() {
        for uri in ["spiffe://example.org/baton/server/server-0.a", "spiffe://baton/baton/controller"] {
            assert_eq!(uri.parse::<Identity>().expect(uri).to_string(), uri);
        }
        for uri in [
            "baton://x/baton/server",
            "spiffe://x/baton",
            "spiffe://x/baton/engine/a",
            "spiffe://x/baton/server/",
            "spiffe:///baton/server",
            "spiffe://x/baton/server/a/b",
            "spiffe://x/other/server/a",
            "spiffe://x/baton/Server/a",
            "spiffe://x/baton/server/a b",
        ] {
            assert!(matches!(uri.parse::<Identity>(), Err(IdentityError::Malformed(_))), "{uri}");
        }
    }

    #[test]
    fn a_certificate_that_names_an_instance_is_of_no_other() {
        let named = |uri: &str| Peer::Named(Arc::new(uri.parse().expect("good")));
        let speaks_as = |peer: Peer, name| peer.speaks_as(name).map_err(|status| status.message().to_owned());
        assert_eq!(speaks_as(named("spiffe://x/baton/server/a"), "a"), Ok(()));
        let refused = "b says hello with the certificate of another: spiffe://x/baton/server/a";
        assert_eq!(speaks_as(named("spiffe://x/baton/server/a"), "b"), Err(refused.to_owned()));
        assert_eq!(speaks_as(named("spiffe://x/baton/server"), "b"), Ok(()));
        assert_eq!(speaks_as(Peer::Plaintext, "b"), Ok(()));
    }
}
