//! A gRPC server as every Baton process runs one: TLS and who may call what, the service's own routes, health
//! (grpc.health.v1), reflection, keep-alive, bounds on what a connection may hold, and a graceful end that a lingering
//! stream cannot hold up.

mod connection;

use std::{net::TcpListener, time::Duration};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, health_reporter},
};

use crate::{
    Health, HealthHandle, ProcessError, Tls,
    seats::{Closed, Seats, Why, accept},
    tls::Door,
};
use connection::Conversation;

/// Connections at a time, where no more are needed.
pub const CONNECTIONS: usize = 16_384;

/// Bytes of a frame, where no longer ones are needed: the least that HTTP/2 has.
pub const FRAME_BYTES: u32 = 16 << 10;

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
    /// At a time. When there are as many, the next one has the seat of who came first and has not called yet; if all have, it
    /// is closed as it comes.
    pub connections: usize,
    /// Most bytes of a frame. Whoever sends it makes a system call for each; whoever it is sent to holds it until it is whole,
    /// whoever may have sent it.
    pub frame_bytes: u32,
    pub closed: Closed,
}

/// When a silent connection is given up, with all its streams (HTTP/2's pings), and when one on which nobody calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive {
    /// A connection that has been silent for so long is asked for a sign of life.
    pub interval: Duration,
    /// It is given up when it has not answered for so long: no less than any peer may pause and be believed alive.
    pub timeout: Duration,
    /// A connection that has had no call for so long is let go, as it keeps its place among all that there may be. A call
    /// counts from its head to the last of its answer; pings, settings, and what is no whole head of a call count for nothing.
    /// Whoever is let go so is told (GOAWAY) and connects anew with its next call, as gRPC clients do by themselves; a call that
    /// is begun just then may have to be made again.
    pub idle: Duration,
}

impl Default for KeepAlive {
    /// Ten seconds each, and five minutes.
    fn default() -> Self {
        let interval = Duration::from_secs(10);
        Self { interval, timeout: interval, idle: Duration::from_secs(300) }
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
    let router = options.tls.guarded(routes.into_axum_router(), options.door).with_state(());
    let conversation = Conversation {
        router,
        keep_alive: options.keep_alive,
        frame_bytes: options.frame_bytes,
        closed: options.closed.clone(),
        ended: options.shutdown.clone(),
    };
    let server = take_in(listener, &options, conversation);
    let cut_off = async {
        options.shutdown.cancelled().await;
        tokio::time::sleep(options.drain).await;
    };
    tokio::select! {
        () = server => Ok(()),
        () = mirror(options.health.subscribe(), reporter, &options.services) => Ok(()),
        () = cut_off => {
            // Without a drain nothing was promised any time.
            if !options.drain.is_zero() {
                tracing::warn!(drain = ?options.drain, "some connections did not end in time and are cut off");
            }
            Ok(())
        }
    }
}

/// Takes connections in until the end, and waits until all have ended, which nothing bounds here.
async fn take_in(listener: tokio::net::TcpListener, options: &GrpcOptions, conversation: Conversation) {
    let (open, mut seats) = (TaskTracker::new(), Seats::new("gRPC", options.connections));
    while let Some((stream, from)) = options.shutdown.run_until_cancelled(accept(&listener)).await {
        let Some(seat) = seats.take() else {
            options.closed.count(Why::Crowded);
            continue;
        };
        let (tls, door, conversation) = (options.tls.clone(), options.door, conversation.clone());
        open.spawn(async move {
            let closed = conversation.closed.clone();
            let conversing = async {
                // Who is still shaking hands when the port ends has asked for nothing.
                let accepted = conversation.ended.run_until_cancelled(tls.accept(stream, from, door)).await;
                if let Some((stream, caller)) = accepted.flatten() {
                    conversation.serve(stream, caller, seat.clone()).await;
                }
            };
            tokio::select! {
                () = conversing => {}
                () = seat.given_away() => closed.count(Why::Stranger),
            }
        });
    }
    // With it the port is closed: nobody waits there for what does not come.
    drop(listener);
    open.close();
    open.wait().await;
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
