//! Finds the controller and the coordinators and opens connections to them: addresses (given, or from the run file of a
//! cluster that runs here), TLS, who is shown the operator's token. [`super::fleet`] asks over what is opened here.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use baton_process::{Tls, TlsConfig, TlsError, one_line, tls::Role};
use tonic::{
    metadata::{Ascii, MetadataValue},
    service::interceptor::InterceptedService,
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    error::CtlError,
    line::{Bearer, Line, Token},
};
use crate::{
    run_file::{RunFile, living, runs_directory},
    screen::complain,
};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take. Changes are stored first, and etcd may have to choose another leader for that.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
/// Largest answer that is taken: ten thousand instances with all that they say of themselves.
pub(super) const MAX_ANSWER_BYTES: usize = 64 << 20;

pub(super) const CONTROLLER: &str = "controller";
pub(super) const COORDINATOR: &str = "coordinator";

/// Which cluster, and who asks.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Which cluster, and who asks")]
pub(super) struct ReachArgs {
    /// Run directory of the cluster, as given to `baton up --run-dir` [default: the cluster that runs here]. An address
    /// given with --controller or --coordinator wins.
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) run_dir: Option<PathBuf>,

    /// gRPC address of a controller, or of several: the first that answers is asked, and the one that leads is found
    /// from there. `https://` in front asks for TLS.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "BATON_CTL_CONTROLLER",
        value_delimiter = ',',
        global = true
    )]
    pub(super) controller: Vec<String>,

    /// Admin gRPC addresses of coordinators, for their requests [default: those that the controller knows].
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "BATON_CTL_COORDINATOR",
        value_delimiter = ',',
        global = true
    )]
    pub(super) coordinator: Vec<String>,

    /// File with the token that says who you are.
    #[arg(long, value_name = "FILE", env = "BATON_CTL_TOKEN_FILE", global = true)]
    pub(super) token_file: Option<PathBuf>,

    /// Certificates (PEM) of who signs the controllers' and coordinators'; with it, TLS is spoken, and they are told by the
    /// role and the trust domain in their certificates. `https://` alone trusts what this machine trusts, and tells them
    /// by their host.
    #[arg(long, value_name = "FILE", env = "BATON_CTL_CA_FILE", global = true)]
    pub(super) ca_file: Option<PathBuf>,

    /// Your certificate (PEM): a cluster that speaks mutual TLS sees by it who you are and what you may do.
    #[arg(long, value_name = "FILE", env = "BATON_CTL_CERT_FILE", global = true)]
    pub(super) cert_file: Option<PathBuf>,

    /// The key (PEM) of --cert-file.
    #[arg(long, value_name = "FILE", env = "BATON_CTL_KEY_FILE", global = true)]
    pub(super) key_file: Option<PathBuf>,

    /// Trust domain of the cluster with --ca-file, as in spiffe://DOMAIN/baton/controller in its certificates: those of
    /// another are not asked, and shown no token [default: that of --cert-file; without one it must be given].
    #[arg(long, value_name = "DOMAIN", env = "BATON_CTL_TRUST_DOMAIN", global = true)]
    pub(super) trust_domain: Option<String>,

    /// Tell those asked by this name in their certificates instead, as one that stands in front of them has it.
    #[arg(long, value_name = "NAME", env = "BATON_CTL_TLS_SERVER_NAME", global = true)]
    pub(super) tls_server_name: Option<String>,
}

/// [`ReachArgs`] with the files read.
#[derive(Debug, Clone)]
pub(super) struct Reach {
    run_dir: Option<PathBuf>,
    controllers: Vec<String>,
    coordinators: Vec<String>,
    bearer: Bearer,
    trust: Trust,
    /// Whether TLS is spoken even where an address does not say so.
    always_tls: bool,
}

/// By what the other side of TLS is told.
#[derive(Debug, Clone)]
enum Trust {
    /// The role and the trust domain in its certificate.
    Role(Tls),
    /// A name that was given, in it.
    Name(ClientTlsConfig),
    /// The name of its host in it.
    Host(ClientTlsConfig),
}

