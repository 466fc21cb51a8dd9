//! A way past a connection's own task, for answers that come in many small pieces.
//!
//! A piece usually goes from whoever made it to the connection's task, through hyper, into the socket: most of what a
//! token costs is that way. While an answer's body waits for more, and all that hyper had has been taken by the kernel, the
//! socket is nobody's: then [`Express::send`] writes a chunk into it at once, on the caller's own thread. What the kernel
//! does not take stays here, before anything that hyper writes later, and the connection's task sends it as it always does.
//!
//! For HTTP/1.1 over plain TCP with bodies of unknown length, which hyper sends in chunks (RFC 9112, 7.1). Whatever else
//! a connection speaks has no [`Express`], and a body that is not offered one, or uses none, is none the wiser.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use parking_lot::Mutex;
use rustix::net::{Shutdown, shutdown};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
};

/// What a chunk has before its bytes, at most: eight hexadecimal digits and the end of a line.
pub const CHUNK_HEAD: usize = 10;
const CHUNK_END: &[u8] = b"\r\n";

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The kernel has it.
    Whole,
    /// The rest of it is kept, and the connection's task must be woken to send it.
    InPart,
    /// The socket is not free: the body must give these bytes as any others.
    No,
}

/// The socket of a connection, for the body of the answer that is on its way. Among the extensions of every request that
/// came over such a connection.
#[derive(Debug, Clone)]
pub struct Express(Arc<Socket>);

#[derive(Debug)]
struct Socket {
    writes: OwnedWriteHalf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The body has given all it has.
    waits: bool,
    /// And hyper has written all that it was given.
    free: bool,
    /// What the kernel has not taken of a chunk.
    rest: Vec<u8>,
}

impl Express {
    /// The body has nothing to give now, and has registered to be woken. Told by the body while it is polled.
    pub fn waits(&self) {
        self.0.state.lock().waits = true;
    }

    /// The body gives something, or ends. Told by the body while it is polled.
    pub fn gives(&self) {
        let mut state = self.0.state.lock();
        (state.waits, state.free) = (false, false);
    }

    /// Whether a chunk would be sent now. Stays true until the body is polled again.
    pub fn is_free(&self) -> bool {
        self.0.state.lock().free
    }

    /// Sends what lies in `buffer` after its first [`CHUNK_HEAD`] bytes, which are written over, as one chunk. Never
    /// waits. `buffer` holds anything afterwards.
    pub fn send(&self, buffer: &mut Vec<u8>) -> Sent {
        let mut state = self.0.state.lock();
        if !state.free {
            return Sent::No;
        }
        // A chunk of no length would be the end of the body.
        if buffer.len() <= CHUNK_HEAD {
            return Sent::Whole;
        }
        let begins = write_head(buffer);
        buffer.extend_from_slice(CHUNK_END);
        let chunk = &buffer[begins..];
        // Whatever is wrong with the socket, the connection's task finds it, too.
        let taken = self.0.writes.try_write(chunk).unwrap_or(0);
        if taken == chunk.len() {
            return Sent::Whole;
        }
        state.rest.extend_from_slice(&chunk[taken..]);
        state.free = false;
        Sent::InPart
    }
}

/// Writes a chunk's length right before its bytes. Where the head begins.
fn write_head(buffer: &mut [u8]) -> usize {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut left = buffer.len() - CHUNK_HEAD;
    buffer[CHUNK_HEAD - 2..CHUNK_HEAD].copy_from_slice(CHUNK_END);
    let mut begins = CHUNK_HEAD - 2;
    loop {
        begins -= 1;
        buffer[begins] = DIGITS[left & 15];
        left >>= 4;
        if left == 0 || begins == 0 {
            return begins;
        }
    }
}

/// The connection as hyper has it.
#[derive(Debug)]
pub(super) struct Connection {
    reads: OwnedReadHalf,
    socket: Arc<Socket>,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> (Self, Express) {
        let (reads, writes) = stream.into_split();
        let socket = Arc::new(Socket { writes, state: Mutex::default() });
        (Self { reads, socket: socket.clone() }, Express(socket))
    }

    /// Once what was kept of a chunk has been sent.
    fn write(
        &self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let mut state = self.socket.state.lock();
        state.free = false;
        ready!(self.socket.send_rest(context, &mut state))?;
        self.socket.try_ready(context, write)
    }
}

impl Socket {
    fn try_ready(
        &self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let stream = self.writes.as_ref();
        loop {
            ready!(stream.poll_write_ready(context))?;
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn send_rest(&self, context: &mut Context<'_>, state: &mut State) -> Poll<io::Result<()>> {
        while !state.rest.is_empty() {
            let taken = ready!(self.try_ready(context, |stream| stream.try_write(&state.rest)))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            state.rest.drain(..taken);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reads).poll_read(context, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write(context, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(context, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Hyper asks this of a connection only when it has nothing left to write itself.
    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.socket.state.lock();
        ready!(self.socket.send_rest(context, &mut state))?;
        state.free = state.waits;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.socket.state.lock();
        (state.waits, state.free) = (false, false);
        ready!(self.socket.send_rest(context, &mut state))?;
        Poll::Ready(shutdown(self.socket.writes.as_ref(), Shutdown::Write).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
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
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::http::converse;

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
        let served = tokio::spawn(converse(connection, Some(express), router, CancellationToken::new()));
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
}
