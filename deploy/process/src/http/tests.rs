//! Whole conversations, over sockets and over memory: who is served, who waits, and who is let go.

use std::{net::SocketAddr, sync::Arc};

use axum::Extension;
use http::Request;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep},
};

use super::*;
use crate::seats::SETTLES_WITHIN;

const PATIENCE: Duration = Duration::from_secs(30);

fn started(connections: usize) -> (SocketAddr, CancellationToken, JoinHandle<Result<(), ProcessError>>) {
    let router = router(Metrics::new("test"), HealthHandle::default());
    serving(Port { connections, ..Port::of_observers(router) })
}

fn serving(port: Port) -> (SocketAddr, CancellationToken, JoinHandle<Result<(), ProcessError>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("is bound");
    let shutdown = CancellationToken::new();
    let serving = serve(listener, port, shutdown.clone(), PATIENCE);
    (address, shutdown, tokio::spawn(serving))
}

async fn ask(stream: &mut TcpStream) -> String {
    ask_for("/health", stream).await
}

async fn ask_for(path: &str, stream: &mut TcpStream) -> String {
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("is sent");
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
async fn who_has_asked_and_is_not_known_gives_way_where_that_counts() {
    let of_somebody = get(async |stranger: Extension<Stranger>| stranger.settle());
    let router = Router::new().route("/known", of_somebody).route("/open", get(async || "anybody"));
    let closed = Closed::default();
    let port = Port {
        connections: 1,
        settles: Settles::Known,
        closed: closed.clone(),
        ..Port::of_observers(router)
    };
    let (address, _shutdown, _serving) = serving(port);
    let mut stranger = TcpStream::connect(address).await.expect("connects");
    assert!(ask_for("/open", &mut stranger).await.starts_with("HTTP/1.1 200"), "served, as there is room");
    let mut known = TcpStream::connect(address).await.expect("the kernel takes it");
    assert!(ask_for("/known", &mut known).await.starts_with("HTTP/1.1 200"), "and lets the next one in");
    assert_eq!(stranger.read(&mut [0; 16]).await.unwrap_or(0), 0, "is closed");
    assert_eq!(closed.of(Why::Stranger), 1);
    let mut next = TcpStream::connect(address).await.expect("the kernel takes it");
    let asked = timeout(SETTLES_WITHIN * 2, ask_for("/known", &mut next)).await;
    assert!(asked.is_err(), "who is known stays");
    assert!(ask_for("/open", &mut known).await.starts_with("HTTP/1.1 200"));
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

#[tokio::test]
async fn what_is_answered_at_once_is_answered_to_whoever_has_said_all() {
    const REQUESTS: usize = 100;
    let (address, _shutdown, _serving) = started(1);
    for requests in [1, REQUESTS] {
        let mut stream = TcpStream::connect(address).await.expect("connects");
        let asked = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n".repeat(requests);
        stream.write_all(asked.as_bytes()).await.expect("is sent");
        stream.shutdown().await.expect("ends its side");
        let mut answers = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answers)).await.expect("in time").expect("is read");
        assert_eq!(answers.matches("HTTP/1.1 200").count(), requests);
    }
}

#[tokio::test]
async fn a_client_that_has_left_is_missed_and_one_that_only_sends_more_is_not() {
    let (asked, dropped) = (Arc::new(Notify::new()), CancellationToken::new());
    let (begun, held) = (asked.clone(), dropped.clone());
    let never = get(async move || {
        let _held = held.drop_guard();
        begun.notify_one();
        std::future::pending::<()>().await
    });
    let (address, _shutdown, _serving) = serving(Port::of_observers(Router::new().route("/never", never)));
    let mut stream = TcpStream::connect(address).await.expect("connects");
    stream.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n\r\n").await.expect("is sent");
    asked.notified().await;
    for _ in 0..3 {
        stream.write_all(b"GET /never").await.expect("is sent");
        assert!(timeout(LEFT_PATIENCE * 3, dropped.cancelled()).await.is_err(), "it is still there");
    }
    drop(stream);
    timeout(PATIENCE, dropped.cancelled()).await.expect("nobody misses it");
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
    (
        client,
        Talk { closed, task: tokio::spawn(conversation.serve(server, None, std::future::pending())) },
        asked,
    )
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