impl Reach {
    pub(super) fn new(args: &ReachArgs) -> Result<Self, CtlError> {
        let files = [
            read("--ca-file", args.ca_file.as_deref())?,
            read("--cert-file", args.cert_file.as_deref())?,
            read("--key-file", args.key_file.as_deref())?,
        ];
        if files[1].is_some() != files[2].is_some() {
            return Err(CtlError::HalfIdentity);
        }
        let trust = match (&args.ca_file, &args.tls_server_name) {
            (Some(_), None) => Trust::Role(by_role(args)?),
            _ if args.trust_domain.is_some() => return Err(CtlError::IdleDomain),
            (_, Some(name)) => Trust::Name(by_host(files).domain_name(name)),
            (_, None) => Trust::Host(by_host(files)),
        };
        Ok(Self {
            run_dir: args.run_dir.clone(),
            controllers: args.controller.clone(),
            coordinators: args.coordinator.clone(),
            bearer: bearer(args.token_file.as_deref())?,
            trust,
            always_tls: args.ca_file.is_some() || args.cert_file.is_some(),
        })
    }

    /// A line to the first controller that answers.
    pub(super) async fn controller(&self) -> Result<Line, CtlError> {
        let addresses = match self.controllers.is_empty() {
            true => vec![cluster(CONTROLLER, self.run_dir.as_deref())?.controller],
            false => self.controllers.clone(),
        };
        let mut failure = CtlError::NoCluster(CONTROLLER);
        for address in &addresses {
            match self.open(CONTROLLER, address).await {
                Ok(line) => return Ok(line),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Coordinators that were named.
    pub(super) fn coordinators(&self) -> &[String] {
        &self.coordinators
    }

    /// The coordinator of the cluster that runs here, unless another cluster was named.
    pub(super) fn coordinator_here(&self) -> Option<String> {
        if !self.controllers.is_empty() {
            return None;
        }
        cluster(COORDINATOR, self.run_dir.as_deref()).ok().map(|run| run.coordinator)
    }

    pub(super) async fn open(&self, service: &'static str, address: &str) -> Result<Line, CtlError> {
        let bare = address.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        let secure = self.always_tls || address.starts_with("https://");
        let (scheme, host, dial) = match (&self.trust, secure) {
            (Trust::Role(tls), true) => ("http", None, tls.dial(role(service))),
            (Trust::Name(host) | Trust::Host(host), true) => {
                ("https", Some(host), Tls::plaintext().dial(role(service)))
            }
            (_, false) => ("http", None, Tls::plaintext().dial(role(service))),
        };
        let endpoint =
            Endpoint::from_shared(format!("{scheme}://{bare}")).ok().filter(|_| bare.contains(':'));
        let mut endpoint = endpoint.ok_or_else(|| CtlError::Address(address.to_owned()))?;
        let token = self.token_for(service, address, secure);
        if token == Token::Shown && !secure && !is_here(bare) {
            return Err(CtlError::TokenInClear(bare.to_owned()));
        }
        if let Some(host) = host {
            endpoint = endpoint.tls_config(host.clone()).map_err(CtlError::Certificates)?;
        }
        // A socket may take the connection and its process never answer; the second timeout covers that. The pings
        // end a stream of events whose other side has gone without a word.
        let endpoint = endpoint
            .connect_timeout(CONNECT)
            .timeout(ANSWER)
            .http2_keep_alive_interval(CONNECT)
            .keep_alive_timeout(CONNECT);
        // The handshakes of TLS and HTTP/2 come after the connection, and want a bound of their own.
        let connected = tokio::time::timeout(2 * CONNECT, dial.connect(endpoint)).await;
        let reason = match connected {
            Ok(Ok(channel)) => {
                let bearer = if token == Token::Shown { self.bearer.clone() } else { Bearer(None) };
                let channel = InterceptedService::new(channel, bearer);
                return Ok(Line { service, address: bare.to_owned(), secure, token, channel });
            }
            Ok(Err(error)) => one_line(&error),
            Err(_) => "it accepts connections and then says nothing".to_owned(),
        };
        Err(CtlError::Unreachable { service, address: bare.to_owned(), reason })
    }

    /// A controller's coordinators are whoever says so to it: a certificate for just any host is no reason to show one of
    /// them the token. One that says what it is, or has the name that was given, is; so is that the operator named it.
    fn token_for(&self, service: &str, address: &str, secure: bool) -> Token {
        let listed = service == COORDINATOR && !self.coordinators.iter().any(|named| named == address);
        match self.bearer.0 {
            None => Token::None,
            Some(_) if listed && secure && matches!(self.trust, Trust::Host(_)) => Token::Withheld,
            Some(_) => Token::Shown,
        }
    }
}

/// Whether an address is this machine's loopback.
fn is_here(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn role(service: &'static str) -> Role {
    if service == COORDINATOR { Role::Coordinator } else { Role::Controller }
}

fn by_role(args: &ReachArgs) -> Result<Tls, CtlError> {
    let file = |path: &Option<PathBuf>| path.clone().unwrap_or_default();
    let config = TlsConfig {
        ca_file: file(&args.ca_file),
        cert_file: file(&args.cert_file),
        key_file: file(&args.key_file),
    };
    Tls::of_operator(&config, args.trust_domain.clone()).map_err(|error| match error {
        TlsError::NoDomain => CtlError::NoDomain,
        error => CtlError::Tls(error),
    })
}

/// Of authority, certificate and key, what is given.
fn by_host([ca, certificate, key]: [Option<Vec<u8>>; 3]) -> ClientTlsConfig {
    let mut tls = ClientTlsConfig::new();
    match ca {
        Some(ca) => tls = tls.ca_certificate(Certificate::from_pem(ca)),
        None => tls = tls.with_native_roots(),
    }
    if let (Some(certificate), Some(key)) = (certificate, key) {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    tls
}

fn read(flag: &'static str, path: Option<&Path>) -> Result<Option<Vec<u8>>, CtlError> {
    let Some(path) = path else { return Ok(None) };
    let content = fs::read(path);
    content.map(Some).map_err(|source| CtlError::File { flag, path: path.to_owned(), source })
}

fn bearer(path: Option<&Path>) -> Result<Bearer, CtlError> {
    let (Some(path), Some(content)) = (path, read("--token-file", path)?) else { return Ok(Bearer(None)) };
    let broken = || CtlError::Token(path.to_owned());
    let token = String::from_utf8(content).map_err(|_| broken())?;
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(broken());
    }
    let mut value: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| broken())?;
    // Keeps it out of what is formatted for people.
    value.set_sensitive(true);
    Ok(Bearer(Some(value)))
}

/// The one of the run directory; without one, that which runs here; the latest, if there are several.
fn cluster(service: &'static str, run_dir: Option<&Path>) -> Result<RunFile, CtlError> {
    if let Some(directory) = run_dir {
        let run = RunFile::read(directory).filter(RunFile::is_alive);
        return run.ok_or_else(|| CtlError::NotInRunDir { run_dir: directory.to_owned(), service });
    }
    let mut found = runs_directory().map(|runs| living(&runs)).unwrap_or_default();
    if found.len() > 1 {
        complain(&format!("{} clusters run here: taking the latest, {}", found.len(), found[0].url));
    }
    if found.is_empty() { Err(CtlError::NoCluster(service)) } else { Ok(found.swap_remove(0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_not_sent_in_the_clear_to_another_machine() {
        let directory = tempfile::tempdir().unwrap();
        let token_file = directory.path().join("token");
        fs::write(&token_file, "secret").unwrap();
        let reach = Reach::new(&ReachArgs { token_file: Some(token_file), ..ReachArgs::default() }).unwrap();
        for service in [CONTROLLER, COORDINATOR] {
            for there in ["10.1.2.3:7100", "controller:7100", "http://[fd00::1]:7100"] {
                let error = reach.open(service, there).await.map(drop).unwrap_err().to_string();
                assert!(error.starts_with("a token is not sent in the clear"), "{error}");
            }
        }
        for here in ["127.0.0.1:1", "[::1]:1", "localhost:1"] {
            assert!(is_here(here), "{here}");
        }
    }

    #[test]
    fn a_coordinator_that_only_says_it_is_one_is_shown_no_token() {
        let directory = tempfile::tempdir().unwrap();
        let token_file = directory.path().join("token");
        fs::write(&token_file, "secret").unwrap();
        let args = ReachArgs { token_file: Some(token_file), ..ReachArgs::default() };
        let (listed, here) = ("https://c:8001", "127.0.0.1:8001");
        let by_host = reach(args.clone()).unwrap();
        assert_eq!(by_host.token_for(COORDINATOR, listed, true), Token::Withheld);
        assert_eq!(by_host.token_for(CONTROLLER, listed, true), Token::Shown);
        assert_eq!(by_host.token_for(COORDINATOR, here, false), Token::Shown);
        let named = ReachArgs { coordinator: vec![listed.to_owned()], ..args.clone() };
        assert_eq!(reach(named).unwrap().token_for(COORDINATOR, listed, true), Token::Shown);
        let by_name = ReachArgs { tls_server_name: Some("front.test".into()), ..args };
        assert_eq!(reach(by_name).unwrap().token_for(COORDINATOR, listed, true), Token::Shown);
        let none = reach(ReachArgs::default()).unwrap();
        assert_eq!(none.token_for(COORDINATOR, listed, true), Token::None);
    }

    fn reach(args: ReachArgs) -> Result<Reach, CtlError> {
        Reach::new(&args)
    }

    #[tokio::test]
    async fn what_does_not_answer_is_named() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap().to_string();
        drop(held);
        let reach = reach(ReachArgs::default()).unwrap();
        let text = reach.open(CONTROLLER, &address).await.unwrap_err().to_string();
        assert!(text.starts_with(&format!("the controller at {address} does not answer: ")), "{text}");
        let text = reach.open(CONTROLLER, "nowhere").await.unwrap_err().to_string();
        assert!(text.contains("expected HOST:PORT"), "{text}");
    }

    #[test]
    fn a_run_directory_says_where_its_cluster_is() {
        let directory = tempfile::tempdir().unwrap();
        let text = cluster(CONTROLLER, Some(directory.path())).unwrap_err().to_string();
        assert!(text.starts_with(&format!("no cluster runs in {}: ", directory.path().display())), "{text}");
        let run = crate::run_file::tests::example(std::process::id(), 1);
        run.write(directory.path()).unwrap();
        assert_eq!(cluster(CONTROLLER, Some(directory.path())).unwrap(), run);
    }

    #[test]
    fn a_token_is_read_and_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, "s3cret\n").unwrap();
        let read = reach(ReachArgs { token_file: Some(path.clone()), ..Default::default() }).unwrap();
        assert_eq!(read.bearer.0.as_ref().unwrap().to_str().unwrap(), "Bearer s3cret");
        assert!(!format!("{read:?}").contains("s3cret"), "{read:?}");
        for bad in ["", "\n", "two words", "a\nb", "\u{e9}"] {
            fs::write(&path, bad).unwrap();
            let error = reach(ReachArgs { token_file: Some(path.clone()), ..Default::default() });
            let text = error.unwrap_err().to_string();
            assert!(
                text.contains("does not hold a token") && (bad.len() < 2 || !text.contains(bad)),
                "{text}"
            );
        }
    }

    #[test]
    fn files_that_are_missing_are_named_with_their_flag() {
        let absent = || Some(PathBuf::from("/absent/file"));
        let tried = [
            ("--token-file", ReachArgs { token_file: absent(), ..Default::default() }),
            ("--ca-file", ReachArgs { ca_file: absent(), ..Default::default() }),
            ("--cert-file", ReachArgs { cert_file: absent(), ..Default::default() }),
        ];
        for (flag, args) in tried {
            let text = reach(args).unwrap_err().to_string();
            assert_eq!(text, format!("the file /absent/file of {flag} cannot be read"));
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cert");
        fs::write(&path, "x").unwrap();
        let half = reach(ReachArgs { cert_file: Some(path), ..Default::default() });
        assert!(matches!(half, Err(CtlError::HalfIdentity)));
    }
}
