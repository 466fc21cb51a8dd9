//! A way past a connection's own task, for answers that come in many small pieces.
//!
//! A piece usually goes from whoever made it to the connection's task, through hyper, into the socket: most of what a
//! piece costs is that way. While an answer's body waits for more, and all that hyper had has been taken by the kernel, the
//! socket is nobody's: then [`Express::send`] writes a chunk into it at once, on the caller's own thread. What the kernel
//! does not take stays here, before anything that hyper writes later, and the connection's task sends it as it always does.
//!
//! For HTTP/1.1 over plain TCP with bodies of unknown length, which hyper sends in chunks (RFC 9112, 7.1). Whatever else
//! a connection speaks has no [`Express`], and a body that is not offered one, or uses none, is none the wiser. TLS, too, goes
//! over a [`Connection`], for it knows when its client has left.

use std::{
    future::pending,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use parking_lot::Mutex;
use rustix::{
    io::Errno,
    net::{SendFlags, Shutdown, send, shutdown},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
};

use crate::prefetch::prefetch;

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

/// The socket of a connection, for the body of the answer that is on its way. Among the extensions of every request of
/// HTTP/1.1 that came over plain TCP.
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

    /// Has the processor fetch what sending reads; with `deeper`, what could be found once that had come.
    pub fn prefetch(&self, deeper: bool) {
        if deeper { prefetch(self.0.writes.as_ref()) } else { prefetch(&*self.0) }
    }

    /// Whether a chunk would be sent now. Stays true until the body is polled again.
    pub fn is_free(&self) -> bool {
        self.0.state.lock().free
    }

    /// Sends what lies in `buffer` after its first [`CHUNK_HEAD`] bytes, which are written over, as one chunk. Never
    /// waits. What lay there lies there afterwards, with more behind it unless it was not sent.
    pub fn send(&self, buffer: &mut Vec<u8>) -> Sent {
        let mut state = self.0.state.lock();
        if !state.free {
            return Sent::No;
        }
        match buffer.len().saturating_sub(CHUNK_HEAD) {
            // A chunk of no length would be the end of the body.
            0 => return Sent::Whole,
            length if u32::try_from(length).is_err() => return Sent::No,
            _ => {}
        }
        let begins = write_head(buffer);
        buffer.extend_from_slice(CHUNK_END);
        let chunk = &buffer[begins..];
        // Whatever is wrong with the socket, or if it takes nothing now, the connection's task finds it, too. Tokio is not
        // asked what it knows of the socket: that lies far away, and the kernel knows better.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let taken = send(self.0.writes.as_ref(), chunk, flags).unwrap_or(0);
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
        if left == 0 {
            return begins;
        }
    }
}

/// The connection as hyper has it.
#[derive(Debug)]
pub(crate) struct Connection {
    reads: OwnedReadHalf,
    socket: Arc<Socket>,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> (Self, Express) {
        let (reads, writes) = stream.into_split();
        let socket = Arc::new(Socket { writes, state: Mutex::default() });
        (Self { reads, socket: socket.clone() }, Express(socket))
    }

    /// Returns once the client has closed its side, whether what it had sent before has been read or not. Whoever waits for
    /// urgent data is told of the end as well, but of no other data: it need not be looked for again and again.
    pub(super) fn left(&self) -> impl Future<Output = ()> + Send + use<> {
        let socket = self.socket.clone();
        async move {
            let ready = socket.writes.ready(Interest::PRIORITY).await;
            if !ready.is_ok_and(|ready| ready.is_read_closed()) {
                pending().await
            }
        }
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
        state.rest = Vec::new();
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

    /// Hyper asks this of a connection only when it has nothing left to write itself: `Buffered::poll_flush` of its
    /// `proto/h1/io.rs`, where pipelined flushes are not asked for. The tests here would fail if it did otherwise.
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
        Poll::Ready(match shutdown(self.socket.writes.as_ref(), Shutdown::Write) {
            // The client was faster.
            Ok(()) | Err(Errno::NOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        })
    }
}

#[cfg(test)]
mod tests;
