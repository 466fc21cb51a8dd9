//! A real process from start to end: readiness, health, reflection, metrics, signals, deadlines, panics.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use rustix::process::{Pid, Signal, kill_process};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Longer than anything here takes; shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(20);

struct Specimen {
    child: Child,
    http: String,
    grpc: String,
}

/// Cargo builds the example for the tests, beside the directory that holds them.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("examples/specimen")
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(args).env_remove("RUST_BACKTRACE").env_remove("BATON_LOG");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Specimen {
    fn start(args: &[&str]) -> Self {
        Self::of(command(args).spawn().unwrap())
    }

    fn of(mut child: Child) -> Self {
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut field = |name: &str| lines.next().unwrap().strip_prefix(name).unwrap().trim().to_owned();
        let (http, grpc) = (field("http"), field("grpc"));
        assert_eq!(field(""), "ready");
        Self { child, http, grpc }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = wait(&mut self.child);
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (status, log)
    }
}

fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the process did not end");
        }
        std::thread::yield_now();
    }
}

#[test]
fn it_is_observed_over_http_and_stops_when_asked() {
    let specimen = Specimen::start(&[]);
    assert!(specimen.get("/health").starts_with("HTTP/1.1 200"));
    let readiness = specimen.get("/readiness");
    assert!(
        readiness.starts_with("HTTP/1.1 200") && readiness.ends_with(r#"{"status":"ready"}"#),
        "{readiness}"
    );
    assert!(specimen.get("/metrics").contains("baton_build_info{service=\"specimen\""));
    specimen.signal(Signal::TERM);
    let (status, log) = specimen.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("asked to stop") && log.contains("stopped"), "{log}");
}

#[tokio::test]
async fn grpc_health_and_reflection_answer() {
    let mut specimen = Specimen::start(&[]);
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", specimen.grpc)).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "baton.v1.Inference"] {
        let mut watch =
            health.watch(HealthCheckRequest { service: service.to_owned() }).await.unwrap().into_inner();
        let mut status = watch.message().await.unwrap().unwrap().status();
        while status != ServingStatus::Serving {
            status = watch.message().await.unwrap().unwrap().status();
        }
    }
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"baton.v1.Inference") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    specimen.child.kill().unwrap();
    specimen.child.wait().unwrap();
}

/// Keeps what is exported.
struct Collector(tokio::sync::mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.send(request.into_inner()).await.unwrap();
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test]
async fn traces_reach_a_collector_before_the_process_ends() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("process.otlp.endpoint=http://{}", listener.local_addr().unwrap());
    let (sender, mut exported) = tokio::sync::mpsc::channel(16);
    let mut server = tonic::transport::Server::builder();
    let server = server.add_service(TraceServiceServer::new(Collector(sender)));
    tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)));

    let ended = tokio::task::spawn_blocking(move || {
        let specimen = Specimen::start(&["--set", &endpoint]);
        specimen.signal(Signal::TERM);
        specimen.end()
    });
    let (status, log) = ended.await.unwrap();
    assert_eq!(status.code(), Some(0), "{log}");
    let export = exported.try_recv().expect("traces are exported before the end");
    let resource = &export.resource_spans[0];
    let spans = resource.scope_spans.iter().flat_map(|scope| &scope.spans);
    assert_eq!(spans.map(|span| span.name.as_str()).collect::<Vec<_>>(), ["getting ready"]);
    assert!(format!("{:?}", resource.resource).contains("baton-specimen"), "{:?}", resource.resource);
}

#[test]
fn a_supervised_process_ends_with_its_supervisor() {
    let mut specimen = Specimen::start(&["--supervised"]);
    drop(specimen.child.stdin.take());
    let (status, log) = specimen.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("supervisor is gone"), "{log}");
}

#[test]
fn a_drain_has_a_deadline() {
    let specimen = Specimen::start(&["--set", "mode=stuck", "--set", "process.shutdown.drain=100ms"]);
    specimen.signal(Signal::TERM);
    let (status, log) = specimen.end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("error: did not stop within 100ms"), "{log}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut specimen = Specimen::start(&["--set", "mode=stuck", "--set", "process.shutdown.drain=1h"]);
    specimen.signal(Signal::TERM);
    let mut log = BufReader::new(specimen.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("asked to stop") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0);
    }
    specimen.signal(Signal::INT);
    assert_eq!(wait(&mut specimen.child).code(), Some(130));
}

#[test]
fn a_panic_is_logged_and_an_essential_task_takes_the_process_along() {
    let specimen = Specimen::start(&["--set", "mode=panic", "--set", "process.log.format=json"]);
    let (status, log) = specimen.end();
    assert_eq!(status.code(), Some(1), "{log}");
    let panic = log.lines().find(|line| line.contains("as the test asked")).unwrap();
    assert!(
        panic.starts_with('{') && panic.contains("specimen.rs:") && panic.contains("\"ERROR\""),
        "{panic}"
    );
    // What an event tells beside the words has other names: a key that comes twice is lost, or breaks whoever reads it.
    for key in ["level", "message", "target", "timestamp"] {
        assert_eq!(panic.matches(&format!("\"{key}\":")).count(), 1, "{key}: {panic}");
    }
    assert!(log.contains("error: doomed failed: it panicked"), "{log}");
    let (_, log) = Specimen::start(&["--set", "mode=panic", "--set", "process.log.format=human"]).end();
    assert_eq!(log.matches(baton_process::PANIC_LOGGED).count(), 1, "{log}");
}

#[test]
fn what_is_wrong_at_start_is_one_line() {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = held.local_addr().unwrap();
    let in_use = format!("port {} of 127.0.0.1 is in use", address.port());
    for (set, expected) in [
        (format!("http={address}"), in_use.as_str()),
        ("http=nowhere".to_owned(), "expected HOST:PORT"),
        ("mod=x".to_owned(), "did you mean `mode`?"),
        ("process.log.level=info,=".to_owned(), "`process.log.level`: expected"),
        ("process.log.level=inof".to_owned(), "`inof` is neither a level"),
        ("process.otlp.sample_ratio=2".to_owned(), "`process.otlp.sample_ratio`: expected 0 to 1, not 2"),
        ("process.otlp.endpoint=https://a:1".to_owned(), "`process.otlp.ca_file`: expected a file"),
        ("process.otlp.ca_file=a.pem".to_owned(), "`process.otlp.endpoint`: expected an address that begins"),
    ] {
        let output = command(&["--set", &set]).env("BATON_LOG", "error").output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(
            log.starts_with("error: ") && log.contains(expected) && log.lines().count() == 1,
            "{set}: {log}"
        );
    }
}

#[test]
fn check_config_prints_what_is_in_effect() {
    let mut command = command(&["--check-config", "--set", "mode=stuck"]);
    let output = command.env("BATON_SPECIMEN__HTTP", "127.0.0.1:81").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for line in ["mode = \"stuck\"", "http = \"127.0.0.1:81\"", "drain = \"\"", "[process.log]"] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn a_process_may_open_as_many_files_as_it_may_let_itself() {
    let limited = Command::new("sh")
        .args(["-c", "ulimit -Sn 128 && exec \"$0\"", program().to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let specimen = Specimen::of(limited.unwrap());
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", specimen.child.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let fields: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(fields[3], fields[4], "{line}");
    assert_ne!(fields[3], "128");
    specimen.signal(Signal::TERM);
    assert!(specimen.end().0.success());
}
