//! What no router can do without: a process that reads each request and writes its answer, one write for each token of each
//! stream, with the engine's steps. It parses nothing, chooses nobody and waits for no other: the least that an answer
//! streamed token by token takes of a processor on this machine.
//!
//! Events are those of the [`worker`](crate::worker), written beforehand. Only what is streamed is answered.

use std::{io, sync::Arc};

use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::{
    error::BenchError,
    protocol::FloorReady,
    words::{ANSWER_TOKENS, Words},
    worker::{Engine, Frames, Sequence, listen, read, say, serve_orders},
};

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// Runs until standard input ends.
pub(crate) fn run() -> Result<(), BenchError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(BenchError::io("start a runtime"))?;
    let Some(words) = read::<Words>()? else { return Ok(()) };
    runtime.block_on(async {
        let frames = Arc::new(Frames::new(&Arc::new(words)));
        let engine = Arc::new(Engine::default());
        let (listener, address) = listen().await?;
        tokio::spawn(accept(listener, frames, engine.clone()));
        say(&FloorReady { address })?;
        serve_orders(engine).await
    })
}

async fn accept(listener: TcpListener, frames: Arc<Frames>, engine: Arc<Engine>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (frames, engine) = (frames.clone(), engine.clone());
        // Whoever breaks off has measured something else, and says so.
        tokio::spawn(async move { drop(answer(stream, &frames, &engine).await) });
    }
}

/// One request after the other.
async fn answer(mut stream: TcpStream, frames: &Arc<Frames>, engine: &Engine) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let Some(seed) = request(&mut stream).await? else { return Ok(()) };
        let (done, back) = oneshot::channel();
        let streamed = Streamed { frames: frames.clone(), seed, position: 0, open: Some((stream, done)) };
        engine.add(Box::new(streamed));
        stream = back.await.map_err(io::Error::other)?;
    }
}

/// The seed of the next request; none: there is none.
async fn request(stream: &mut TcpStream) -> io::Result<Option<u64>> {
    let mut bytes = Vec::with_capacity(256 << 10);
    let number = |after: &str, bytes: &[u8]| -> Option<u64> {
        let text = String::from_utf8_lossy(bytes);
        let (_, rest) = text.split_once(after)?;
        rest.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    // Where the request ends.
    let mut end = None;
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
        if end.is_none() {
            let head = bytes.windows(4).position(|window| window == b"\r\n\r\n");
            end = head.map(|head| head + 4 + number("content-length:", &bytes[..head]).unwrap_or(0) as usize);
        }
        if end.is_some_and(|end| bytes.len() >= end) {
            // It is the first field of the body.
            let beginning = &bytes[..bytes.len().min(1 << 10)];
            return Ok(Some(number("\"seed\":", beginning).unwrap_or(0)));
        }
    }
}

/// An answer that is being written.
struct Streamed {
    frames: Arc<Frames>,
    seed: u64,
    position: u32,
    /// The connection, and who reads its next request.
    open: Option<(TcpStream, oneshot::Sender<TcpStream>)>,
}

impl Sequence for Streamed {
    fn step(&mut self) -> bool {
        let mut bytes = Vec::with_capacity(1 << 10);
        if self.position == 0 {
            bytes.extend_from_slice(HEAD.as_bytes());
            chunk(&mut bytes, self.frames.opening());
        }
        chunk(&mut bytes, &self.frames.token(self.seed, self.position));
        self.position += 1;
        let last = self.position == ANSWER_TOKENS;
        if last {
            chunk(&mut bytes, self.frames.closing());
            bytes.extend_from_slice(b"0\r\n\r\n");
        }
        let Some((stream, _)) = &self.open else { return false };
        // The kernel takes so little, or nobody reads.
        let written = matches!(stream.try_write(&bytes), Ok(written) if written == bytes.len());
        if last
            && written
            && let Some((stream, done)) = self.open.take()
        {
            drop(done.send(stream));
        }
        written && !last
    }
}

fn chunk(to: &mut Vec<u8>, event: &[u8]) {
    to.extend_from_slice(format!("{:x}\r\n", event.len()).as_bytes());
    to.extend_from_slice(event);
    to.extend_from_slice(b"\r\n");
}
