//! One connection to a gRPC port: until it ends, the port does, or nobody has called on it for long ([`super::KeepAlive`]).
//!
//! It has settled with its first call; but one of a caller who is asked for a certificate and has shown none never does, as any
//! call would do for that, also one that never ends.
//!
//! A connection that is to end is told so (GOAWAY), and calls that are under way go on. One that then has no call and does not
//! leave is cut off.

use std::time::Duration;

use axum::Router;
use http::Request;
use hyper::{
    body::Incoming,
    server::conn::http2,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::KeepAlive;
use crate::{
    seats::{Closed, Seat, Why},
    tls::Caller,
    underway::Underway,
};

/// Frames of one peer in flight; bounds what a slow reader can make us hold.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Calls under way on a connection; what our own processes have is a handful.
const STREAMS_MOST: u32 = 256;
/// Of a call, all together; those of our own have a few hundred.
const HEADER_BYTES_MOST: u32 = 16 << 10;
/// A new connection brings its first call within this time. Our own call at once; others may connect ahead of that.
const CALLS_WITHIN: Duration = Duration::from_secs(20);
/// For a connection without a call that was told to leave. An honest one is gone after a round trip; but the end of its last
/// answer, handed over and not yet sent, may still wait for one that reads slowly.
const LEAVES_WITHIN: Duration = Duration::from_secs(60);
/// For one that has never called.
const STRANGER_LEAVES_WITHIN: Duration = Duration::from_millis(250);

/// How the connections of a port are served.
#[derive(Debug, Clone)]
pub(super) struct Conversation {
    pub(super) router: Router,
    pub(super) keep_alive: KeepAlive,
    pub(super) frame_bytes: u32,
    pub(super) closed: Closed,
    /// When all are to leave.
    pub(super) ended: CancellationToken,
}

impl Conversation {
    pub(super) async fn serve<S>(self, stream: S, caller: Caller, seat: Seat)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Self { router, keep_alive, frame_bytes, closed, ended } = self;
        let KeepAlive { interval, timeout: silent, idle } = keep_alive;
        let (called, calls) = (CancellationToken::new(), Underway::default());
        let (mark, counted, router) = (called.clone(), calls.clone(), TowerToHyperService::new(router));
        let service = service_fn(move |mut request: Request<Incoming>| {
            mark.cancel();
            if caller.is_known() {
                seat.settle();
            }
            caller.introduce(&mut request);
            let (answer, turn) = (router.call(request), counted.begin());
            async move { answer.await.map(|answer| answer.map(|body| turn.carry(body))) }
        });
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(interval)
            .keep_alive_timeout(silent)
            .max_concurrent_streams(STREAMS_MOST)
            .max_header_list_size(HEADER_BYTES_MOST)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(frame_bytes);
        let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
        let unused = async {
            if timeout(CALLS_WITHIN, called.cancelled()).await.is_err() {
                return Why::Late;
            }
            calls.nothing_for(idle).await;
            Why::Idle
        };
        tokio::select! {
            biased;
            // How it ended is nobody's concern: its calls have been told.
            _ = connection.as_mut() => return,
            () = ended.cancelled() => {}
            why = unused => closed.count(why),
        }
        connection.as_mut().graceful_shutdown();
        let left = async {
            if !called.is_cancelled() {
                calls.nothing_for(STRANGER_LEAVES_WITHIN).await;
            }
            // Also for one whose first call came at the last moment.
            if called.is_cancelled() {
                calls.nothing_for(LEAVES_WITHIN).await;
            }
        };
        tokio::select! {
            _ = connection => {}
            () = left => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, sync::Arc};

    use axum::{body::Body, routing::any};
    use h2::client::SendRequest;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::JoinHandle,
        time::{Instant, sleep},
    };

    use super::*;
    use crate::{seats::Seats, tls::Peer};

    /// Longer than HTTP/2's own.
    const FRAME_BYTES: u32 = 48 << 10;

    /// Over memory and with a paused clock: time goes on only when nobody has anything to do.
    struct Conversing {
        closed: Closed,
        ended: CancellationToken,
        seats: Seats,
        task: JoinHandle<()>,
    }

    const WATCH: &str = "/grpc.health.v1.Health/Watch";

    fn conversing(peer: Peer) -> (DuplexStream, Conversing) {
        let (client, server) = duplex(1 << 10);
        let router = Router::new()
            .route("/at-once", any(async || "done"))
            .route("/never", any(async || pending::<()>().await))
            .route(WATCH, any(async || Body::new(NeverEnds)));
        let closed = Closed::default();
        let conversation = Conversation {
            router,
            keep_alive: KeepAlive::default(),
            frame_bytes: FRAME_BYTES,
            closed: closed.clone(),
            ended: CancellationToken::new(),
        };
        let ended = conversation.ended.clone();
        let mut seats = Seats::new("test", 1);
        let seat = seats.take().expect("free");
        let task = tokio::spawn(conversation.serve(server, Caller::of_test(peer), seat));
        (client, Conversing { closed, ended, seats, task })
    }

    #[tokio::test(start_paused = true)]
    async fn the_peer_is_told_how_long_frames_may_be() {
        const MAX_FRAME_SIZE: u16 = 5;
        let (mut stream, _conversing) = conversing(Peer::Plaintext);
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("is sent");
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.expect("settings");
        let mut settings = vec![0; usize::from(head[2])];
        stream.read_exact(&mut settings).await.expect("settings");
        let mut told =
            settings.chunks_exact(6).map(|told| (u16::from_be_bytes([told[0], told[1]]), &told[2..]));
        let frame = told.find(|(which, _)| *which == MAX_FRAME_SIZE).map(|(_, bytes)| bytes);
        assert_eq!(frame, Some(&FRAME_BYTES.to_be_bytes()[..]));
    }

    /// A body of which nothing comes.
    struct NeverEnds;

    impl hyper::body::Body for NeverEnds {
        type Data = axum::body::Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
            std::task::Poll::Pending
        }
    }

    type Requests = SendRequest<axum::body::Bytes>;

    /// A client that answers whatever it is asked, and how its connection ends.
    async fn client(stream: DuplexStream) -> (Requests, JoinHandle<Result<(), h2::Error>>) {
        let (requests, mut connection) = h2::client::handshake(stream).await.expect("shakes hands");
        let mut pings = connection.ping_pong().expect("the first to ask for it");
        tokio::spawn(async move {
            while pings.ping(h2::Ping::opaque()).await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
        });
        (requests, tokio::spawn(connection))
    }

    async fn call(requests: &mut Requests, path: &str) -> h2::RecvStream {
        let request = Request::post(format!("http://x{path}")).body(()).expect("a request");
        let (answer, _) = requests.send_request(request, true).expect("is sent");
        answer.await.expect("is answered").into_body()
    }

    /// How long until it ends from now on.
    async fn ends(task: JoinHandle<()>) -> Duration {
        let since = Instant::now();
        timeout(KeepAlive::default().idle * 10, task)
            .await
            .expect("it keeps its seat for ever")
            .expect("no panic");
        since.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn signs_of_life_are_no_use_of_a_connection() {
        let idle = KeepAlive::default().idle;
        let (stream, conversing) = conversing(Peer::Plaintext);
        let (mut requests, connection) = client(stream).await;
        let _ = call(&mut requests, "/at-once").await;
        sleep(idle / 2).await;
        let _ = call(&mut requests, "/at-once").await;
        let took = ends(conversing.task).await;
        assert!(took >= idle - Duration::from_secs(1) && took < idle + LEAVES_WITHIN, "{took:?}");
        connection.await.expect("no panic").expect("it is told to leave, not cut off");
        assert_eq!((conversing.closed.of(Why::Idle), conversing.closed.of(Why::Late)), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_stands_keeps_its_connection() {
        let (stream, conversing) = conversing(Peer::Plaintext);
        let (mut requests, _connection) = client(stream).await;
        let standing = call(&mut requests, WATCH).await;
        sleep(KeepAlive::default().idle * 5).await;
        assert!(!conversing.task.is_finished());
        drop(standing);
        ends(conversing.task).await;
        assert_eq!(conversing.closed.of(Why::Idle), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_never_calls_is_let_go() {
        // Nothing; half of how HTTP/2 begins; all of it, and neither a call nor a sign of life, for which it is given up as soon.
        let whole = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        for (says, late) in [("", 1), (&whole[..16], 1), (whole, 0)] {
            let (mut stream, conversing) = conversing(Peer::Plaintext);
            stream.write_all(says.as_bytes()).await.expect("is sent");
            let took = ends(conversing.task).await;
            assert!(took < CALLS_WITHIN + STRANGER_LEAVES_WITHIN * 2, "{says:?}: {took:?}");
            let closed = conversing.closed;
            assert_eq!((closed.of(Why::Late), closed.of(Why::Idle)), (late, 0), "{says:?}");
        }
    }

    /// It asks for ever and reads no answer, so that nothing can be written to it, no GOAWAY either.
    #[tokio::test(start_paused = true)]
    async fn who_does_not_listen_is_cut_off() {
        let (mut stream, conversing) = conversing(Peer::Plaintext);
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("is sent");
        let pings = async { while stream.write_all(b"\0\0\x08\x06\0\0\0\0\0ABCDEFGH").await.is_ok() {} };
        let (took, ()) = tokio::join!(ends(conversing.task), pings);
        assert!(took <= CALLS_WITHIN + STRANGER_LEAVES_WITHIN * 2, "{took:?}");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn when_the_port_ends_calls_go_on_and_others_leave() {
        let (stream, conversing) = conversing(Peer::Plaintext);
        let (mut requests, _connection) = client(stream).await;
        let standing = call(&mut requests, WATCH).await;
        conversing.ended.cancel();
        sleep(LEAVES_WITHIN * 5).await;
        assert!(!conversing.task.is_finished(), "a call is cut");
        drop(standing);
        assert!(ends(conversing.task).await <= LEAVES_WITHIN);

        let (_silent, conversing) = super::tests::conversing(Peer::Plaintext);
        conversing.ended.cancel();
        assert!(ends(conversing.task).await <= STRANGER_LEAVES_WITHIN);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_settles_who_is_known() {
        let identity = "spiffe://test/baton/server/a".parse().expect("good");
        let named = Peer::Named(Arc::new(identity));
        let nameless = Peer::Nameless("no certificate was shown".into());
        for (peer, settles) in [(Peer::Plaintext, true), (named, true), (nameless, false)] {
            let (stream, mut conversing) = conversing(peer.clone());
            let (mut requests, _connection) = client(stream).await;
            let request = Request::post("http://x/never").body(()).expect("a request");
            let (_answer, _body) = requests.send_request(request, false).expect("is sent");
            sleep(Duration::from_secs(5)).await;
            assert_eq!(conversing.seats.take().is_none(), settles, "{peer}");
        }
    }
}
