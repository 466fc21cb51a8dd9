//! Who may ask and who may change: viewers and admins, told by their certificate, or by the tokens in a file. Asked by the
//! services for operators, before each call.
//!
//! Over TLS a certificate of an admin or a viewer says who calls. Of others the token does.
//!
//! The file `admin.tokens_file` has a line for each token: a name, `viewer` or `admin`, and the SHA-256 of the token in
//! hex, so that the file gives no token away. It is read again whenever it has changed. Without a file, and without TLS,
//! whoever calls from this machine (over loopback) is an admin, and nobody else is let in.
//!
//! Who is refused is recorded (`refusals`).

mod refusals;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Status};

use crate::tls::{Identity, Peer, Role};
use refusals::{Refusals, Refused};

pub use refusals::Call;

/// Who may ask and change, by `baton ctl` or any other client of the services for operators.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// A file with a line for each operator: name, `viewer` or `admin`, and the SHA-256 of the token in hex. It is read
    /// again when it changes. With `tls`, certificates of admins and viewers will do, too. Empty = by certificate alone;
    /// without `tls`, whoever calls from this machine is an admin, and nobody else is let in.
    pub tokens_file: String,
}

/// What a caller may do; each may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    Viewer,
    Admin,
}

/// Who called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    pub name: String,
    pub right: Right,
}

/// Why the file of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: &'static str },
}

const HASH_BYTES: usize = 32;

struct Token {
    hash: [u8; HASH_BYTES],
    actor: Actor,
}

/// Tokens as they stood in the file when it was last changed.
#[derive(Default)]
struct Tokens {
    changed: Option<SystemTime>,
    tokens: Vec<Token>,
}

impl Tokens {
    fn read(path: &Path) -> Result<Self, AccessError> {
        let unreadable = |source| AccessError::Read { path: path.to_owned(), source };
        // Before its content, so that a change between the two is seen the next time.
        let changed = changed(path);
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Ok(Self { changed, tokens: Self::parse(&text, path)? })
    }

    /// A file's text.
    fn parse(text: &str, path: &Path) -> Result<Vec<Token>, AccessError> {
        let mut tokens = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let token = Token::parse(line);
            let at = |problem| AccessError::Line { path: path.to_owned(), line: number + 1, problem };
            tokens.push(token.map_err(at)?);
        }
        Ok(tokens)
    }
}

impl Token {
    fn parse(line: &str) -> Result<Self, &'static str> {
        let mut words = line.split_whitespace();
        let (Some(name), Some(right), Some(hash), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err("expected: NAME viewer|admin SHA256-OF-THE-TOKEN");
        };
        let right = match right {
            "viewer" => Right::Viewer,
            "admin" => Right::Admin,
            _ => return Err("expected `viewer` or `admin` after the name"),
        };
        let hash =
            unhex(hash).ok_or("expected 64 hex digits: the token's SHA-256, as sha256sum prints it")?;
        Ok(Self { hash, actor: Actor { name: name.to_owned(), right } })
    }
}

/// What a fuzz target finds in a file of tokens: names, and whether they may change things.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn tokens_of(text: &str) -> Option<Vec<Actor>> {
    let tokens = Tokens::parse(text, Path::new("tokens")).ok()?;
    Some(tokens.into_iter().map(|token| token.actor).collect())
}

fn unhex(hex: &str) -> Option<[u8; HASH_BYTES]> {
    let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    (digits.len() == HASH_BYTES * 2).then(|| bytes.try_into().ok())?
}

fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|about| about.modified()).ok()
}

