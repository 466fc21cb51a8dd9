//! Mutual TLS 1.3 between our processes, and who may say what to whom.
//!
//! A process has three files ([`TlsConfig`]): its certificate, the key, and the certificates of who signs those of its
//! peers. They are looked at every few seconds and taken anew when they have changed (`credentials`); connections that
//! stand go on. What counts of a certificate is who signed it and the [`Role`] that it names ([`Identity`]), not a host:
//! instances are dialled by address, and come and go.
//!
//! A gRPC port takes a connection in by [`Tls::accept`], which shakes hands and finds out who calls (`caller`), and asks at
//! its [`Door`] before each call whether the caller's role may make it. A client dials by [`Dial`], which turns away
//! whoever has not the role that is asked for. Without files all of it is plaintext, and nobody is asked who they are.
//! [`Https`] is for those who are no processes of ours: clients of an HTTP port. What etcd's client shows is only watched
//! (`watched`).

mod caller;
mod credentials;
mod dial;
mod door;
mod error;
mod expiry;
mod files;
mod handshake;
mod https;
mod identity;
mod parting;
mod watched;

use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, middleware};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::pki_types::UnixTime;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Invalid, Metrics,
    follow::{LOOK_EVERY, follow},
};
use credentials::{Credentials, Owner};

pub(crate) use caller::Caller;
pub(crate) use watched::watch;

pub use dial::Dial;
pub use door::{Allowed, Door};
pub use error::TlsError;
pub use https::{Https, HttpsConfig};
pub use identity::{Identity, IdentityError, Peer, Role};

/// Whom a certificate in DER names, for a fuzz target.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_identity(
    certificate: &tokio_rustls::rustls::pki_types::CertificateDer<'_>,
) -> Result<Identity, IdentityError> {
    Identity::of(certificate)
}

/// What a PEM file holds, for a fuzz target.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use credentials::fuzz_certificates;

/// Between two refused calls that the log tells of.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Files of TLS between processes: all three, or none for plaintext.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Certificates (PEM) of who signs those of the peers; with it, every gRPC connection is
    /// [mutual TLS](../../README.md#security). Empty = plaintext.
    pub ca_file: PathBuf,
    /// This process's own certificate (PEM), and those between it and its signer. It names its role.
    pub cert_file: PathBuf,
    /// The key (PEM) of `cert_file`.
    pub key_file: PathBuf,
}

impl TlsConfig {
    fn files(&self) -> [(&'static str, &PathBuf); 3] {
        [("tls.ca_file", &self.ca_file), ("tls.cert_file", &self.cert_file), ("tls.key_file", &self.key_file)]
    }

    fn is_empty(&self) -> bool {
        self.files().iter().all(|(_, path)| path.as_os_str().is_empty())
    }

    /// A process has all of the files, or none.
    pub fn validate(&self) -> Result<(), Invalid> {
        let missing = self.files().into_iter().find(|(_, path)| path.as_os_str().is_empty());
        match missing {
            Some((key, _)) if !self.is_empty() => {
                Err(Invalid::new(key, "expected a file, as another of `tls` is given: all three, or none"))
            }
            _ => Ok(()),
        }
    }
}

/// How a process speaks to others: in plaintext, or by TLS with credentials that are kept fresh. Cheap to clone.
#[derive(Clone, Default)]
pub struct Tls {
    credentials: Option<Arc<Credentials>>,
    counts: Counts,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.credentials.as_ref().map(|held| held.config())).finish()
    }
}

/// What is counted of TLS.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    refused: Family<Why, Counter>,
    reloads: Family<Outcome, Counter>,
    ends: Family<File, Gauge>,
    /// When a refused call was last told of.
    told: Arc<Mutex<Option<Instant>>>,
}

/// Why a connection or a call was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    why: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The setting that names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct File {
    file: &'static str,
}

/// The certificate that others are shown.
#[derive(Debug, Clone)]
struct Shown {
    /// The setting that names its file.
    file: &'static str,
    /// Whom it names, or where it lies.
    named: String,
    /// How long others believe it.
    until: Option<UnixTime>,
}

