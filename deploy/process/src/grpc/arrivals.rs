//! The connections of a gRPC port: how many there may be, and how long one may take to begin.
//!
//! Who has shaken hands, or needs none, can still say nothing for ever, or a byte now and then: HTTP/2 asks for signs of life
//! only once a connection has begun ([`super::KeepAlive`]). So the first bytes, which are always the same, have to come
//! within a bounded time, and connections of more than so many are closed as they come.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

/// An honest client begins as soon as it is connected.
pub(super) const BEGINS_WITHIN: Duration = Duration::from_secs(10);
/// What HTTP/2 begins with (RFC 9113, section 3.4).
const PREFACE_BYTES: usize = 24;
/// Between two closed connections that the log tells of.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// See the module. `I` yields connections.
pub(super) struct Arrivals<I> {
    incoming: I,
    places: Arc<Semaphore>,
    begins_within: Duration,
    told: Option<Instant>,
}

impl<I> Arrivals<I> {
    pub(super) fn new(incoming: I, most: usize, begins_within: Duration) -> Self {
        Self {
            incoming,
            places: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))),
            begins_within,
            told: None,
        }
    }

    fn tell(&mut self) {
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.told = Some(Instant::now());
            tracing::warn!("a connection to the gRPC port is closed: there are as many as may be");
        }
    }
}

impl<I: Stream<Item = io::Result<S>> + Unpin, S> Stream for Arrivals<I> {
    type Item = io::Result<Arrived<S>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let stream = match Pin::new(&mut self.incoming).poll_next(context) {
                Poll::Ready(Some(Ok(stream))) => stream,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            };
            match self.places.clone().try_acquire_owned() {
                Ok(place) => {
                    let begins = Box::pin(tokio::time::sleep(self.begins_within));
                    let preface = Some(Preface { missing: PREFACE_BYTES, begins });
                    return Poll::Ready(Some(Ok(Arrived { stream, preface, _place: place })));
                }
                Err(_) => self.tell(),
            }
        }
    }
}

/// What has yet to come of a connection's first bytes, and by when.
struct Preface {
    missing: usize,
    begins: Pin<Box<Sleep>>,
}

/// A connection that has its place.
pub(super) struct Arrived<S> {
    stream: S,
    /// `None`: it has begun.
    preface: Option<Preface>,
    _place: OwnedSemaphorePermit,
}

impl<S: Connected> Connected for Arrived<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Arrived<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        if let Some(preface) = &mut this.preface {
            preface.missing = preface.missing.saturating_sub(buffer.filled().len() - before);
            if preface.missing == 0 {
                this.preface = None;
            } else if preface.begins.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Arrived<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_stream::StreamExt as _;

    use super::*;

    /// So many connections: this side's ends, and the port of the others.
    fn connected(
        count: usize,
        most: usize,
    ) -> (Vec<DuplexStream>, Arrivals<impl Stream<Item = io::Result<DuplexStream>>>) {
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..count).map(|_| duplex(1 << 10)).unzip();
        let incoming = tokio_stream::iter(theirs.into_iter().map(Ok));
        (ours, Arrivals::new(incoming, most, BEGINS_WITHIN))
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_begin_is_given_up() {
        let (mut ours, mut arrivals) = connected(3, 3);
        let mut arrived = Vec::new();
        while let Some(stream) = arrivals.next().await {
            arrived.push(stream.expect("a connection"));
        }
        let [silent, slow, honest] = &mut arrived[..] else { panic!("three came") };
        honest_begins(&mut ours[2], honest).await;

        // A byte now and then does not help.
        let mut byte = [0];
        for _ in 0..9 {
            ours[1].write_all(b"P").await.expect("it is open");
            slow.read_exact(&mut byte).await.expect("it is open");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        for stream in [silent, slow] {
            let error = stream.read_exact(&mut byte).await.expect_err("it is given up");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        // Who has begun may be silent; that is for HTTP/2 to ask.
        let waits = tokio::time::timeout(Duration::from_secs(3600), honest.read_exact(&mut byte)).await;
        assert!(waits.is_err(), "{waits:?}");
    }

    async fn honest_begins(ours: &mut DuplexStream, theirs: &mut Arrived<DuplexStream>) {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        assert_eq!(preface.len(), PREFACE_BYTES);
        ours.write_all(preface).await.expect("it is open");
        theirs.read_exact(&mut [0; PREFACE_BYTES]).await.expect("it has begun");
    }

    #[tokio::test]
    async fn there_are_no_more_than_may_be() {
        let (mut ours, mut arrivals) = connected(4, 2);
        let first = arrivals.next().await.expect("one").expect("a connection");
        let second = arrivals.next().await.expect("one more").expect("a connection");
        drop(first);
        let third = arrivals.next().await.expect("a place was free").expect("a connection");
        assert!(arrivals.next().await.is_none(), "the fourth has no place");
        assert_eq!(ours[3].read(&mut [0]).await.expect("it is closed"), 0);
        drop((second, third));
    }
}