/// Tells callers apart; by default by certificate, or without TLS by whether they are on this machine.
#[derive(Default)]
pub struct Access {
    path: Option<PathBuf>,
    tokens: Mutex<Tokens>,
    refusals: Arc<Refusals>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Access {
    /// As it is configured. Calls that are refused are recorded until the shutdown. Errors name the file.
    pub fn start(
        config: &AdminConfig,
        shutdown: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Self, AccessError> {
        let path = Some(&config.tokens_file).filter(|path| !path.is_empty());
        let access = Self::new(path.map(PathBuf::from))?;
        let (refusals, shutdown) = (access.refusals.clone(), shutdown.clone());
        tasks.spawn(async move { refusals.run(shutdown).await });
        Ok(access)
    }

    /// By the tokens in this file.
    fn new(path: Option<PathBuf>) -> Result<Self, AccessError> {
        let tokens = path.as_deref().map_or_else(|| Ok(Tokens::default()), Tokens::read)?;
        Ok(Self { path, tokens: Mutex::new(tokens), refusals: Arc::default() })
    }

    /// Whether a token will do in place of a certificate.
    pub fn takes_tokens(&self) -> bool {
        self.path.is_some()
    }

    /// Who calls, if they may do this; otherwise the call is recorded. Errors: `UNAUTHENTICATED` without a certificate or
    /// token that is known, `PERMISSION_DENIED` for a viewer who would change something.
    pub fn check<T>(&self, request: &Request<T>, needed: Right, call: Call<'_>) -> Result<Actor, Status> {
        let peer = Peer::of(request);
        let (status, actor) = match self.actor(request, &peer) {
            Ok(actor) if actor.right >= needed => return Ok(actor),
            Ok(Actor { name, .. }) => {
                let message = format!("{name} may look but not change: ask as an admin");
                (Status::permission_denied(message), Some(name))
            }
            Err(status) => (status, named(&peer)),
        };
        let (actor, from) = (actor.as_deref(), request.remote_addr());
        self.refusals.enter(&Refused { actor, from, call, why: status.message() }, Instant::now());
        Err(status)
    }

    fn actor<T>(&self, request: &Request<T>, peer: &Peer) -> Result<Actor, Status> {
        match (certified(peer), &self.path) {
            (Some(actor), _) => Ok(actor),
            (None, Some(path)) => self.bearer(path, request),
            (None, None) => local(request, peer),
        }
    }

    fn bearer<T>(&self, path: &Path, request: &Request<T>) -> Result<Actor, Status> {
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let Some(token) = header.and_then(|value| value.strip_prefix("Bearer ")) else {
            return Err(Status::unauthenticated(
                "a token, or the certificate of an admin or viewer, is needed",
            ));
        };
        // What is compared is the hash of what came: the time that takes says nothing of the token.
        let hash = Sha256::digest(token.trim().as_bytes());
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if changed(path) != tokens.changed {
            *tokens = Tokens::read(path).map_err(|error| {
                tracing::error!(%error, "no operator is let in until the file of tokens can be read");
                Status::unavailable("the file of tokens cannot be read: see the log")
            })?;
        }
        let known = tokens.tokens.iter().find(|token| token.hash[..] == hash[..]);
        known
            .map(|token| token.actor.clone())
            .ok_or_else(|| Status::unauthenticated("this token is not known"))
    }
}

/// Whom a certificate names, operator or not.
fn named(peer: &Peer) -> Option<String> {
    match peer {
        Peer::Named(identity) => Some(identity.to_string()),
        Peer::Plaintext | Peer::Nameless(_) => None,
    }
}

/// An operator who shows so by a certificate.
fn certified(peer: &Peer) -> Option<Actor> {
    let Peer::Named(identity) = peer else { return None };
    let Identity { role, name, .. } = &**identity;
    let right = match role {
        Role::Admin => Right::Admin,
        Role::Viewer => Right::Viewer,
        Role::Controller | Role::Coordinator | Role::Server => return None,
    };
    Some(Actor { name: name.clone().unwrap_or_else(|| role.to_string()), right })
}

/// Without tokens, and without TLS: who is on this machine may do everything.
fn local<T>(request: &Request<T>, peer: &Peer) -> Result<Actor, Status> {
    if *peer != Peer::Plaintext {
        let message = format!("this is for certificates of admins and viewers, not for {peer}");
        return Err(Status::permission_denied(message));
    }
    // No address: a call within the process, as in tests.
    if request.remote_addr().is_none_or(|address| address.ip().to_canonical().is_loopback()) {
        return Ok(Actor { name: "local".to_owned(), right: Right::Admin });
    }
    let message = "only callers on this service's own machine are let in, as it has no `admin.tokens_file`";
    Err(Status::unauthenticated(message))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{refusals::tests::recorded, *};

    const CALL: Call<'static> = Call { name: "SetRole", of: "a" };

    fn with(token: &str) -> Request<()> {
        let mut request = Request::new(());
        let value = format!("Bearer {token}").parse().expect("a header");
        request.metadata_mut().insert("authorization", value);
        request
    }

    fn line(name: &str, right: &str, token: &str) -> String {
        let hash: String =
            Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name} {right} {hash}\n")
    }

    #[test]
    fn tokens_tell_viewers_from_admins_and_strangers() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokens");
        let text = format!("# who may\n\n{}{}", line("alice", "admin", "a"), line("bob", "viewer", "b"));
        std::fs::write(&path, text).expect("a file");
        let access = Access::new(Some(path.clone())).expect("a good file");
        let name = |request: &Request<()>, right| access.check(request, right, CALL).map(|actor| actor.name);
        assert_eq!(name(&with("a"), Right::Admin).expect("an admin"), "alice");
        assert_eq!(name(&with("b"), Right::Viewer).expect("a viewer"), "bob");
        let code = |request: &Request<()>| name(request, Right::Admin).expect_err("refused").code();
        assert_eq!(code(&with("b")), tonic::Code::PermissionDenied);
        for stranger in [with("c"), with(""), Request::new(())] {
            assert_eq!(code(&stranger), tonic::Code::Unauthenticated);
        }
        assert!(!format!("{access:?}").contains("hash"));

        // Who is struck from the file is out at once.
        std::fs::write(&path, line("carol", "admin", "c")).expect("a file");
        let later = SystemTime::now() + Duration::from_secs(2);
        std::fs::File::open(&path).and_then(|file| file.set_modified(later)).expect("a time");
        assert_eq!(code(&with("a")), tonic::Code::Unauthenticated);
        assert_eq!(name(&with("c"), Right::Admin).expect("an admin"), "carol");
    }

