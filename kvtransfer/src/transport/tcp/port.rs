//! Incoming data connections: frames are checked, then read straight into the blocks they belong to.
//!
//! A connection begins with a hello that shows which control stream it belongs to, and ends with that. A frame of a live
//! transfer must be proven; one that is not closes the connection and touches nothing. Frames of transfers that are over
//! are read past, since the connection carries others' slices too. So is a frame whose claim is refused; its transfer is
//! aborted by its session.

use std::{
    io::{self, IoSliceMut},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::coop::consume_budget,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    session::{Claim, RunningCrc},
    transport::{
        Admission, Claimed, Found, Inbox, Landing, Terms, TransportKind,
        frame::{Form, FrameError, HEADER_BYTES, Header},
        hello::{HELLO_BYTES, Hello, HelloError},
    },
};

/// Elements of one vectored read.
const READ_SLICES: usize = 64;
/// Payload of one read: little enough to be in a core's own cache still when it is summed right after.
const READ_BYTES: u64 = 64 << 10;
const SCRAP_BYTES: usize = 64 << 10;
/// Pause after `accept` itself failed, e.g. for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a data connection is closed from this side.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a frame without the transfer's proof")]
    Unproven,
    #[error("no hello within the handshake deadline")]
    Silent,
    #[error("a frame made no progress")]
    Stalled,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Accepts data connections until `stop`; over the limit, a connection is closed at once.
pub(super) async fn serve(
    listener: TcpListener,
    connections: usize,
    terms: Terms,
    inbox: Arc<dyn Inbox>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(connections));
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept data connections for the moment");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            tracing::warn!(%peer, limit = connections, "data connection refused: too many are open");
            continue;
        };
        let (inbox, stop) = (inbox.clone(), stop.clone());
        tasks.spawn(async move {
            let _permit = permit;
            match stop.run_until_cancelled(converse(stream, terms, inbox)).await {
                Some(Err(Closed::Io(error))) => tracing::debug!(%peer, %error, "data connection ended"),
                Some(Err(reason)) => tracing::warn!(%peer, %reason, "data connection closed"),
                Some(Ok(())) | None => {}
            }
        });
    }
}

/// One connection, until the peer closes it or its control stream ends.
async fn converse(mut stream: TcpStream, terms: Terms, inbox: Arc<dyn Inbox>) -> Result<(), Closed> {
    super::prepare(&stream, &terms)?;
    let welcome = timeout(terms.handshake, welcome(&mut stream, &*inbox)).await;
    let admission = welcome.map_err(|_| Closed::Silent)??;
    let connection = Connection::new(stream, terms, inbox);
    admission.ended.run_until_cancelled(connection.run()).await.unwrap_or(Ok(()))
}

/// Takes a hello and answers it.
async fn welcome(stream: &mut TcpStream, inbox: &dyn Inbox) -> Result<Admission, Closed> {
    let mut head = [0; HELLO_BYTES];
    stream.read_exact(&mut head).await?;
    let hello = Hello::decode(head)?;
    let mut terms = vec![0; hello.terms_bytes()];
    stream.read_exact(&mut terms).await?;
    let admission = inbox.link(&hello.link()).ok_or(HelloError::Link)?;
    if !hello.proven(&admission.key, &terms) {
        return Err(HelloError::Unproven.into());
    }
    if hello.kind() != Some(TransportKind::Tcp) {
        return Err(HelloError::Kind.into());
    }
    stream.write_all(&hello.answer(&admission.key, &[])).await?;
    Ok(admission)
}

struct Connection {
    stream: TcpStream,
    terms: Terms,
    inbox: Arc<dyn Inbox>,
    head: [u8; HEADER_BYTES],
    /// Bytes of the next header that are in `head` already: read together with the payload before it.
    have: usize,
    table: Vec<u8>,
    crcs: Vec<u32>,
    scrap: Vec<u8>,
}

impl Connection {
    fn new(stream: TcpStream, terms: Terms, inbox: Arc<dyn Inbox>) -> Self {
        let (head, table, crcs, scrap) = ([0; HEADER_BYTES], Vec::new(), Vec::new(), Vec::new());
        Self { stream, terms, inbox, head, have: 0, table, crcs, scrap }
    }

    /// Reads frames until the peer closes.
    async fn run(mut self) -> Result<(), Closed> {
        while self.read_head().await? {
            let header = Header::decode(&self.head, Form::Carried, self.terms.slice_bytes)?;
            self.have = 0;
            self.read_table(&header).await?;
            match self.inbox.find(&header.transfer) {
                Found::Live(landing) => self.deliver(&header, &*landing).await?,
                Found::Over => self.pass_over(header.payload_bytes()).await?,
            }
        }
        Ok(())
    }

