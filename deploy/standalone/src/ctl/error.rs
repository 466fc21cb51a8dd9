//! Why `ctl` fails, each message with what to do about it.

use std::{io, path::PathBuf};

use baton_process::TlsError;

/// Ends a command, with exit status 1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    #[error(
        "no cluster runs here: start one with `baton up`, or say where one is with --run-dir DIR or --{0} HOST:PORT"
    )]
    NoCluster(&'static str),
    #[error("no cluster runs in {dir}: start one with `baton up --run-dir {dir}`, or say where one is with --{service} HOST:PORT", dir = .run_dir.display())]
    NotInRunDir { run_dir: PathBuf, service: &'static str },
    #[error("`{0}` is not an address; expected HOST:PORT, as in 127.0.0.1:7000")]
    Address(String),
    #[error("the file {path} of {flag} cannot be read", path = .path.display())]
    File { flag: &'static str, path: PathBuf, source: io::Error },
    #[error("the file {path} of --token-file does not hold a token: one line of visible characters, without spaces", path = .0.display())]
    Token(PathBuf),
    #[error(
        "a token is not sent in the clear to {0}: say --ca-file FILE for TLS, or run ctl on that machine and name its loopback address"
    )]
    TokenInClear(String),
    #[error("--cert-file and --key-file belong together: give both, or neither")]
    HalfIdentity,
    #[error("the certificates cannot be used: expected PEM files")]
    Certificates(#[source] tonic::transport::Error),
    #[error("the certificates cannot be used: {0}")]
    Tls(#[source] TlsError),
    #[error(
        "--ca-file without --cert-file does not say which cluster is yours, as an authority may sign for several: add \
         --trust-domain DOMAIN, what its certificates have after spiffe:// (`baton` if `deploy/certificates` made them \
         without --domain)"
    )]
    NoDomain,
    #[error("--trust-domain goes with --ca-file and without --tls-server-name: a host's name says no domain")]
    IdleDomain,
    #[error("the {service} at {address} does not answer: {reason}")]
    Unreachable { service: &'static str, address: String, reason: String },
    #[error(
        "the controller at {asked} does not lead, and the one that does cannot be asked: see that {leader} can be \
         reached from here"
    )]
    Leader { asked: String, leader: String, source: Box<CtlError> },
    #[error("the {service} at {address} {message}")]
    Refused { service: &'static str, address: String, message: String },
    #[error("no {kind} is called {name}: {}", listed(.kind, .known))]
    Unknown { kind: &'static str, name: String, known: Vec<String> },
    #[error(
        "no coordinator knows request {0}: they know those that run and the last thousand that have ended; its id is in \
         the answer's header x-request-id"
    )]
    NoRequest(String),
    #[error("no event has the number {sequence}: {}", held_events(.held))]
    NoEvent {
        sequence: u64,
        /// The first and the last that the controller holds; none = it holds none.
        held: Option<(u64, u64)>,
    },
    #[error("{0}")]
    Usage(&'static str),
    #[error("{0}")]
    Selector(String),
    #[error("{what} after {after}: {advice}")]
    TookTooLong { what: String, after: String, advice: String },
}

/// Most names that a message lists.
const NAMES: usize = 10;

fn listed(kind: &str, known: &[String]) -> String {
    match known.len() {
        0 => format!("there is no {kind} at all"),
        1..=NAMES => format!("there are {}", known.join(", ")),
        more => format!("there are {} and {} more", known[..NAMES].join(", "), more - NAMES),
    }
}

fn held_events(held: &Option<(u64, u64)>) -> String {
    match held {
        None => "the controller holds none".to_owned(),
        Some((first, last)) => format!(
            "the controller holds those from {first} to {last}, with gaps; `get events -o wide` shows their numbers"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_misspells_a_name_is_shown_the_names() {
        let error = |known: Vec<String>| {
            CtlError::Unknown { kind: "instance", name: "servr".into(), known }.to_string()
        };
        assert_eq!(error(Vec::new()), "no instance is called servr: there is no instance at all");
        assert_eq!(error(vec!["a".into(), "b".into()]), "no instance is called servr: there are a, b");
        let many = error((0..12).map(|i| format!("s{i}")).collect());
        assert!(many.ends_with("s8, s9 and 2 more"), "{many}");
    }
}