    #[test]
    fn who_is_refused_is_recorded() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokens");
        std::fs::write(&path, line("alice", "admin", "a") + &line("bob", "viewer", "b")).expect("a file");
        let access = Access::new(Some(path)).expect("a good file");
        let mut server = Request::new(());
        let identity = "spiffe://x/baton/server/s".parse().expect("an identity");
        server.extensions_mut().insert(Peer::Named(Arc::new(identity)));
        let mut far = with("c");
        let remote_addr = Some("10.0.0.7:9".parse().expect("an address"));
        let info = tonic::transport::server::TcpConnectInfo { local_addr: None, remote_addr };
        far.extensions_mut().insert(info);
        let record = recorded(|| {
            assert!(access.check(&with("a"), Right::Admin, CALL).is_ok());
            assert!(access.check(&with("b"), Right::Viewer, Call::look("ListRoles")).is_ok());
            for refused in [with("b"), far, server] {
                assert!(access.check(&refused, Right::Admin, CALL).is_err());
            }
        });
        let needed = "a token, or the certificate of an admin or viewer, is needed";
        let [bob, stranger, server] = &record[..] else { panic!("{record:?}") };
        let refused = r#"refused="SetRole" of="a""#;
        assert_eq!(
            *bob,
            format!(
                r#"actor="bob" {refused} from="" message="bob may look but not change: ask as an admin""#
            )
        );
        let unknown = r#"from="10.0.0.7:9" message="this token is not known""#;
        assert_eq!(*stranger, format!(r#"actor="anonymous" {refused} {unknown}"#));
        let identity = r#"actor="spiffe://x/baton/server/s""#;
        assert_eq!(*server, format!(r#"{identity} {refused} from="" message="{needed}""#));
    }

    #[test]
    fn a_bad_line_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokens");
        for (bad, problem) in [
            ("alice admin", "expected: NAME"),
            ("alice root 00", "`viewer` or `admin`"),
            ("alice admin 00", "64 hex digits"),
        ] {
            std::fs::write(&path, format!("# first\n{bad}\n")).expect("a file");
            let text = Access::new(Some(path.clone())).expect_err("a bad line").to_string();
            assert!(text.contains("tokens, line 2") && text.contains(problem), "{text}");
        }
        assert!(Access::new(Some(directory.path().join("none"))).is_err());
    }

    #[test]
    fn without_tokens_only_this_machine_is_let_in() {
        let access = Access::new(None).expect("nothing to read");
        let from = |address: &str| {
            let mut request = Request::new(());
            let remote_addr = Some(address.parse().expect("an address"));
            let info = tonic::transport::server::TcpConnectInfo { local_addr: None, remote_addr };
            request.extensions_mut().insert(info);
            access.check(&request, Right::Admin, CALL)
        };
        assert_eq!(from("127.0.0.1:9").expect("local").name, "local");
        assert!(from("[::1]:9").is_ok() && from("[::ffff:127.0.0.1]:9").is_ok());
        assert_eq!(from("10.0.0.7:9").expect_err("a stranger").code(), tonic::Code::Unauthenticated);
    }

    #[test]
    fn a_certificate_says_what_its_holder_may() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokens");
        std::fs::write(&path, line("bob", "admin", "b")).expect("a file");
        let (tokens, none) = (Access::new(Some(path)).expect("good"), Access::new(None).expect("good"));
        let by = |uri: &str, mut request: Request<()>| {
            let identity = uri.parse().expect("an identity");
            request.extensions_mut().insert(Peer::Named(std::sync::Arc::new(identity)));
            request
        };
        let (alice, server) = ("spiffe://x/baton/admin/alice", "spiffe://x/baton/server/a");
        for access in [&tokens, &none] {
            let actor = access.check(&by(alice, Request::new(())), Right::Admin, CALL).expect("an admin");
            assert_eq!(actor.name, "alice");
            let viewer = by("spiffe://x/baton/viewer", with("b"));
            assert_eq!(access.check(&viewer, Right::Viewer, CALL).expect("a viewer").name, "viewer");
            let refused = access.check(&viewer, Right::Admin, CALL).expect_err("whatever the token");
            assert_eq!(refused.code(), tonic::Code::PermissionDenied);
            assert!(access.check(&by(server, Request::new(())), Right::Viewer, CALL).is_err());
        }
        assert_eq!(tokens.check(&by(server, with("b")), Right::Admin, CALL).expect("by token").name, "bob");
        let mut nobody = Request::new(());
        nobody.extensions_mut().insert(Peer::Nameless("no certificate was shown".into()));
        assert!(none.check(&nobody, Right::Viewer, CALL).is_err(), "though it is on this machine");
    }
}
