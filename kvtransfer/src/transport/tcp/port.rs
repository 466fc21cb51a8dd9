//! Incoming data connections: frames are checked, then read straight into the blocks they belong to.
//!
//! A frame of a live transfer must be proven; one that is not closes the connection and touches nothing. Late frames of
//! ended transfers are read past. So are those of unknown ones, for a while: they ended longer ago than is remembered,
//! and the connection carries others' slices too. A frame whose claim is refused is read past as well, and its transfer
//! is aborted by its session.

use std::{
    io::{self, IoSliceMut},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Terms,
    frame::{FrameError, HEADER_BYTES, Header},
};
use crate::{
    session::{Claim, SliceRun},
    transport::{Found, Inbox, Landing},
};

/// Elements of one vectored read.
const READ_SLICES: usize = 64;
const SCRAP_BYTES: usize = 64 << 10;
/// What a connection may carry for unknown transfers between two proven frames; more closes it. A peer that was told of
/// an end has far less on its way.
const STRAY_BYTES: u64 = 64 << 20;
/// Pause after `accept` itself failed, e.g. for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a data connection is closed from this side.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a frame without the transfer's proof")]
    Unproven,
    #[error("too many frames of transfers that are not known here")]
    Strays,
    #[error("no frame within the handshake deadline")]
    Silent,
    #[error("a frame made no progress")]
    Stalled,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Accepts data connections until `stop`; over the limit, a connection is closed at once.
pub(super) async fn serve(
    listener: TcpListener,
    terms: Terms,
    inbox: Arc<dyn Inbox>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(terms.connections));
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
            tracing::warn!(%peer, limit = terms.connections, "data connection refused: too many are open");
            continue;
        };
        let connection = Connection::new(stream, terms.clone(), inbox.clone());
        let stop = stop.clone();
        tasks.spawn(async move {
            let _permit = permit;
            match stop.run_until_cancelled(connection.run()).await {
                Some(Err(Closed::Io(error))) => tracing::debug!(%peer, %error, "data connection ended"),
                Some(Err(reason)) => tracing::warn!(%peer, %reason, "data connection closed"),
                Some(Ok(())) | None => {}
            }
        });
    }
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
    /// How much more of unknown transfers is read past.
    strays_left: u64,
}

impl Connection {
    fn new(stream: TcpStream, terms: Terms, inbox: Arc<dyn Inbox>) -> Self {
        let (head, table, crcs, scrap) = ([0; HEADER_BYTES], Vec::new(), Vec::new(), Vec::new());
        Self { stream, terms, inbox, head, have: 0, table, crcs, scrap, strays_left: STRAY_BYTES }
    }

    /// Reads frames until the peer closes.
    async fn run(mut self) -> Result<(), Closed> {
        let mut first_by = Some(Instant::now() + self.terms.connect);
        while self.read_head(first_by).await? {
            let header = Header::decode(&self.head, self.terms.slice_bytes)?;
            self.have = 0;
            self.read_table(&header).await?;
            match self.inbox.find(&header.transfer) {
                Found::Live(landing) => {
                    self.deliver(&header, &*landing).await?;
                    self.strays_left = STRAY_BYTES;
                }
                Found::Ended => self.pass_over(header.payload_bytes()).await?,
                Found::Unknown => {
                    self.pass_over_stray(&header).await?;
                    continue; // anybody can write such a frame: it does not keep a connection open
                }
            }
            first_by = None;
        }
        Ok(())
    }

