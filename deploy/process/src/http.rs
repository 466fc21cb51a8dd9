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

mod express;

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
    /// Connections at once. When there are as many, the next one has the seat of who came first and has not asked for anything
    /// yet; if all have, it waits until one ends, and more in the kernel's queue.
    pub connections: usize,
    pub closed: Closed,
}

impl Port {
    /// For those who observe a process: few connections at once, in plaintext, as probes speak it.
    pub fn of_observers(router: Router) -> Self {
        Self { router, https: None, connections: OBSERVERS_MOST, closed: Closed::default() }
    }
}

/// Serves until `shutdown`, then lets running requests finish for up to `drain`.
pub async fn serve(
    listener: TcpListener,
    port: Port,
    shutdown: CancellationToken,
    drain: Duration,
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
    // What does not end in time is left to its task, which still tells its client when the process takes its work away.
    if timeout(drain, open.wait()).await.is_err() {
        tracing::warn!(?drain, "some requests did not end in time and are cut off");
    }
    Ok(())
}

/// A connection that was accepted, to its end.
async fn take(stream: TcpStream, port: Port, seat: Seat, shutdown: CancellationToken) {
    let conversation = Conversation { router: port.router, closed: port.closed, seat, shutdown };
    match port.https {
        None => {
            let (connection, express) = express::Connection::new(stream);
            conversation.serve(connection, Some(express)).await;
        }
        Some(https) => {
            if let Some(secured) = https.accept(stream).await {
                conversation.serve(secured, None).await;
            }
        }
    }
}

/// One connection, which has settled with its first request.
struct Conversation {
    router: Router,
    closed: Closed,
    seat: Seat,
    shutdown: CancellationToken,
}

impl Conversation {
    #[cfg(test)]
    fn of_test(router: Router) -> Self {
        let seat = Seats::new("test", 1).take().expect("free");
        Self { router, closed: Closed::default(), seat, shutdown: CancellationToken::new() }
    }

