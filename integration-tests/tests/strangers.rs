//! What strangers can do to a port that they reach: say nothing, say it slowly, say too much, or say what is no message. Each
//! is turned away in bounded time, and others are served meanwhile.

use std::time::{Duration, Instant};

use baton_integration_tests::{Cluster, chat, process};
use bytes::{Buf as _, BufMut as _, Bytes};
use futures::future::join_all;
use http::uri::PathAndQuery;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::MetadataValue,
    transport::Endpoint,
};

/// HTTP/2's first bytes, and settings without any.
const HTTP_2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// By then whoever does not get on is turned away: twenty seconds for a first call or signs of life, and five to leave; a busy
/// machine's delay comes on top.
const TURNED_AWAY_WITHIN: Duration = Duration::from_secs(35);

/// How a connection goes on after its first bytes.
#[derive(Debug, Clone, Copy)]
enum Then {
    Silence,
    /// One more byte of this every second.
    Drip(u8),
}

/// Connects and says this; how long it took until the port hung up.
async fn turned_away(address: &str, first: &[u8], then: Then) -> Duration {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(first).await.expect("it is open");
    let began = Instant::now();
    let mut said = [0; 1 << 12];
    loop {
        assert!(began.elapsed() < TURNED_AWAY_WITHIN, "{address}: {first:?}, {then:?}: it is still open");
        match tokio::time::timeout(Duration::from_secs(1), stream.read(&mut said)).await {
            Ok(Ok(0) | Err(_)) => return began.elapsed(),
            Ok(Ok(_)) => {}
            Err(_) => {
                if let Then::Drip(byte) = then {
                    // That it is closed is seen by reading.
                    let _ = stream.write_all(&[byte]).await;
                }
            }
        }
    }
}

/// The ports of a cluster that speak gRPC, and that of the OpenAI API.
struct Ports {
    grpc: Vec<String>,
    http: String,
}

impl Ports {
    async fn of(cluster: &Cluster) -> Self {
        let instances = cluster.ctl("instances").await;
        let server = instances[0]["inference_endpoint"].as_str().expect("an endpoint").to_owned();
        Self {
            grpc: vec![cluster.controller().to_owned(), cluster.coordinator().to_owned(), server],
            http: cluster.url().trim_start_matches("http://").to_owned(),
        }
    }
}

#[tokio::test]
async fn who_is_slow_or_makes_no_sense_is_turned_away_and_keeps_nobody_out() {
    let cluster = Cluster::start(&[]).await;
    let ports = Ports::of(&cluster).await;
    let garbage: Vec<u8> = (0..2000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    // A frame of headers that is announced to be longer than what comes of it.
    let unfinished = [HTTP_2, b"\0\x01\0\x01\x04\0\0\0\x01"].concat();
    // A frame of 16 MiB, which nobody has allowed.
    let enormous = [HTTP_2, b"\xff\xff\xff\0\0\0\0\0\x01"].concat();
    // Settings, though there is no stream of that number.
    let wrong = [HTTP_2, b"\0\0\0\x04\0\0\0\0\x05"].concat();
    let grpc = [
        (&b""[..], Then::Silence),
        (b"P", Then::Drip(b'R')),
        (&garbage, Then::Silence),
        (&unfinished, Then::Drip(0)),
        (&enormous, Then::Silence),
        (&wrong, Then::Silence),
    ];
    let http = [
        (&b""[..], Then::Silence),
        (b"GET / HTTP/1.1\r\nx: ", Then::Drip(b'a')),
        (&garbage, Then::Silence),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n", Then::Silence),
        (&unfinished, Then::Drip(0)),
    ];
    let everyone = async {
        let mut strangers = Vec::new();
        for (port, cases) in ports.grpc.iter().map(|port| (port, &grpc[..])).chain([(&ports.http, &http[..])])
        {
            for (first, then) in cases {
                // Many of each, so that what one of them holds would be missed.
                strangers.extend((0..20).map(|_| turned_away(port, first, *then)));
            }
        }
        join_all(strangers).await
    };
    let body = chat::request(cluster.model(), "What is the capital of France?", 12, false);
    let honest = async {
        let began = Instant::now();
        let mut asked = 0;
        while began.elapsed() < Duration::from_secs(12) || asked < 6 {
            assert!(chat::ask(cluster.url(), &body).await.contains("Paris"));
            assert_eq!(cluster.ctl("roles").await.len(), 2);
            asked += 1;
        }
        asked
    };
    let (took, asked) = tokio::join!(everyone, honest);
    let longest = took.iter().max().expect("there were some");
    println!(
        "{} connections turned away after {longest:?} at most, {asked} requests beside them",
        took.len()
    );
    cluster.assert_nothing_held().await;
    assert_no_panic(&cluster);
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
    let cluster = Cluster::start(&[]).await;
    let ports = Ports::of(&cluster).await;
    // A field of two gigabytes that never comes; groups that are never closed.
    let malformed: [&[u8]; 2] = [b"\x0a\xff\xff\xff\xff\x07", b"\x0b\x0b\x0b"];
    let patience = Duration::from_secs(30);
    for (port, method) in METHODS {
        let port = &ports.grpc[port];
        let within = async |message: Bytes, header| {
            let answer = tokio::time::timeout(patience, call(port, method, message, header)).await;
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
