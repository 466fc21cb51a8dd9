//! The receiver's end of a TCP connection: frames are checked, then read straight into the blocks they belong to.
//!
//! A frame of a live transfer must be proven; one that is not closes the connection and touches nothing. Frames of
//! transfers that are over are read past, since the connection carries others' slices too. So is a frame whose claim is
//! refused; its transfer is aborted by its session. A slice that does not match its sum is damaged if its frame ends whole;
//! until then it may be the zeros of a sender that has given the frame up.

use std::{
    io::{self, IoSliceMut},
    sync::Arc,
};

use tokio::{net::TcpStream, task::coop::consume_budget, time::timeout};

use crate::{
    TransferError,
    session::Crc32c,
    transport::{
        Claimed, Found, Inbox, Landing, Live, Terms,
        frame::{END_BYTES, End, Form, FrameError, HEADER_BYTES, Header},
        port,
    },
};

/// Elements of one vectored read.
const READ_SLICES: usize = 64;
/// A read ends with the slice that takes it so far: few enough bytes to be in the processor's cache still when they are
/// summed.
const READ_BYTES: usize = 256 << 10;
const SCRAP_BYTES: usize = 64 << 10;

/// Why a connection is closed from this side.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a frame without the transfer's proof")]
    Unproven,
    #[error("a frame made no progress")]
    Stalled,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Closed> for port::Closed {
    fn from(closed: Closed) -> Self {
        match closed {
            Closed::Io(error) => Self::Io(error),
            other => Self::Misbehaved(other.to_string()),
        }
    }
}

/// One connection.
pub(super) struct Reader {
    stream: TcpStream,
    terms: Terms,
    inbox: Arc<dyn Inbox>,
    /// How the frame before ended, and the next header.
    end: [u8; END_BYTES],
    head: [u8; HEADER_BYTES],
    /// Bytes of both that are there already: read together with the payload before them.
    have: usize,
    table: Vec<u8>,
    crcs: Vec<u32>,
    scrap: Vec<u8>,
}

impl Reader {
    pub(super) fn new(stream: TcpStream, terms: Terms, inbox: Arc<dyn Inbox>) -> Self {
        let (table, crcs, scrap) = (Vec::new(), Vec::new(), Vec::new());
        // As if a frame had gone before.
        let (end, head, have) = (*End::Whole.bytes(), [0; HEADER_BYTES], END_BYTES);
        Self { stream, terms, inbox, end, head, have, table, crcs, scrap }
    }

    /// Reads frames until the peer closes.
    pub(super) async fn run(mut self) -> Result<(), port::Closed> {
        Ok(self.read_frames().await?)
    }

    async fn read_frames(&mut self) -> Result<(), Closed> {
        while self.read_head().await? {
            let header = Header::decode(&self.head, Form::Carried, self.terms.slice_bytes)?;
            self.have = 0;
            self.read_table(&header).await?;
            match self.inbox.find(&header.transfer) {
                Found::Live(live) => self.deliver(&header, &live).await?,
                Found::Over => self.pass_over(&mut header.payload_bytes()).await?,
            }
        }
        Ok(())
    }

