//! What strangers can do to a port that they reach: say nothing, say it slowly, say too much, or say what is no message. Each
//! is turned away in bounded time, and others are served meanwhile.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use baton_integration_tests::{
    Cluster,
    authority::{Authority, alert},
    chat, eventually, metrics, process,
    strangers::{self, Way, crowd},
};
use bytes::{Buf as _, BufMut as _, Bytes};
use futures::future::join_all;
use http::uri::PathAndQuery;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::MetadataValue,
    transport::Endpoint,
};

/// Who does not get on with a handshake has five seconds; a busy machine's delay comes on top.
const HANDSHAKE_MOST: Duration = Duration::from_secs(10);
/// With fewer seats than strangers: some turns of two seconds each.
const KEPT_WAITING_MOST: Duration = Duration::from_secs(15);

/// Processes of a cluster, each with a port for metrics.
const PROCESSES: u16 = 4;

/// The ports of a cluster that strangers reach.
struct Ports {
    grpc: Vec<String>,
    http: Vec<String>,
}

impl Ports {
    /// Metrics are at `metrics` and the next ports.
    async fn of(cluster: &Cluster, metrics: &str) -> Self {
        let instances = cluster.ctl("instances").await;
        let server = instances[0]["inference_endpoint"].as_str().expect("an endpoint").to_owned();
        let first: SocketAddr = metrics.parse().expect("an address");
        let metrics = (0..PROCESSES).map(|at| SocketAddr::new(first.ip(), first.port() + at).to_string());
        let openai = cluster.url().trim_start_matches("http://").to_owned();
        Self {
            grpc: vec![cluster.controller().to_owned(), cluster.coordinator().to_owned(), server],
            http: metrics.chain([openai]).collect(),
        }
    }
}

#[tokio::test]
async fn who_is_slow_or_makes_no_sense_is_turned_away_and_keeps_nobody_out() {
    let metrics = process::free_ports(PROCESSES);
    let cluster = Cluster::start(&["--metrics-listen", &metrics]).await;
    let ports = Ports::of(&cluster, &metrics).await;
    let everyone = async {
        // Many of each, so that what one of them holds would be missed.
        let (grpc, http) = tokio::join!(
            crowd(&ports.grpc, &Way::Plaintext, 20, strangers::of_grpc()),
            crowd(&ports.http, &Way::Plaintext, 20, strangers::of_http()),
        );
        grpc.max(http)
    };
    let (longest, asked) = tokio::join!(everyone, honest(&cluster));
    println!("all were turned away after {longest:?} at most, {asked} requests beside them");
    cluster.assert_nothing_held().await;
    assert_no_panic(&cluster);
}

/// Asks and is answered for a while; how often.
async fn honest(cluster: &Cluster) -> usize {
    let body = chat::request(cluster.model(), "What is the capital of France?", 12, false);
    let (began, mut asked) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(12) || asked < 6 {
        assert!(chat::ask(cluster.url(), &body).await.contains("Paris"));
        assert_eq!(cluster.ctl("roles").await.len(), 2);
        asked += 1;
    }
    asked
}

#[tokio::test]
async fn it_is_so_before_https_and_within_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(folder.path().join("ours"));
    authority.run(&["issue", "host", "web", "127.0.0.1", "localhost"]);
    let set = [("cert_file", "host-web.crt"), ("key_file", "host-web.key")];
    let set = set.map(|(key, file)| format!("coordinator.https.{key}={}", authority.0.join(file).display()));
    let set: Vec<&str> = set.iter().flat_map(|setting| ["--set", setting]).collect();
    let cluster = Cluster::start(&set).await;
    let port = [cluster.url().trim_start_matches("https://").to_owned()];
    let (within, port_of_others) = (Way::tls(None), port[0].clone());
    let crowds = async {
        tokio::join!(
            crowd(&port, &Way::Plaintext, 20, strangers::before_tls()),
            crowd(&port, &within, 5, strangers::of_http()),
        )
    };
    // Others are let in meanwhile: each of these looks for three seconds whether they are turned away.
    let ca = authority.0.join("ca.crt");
    let let_in = tokio::task::spawn_blocking(move || [(); 3].map(|()| alert(&port_of_others, &ca, None)));
    let ((before, within), let_in) = tokio::join!(crowds, let_in);
    println!("all were turned away after {before:?} before TLS at most, and after {within:?} within");
    assert!(before < HANDSHAKE_MOST, "{before:?}");
    assert_eq!(let_in.expect("no panic"), [None, None, None]);
    assert_no_panic(&cluster);
}

