//! Operators are let in by the controller's rule: by token, or from the coordinator's own machine. Whoever may look may
//! ask everything here.

use std::time::Duration;

use baton_coordinator::admin::Admin;
use baton_process::{
    Closed, HealthHandle, Tls,
    access::{Access, AdminConfig},
    grpc,
};
use baton_proto::v1::{self, request_admin_client::RequestAdminClient, request_admin_server::RequestAdmin};
use sha2::{Digest, Sha256};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tonic::{
    Code, Request, Status,
    transport::{Channel, server::TcpConnectInfo},
};

use crate::scripted::Cluster;

const ID: &str = "none-has-this";

/// A port for operators, in plaintext.
struct Port {
    client: RequestAdminClient<Channel>,
    _cluster: Cluster,
    _stop: DropGuard,
}

impl Port {
    async fn open(config: &AdminConfig) -> Self {
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        let access = Access::start(config, &shutdown, &tasks).expect("a good file");
        let (cluster, []) = Cluster::start([], |_| {}).await;
        let admin = Admin { service: cluster.service.clone(), access };
        let drain = Duration::from_secs(1);
        let (health, closed) = (HealthHandle::default(), Closed::default());
        let (routes, options) = admin.port(health, Tls::plaintext(), closed, shutdown.clone(), drain);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("is bound"));
        tasks.spawn(grpc::serve(listener, routes, options));
        let channel = Channel::from_shared(address).expect("an address").connect_lazy();
        Self { client: RequestAdminClient::new(channel), _cluster: cluster, _stop: shutdown.drop_guard() }
    }

    /// Both calls, as whoever has this token: how each is refused; none = it is answered.
    async fn calls(&self, token: Option<&str>) -> [Option<Status>; 2] {
        let mut client = self.client.clone();
        let listed = client.list_requests(by(token, v1::ListRequestsRequest {})).await;
        let asked = v1::ExplainPlacementRequest { request_id: ID.to_owned() };
        let explained = client.explain_placement(by(token, asked)).await.err();
        [listed.err(), explained.filter(|status| status.code() != Code::NotFound)]
    }
}

fn by<T>(token: Option<&str>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().expect("a header");
        request.metadata_mut().insert("authorization", value);
    }
    request
}

#[tokio::test]
async fn viewers_and_admins_may_ask_and_strangers_may_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tokens");
    let line = |name: &str, right: &str| {
        let hash: String = Sha256::digest(name.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name} {right} {hash}\n")
    };
    std::fs::write(&path, line("alice", "admin") + &line("bob", "viewer")).expect("a file");
    let port = Port::open(&AdminConfig { tokens_file: path.to_str().expect("a path").to_owned() }).await;
    for known in ["alice", "bob"] {
        for refused in port.calls(Some(known)).await {
            assert!(refused.is_none(), "{known}: {refused:?}");
        }
    }
    // Though they are on this machine.
    for (stranger, said) in
        [(Some("carol"), "this token is not known"), (None, "a token, or the certificate")]
    {
        for refused in port.calls(stranger).await {
            let status = refused.expect("a stranger");
            assert_eq!(status.code(), Code::Unauthenticated, "{stranger:?}");
            assert!(status.message().starts_with(said), "{stranger:?}: {status}");
        }
    }
}

#[tokio::test]
async fn without_tokens_callers_of_this_machine_alone_are_let_in() {
    let port = Port::open(&AdminConfig::default()).await;
    for refused in port.calls(None).await {
        assert!(refused.is_none(), "{refused:?}");
    }
    fn from<T>(address: &str, message: T) -> Request<T> {
        let remote_addr = Some(address.parse().expect("an address"));
        let mut request = Request::new(message);
        request.extensions_mut().insert(TcpConnectInfo { local_addr: None, remote_addr });
        request
    }
    let (cluster, []) = Cluster::start([], |_| {}).await;
    let admin = Admin { service: cluster.service.clone(), access: Access::default() };
    let asked = || v1::ExplainPlacementRequest { request_id: ID.to_owned() };
    let here = "127.0.0.1:9";
    assert!(admin.list_requests(from(here, v1::ListRequestsRequest {})).await.is_ok());
    let code = admin.explain_placement(from(here, asked())).await.expect_err("unknown").code();
    assert_eq!(code, Code::NotFound, "it is asked for");
    for there in ["10.0.0.7:9", "[fd00::7]:9"] {
        let refused = [
            admin
                .list_requests(from(there, v1::ListRequestsRequest {}))
                .await
                .map(drop)
                .expect_err("refused"),
            admin.explain_placement(from(there, asked())).await.map(drop).expect_err("refused"),
        ];
        for status in refused {
            assert_eq!(status.code(), Code::Unauthenticated, "{there}");
            assert!(status.message().contains("`admin.tokens_file`"), "{status}");
        }
    }
}
