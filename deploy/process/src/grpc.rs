//! A gRPC server as every Baton process runs one: TLS and who may call what, the service's own routes, health
//! (grpc.health.v1), reflection, keep-alive, bounds on what a connection may hold, and a graceful end that a lingering
//! stream cannot hold up.

mod arrivals;

use std::{net::TcpListener, time::Duration};

use tokio::sync::watch;
use tokio_util::{either::Either, sync::CancellationToken};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, health_reporter},
};

use crate::{Health, HealthHandle, ProcessError, Tls, tls::Door};
use arrivals::{Arrivals, BEGINS_WITHIN};

/// Connections at a time, where no more are needed.
pub const CONNECTIONS: usize = 16_384;
/// Frames of one peer in flight; bounds what a slow reader can make us hold.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Calls under way on a connection; what our own processes have is a handful.
const STREAMS_MOST: u32 = 256;
/// Of a call, all together; those of our own have a few hundred.
const HEADER_BYTES_MOST: u32 = 16 << 10;

/// What a gRPC server is made of besides its routes.
#[derive(Debug, Clone)]
pub struct GrpcOptions {
    pub health: HealthHandle,
    /// Full names, as in `baton.v1.Inference`, whose health is the process's.
    pub services: Vec<&'static str>,
    /// Encoded `FileDescriptorSet` for reflection.
    pub descriptors: &'static [u8],
    pub tls: Tls,
    /// Who may call what, where it is TLS.
    pub door: Door,
    pub shutdown: CancellationToken,
    /// How long calls may go on after `shutdown`; those that have not ended then are cut off.
    pub drain: Duration,
    pub keep_alive: KeepAlive,
    /// At a time; of more, each is closed as it comes.
    pub connections: usize,
}

/// When a silent connection is given up, with all its streams (HTTP/2's pings).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive {
    /// A connection that has been silent for so long is asked for a sign of life.
    pub interval: Duration,
    /// It is given up when it has not answered for so long: no less than any peer may pause and be believed alive.
    pub timeout: Duration,
}

impl Default for KeepAlive {
    /// Ten seconds each.
    fn default() -> Self {
        let interval = Duration::from_secs(10);
        Self { interval, timeout: interval }
    }
}

/// Serves until `shutdown`, then lets running calls finish for up to `drain`. The listener comes from
/// [`crate::Listen::bind`].
pub async fn serve(listener: TcpListener, routes: Routes, options: GrpcOptions) -> Result<(), ProcessError> {
    let setup =
        |source: Box<dyn std::error::Error + Send + Sync>| ProcessError::Setup { what: "gRPC", source };
    listener.set_nonblocking(true).map_err(|error| setup(error.into()))?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(|error| setup(error.into()))?;
    let address = listener.local_addr().map_err(|error| setup(error.into()))?;
    tracing::info!(%address, tls = options.tls.is_on(), "gRPC is served");
    let KeepAlive { interval, timeout } = options.keep_alive;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(interval));

    let (reporter, health_service) = health_reporter();
    // Both versions: grpcurl and the Python client still ask in the older one.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(options.descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection_v1 = reflection().build_v1().map_err(|error| setup(error.into()))?;
    let reflection_v1alpha = reflection().build_v1alpha().map_err(|error| setup(error.into()))?;
    let routes =
        routes.add_service(health_service).add_service(reflection_v1).add_service(reflection_v1alpha);
    let routes = options.tls.guarded(routes, options.door);

    let router = Server::builder()
        .http2_keepalive_interval(Some(interval))
        .http2_keepalive_timeout(Some(timeout))
        .max_concurrent_streams(Some(STREAMS_MOST))
        .http2_max_header_list_size(Some(HEADER_BYTES_MOST))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_routes(routes);
    let ended = options.shutdown.clone().cancelled_owned();
    let server = match options.tls.incoming(incoming, options.door) {
        Either::Left(secured) => {
            let arrivals = Arrivals::new(secured, options.connections, BEGINS_WITHIN);
            Either::Left(router.serve_with_incoming_shutdown(arrivals, ended))
        }
        Either::Right(plaintext) => {
            let arrivals = Arrivals::new(plaintext, options.connections, BEGINS_WITHIN);
            Either::Right(router.serve_with_incoming_shutdown(arrivals, ended))
        }
    };
    let cut_off = async {
        options.shutdown.cancelled().await;
        tokio::time::sleep(options.drain).await;
    };
    tokio::select! {
        result = server => result.map_err(ProcessError::Grpc),
        () = mirror(options.health.subscribe(), reporter, &options.services) => Ok(()),
        () = cut_off => {
            // Without a drain nothing was promised any time.
            if !options.drain.is_zero() {
                tracing::warn!(drain = ?options.drain, "some calls did not end in time and are cut off");
            }
            Ok(())
        }
    }
}

/// Keeps gRPC health as the process's own. Never ends while anyone can still change it.
async fn mirror(mut state: watch::Receiver<Health>, reporter: HealthReporter, services: &[&str]) {
    loop {
        let ready = state.borrow_and_update().is_ready();
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in std::iter::once(&"").chain(services) {
            reporter.set_service_status(service, status).await;
        }
        if state.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