    /// Completes `head`; false at the end of the stream. Between frames there is no hurry.
    async fn read_head(&mut self) -> Result<bool, Closed> {
        while self.have < HEADER_BYTES {
            consume_budget().await;
            match self.stream.try_read(&mut self.head[self.have..]) {
                Ok(0) if self.have == 0 => return Ok(false),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.have == 0 => {
                    self.stream.readable().await?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    async fn read_table(&mut self, header: &Header) -> Result<(), Closed> {
        self.table.resize(header.table_bytes(), 0);
        let mut have = 0;
        while have < self.table.len() {
            match self.stream.try_read(&mut self.table[have..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        self.crcs.clear();
        self.crcs.extend(header.entries(&self.table).map(|entry| entry.sum));
        Ok(())
    }

    async fn readable(&self) -> Result<(), Closed> {
        timeout(self.terms.stall, self.stream.readable()).await.map_err(|_| Closed::Stalled)??;
        Ok(())
    }

    /// Handles a frame of a live transfer.
    async fn deliver(&mut self, header: &Header, landing: &dyn Landing) -> Result<(), Closed> {
        if !Header::proven(landing.data_key(), &self.head, &self.table) {
            return Err(Closed::Unproven);
        }
        match landing.claim(header.run, &self.crcs) {
            Claim::Write => {
                let claimed = Claimed::new(landing, header.run);
                let left = self.fill(header, claimed).await?;
                self.pass_over(left).await
            }
            Claim::Skip | Claim::Refused => self.pass_over(header.payload_bytes()).await,
        }
    }

    /// Reads a claimed run into its blocks, and the next header with it. Returns how many payload bytes are left to pass
    /// over because the transfer ended on the way.
    async fn fill(&mut self, header: &Header, mut claimed: Claimed<'_>) -> Result<u64, Closed> {
        let (total, slice_bytes) = (header.payload_bytes(), u64::from(header.slice_bytes));
        let (mut done, mut sum) = (0, RunningCrc::new());
        while done < total {
            consume_budget().await; // a peer that keeps the socket full shares this thread with others
            if claimed.landing().revoked().is_cancelled() {
                claimed.interrupted("the transfer was aborted");
                return Ok(total - done);
            }
            let before = done;
            match self.read_some(header, &claimed, done) {
                Ok(0) => {
                    claimed.interrupted("the data connection ended inside a slice");
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                Ok(n) => {
                    self.have = (done + n as u64).saturating_sub(total) as usize;
                    done = (done + n as u64).min(total);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::select! {
                        biased;
                        () = claimed.landing().revoked().cancelled() => {}
                        ready = self.readable() => if let Err(error) = ready {
                            claimed.interrupted(&format!("the data connection failed: {error}"));
                            return Err(error);
                        },
                    }
                }
                Err(error) => {
                    claimed.interrupted(&format!("the data connection failed: {error}"));
                    return Err(error.into());
                }
            }
            for (nth, bytes) in pieces(before..done, slice_bytes) {
                let (block, ends) = (header.run.first + nth, bytes.end as u64 == slice_bytes);
                let content = claimed.landing().content(header.run.layer, block).map_err(io::Error::other)?;
                sum.update(&content[bytes]);
                if ends && sum.finish() != self.crcs[nth as usize] {
                    claimed.damaged(block);
                    return Ok(total - done);
                }
            }
        }
        claimed.landed();
        Ok(0)
    }

    /// One vectored read into the rest of a run; the last one reaches into the next header.
    fn read_some(&mut self, header: &Header, claimed: &Claimed<'_>, done: u64) -> io::Result<usize> {
        let (total, slice_bytes) = (header.payload_bytes(), u64::from(header.slice_bytes));
        let mut list: Vec<IoSliceMut<'_>> = Vec::with_capacity(READ_SLICES + 1);
        let mut asked = done;
        for (nth, bytes) in pieces(done..total.min(done + READ_BYTES), slice_bytes).take(READ_SLICES) {
            asked += bytes.len() as u64;
            let target = claimed.landing().target(header.run.layer, header.run.first + nth, bytes);
            list.push(target.map_err(io::Error::other)?);
        }
        if asked == total {
            list.push(IoSliceMut::new(&mut self.head));
        }
        self.stream.try_read_vectored(&mut list)
    }

    /// Reads `left` bytes of payload and forgets them.
    async fn pass_over(&mut self, mut left: u64) -> Result<(), Closed> {
        self.scrap.resize(SCRAP_BYTES, 0);
        while left > 0 {
            consume_budget().await;
            let most = left.min(SCRAP_BYTES as u64) as usize;
            match self.stream.try_read(&mut self.scrap[..most]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => left -= n as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Where bytes of a run's payload lie: which slice of it, and where in that.
fn pieces(payload: Range<u64>, slice_bytes: u64) -> impl Iterator<Item = (u32, Range<usize>)> {
    let mut at = payload.start;
    std::iter::from_fn(move || {
        let (nth, from) = (at / slice_bytes, at % slice_bytes);
        let to = slice_bytes.min(from + payload.end - at);
        (at < payload.end).then(|| {
            at += to - from;
            (nth as u32, from as usize..to as usize)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_is_cut_where_slices_end() {
        let cut = |payload| pieces(payload, 10).collect::<Vec<_>>();
        assert_eq!(cut(0..20), [(0, 0..10), (1, 0..10)]);
        assert_eq!(cut(7..23), [(0, 7..10), (1, 0..10), (2, 0..3)]);
        assert_eq!(cut(14..17), [(1, 4..7)]);
        assert_eq!(cut(20..20), []);
    }
}