#[tokio::test]
async fn who_is_refused_for_want_of_a_key_keeps_nobody_out() {
    const SEATS: usize = 4;
    let folder = tempfile::tempdir().expect("a folder");
    let (key, file) = ("sk-baton-of-the-test", folder.path().join("keys.toml"));
    let hash: String = Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(&file, format!("[[keys]]\nname = \"alice\"\nsha256 = \"{hash}\"\n")).expect("a file");
    let keys = format!("coordinator.api_keys.file={}", file.display());
    let seats = format!("coordinator.limits.max_connections={SEATS}");
    let metrics = process::free_ports(PROCESSES);
    let cluster = Cluster::start(&["--metrics-listen", &metrics, "--set", &keys, "--set", &seats]).await;
    // Each keeps its connection for its next request, and takes a seat whenever there is one.
    let strangers = [(); 2 * SEATS].map(|()| reqwest::Client::new());
    let refused = async |stranger: &reqwest::Client| {
        loop {
            let asked =
                stranger.get(format!("{}/v1/models", cluster.url())).bearer_auth("sk-baton-unknown").send();
            if let Ok(answer) = asked.await {
                assert_eq!(answer.status(), 401);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let crowd = join_all(strangers.iter().map(refused));
    let alice = async {
        eventually("strangers who give way to each other", || async {
            let seen = reqwest::get(format!("http://{metrics}/metrics")).await.ok()?.text().await.ok()?;
            let label = "why=\"stranger\"";
            (metrics::sum(&seen, "baton_http_closed_total", label)? > 0.0).then_some(())
        })
        .await;
        let address = cluster.url().trim_start_matches("http://");
        let mut alice = TcpStream::connect(address).await.expect("the kernel takes it");
        let began = Instant::now();
        timeout(KEPT_WAITING_MOST, asks(&mut alice, key)).await.expect("she has a seat before long");
        let waited = began.elapsed();
        // By the same connection, for longer than a stranger keeps one.
        for _ in 0..12 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            asks(&mut alice, key).await;
        }
        waited
    };
    let waited = tokio::select! {
        waited = alice => waited,
        _ = crowd => unreachable!("they never end"),
    };
    println!("she waited for {waited:?}");
    assert_no_panic(&cluster);
}

/// Asks for the models by this connection, and is answered.
async fn asks(stream: &mut TcpStream, key: &str) {
    let head = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("her connection stands");
    let mut answer = vec![0; 1 << 14];
    let length = stream.read(&mut answer).await.expect("her connection stands");
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

fn assert_no_panic(cluster: &Cluster) {
    for name in cluster.pids().keys() {
        let log = cluster.log(name);
        let panics: Vec<&str> = process::panics(&log).collect();
        assert!(panics.is_empty(), "{name}: {panics:?}");
    }
}

/// Sends bytes as they are in place of messages.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, bytes: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls a method with these bytes as the one message of its stream, and with a header of so many bytes.
async fn call(port: &str, method: &'static str, message: Bytes, header_bytes: usize) -> Status {
    let endpoint: Endpoint = format!("http://{port}").parse().expect("an address");
    let mut client = tonic::client::Grpc::new(endpoint.connect_lazy());
    client.ready().await.expect("it listens");
    let mut request = Request::new(futures::stream::iter([message]));
    if header_bytes > 0 {
        let value = MetadataValue::try_from("a".repeat(header_bytes)).expect("letters");
        request.metadata_mut().insert("x-stranger", value);
    }
    let path = PathAndQuery::from_static(method);
    match client.streaming(request, path, Raw).await {
        Err(status) => status,
        Ok(answers) => {
            let mut answers = answers.into_inner();
            loop {
                match answers.message().await {
                    Err(status) => return status,
                    Ok(None) => return Status::ok("it ended"),
                    Ok(Some(_)) => {}
                }
            }
        }
    }
}

/// The methods that a stranger can call, with the index of their port in [`Ports::grpc`].
const METHODS: [(usize, &str); 9] = [
    (0, "/baton.v1.Control/Session"),
    (0, "/baton.v1.Control/Coordinate"),
    (0, "/baton.v1.FleetAdmin/SetTargets"),
    (0, "/baton.v1.Store/Range"),
    (1, "/baton.v1.RequestAdmin/ListRequests"),
    (2, "/baton.v1.Inference/Attach"),
    (2, "/baton.v1.Handoff/Exchange"),
    (2, "/baton.v1.KvCache/Events"),
    (2, "/grpc.health.v1.Health/Check"),
];

#[tokio::test]
async fn messages_that_are_too_large_or_none_are_refused_by_each_service() {
    let metrics = process::free_ports(PROCESSES);
    let cluster = Cluster::start(&["--metrics-listen", &metrics]).await;
    let ports = Ports::of(&cluster, &metrics).await;
    // A field of two gigabytes that never comes; groups that are never closed.
    let malformed: [&[u8]; 2] = [b"\x0a\xff\xff\xff\xff\x07", b"\x0b\x0b\x0b"];
    let patience = Duration::from_secs(30);
    for (port, method) in METHODS {
        let port = &ports.grpc[port];
        let within = async |message: Bytes, header| {
            let answer = timeout(patience, call(port, method, message, header)).await;
            answer.unwrap_or_else(|_| panic!("{method} does not answer"))
        };
        for message in malformed {
            let status = within(Bytes::from_static(message), 0).await;
            assert!(
                matches!(status.code(), Code::Internal | Code::InvalidArgument | Code::Unimplemented),
                "{method}: {message:?}: {status:?}"
            );
        }
        let status = within(vec![0x0a; 80 << 20].into(), 0).await;
        assert!(
            matches!(
                status.code(),
                Code::OutOfRange | Code::ResourceExhausted | Code::Unimplemented | Code::Internal
            ),
            "{method}: 80 MiB: {status:?}"
        );
        let status = within(Bytes::new(), 64 << 10).await;
        assert_ne!(status.code(), Code::Ok, "{method}: 64 KiB of headers");
    }
    let body = chat::request(cluster.model(), "What is the capital of France?", 12, false);
    assert!(chat::ask(cluster.url(), &body).await.contains("Paris"));
    cluster.assert_nothing_held().await;
    assert_no_panic(&cluster);
}
