//! HTTP as every Baton process has it: `/metrics`, `/health` (the process answers) and `/readiness` (it can do its
//! work), and a server with a graceful end, in plaintext or by TLS. The coordinator merges its API into the same router.

use std::{net::TcpListener, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, Version, header::CONTENT_TYPE},
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
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    HealthHandle, Metrics, ProcessError, metrics,
    seats::{Closed, Seat, Seats, Why, accept},
    tls::Https,
    underway::Underway,
};

pub use express::{CHUNK_HEAD, Express, Sent};

pub(crate) mod express;

/// Connections of those who only observe a process.
const OBSERVERS_MOST: usize = 256;
/// A new connection brings the head of a request within this time, or is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Between one request and the next, longer than clients and proxies commonly keep connections for later.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// The half of a head is waited for as long, and so is the next one: a little longer, so that it is told which it was.
const REST_OF_HEAD_TIMEOUT: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(1));
/// For a connection that is let go to close. At once, mostly; but the end of the last answer, handed over and not yet
/// sent, may still wait for a client that reads slowly.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(300);
/// Whoever has sent all and says so is answered if that takes no longer; an answer that takes longer is not made for nobody.
const LEFT_PATIENCE: Duration = Duration::from_millis(20);
/// A silent HTTP/2 client is asked this often whether it is still there.
const PING_EVERY: Duration = Duration::from_secs(30);
/// And must answer within this time, which is long: many a client answers only while it reads.
const PING_TIMEOUT: Duration = Duration::from_secs(120);

/// The routes by which a process is observed.
pub fn router(metrics: Metrics, health: HealthHandle) -> Router {
    let metrics = get(async move || ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics.render()));
    probes(health).route("/metrics", metrics)
}

/// Of these, the ones by which it is found out whether to send anything here.
pub fn probes(health: HealthHandle) -> Router {
    Router::new()
        .route("/health", get(async || Json(Status { status: "ok".to_owned() })))
        .route("/readiness", get(readiness).with_state(health))
}

#[derive(Serialize)]
struct Status {
    status: String,
}

async fn readiness(State(health): State<HealthHandle>) -> impl IntoResponse {
    let state = health.get();
    let code = if state.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Status { status: state.describe().to_owned() }))
}

/// What a port offers.
#[derive(Debug, Clone)]
pub struct Port {
    pub router: Router,
    /// How clients are spoken to; none = in plaintext.
    pub https: Option<Https>,
    /// Connections at once. When there are as many, the next one has the seat of who came first and has not settled yet; if all
    /// have, it waits until one ends, and more in the kernel's queue.
    pub connections: usize,
    pub settles: Settles,
    pub closed: Closed,
}

/// When a connection has its seat for good.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Settles {
    /// With its first request.
    #[default]
    Asked,
    /// When who serves says that a request is somebody's: each has its [`Stranger`] among its extensions.
    Known,
}

/// The connection of a request of nobody knows whom.
#[derive(Debug, Clone)]
pub struct Stranger(Seat);

impl Stranger {
    /// It is known who asks: the connection has its seat for good.
    pub fn settle(&self) {
        self.0.settle();
    }
}

impl Port {
    /// For those who observe a process: few connections at once, in plaintext, as probes speak it.
    pub fn of_observers(router: Router) -> Self {
        let (settles, closed) = (Settles::default(), Closed::default());
        Self { router, https: None, connections: OBSERVERS_MOST, settles, closed }
    }
}

/// Serves until `shutdown`, then lets running requests finish for up to `drain`.
pub async fn serve(
    listener: TcpListener,
    port: Port,
    shutdown: CancellationToken,
    drain: Duration,
) -> Result<(), ProcessError> {
    serve_and_cut(listener, port, shutdown, drain, || {}, Duration::ZERO).await
}

/// The same; requests that have not finished by then are `cut`: whoever serves them ends them, and they have `last_words` to tell
/// their clients.
pub async fn serve_and_cut(
    listener: TcpListener,
    port: Port,
    shutdown: CancellationToken,
    drain: Duration,
    cut: impl FnOnce(),
    last_words: Duration,
) -> Result<(), ProcessError> {
    listener.set_nonblocking(true).map_err(ProcessError::Http)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ProcessError::Http)?;
    let (open, mut seats) = (TaskTracker::new(), Seats::new("HTTP", port.connections));
    loop {
        let arrived = async { (accept(&listener).await.0, seats.wait().await) };
        let Some((stream, seat)) = shutdown.run_until_cancelled(arrived).await else { break };
        let (port, shutdown) = (port.clone(), shutdown.clone());
        open.spawn(async move {
            let closed = port.closed.clone();
            tokio::select! {
                () = take(stream, port, seat.clone(), shutdown) => {}
                () = seat.given_away() => closed.count(Why::Stranger),
            }
        });
    }
    drop(listener);
    open.close();
    if timeout(drain, open.wait()).await.is_err() {
        tracing::warn!(?drain, "some requests did not end in time and are cut off");
        cut();
        // Who does not read by then what they are told goes without.
        let _ = timeout(last_words, open.wait()).await;
    }
    Ok(())
}

