//! Pieces on both ways, through a real socket with little room.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    routing::get,
};
use futures::{Stream, task::AtomicWaker};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    time::{sleep, timeout},
};

use super::*;
use crate::http::Conversation;

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_chunk_has_its_length_before_it() {
    for length in [1, 9, 15, 16, 255, 4096, 0x12345] {
        let mut buffer = vec![7; CHUNK_HEAD];
        let bytes = vec![1; length];
        buffer.extend_from_slice(&bytes);
        let begins = write_head(&mut buffer);
        let expected = format!("{:x}\r\n", bytes.len());
        assert_eq!(&buffer[begins..CHUNK_HEAD], expected.as_bytes());
        assert_eq!(&buffer[CHUNK_HEAD..], bytes);
    }
}

/// An answer that somebody else makes, piece by piece.
#[derive(Default)]
struct Making {
    given: Mutex<Vec<Bytes>>,
    over: Mutex<bool>,
    task: AtomicWaker,
    past: AtomicUsize,
    in_part: AtomicUsize,
}

struct Made(Arc<Making>, Express);

impl Stream for Made {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.task.register(context.waker());
        let mut given = self.0.given.lock();
        if !given.is_empty() {
            self.1.gives();
            return Poll::Ready(Some(Ok(given.remove(0))));
        }
        if *self.0.over.lock() {
            self.1.gives();
            return Poll::Ready(None);
        }
        self.1.waits();
        Poll::Pending
    }
}

fn piece(number: usize) -> Vec<u8> {
    // Now and then more than the socket takes at once.
    let times = if number % 50 == 49 { 30_000 } else { 1 + number % 7 };
    format!("{number} ").repeat(times).into_bytes()
}

const PIECES: usize = 400;

async fn make(making: Arc<Making>, express: Express) {
    for number in 0..PIECES {
        let bytes = piece(number);
        {
            let mut given = making.given.lock();
            let mut buffer = vec![0; CHUNK_HEAD];
            buffer.extend_from_slice(&bytes);
            let sent = if given.is_empty() { express.send(&mut buffer) } else { Sent::No };
            match sent {
                Sent::Whole => making.past.fetch_add(1, Ordering::Relaxed),
                Sent::InPart => making.in_part.fetch_add(1, Ordering::Relaxed),
                Sent::No => {
                    given.push(bytes.into());
                    0
                }
            };
        }
        making.task.wake();
        if number % 3 == 0 {
            sleep(Duration::from_micros(300)).await;
        }
    }
    *making.over.lock() = true;
    making.task.wake();
}

/// What a client reads that asks for `/` in this version of HTTP, with the head.
async fn ask(making: &Arc<Making>, version: &str) -> Vec<u8> {
    let small = || {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_send_buffer_size(8 << 10).expect("is set");
        socket.set_recv_buffer_size(8 << 10).expect("is set");
        socket
    };
    let listener = small();
    listener.bind(([127, 0, 0, 1], 0).into()).expect("a free port");
    let listener = listener.listen(1).expect("listens");
    let address = listener.local_addr().expect("is bound");
    let mut client = small().connect(address).await.expect("connects");
    let (stream, _) = listener.accept().await.expect("accepts");
    let made = making.clone();
    let route = get(async move |express: Option<Extension<Express>>| match express {
        None => Body::from("no express"),
        Some(Extension(express)) => {
            tokio::spawn(make(made.clone(), express.clone()));
            Body::from_stream(Made(made, express))
        }
    });
    let (connection, express) = Connection::new(stream);
    let router = Router::new().route("/", route);
    let left = connection.left();
    let served = tokio::spawn(Conversation::of_test(router).serve(connection, Some(express), left));
    let request = format!("GET / HTTP/{version}\r\nhost: x\r\nconnection: close\r\n\r\n");
    client.write_all(request.as_bytes()).await.expect("is sent");
    let mut answer = Vec::new();
    let reading = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match client.read(&mut buffer).await.expect("is read") {
                0 => return,
                read => answer.extend_from_slice(&buffer[..read]),
            }
            sleep(Duration::from_micros(200)).await;
        }
    };
    timeout(PATIENCE, reading).await.expect("an end");
    served.await.expect("no panic");
    answer
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|two| two == b"\r\n").expect("a chunk's head");
        let length = std::str::from_utf8(&body[..line]).expect("is text");
        let length = usize::from_str_radix(length, 16).expect("a length");
        body = &body[line + 2..];
        assert_eq!(&body[length..length + 2], b"\r\n", "a chunk ends");
        if length == 0 {
            assert_eq!(body, b"\r\n", "nothing follows");
            return whole;
        }
        whole.extend_from_slice(&body[..length]);
        body = &body[length + 2..];
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_piece_arrives_once_and_in_order_whichever_way_it_went() {
    let making = Arc::new(Making::default());
    let answer = ask(&making, "1.1").await;
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head") + 4;
    let expected: Vec<u8> = (0..PIECES).flat_map(piece).collect();
    assert!(unchunked(&answer[head..]) == expected, "the answer is another");
    let (past, in_part) = (making.past.load(Ordering::Relaxed), making.in_part.load(Ordering::Relaxed));
    assert!(past > 0 && in_part > 0 && past + in_part < PIECES, "{past} past, {in_part} in part");
}

#[tokio::test]
async fn who_cannot_read_chunks_is_not_sent_any() {
    let answer = ask(&Arc::default(), "1.0").await;
    assert!(answer.ends_with(b"no express"));
}
