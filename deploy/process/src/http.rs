//! HTTP as every Baton process has it: `/metrics`, `/health` (the process answers) and `/readiness` (it can do its
//! work), and a server with a graceful end. The coordinator merges its API into the same router.

use std::{net::TcpListener, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use hyper::service::{Service, service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde::Serialize;
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{HealthHandle, Metrics, ProcessError, metrics};

/// Connections of those who only observe a process.
const OBSERVERS_MOST: usize = 256;
/// A new connection brings the head of a request within this time, or is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Between one request and the next, longer than clients and proxies commonly keep connections for later.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// After a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The routes by which a process is observed.
pub fn router(metrics: Metrics, health: HealthHandle) -> Router {
    let metrics = get(async move || ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics.render()));
    Router::new()
        .route("/metrics", metrics)
        .route("/health", get(async || Json(Status { status: "ok".to_owned() })))
        .route("/readiness", get(readiness).with_state(health))
}

#[derive(Serialize)]
struct Status {
    status: String,
}

async fn readiness(State(health): State<HealthHandle>) -> impl IntoResponse {
    let state = health.get();
    let code = if health.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Status { status: state.describe().to_owned() }))
}

/// Serves until `shutdown`, then lets running requests finish for up to `drain`. For those who observe a process: few
/// connections at once.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
    drain: Duration,
) -> Result<(), ProcessError> {
    serve_many(listener, router, OBSERVERS_MOST, shutdown, drain).await
}

/// The same for up to `connections` at once; more wait in the kernel's queue until one ends.
pub async fn serve_many(
    listener: TcpListener,
    router: Router,
    connections: usize,
    shutdown: CancellationToken,
    drain: Duration,
) -> Result<(), ProcessError> {
    listener.set_nonblocking(true).map_err(ProcessError::Http)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ProcessError::Http)?;
    let seats = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
    let open = TaskTracker::new();
    loop {
        let accepted = async { (seats.clone().acquire_owned().await, listener.accept().await) };
        let (seat, accepted) = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (router, shutdown) = (router.clone(), shutdown.clone());
                open.spawn(async move {
                    let _seat = seat;
                    converse(stream, router, shutdown).await;
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: accepting again at once would only spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    drop(listener);
    open.close();
    // What does not end in time is left to its task, which still tells its client when the process takes its work away.
    if timeout(drain, open.wait()).await.is_err() {
        tracing::warn!(?drain, "some requests did not end in time and are cut off");
    }
    Ok(())
}

/// One connection, to its end. One that brings no request in time, or nothing between two, is closed.
async fn converse(stream: TcpStream, router: Router, shutdown: CancellationToken) {
    // Tokens are small and must leave at once; a socket that refuses is slow, not broken.
    let _ = stream.set_nodelay(true);
    let begun = CancellationToken::new();
    let (mark, service) = (begun.clone(), TowerToHyperService::new(router));
    let service = service_fn(move |request| {
        mark.cancel();
        service.call(request)
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
    builder.http2().timer(TokioTimer::new());
    let mut connection =
        std::pin::pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let head_is_late = async {
        if timeout(HEAD_TIMEOUT, begun.cancelled()).await.is_ok() {
            std::future::pending::<()>().await;
        }
    };
    let result = tokio::select! {
        biased;
        result = connection.as_mut() => result,
        () = head_is_late => return,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::trace!(%error, "a connection broke");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        task::JoinHandle,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn started(connections: usize) -> (SocketAddr, CancellationToken, JoinHandle<Result<(), ProcessError>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("is bound");
        let router = router(Metrics::new("test"), HealthHandle::default());
        let shutdown = CancellationToken::new();
        let serving = serve_many(listener, router, connections, shutdown.clone(), PATIENCE);
        (address, shutdown, tokio::spawn(serving))
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("is sent");
        let mut answer = vec![0; 4096];
        let length = timeout(PATIENCE, stream.read(&mut answer)).await.expect("in time").expect("is read");
        String::from_utf8_lossy(&answer[..length]).into_owned()
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_wait_and_idle_ones_end_with_the_process() {
        let (address, shutdown, serving) = started(1);
        let mut first = TcpStream::connect(address).await.expect("connects");
        assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
        let mut second = TcpStream::connect(address).await.expect("the kernel takes it");
        let mut asked = Box::pin(ask(&mut second));
        assert!(timeout(Duration::from_millis(100), &mut asked).await.is_err(), "the only seat is taken");
        drop(first);
        assert!(asked.await.starts_with("HTTP/1.1 200"));
        shutdown.cancel();
        timeout(PATIENCE, serving).await.expect("ends").expect("no panic").expect("ends well");
        assert_eq!(second.read(&mut [0; 16]).await.expect("is closed"), 0);
    }

    #[tokio::test]
    async fn a_connection_that_brings_no_whole_head_is_closed() {
        let (address, _shutdown, _serving) = started(4);
        // Nothing; what may become HTTP/2; the half of a head.
        let all = ["", "PRI * HT", "GET /health HTTP/1.1\r\nhost"].map(|said| async move {
            let mut stream = TcpStream::connect(address).await.expect("connects");
            stream.write_all(said.as_bytes()).await.expect("is sent");
            let mut answer = Vec::new();
            let closed = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
            closed.unwrap_or_else(|_| panic!("{said:?} holds its connection")).is_ok()
        });
        let [a, b, c] = all;
        assert_eq!(tokio::join!(a, b, c), (true, true, true));
    }
}