    /// Completes `end` and `head`; false at the end of the stream. Between frames there is no hurry.
    async fn read_head(&mut self) -> Result<bool, Closed> {
        self.read_end().await?;
        while self.have < END_BYTES + HEADER_BYTES {
            consume_budget().await;
            let between = self.have == END_BYTES;
            match self.read_ahead() {
                Ok(0) if between => return Ok(false),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && between => {
                    self.stream.readable().await?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// How the frame ended whose payload has been read. Cancel safe.
    async fn read_end(&mut self) -> Result<End, Closed> {
        while self.have < END_BYTES {
            match self.read_ahead() {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(End::decode(&self.end)?)
    }

    /// Reads on in `end` and `head`.
    fn read_ahead(&mut self) -> io::Result<usize> {
        let end = IoSliceMut::new(&mut self.end[self.have.min(END_BYTES)..]);
        let head = IoSliceMut::new(&mut self.head[self.have.saturating_sub(END_BYTES)..]);
        self.stream.try_read_vectored(&mut [end, head])
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
        timeout(self.terms.waits.stall, self.stream.readable()).await.map_err(|_| Closed::Stalled)??;
        Ok(())
    }

    /// Handles a frame of a live transfer.
    async fn deliver(&mut self, header: &Header, live: &Live) -> Result<(), Closed> {
        if !Header::proven(live.landing().data_key(), &self.head, &self.table) {
            return Err(Closed::Unproven);
        }
        header.check_slices(live.landing().slice_bytes())?;
        live.room(header.run).await;
        let Some(claimed) = live.claim(header.run, &self.crcs) else {
            return self.pass_over(&mut header.payload_bytes()).await;
        };
        match self.fill(header, claimed).await? {
            Filled::Settled { mut left } => self.pass_over(&mut left).await,
            Filled::Differs { claimed, block, left } => self.judge(claimed, block, left).await,
        }
    }

    /// A slice does not match its sum. Whether it is damaged, the frame's end says, `left` bytes of payload further on;
    /// nothing more is written.
    async fn judge(&mut self, mut claimed: Claimed<'_>, block: u32, mut left: u64) -> Result<(), Closed> {
        let end = async {
            self.pass_over(&mut left).await?;
            self.read_end().await
        };
        let end = claimed.landing().revoked().run_until_cancelled(end).await;
        match end {
            None => claimed.interrupted("the transfer was aborted"),
            Some(Ok(End::Whole)) => claimed.damaged(block),
            Some(Ok(End::CutShort)) => claimed.interrupted("the sender gave the frame up on the way"),
            Some(Err(error)) => {
                claimed.interrupted(&format!("the data connection failed: {error}"));
                return Err(error);
            }
        }
        self.pass_over(&mut left).await
    }

    /// Reads a claimed run into its blocks, and the next header with it.
    async fn fill<'a>(&mut self, header: &Header, mut claimed: Claimed<'a>) -> Result<Filled<'a>, Closed> {
        let total = header.payload_bytes();
        let (mut done, mut check) = (0, Check::new());
        while done < total {
            consume_budget().await; // a peer that keeps the socket full shares this thread with others
            if claimed.landing().revoked().is_cancelled() {
                claimed.interrupted("the transfer was aborted");
                return Ok(Filled::Settled { left: total - done });
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
            match check.up_to(done, header, claimed.landing(), &self.crcs) {
                Ok(()) => {}
                Err(Unfit::Differs(block)) => {
                    return Ok(Filled::Differs { claimed, block, left: total - done });
                }
                Err(Unfit::Refused(reason)) => {
                    claimed.interrupted(&reason.to_string());
                    return Ok(Filled::Settled { left: total - done });
                }
            }
        }
        claimed.landed();
        Ok(Filled::Settled { left: 0 })
    }

    /// One vectored read of the next bytes of a run; the last one reaches into the next header.
    fn read_some(&mut self, header: &Header, claimed: &Claimed<'_>, done: u64) -> io::Result<usize> {
        let slice_bytes = u64::from(header.slice_bytes);
        let mut list: [_; READ_SLICES + 2] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let mut listed = 0;
        let mut skip = (done % slice_bytes) as usize;
        let rest = (done / slice_bytes) as u32..header.run.count;
        let (mut blocks, mut room) = (rest, READ_BYTES);
        while room > 0
            && listed < READ_SLICES
            && let Some(block) = blocks.next()
        {
            let target = claimed.landing().target(header.run.layer, header.run.first + block, skip);
            let target = target.map_err(io::Error::other)?;
            skip = 0;
            room = room.saturating_sub(target.len());
            list[listed] = target;
            listed += 1;
        }
        if blocks.is_empty() {
            list[listed] = IoSliceMut::new(&mut self.end);
            list[listed + 1] = IoSliceMut::new(&mut self.head);
            listed += 2;
        }
        self.stream.try_read_vectored(&mut list[..listed])
    }

    /// Reads `left` bytes of payload and forgets them. Cancel safe, as `left` says how many remain.
    async fn pass_over(&mut self, left: &mut u64) -> Result<(), Closed> {
        self.scrap.resize(SCRAP_BYTES, 0);
        while *left > 0 {
            consume_budget().await;
            let most = (*left).min(SCRAP_BYTES as u64) as usize;
            match self.stream.try_read(&mut self.scrap[..most]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => *left -= n as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// What has become of a claimed run, with so many bytes of payload left to pass over.
enum Filled<'a> {
    /// It was reported.
    Settled { left: u64 },
    /// This block does not match its sum.
    Differs { claimed: Claimed<'a>, block: u32, left: u64 },
}

/// Why a slice is not taken in.
enum Unfit {
    /// This block does not match its sum.
    Differs(u32),
    /// It does, and cannot be put where it belongs.
    Refused(TransferError),
}

/// The sums of a run's slices, taken from their bytes as they come.
struct Check {
    sum: Crc32c,
    summed: u64,
}

impl Check {
    fn new() -> Self {
        Self { sum: Crc32c::new(), summed: 0 }
    }

    /// Sums what has come of a run by now, `done` bytes, and hands slices on that are whole.
    fn up_to(
        &mut self,
        done: u64,
        header: &Header,
        landing: &dyn Landing,
        sums: &[u32],
    ) -> Result<(), Unfit> {
        let slice_bytes = u64::from(header.slice_bytes);
        while self.summed < done {
            let (index, skip) = (self.summed / slice_bytes, self.summed % slice_bytes);
            let block = header.run.first + index as u32;
            let come = (slice_bytes - skip).min(done - self.summed);
            let content = landing.content(header.run.layer, block, skip as usize);
            let content = content.map_err(|_| Unfit::Differs(block))?;
            self.sum.add(&content[..come as usize]);
            self.summed += come;
            if skip + come == slice_bytes {
                if self.sum.take() != sums[index as usize] {
                    return Err(Unfit::Differs(block));
                }
                landing.arrived(header.run.layer, block).map_err(Unfit::Refused)?;
            }
        }
        Ok(())
    }
}