    /// Completes `head`; false at the end of the stream. Between frames there is no hurry.
    async fn read_head(&mut self, first_by: Option<Instant>) -> Result<bool, Closed> {
        while self.have < HEADER_BYTES {
            match self.stream.try_read(&mut self.head[self.have..]) {
                Ok(0) if self.have == 0 => return Ok(false),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let by = match first_by {
                        Some(by) => Some(by),
                        None if self.have > 0 => Some(Instant::now() + self.terms.stall),
                        None => None,
                    };
                    tokio::select! {
                        biased;
                        ready = self.stream.readable() => ready?,
                        () = sleep_until(by.unwrap_or_else(Instant::now)), if by.is_some() => {
                            return Err(if first_by.is_some() { Closed::Silent } else { Closed::Stalled });
                        }
                    }
                }
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
        let words =
            self.table.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        self.crcs.clear();
        self.crcs.extend(words);
        Ok(())
    }

    async fn readable(&self) -> Result<(), Closed> {
        tokio::select! {
            biased;
            ready = self.stream.readable() => Ok(ready?),
            () = sleep(self.terms.stall) => Err(Closed::Stalled),
        }
    }

    /// Handles a frame of a live transfer.
    async fn deliver(&mut self, header: &Header, landing: &dyn Landing) -> Result<(), Closed> {
        if !Header::proven(landing.data_key(), &self.head, &self.table) {
            return Err(Closed::Unproven);
        }
        match landing.claim(header.run, &self.crcs) {
            Claim::Write => {
                let claimed = Claimed { landing, run: header.run, open: true };
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
        let (mut done, mut checked) = (0, 0);
        while done < total {
            if claimed.landing.revoked().is_cancelled() {
                claimed.interrupted("the transfer was aborted");
                return Ok(total - done);
            }
            let read = self.read_some(header, &claimed, done);
            match read {
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
                        () = claimed.landing.revoked().cancelled() => {}
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
            while u64::from(checked + 1) * slice_bytes <= done {
                let (block, crc) = (header.run.first + checked, self.crcs[checked as usize]);
                if claimed.landing.crc(header.run.layer, block).ok() != Some(crc) {
                    claimed.damaged(block);
                    return Ok(total - done);
                }
                checked += 1;
            }
        }
        claimed.landed();
        Ok(0)
    }

    /// One vectored read into the rest of a run; the last one reaches into the next header.
    fn read_some(&mut self, header: &Header, claimed: &Claimed<'_>, done: u64) -> io::Result<usize> {
        let slice_bytes = u64::from(header.slice_bytes);
        let mut list: Vec<IoSliceMut<'_>> = Vec::with_capacity(READ_SLICES + 1);
        let mut skip = (done % slice_bytes) as usize;
        let rest = (done / slice_bytes) as u32..header.run.count;
        let whole = rest.len() <= READ_SLICES;
        for block in rest.take(READ_SLICES) {
            let target = claimed.landing.target(header.run.layer, header.run.first + block, skip);
            list.push(target.map_err(io::Error::other)?);
            skip = 0;
        }
        if whole {
            list.push(IoSliceMut::new(&mut self.head));
        }
        self.stream.try_read_vectored(&mut list)
    }

    /// Reads past a frame of an unknown transfer, within what is allowed of such.
    async fn pass_over_stray(&mut self, header: &Header) -> Result<(), Closed> {
        let bytes = header.payload_bytes() + (HEADER_BYTES + header.table_bytes()) as u64;
        self.strays_left = self.strays_left.checked_sub(bytes).ok_or(Closed::Strays)?;
        tracing::debug!(transfer = %header.transfer, bytes, "frame of an unknown transfer passed over");
        self.pass_over(header.payload_bytes()).await
    }

    /// Reads `left` bytes of payload and forgets them.
    async fn pass_over(&mut self, mut left: u64) -> Result<(), Closed> {
        self.scrap.resize(SCRAP_BYTES, 0);
        while left > 0 {
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

/// An open claim. Reported exactly once: dropping it counts as interrupted.
struct Claimed<'a> {
    landing: &'a dyn Landing,
    run: SliceRun,
    open: bool,
}

impl Claimed<'_> {
    fn landed(mut self) {
        self.open = false;
        self.landing.landed(self.run);
    }

    fn damaged(&mut self, block: u32) {
        self.open = false;
        self.landing.damaged(self.run, block);
    }

    fn interrupted(&mut self, why: &str) {
        if std::mem::take(&mut self.open) {
            self.landing.interrupted(self.run, why);
        }
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.interrupted("the data connection was given up");
    }
}