impl Counts {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let counts = Self::default();
        // Shown as 0 from the start: the first of them would be no increase otherwise.
        for outcome in ["taken", "failed"] {
            drop(counts.reloads.get_or_create(&Outcome { outcome }));
        }
        metrics.register(|registry| {
            let registry = registry.sub_registry_with_prefix("baton_tls");
            let refused = "Connections refused (handshake, plaintext, slow) and calls (role)";
            registry.register("refused", refused, counts.refused.clone());
            let reloads = "Changed certificates, keys and authorities that were taken, or failed";
            registry.register("reloads", reloads, counts.reloads.clone());
            let ends = "Unix time at which the certificate that others are shown ends, by the setting that names its file";
            registry.register("certificate_expiry_timestamp_seconds", ends, counts.ends.clone());
        });
        counts
    }

    fn refused(&self, why: &'static str) {
        self.refused.get_or_create(&Why { why }).inc();
    }

    /// Tells of a refused call, unless one was told of just before: who calls without end fills no log.
    fn tell(&self, why: &str) {
        let mut told = self.told.lock();
        if told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            *told = Some(Instant::now());
            tracing::warn!(why, "a call is refused; others of this second are only counted");
        }
    }

    fn reloaded(&self, outcome: &'static str) {
        self.reloads.get_or_create(&Outcome { outcome }).inc();
    }

    fn shows(&self, shown: &Shown) {
        if let Some(until) = shown.until {
            let seconds = i64::try_from(until.as_secs()).unwrap_or(i64::MAX);
            self.ends.get_or_create(&File { file: shown.file }).set(seconds);
        }
    }
}

impl Tls {
    /// Nobody is asked who they are.
    pub fn plaintext() -> Self {
        Self::default()
    }

    /// Reads the files of a process with this role, and follows them until the shutdown. Without files: plaintext.
    /// Errors name the key and the file.
    pub(crate) fn start(
        config: &TlsConfig,
        own: Role,
        counts: impl FnOnce() -> Counts,
        shutdown: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Self, TlsError> {
        if config.is_empty() {
            return Ok(Self::plaintext());
        }
        let credentials = Arc::new(Credentials::read(config.clone(), Owner::Service(own))?);
        let counts = counts();
        credentials.shown().iter().for_each(|shown| counts.shows(shown));
        let (followed, told) = (credentials.clone(), counts.clone());
        tasks.spawn(
            shutdown.clone().run_until_cancelled_owned(follow_files(move || followed.refresh(), told)),
        );
        Ok(Self { credentials: Some(credentials), counts })
    }

    /// Of a person: a certificate is not needed where a token will do. The files are read once. `domain` is the trust
    /// domain of those who are dialled; none = that of the certificate, and without one it has to be given: an authority
    /// may sign for several clusters, and what is meant for one is not to be shown to another.
    pub fn of_operator(config: &TlsConfig, domain: Option<String>) -> Result<Self, TlsError> {
        let credentials = Arc::new(Credentials::read(config.clone(), Owner::Operator { domain })?);
        Ok(Self { credentials: Some(credentials), counts: Counts::default() })
    }

    /// Whether it is TLS.
    pub fn is_on(&self) -> bool {
        self.credentials.is_some()
    }

    /// The routes of a port, behind its door.
    pub(crate) fn guarded(&self, router: Router, door: Door) -> Router {
        if !self.is_on() {
            return router;
        }
        let state = (door, self.counts.clone());
        router.layer(middleware::from_fn_with_state(state, door::guard))
    }

    /// The way to peers of this role.
    pub fn dial(&self, role: Role) -> Dial {
        Dial::new(self.credentials.clone(), role)
    }
}

/// Takes files whenever they have changed. Ones that cannot be used change nothing.
async fn follow_files(
    refresh: impl Fn() -> Result<Option<Shown>, TlsError> + Send + 'static,
    counts: Counts,
) {
    let told = |now: Result<Shown, TlsError>| match now {
        Ok(shown) => {
            counts.reloaded("taken");
            counts.shows(&shown);
            tracing::info!(now = shown.named, "changed TLS files are taken: new connections use them");
        }
        Err(error) => {
            counts.reloaded("failed");
            tracing::error!("{error}; what was read before stays in use");
        }
    };
    follow(LOOK_EVERY, refresh, told).await;
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
