//! The binary itself, with the real model, under a scripted controller: it registers while it loads, takes a role on,
//! serves, and on SIGTERM finishes what runs before it says goodbye.

mod support;

use std::{
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use baton_proto::{ErrorCode, v1};
use support::{Attached, PATIENCE, Request, Target, whole};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request as GrpcRequest, Response, Status, Streaming};

type Orders = mpsc::Sender<Result<v1::ControllerOrder, Status>>;

/// Hands every session to the test.
struct Scripted(mpsc::Sender<Called>);

type Called = (Streaming<v1::InstanceReport>, Orders);

#[tonic::async_trait]
impl v1::control_server::Control for Scripted {
    type CoordinateStream = ReceiverStream<Result<v1::CoordinatorOrder, Status>>;

    async fn coordinate(
        &self,
        _: GrpcRequest<Streaming<v1::CoordinatorReport>>,
    ) -> Result<Response<Self::CoordinateStream>, Status> {
        Err(Status::unimplemented("for servers only"))
    }

    type SessionStream = ReceiverStream<Result<v1::ControllerOrder, Status>>;

    async fn session(
        &self,
        request: GrpcRequest<Streaming<v1::InstanceReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (orders, stream) = mpsc::channel(8);
        self.0
            .send((request.into_inner(), orders))
            .await
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Ends the process if the test fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn start(controller: &str, settings: &[&str]) -> Self {
        let model = std::env::var_os("BATON_TEST_MODEL").expect(
            "set BATON_TEST_MODEL to the GGUF file of SmolLM2-135M-Instruct; `./deploy/run test` fetches it",
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton-server"));
        command.arg("--model").arg(model).args(["--controller", controller, "--instance-id", "s"]);
        for setting in ["model.name=real"].iter().chain(settings) {
            command.args(["--set", setting]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().expect("the server starts"))
    }

    fn terminate(&self) {
        let killed = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        assert!(killed.expect("kill runs").success());
    }

    async fn exit(mut self) -> ExitStatus {
        let exited = async {
            loop {
                if let Some(status) = self.0.try_wait().expect("a child") {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, exited).await.expect("the server ends")
    }
}

/// The session's reports, one after the other.
struct Reports(Streaming<v1::InstanceReport>);

impl Reports {
    async fn next(&mut self) -> v1::instance_report::Report {
        let message = tokio::time::timeout(PATIENCE, self.0.message()).await.expect("a report in time");
        message.expect("a healthy stream").expect("an open stream").report.expect("a report")
    }

    async fn until(&mut self, phase: v1::Phase) -> v1::InstanceBeat {
        loop {
            match self.next().await {
                v1::instance_report::Report::Beat(beat) if beat.phase() == phase => return beat,
                v1::instance_report::Report::Beat(_) => {}
                other => panic!("expected a beat, got {other:?}"),
            }
        }
    }

    /// Whether the session ends without a goodbye.
    async fn ended(&mut self) -> bool {
        loop {
            match tokio::time::timeout(PATIENCE, self.0.message()).await.expect("an end in time") {
                Ok(Some(report)) if matches!(report.report, Some(v1::instance_report::Report::Beat(_))) => {}
                Ok(Some(_)) => return false,
                Ok(None) | Err(_) => return true,
            }
        }
    }

    async fn until_goodbye(&mut self) {
        loop {
            match self.next().await {
                v1::instance_report::Report::Beat(_) => {}
                v1::instance_report::Report::Bye(_) => return,
                other @ v1::instance_report::Report::Hello(_) => panic!("expected goodbye, got {other:?}"),
            }
        }
    }
}

fn order(order: v1::controller_order::Order) -> Result<v1::ControllerOrder, Status> {
    Ok(v1::ControllerOrder { order: Some(order) })
}

/// The next session and who calls.
async fn greeted(sessions: &mut mpsc::Receiver<Called>) -> (Reports, Orders, v1::InstanceSpec) {
    let session = tokio::time::timeout(PATIENCE, sessions.recv()).await.expect("a session in time");
    let (reports, orders) = session.expect("a session");
    let mut reports = Reports(reports);
    let v1::instance_report::Report::Hello(hello) = reports.next().await else { panic!("expected hello") };
    (reports, orders, hello.spec.expect("a spec"))
}

/// A server that is ready, the controller's side of its session, and a coordinator attached to it. If `known` is not 0,
/// the controller first says that it knows the instance from a time so many milliseconds later.
async fn ready(settings: &[&str], known: u64) -> (Server, Reports, Orders, Attached) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (accepted, mut sessions) = mpsc::channel(1);
    let control = v1::control_server::ControlServer::from_arc(Arc::new(Scripted(accepted)));
    let serve = tonic::transport::Server::builder().add_service(control);
    tokio::spawn(serve.serve_with_incoming(TcpListenerStream::new(listener)));

    let server = Server::start(&address, settings);
    let (mut reports, mut orders, mut spec) = greeted(&mut sessions).await;
    if known > 0 {
        let held_incarnation = spec.incarnation + known;
        let refuse = v1::Refuse { reason: None, held_incarnation };
        orders.send(order(v1::controller_order::Order::Refuse(refuse))).await.expect("sent");
        (reports, orders, spec) = greeted(&mut sessions).await;
        assert_eq!(spec.incarnation, held_incarnation + 1);
    }
    let model = spec.model.expect("a model");
    assert_eq!((spec.instance_id.as_str(), model.name.as_str()), ("s", "real"));
    assert_eq!((model.context_tokens, model.vocabulary_size), (8192, 49_152));
    assert_eq!(spec.kv_layout.expect("a layout").layers, 30);

    let welcome = v1::controller_order::Welcome { beat_millis: 200, ..Default::default() };
    orders.send(order(v1::controller_order::Order::Welcome(welcome))).await.expect("sent");
    let assign = v1::AssignRole { role: v1::Role::Mixed.into(), epoch: 3, ..Default::default() };
    orders.send(order(v1::controller_order::Order::Assign(assign))).await.expect("sent");
    let ready = reports.until(v1::Phase::Ready).await;
    assert_eq!((ready.role(), ready.role_epoch), (v1::Role::Mixed, 3));

    let target =
        Target { instance: "s".into(), incarnation: spec.incarnation, epoch: 3, model: "real".into() };
    let coordinator = Attached::open(&spec.inference_endpoint, target).await;
    (server, reports, orders, coordinator)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_registers_serves_and_drains() {
    let (server, mut reports, orders, mut coordinator) = ready(&[], 0).await;
    let request = Request::greedy(20, 60);
    coordinator.dispatch(1, &request, whole()).await;
    coordinator.until_tokens(1, 3).await;
    server.terminate();
    reports.until(v1::Phase::Draining).await;
    coordinator.dispatch(2, &request, whole()).await;
    assert_eq!(coordinator.until_end(2).await.failed(), ErrorCode::Unavailable);
    let heard = coordinator.until_end(1).await;
    assert_eq!((heard.tokens.len(), heard.finished()), (60, v1::FinishReason::Length));
    reports.until_goodbye().await;
    drop(orders);
    assert!(server.exit().await.success());
}

/// The status line of the answer.
async fn get(address: &str, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nhost: s\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer.lines().next().expect("a status").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_cordoned_works_to_the_end_and_is_then_not_ready_and_alive() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address").to_string();
    drop(free);
    let setting = format!("metrics_listen={address}");
    let (server, mut reports, orders, mut coordinator) = ready(&[&setting], 0).await;
    assert_eq!(get(&address, "/readiness").await, "HTTP/1.1 200 OK");
    coordinator.dispatch(1, &Request::greedy(20, 60), whole()).await;
    coordinator.until_tokens(1, 3).await;
    let assign = |role: v1::Role, epoch, cordoned| {
        let assign =
            v1::AssignRole { role: role.into(), epoch, drain_millis: 60_000, cordoned, ..Default::default() };
        order(v1::controller_order::Order::Assign(assign))
    };
    orders.send(assign(v1::Role::None, 4, true)).await.expect("sent");
    assert_eq!(reports.until(v1::Phase::Draining).await.role(), v1::Role::Mixed);
    assert_eq!(get(&address, "/readiness").await, "HTTP/1.1 200 OK", "it works on");
    assert_eq!(coordinator.until_end(1).await.finished(), v1::FinishReason::Length);
    assert_eq!(reports.until(v1::Phase::Ready).await.role(), v1::Role::None);
    assert_eq!(get(&address, "/readiness").await, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(get(&address, "/health").await, "HTTP/1.1 200 OK");
    orders.send(assign(v1::Role::Decode, 5, false)).await.expect("sent");
    while reports.until(v1::Phase::Ready).await.role() != v1::Role::Decode {}
    assert_eq!(get(&address, "/readiness").await, "HTTP/1.1 200 OK");
    server.terminate();
    reports.until_goodbye().await;
    drop(orders);
    assert!(server.exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_outlasts_its_drain_is_told_so() {
    let (server, mut reports, orders, mut coordinator) = ready(&["process.shutdown.drain=3s"], 0).await;
    coordinator.dispatch(1, &Request::greedy(20, 8000), whole()).await;
    coordinator.until_tokens(1, 1).await;
    server.terminate();
    assert_eq!(coordinator.until_end(1).await.failed(), ErrorCode::Unavailable);
    reports.until_goodbye().await;
    drop(orders);
    assert!(server.exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_replaced_drains_and_ends_as_failed() {
    let (server, mut reports, orders, mut coordinator) = ready(&[], 0).await;
    coordinator.dispatch(1, &Request::greedy(20, 60), whole()).await;
    coordinator.until_tokens(1, 3).await;
    let refuse = v1::Refuse { reason: None, held_incarnation: u64::MAX };
    orders.send(order(v1::controller_order::Order::Refuse(refuse))).await.expect("sent");
    let heard = coordinator.until_end(1).await;
    assert_eq!((heard.tokens.len(), heard.finished()), (60, v1::FinishReason::Length));
    assert!(reports.ended().await, "it has nothing more to say to this controller");
    assert!(!server.exit().await.success(), "so that its supervisor starts it again");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_whose_clock_was_set_back_is_at_work_under_a_later_incarnation() {
    let (server, mut reports, orders, mut coordinator) = ready(&[], 3_600_000).await;
    // Meant for the incarnation of its second hello: it would refuse any other.
    coordinator.dispatch(1, &Request::greedy(20, 5), whole()).await;
    assert_eq!(coordinator.until_end(1).await.finished(), v1::FinishReason::Length);
    server.terminate();
    reports.until_goodbye().await;
    drop(orders);
    assert!(server.exit().await.success());
}

#[test]
fn a_machine_says_over_what_caches_could_travel() {
    let said = Command::new(env!("CARGO_BIN_EXE_baton-server")).arg("--transports").output().expect("runs");
    let said = String::from_utf8(said.stdout).expect("text");
    let kinds: Vec<_> = said.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(kinds, ["hixl", "hccl", "shm", "rdma", "tcp"], "{said}");
    assert!(said.lines().any(|line| line == "tcp   yes: any network"), "{said}");
}
