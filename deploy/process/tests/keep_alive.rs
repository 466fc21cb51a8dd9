//! Silent connections over real HTTP/2: a client behind a proxy that stops to pass anything on for a while, as a paused
//! process or a network that drops everything does. The client knows nothing of it and asks for no sign of life itself.

use std::{net::SocketAddr, time::Duration};

use baton_process::{
    Closed, HealthHandle, Tls,
    grpc::{self, GrpcOptions, KeepAlive},
    tls::Door,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, service::Routes, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

/// Longer than anything here takes; shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(50);
/// A timeout that is short, one that is long, and a silence between them.
const SHORT: Duration = Duration::from_millis(500);
const SILENCE: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(30);

/// A server whose health is the test's to set, and a stream of it that was opened through a proxy.
struct Watched {
    health: HealthHandle,
    stream: Streaming<HealthCheckResponse>,
    silent: watch::Sender<bool>,
    _stop: tokio_util::sync::DropGuard,
}

impl Watched {
    async fn with(timeout: Duration) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = listener.local_addr().expect("an address");
        let (health, stop) = (HealthHandle::default(), CancellationToken::new());
        let options = GrpcOptions {
            health: health.clone(),
            services: Vec::new(),
            descriptors: baton_proto::FILE_DESCRIPTOR_SET,
            tls: Tls::plaintext(),
            door: Door::default(),
            shutdown: stop.clone(),
            drain: Duration::ZERO,
            keep_alive: KeepAlive { interval: INTERVAL, timeout, ..KeepAlive::default() },
            connections: grpc::CONNECTIONS,
            frame_bytes: grpc::FRAME_BYTES,
            closed: Closed::default(),
        };
        tokio::spawn(grpc::serve(listener, Routes::default(), options));
        let (silent, proxy) = proxy(server).await;
        let channel = Channel::from_shared(format!("http://{proxy}")).expect("an address");
        let mut client = HealthClient::new(channel.connect().await.expect("it listens"));
        let stream = client.watch(HealthCheckRequest::default()).await.expect("a stream").into_inner();
        let mut this = Self { health, stream, silent, _stop: stop.drop_guard() };
        while this.next().await.expect("a status") != ServingStatus::NotServing {}
        this
    }

    async fn next(&mut self) -> Result<ServingStatus, Status> {
        let next = tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("something in time");
        Ok(next?.ok_or_else(|| Status::cancelled("the stream ended"))?.status())
    }

    /// Nothing passes for a while; then the server has something to say.
    async fn after_silence(mut self) -> Result<ServingStatus, Status> {
        self.silent.send_replace(true);
        tokio::time::sleep(SILENCE).await;
        self.silent.send_replace(false);
        self.health.set_ready();
        self.next().await
    }
}

/// A proxy of one connection, and what makes it pass nothing on.
async fn proxy(server: SocketAddr) -> (watch::Sender<bool>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (silent, seen) = watch::channel(false);
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("a client");
        let server = TcpStream::connect(server).await.expect("it listens");
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let there = pass(from_client, to_server, seen.clone());
        tokio::join!(there, pass(from_server, to_client, seen))
    });
    (silent, address)
}

/// Passes on what comes, unless it is to be silent, until either side ends.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    silent: watch::Receiver<bool>,
) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        let heard = silent.clone().wait_for(|silent| !silent).await.is_ok();
        if !heard || to.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    // Who has read all of it learns that no more comes; an error means that nobody reads.
    let _ = to.shutdown().await;
}

#[tokio::test]
async fn a_peer_that_is_silent_for_less_than_the_timeout_keeps_its_stream() {
    let watched = Watched::with(LONG).await;
    let status = watched.after_silence().await.expect("the stream is kept");
    assert_eq!(status, ServingStatus::Serving);
}

#[tokio::test]
async fn a_peer_that_is_silent_for_longer_is_cut_off() {
    let watched = Watched::with(SHORT).await;
    watched.after_silence().await.expect_err("the stream is cut");
}
