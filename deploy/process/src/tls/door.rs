//! Who may make which calls at a port: asked before each call, with what the connection's handshake has shown.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use tonic::Status;

use super::{Counts, Peer, Role};

/// Open to whoever has come so far: they say whether a process is well, and what it speaks.
const OPEN: [&str; 2] = ["/grpc.health.v1.Health/", "/grpc.reflection."];

/// Whose calls are taken.
#[derive(Debug, Clone, Copy)]
pub enum Allowed {
    Roles(&'static [Role]),
    /// The service itself asks who calls, by [`Peer::of`].
    Anyone,
}

/// Whom a port lets in. Counts only where TLS is spoken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Door {
    /// Beginnings of paths, as in `/baton.v1.Control/Session`; the first that fits decides. What none fits is for
    /// nobody.
    pub calls: &'static [(&'static str, Allowed)],
    /// Whether callers need no certificate, as they may show a token to the service itself.
    pub without_certificate: bool,
}

impl Door {
    fn admit(&self, path: &str, peer: &Peer) -> Result<(), Status> {
        let listed = self.calls.iter().find(|(begin, _)| path.starts_with(begin));
        let allowed = match listed {
            Some((_, allowed)) => *allowed,
            None if OPEN.iter().any(|begin| path.starts_with(begin)) => Allowed::Anyone,
            None => Allowed::Roles(&[]),
        };
        let Allowed::Roles(roles) = allowed else { return Ok(()) };
        match peer {
            Peer::Plaintext => Ok(()),
            Peer::Named(identity) if roles.contains(&identity.role) => Ok(()),
            Peer::Named(identity) => {
                Err(Status::permission_denied(format!("{path} is for {}, not for {identity}", list(roles))))
            }
            Peer::Nameless(why) => Err(Status::unauthenticated(format!(
                "{path} is for {}, by their certificate: {why}",
                list(roles)
            ))),
        }
    }
}

fn list(roles: &[Role]) -> String {
    match roles {
        [] => "nobody".to_owned(),
        roles => roles.iter().map(|role| format!("{role}s")).collect::<Vec<_>>().join(" and "),
    }
}

/// The middleware of a TLS port.
pub(super) async fn guard(
    State((door, counts)): State<(Door, Counts)>,
    request: Request,
    next: Next,
) -> Response {
    // Without it, the port is not served by us: nobody is believed.
    let stranger = Peer::Nameless("no handshake".into());
    let peer = request.extensions().get().unwrap_or(&stranger);
    if let Err(status) = door.admit(request.uri().path(), peer) {
        counts.refused("role");
        counts.tell(status.message());
        return status.into_http();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tonic::Code;

    use super::*;

    #[test]
    fn what_is_not_listed_is_for_nobody() {
        let door = Door {
            calls: &[
                ("/a.Control/Session", Allowed::Roles(&[Role::Server])),
                ("/a.Control/", Allowed::Roles(&[Role::Coordinator, Role::Admin])),
                ("/a.Open/", Allowed::Anyone),
            ],
            without_certificate: false,
        };
        let peer = |role| Peer::Named(Arc::new(format!("spiffe://x/baton/{role}").parse().expect("good")));
        let nobody = Peer::Nameless("no certificate was shown".into());
        let code = |path, peer: &Peer| door.admit(path, peer).err().map(|status| status.code());
        assert_eq!(code("/a.Control/Session", &peer("server")), None);
        assert_eq!(code("/a.Control/Session", &peer("coordinator")), Some(Code::PermissionDenied));
        assert_eq!(code("/a.Control/Other", &peer("coordinator")), None);
        assert_eq!(code("/a.Control/Other", &peer("server")), Some(Code::PermissionDenied));
        assert_eq!(code("/a.Control/Other", &nobody), Some(Code::Unauthenticated));
        assert_eq!(code("/a.Open/Any", &nobody), None);
        assert_eq!(code("/b.Else/Any", &peer("admin")), Some(Code::PermissionDenied));
        assert_eq!(code("/grpc.health.v1.Health/Check", &peer("viewer")), None);
        let said = door.admit("/a.Control/Other", &peer("server")).expect_err("refused");
        assert_eq!(
            said.message(),
            "/a.Control/Other is for coordinators and admins, not for spiffe://x/baton/server"
        );
    }
}