    /// To its end. One that brings no request in time, or nothing for long while no answer is on its way, is closed, whatever
    /// its version of HTTP: it would hold a seat for ever. What is on its way is never cut for that. Requests that are
    /// answered in chunks are told of `express`.
    async fn serve<S>(self, stream: S, express: Option<Express>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Self { router, closed, seat, shutdown } = self;
        let (begun, underway) = (CancellationToken::new(), Underway::default());
        let (mark, answers, service) = (begun.clone(), underway.clone(), TowerToHyperService::new(router));
        let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            mark.cancel();
            seat.settle();
            if let Some(express) = express.as_ref().filter(|_| request.version() == Version::HTTP_11) {
                request.extensions_mut().insert(express.clone());
            }
            let (answer, turn) = (service.call(request), answers.begin());
            async move { answer.await.map(|response| response.map(|body| turn.carry(body))) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(REST_OF_HEAD_TIMEOUT);
        let mut http2 = builder.http2();
        http2.timer(TokioTimer::new()).keep_alive_interval(PING_EVERY).keep_alive_timeout(PING_TIMEOUT);
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
            () = head_is_late => return closed.count(Why::Late),
            () = underway.nothing_for(IDLE_TIMEOUT) => {
                closed.count(Why::Idle);
                connection.as_mut().graceful_shutdown();
                // A request that came at the last moment is still answered.
                tokio::select! {
                    result = connection => result,
                    () = underway.nothing_for(GOODBYE_TIMEOUT) => return,
                }
            }
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::trace!(%error, "a connection broke");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use http::Request;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
        sync::Notify,
        task::JoinHandle,
        time::{Instant, sleep},
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn started(connections: usize) -> (SocketAddr, CancellationToken, JoinHandle<Result<(), ProcessError>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("is bound");
        let router = router(Metrics::new("test"), HealthHandle::default());
        let shutdown = CancellationToken::new();
        let port = Port { connections, ..Port::of_observers(router) };
        let serving = serve(listener, port, shutdown.clone(), PATIENCE);
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

    /// The server's side of a conversation.
    struct Talk {
        closed: Closed,
        task: JoinHandle<()>,
    }

    /// More than HTTP/2 sends to a client that takes nothing.
    const LARGE_BYTES: usize = 1 << 20;

    /// A conversation over memory, so that a paused clock goes on only when nobody has anything to do.
    fn conversation() -> (DuplexStream, Talk, Arc<Notify>) {
        let (client, server) = tokio::io::duplex(64 << 10);
        let asked = Arc::new(Notify::new());
        let never = asked.clone();
        let router = Router::new()
            .route("/at-once", get(async || "done"))
            .route("/late", get(async || sleep(IDLE_TIMEOUT * 5).await))
            .route("/large", get(async || vec![7; LARGE_BYTES]))
            .route(
                "/never",
                get(async move || {
                    never.notify_one();
                    std::future::pending::<()>().await
                }),
            );
        let conversation = Conversation::of_test(router);
        let closed = conversation.closed.clone();
        (client, Talk { closed, task: tokio::spawn(conversation.serve(server, None)) }, asked)
    }

    fn asking(path: &str) -> Request<()> {
        Request::get(format!("http://x{path}")).body(()).expect("a request")
    }

    /// How long until the conversation ends from now on.
    async fn ends(conversation: Talk) -> Duration {
        let since = Instant::now();
        timeout(IDLE_TIMEOUT * 10, conversation.task)
            .await
            .expect("it holds its seat for ever")
            .expect("no panic");
        since.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_client_of_http_1_is_let_go() {
        let (mut client, conversation, _) = conversation();
        client.write_all(b"GET /late HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("is sent");
        let mut answer = [0; 4096];
        let length = client.read(&mut answer).await.expect("is read");
        assert!(answer[..length].starts_with(b"HTTP/1.1 200"), "what is on its way is never cut");
        let closed = conversation.closed.clone();
        let took = ends(conversation).await;
        assert!(took >= IDLE_TIMEOUT && took < IDLE_TIMEOUT * 2, "{took:?}");
        assert_eq!((closed.of(Why::Idle), closed.of(Why::Late)), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_client_of_http_2_is_let_go() {
        let (client, conversation, _) = conversation();
        let (mut sender, connection) = h2::client::handshake(client).await.expect("shakes hands");
        tokio::spawn(connection);
        for path in ["/at-once", "/late", "/at-once"] {
            let (answer, _) = sender.send_request(asking(path), true).expect("is sent");
            let mut body = answer.await.expect("is answered").into_body();
            while let Some(data) = body.data().await {
                data.expect("is not cut");
            }
            sleep(IDLE_TIMEOUT / 2).await;
        }
        let closed = conversation.closed.clone();
        let took = ends(conversation).await;
        assert!(took > Duration::ZERO && took <= IDLE_TIMEOUT, "{took:?}");
        assert_eq!((closed.of(Why::Idle), closed.of(Why::Late)), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_slowly_gets_all() {
        let (client, conversation, _) = conversation();
        let (mut sender, connection) = h2::client::handshake(client).await.expect("shakes hands");
        tokio::spawn(connection);
        let (answer, _) = sender.send_request(asking("/large"), true).expect("is sent");
        let mut body = answer.await.expect("is answered").into_body();
        let (mut read, mut held) = (0, 0);
        while let Some(data) = body.data().await {
            let length = data.expect("is not cut").len();
            (read, held) = (read + length, held + length);
            // Half of what is sent ahead of it.
            if held >= 32 << 10 {
                sleep(IDLE_TIMEOUT / 2).await;
                body.flow_control().release_capacity(std::mem::take(&mut held)).expect("was taken");
            }
        }
        assert_eq!(read, LARGE_BYTES);
        ends(conversation).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_no_ping_is_gone() {
        let (client, conversation, asked) = conversation();
        let (mut sender, connection) = h2::client::handshake(client).await.expect("shakes hands");
        let mut connection = Box::pin(connection);
        let (_answer, _) = sender.send_request(asking("/never"), true).expect("is sent");
        tokio::select! {
            _ = connection.as_mut() => panic!("the connection ended"),
            () = asked.notified() => {}
        }
        let took = ends(conversation).await;
        assert!(took <= (PING_EVERY + PING_TIMEOUT) * 2, "{took:?}");
    }
}