/// A connection that was accepted, to its end.
async fn take(stream: TcpStream, port: Port, seat: Seat, shutdown: CancellationToken) {
    let Port { router, settles, closed, .. } = port;
    let conversation = Conversation { router, settles, closed, seat, shutdown };
    match port.https {
        None => {
            let (connection, express) = express::Connection::new(stream);
            let left = connection.left();
            conversation.serve(connection, Some(express), left).await;
        }
        Some(https) => {
            if let Some(secured) = https.accept(stream).await {
                let left = secured.get_ref().0.left();
                conversation.serve(secured, None, left).await;
            }
        }
    }
}

/// One connection.
struct Conversation {
    router: Router,
    settles: Settles,
    closed: Closed,
    seat: Seat,
    shutdown: CancellationToken,
}

impl Conversation {
    #[cfg(test)]
    fn of_test(router: Router) -> Self {
        let seat = Seats::new("test", 1).take().expect("free");
        let (settles, closed) = (Settles::default(), Closed::default());
        Self { router, settles, closed, seat, shutdown: CancellationToken::new() }
    }

    /// To its end. One that brings no request in time, or nothing for long while no answer is on its way, is closed, whatever
    /// its version of HTTP: it would hold a seat for ever. What is on its way is never cut for that, only once its client has
    /// `left`. Requests that are answered in chunks are told of `express`.
    async fn serve<S>(self, stream: S, express: Option<Express>, left: impl Future<Output = ()>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Self { router, settles, closed, seat, shutdown } = self;
        let (begun, underway) = (CancellationToken::new(), Underway::default());
        let (mark, answers, service) = (begun.clone(), underway.clone(), TowerToHyperService::new(router));
        let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            mark.cancel();
            match settles {
                Settles::Asked => seat.settle(),
                Settles::Known => _ = request.extensions_mut().insert(Stranger(seat.clone())),
            }
            if let Some(express) = express.as_ref().filter(|_| request.version() == Version::HTTP_11) {
                request.extensions_mut().insert(express.clone());
            }
            let (answer, turn) = (service.call(request), answers.begin());
            async move { answer.await.map(|response| response.map(|body| turn.carry(body))) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        let mut http1 = builder.http1();
        http1.timer(TokioTimer::new()).header_read_timeout(REST_OF_HEAD_TIMEOUT);
        // When a client has left is for `left` to say: hyper looks for that only while it has nothing else of what it sends, and
        // does not even answer what it has.
        http1.half_close(true);
        let mut http2 = builder.http2();
        http2.timer(TokioTimer::new()).keep_alive_interval(PING_EVERY).keep_alive_timeout(PING_TIMEOUT);
        let mut connection =
            std::pin::pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        let head_is_late = async {
            if timeout(HEAD_TIMEOUT, begun.cancelled()).await.is_ok() {
                std::future::pending::<()>().await;
            }
        };
        let nobody_hears = async {
            left.await;
            underway.same_for(LEFT_PATIENCE).await;
        };
        let mut nobody_hears = std::pin::pin!(nobody_hears);
        let result = tokio::select! {
            biased;
            result = connection.as_mut() => result,
            () = nobody_hears.as_mut() => return,
            () = head_is_late => return closed.count(Why::Late),
            () = underway.nothing_for(IDLE_TIMEOUT) => {
                closed.count(Why::Idle);
                connection.as_mut().graceful_shutdown();
                // A request that came at the last moment is still answered.
                tokio::select! {
                    result = connection => result,
                    () = nobody_hears => return,
                    () = underway.nothing_for(GOODBYE_TIMEOUT) => return,
                }
            }
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    biased;
                    result = connection => result,
                    () = nobody_hears => return,
                }
            }
        };
        if let Err(error) = result {
            tracing::trace!(%error, "a connection broke");
        }
    }
}

#[cfg(test)]
mod tests;
