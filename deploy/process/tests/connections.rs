//! Connections to a gRPC port, over real sockets: clients that were let go connect anew by themselves, and one more than there may
//! be is closed.

use std::{net::SocketAddr, time::Duration};

use baton_process::{
    Closed, HealthHandle, Metrics, Tls,
    grpc::{self, GrpcOptions, KeepAlive},
    tls::Door,
};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    service::Routes,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Longer than anything here takes; shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(20);
/// In place of minutes.
const IDLE: Duration = Duration::from_millis(300);

struct Port {
    address: SocketAddr,
    metrics: Metrics,
    _stop: DropGuard,
}

impl Port {
    fn open(connections: usize) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (metrics, stop) = (Metrics::new("test"), CancellationToken::new());
        let options = GrpcOptions {
            health: HealthHandle::default(),
            services: Vec::new(),
            descriptors: baton_proto::FILE_DESCRIPTOR_SET,
            tls: Tls::plaintext(),
            door: Door::default(),
            shutdown: stop.clone(),
            drain: Duration::ZERO,
            keep_alive: KeepAlive { idle: IDLE, ..KeepAlive::default() },
            connections,
            frame_bytes: grpc::FRAME_BYTES,
            closed: Closed::of_grpc(&metrics),
        };
        tokio::spawn(grpc::serve(listener, Routes::default(), options));
        Self { address, metrics, _stop: stop.drop_guard() }
    }

    fn client(&self) -> HealthClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("an address");
        HealthClient::new(endpoint.connect_lazy())
    }

    async fn has_closed(&self, why: &str, count: usize) {
        let line = format!("baton_grpc_closed_total{{why=\"{why}\"}} {count}\n");
        let begun = Instant::now();
        while !self.metrics.render().contains(&line) {
            assert!(begun.elapsed() < PATIENCE, "never {line}{}", self.metrics.render());
            sleep(IDLE / 20).await;
        }
    }
}

#[tokio::test]
async fn who_was_let_go_connects_anew_with_its_next_call() {
    let port = Port::open(2);
    let mut client = port.client();
    for idle in 1..4 {
        // A call of the very moment may have to be made again.
        let served = async {
            while client.check(HealthCheckRequest::default()).await.is_err() {
                sleep(IDLE / 20).await;
            }
        };
        timeout(PATIENCE, served).await.expect("is served");
        port.has_closed("idle", idle).await;
    }
}

#[tokio::test]
async fn when_all_have_called_one_more_is_closed() {
    let port = Port::open(1);
    let mut watched =
        port.client().watch(HealthCheckRequest::default()).await.expect("a stream").into_inner();
    watched.message().await.expect("a status");
    let mut stream = TcpStream::connect(port.address).await.expect("it listens");
    let read = timeout(PATIENCE, stream.read(&mut [0])).await.expect("it is closed");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    port.has_closed("crowded", 1).await;
    let silent = timeout(IDLE * 3, watched.message()).await;
    assert!(silent.is_err(), "the stream goes on, and there is nothing new: {silent:?}");
}
