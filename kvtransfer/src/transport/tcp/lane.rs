//! One outgoing data connection: takes runs from the outbox, frames them, writes them straight from the KV pool.
//!
//! When the connection breaks, the run in hand fails, every transfer that has slices on it is told, and its path is over.
//! When a transfer is aborted in the middle of its frame, the frame is finished from its blocks if that takes no longer
//! than the fence grace, and with zeros after that, which its end tells: the connection stays in step, the blocks are
//! free, and the receiver does not take the zeros for damage, though it may hear of the abort later.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    sync::Arc,
};

use baton_proto::TransferId;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until},
};

use crate::{
    session::crc32c,
    transport::{
        Departure, Outbox, PathEnd, Terms, Ticket,
        frame::{END_BYTES, End, Entry, Form, HEADER_BYTES, Header},
    },
};

/// Elements of one vectored write. More gain nothing once a write carries a few hundred kilobytes.
const WRITE_SLICES: usize = 64;
/// Ended transfers are forgotten whenever a connection remembers this many, or twice what was left the last time.
const FORGET_AT: usize = 64;

/// What is written in place of blocks that must not be read any more.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// One connection's worth of sending.
pub(super) struct Lane {
    address: String,
    terms: Terms,
    outbox: Outbox,
    head: Vec<u8>,
    crcs: Vec<u32>,
    /// Transfers that have slices on the connection.
    carried: HashMap<TransferId, Arc<dyn Departure>>,
    forget_at: usize,
}

impl Lane {
    pub(super) fn new(address: String, terms: Terms, outbox: Outbox) -> Self {
        let head = Vec::with_capacity(HEADER_BYTES + 4 * terms.frame_slices as usize);
        let (crcs, carried) = (Vec::new(), HashMap::new());
        Self { address, terms, outbox, head, crcs, carried, forget_at: FORGET_AT }
    }

    /// Sends until the path ends. Whatever is in hand then is reported as failed.
    pub(super) async fn run(mut self, stream: TcpStream, path: PathEnd) {
        let why = match path.ended().run_until_cancelled(self.work(&stream)).await {
            Some(error) => format!("{error} ({})", self.address),
            None => "the data path was given up".into(),
        };
        tracing::debug!(peer = %self.address, %why, "data connection ended");
        self.carried.drain().for_each(|(_, departure)| departure.path_lost(&why));
        path.broken(why);
    }

    /// Sends one run after the other; why that cannot go on.
    async fn work(&mut self, stream: &TcpStream) -> io::Error {
        loop {
            let mut ticket = tokio::select! {
                // First, so that no run is given to a connection that is known to be gone.
                biased;
                error = closed(stream) => return error,
                ticket = self.outbox.next(self.terms.frame_slices) => ticket,
            };
            if let Err(error) = self.send(stream, &mut ticket).await {
                ticket.failed(&format!("{error} ({})", self.address));
                return error;
            }
            self.remember(ticket.departure());
            ticket.sent(&self.crcs);
        }
    }

    /// Writes one frame. A ticket whose transfer is aborted meanwhile may be reported on the way.
    async fn send(&mut self, stream: &TcpStream, ticket: &mut Ticket) -> io::Result<()> {
        let (run, departure) = (ticket.run(), ticket.departure().clone());
        self.crcs.clear();
        for block in run.blocks() {
            let slice = departure.source(run.layer, block, 0).map_err(io::Error::other)?;
            self.crcs.push(crc32c(&slice));
        }
        let key = departure.data_key().ok_or_else(|| io::Error::other("no data key"))?;
        let (transfer, slice_bytes) = (departure.id(), self.terms.slice_bytes);
        let header = Header { form: Form::Carried, transfer, run, slice_bytes };
        header.encode(&key, self.crcs.iter().map(|&sum| Entry { offset: 0, sum }), &mut self.head);

        let end_at = self.head.len() as u64 + header.payload_bytes();
        let total = end_at + END_BYTES as u64;
        let (mut written, mut end) = (0, End::Whole);
        let mut patience = Patience::new(&self.terms);
        while written < total {
            if ticket.settled() && written < end_at {
                end = End::CutShort;
            }
            let wrote = {
                let mut list = [IoSlice::new(&[]); WRITE_SLICES + 1];
                let listed = self.rest(&header, ticket, end, written, &mut list)?;
                stream.try_write_vectored(&list[..listed])
            };
            match wrote {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    written += n as u64;
                    patience.progressed(&self.terms);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    patience.wait(stream, ticket, &self.terms).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lists what is left of a frame after `written` bytes, as far as one write goes; how many elements that are.
    fn rest<'a>(
        &'a self,
        header: &Header,
        ticket: &'a Ticket,
        end: End,
        written: u64,
        list: &mut [IoSlice<'a>; WRITE_SLICES + 1],
    ) -> io::Result<usize> {
        let mut listed = 0;
        let mut add = |part| {
            list[listed] = part;
            listed += 1;
        };
        let head = self.head.len() as u64;
        let mut room = WRITE_SLICES;
        if written < head {
            add(IoSlice::new(&self.head[written as usize..]));
            room -= 1;
        }
        let at = written.saturating_sub(head);
        let left = header.payload_bytes().saturating_sub(at);
        if left == 0 {
            let told = (at - header.payload_bytes()) as usize;
            add(IoSlice::new(&end.bytes()[told..]));
            return Ok(listed);
        }
        if end == End::CutShort {
            add(IoSlice::new(&ZEROS[..left.min(ZEROS.len() as u64) as usize]));
            return Ok(listed);
        }
        let slice_bytes = u64::from(header.slice_bytes);
        let mut skip = (at % slice_bytes) as usize;
        let mut blocks = header.run.blocks().skip((at / slice_bytes) as usize);
        for block in blocks.by_ref().take(room) {
            add(ticket.departure().source(header.run.layer, block, skip).map_err(io::Error::other)?);
            skip = 0;
        }
        if blocks.next().is_none() {
            add(IoSlice::new(end.bytes()));
        }
        Ok(listed)
    }

    fn remember(&mut self, departure: &Arc<dyn Departure>) {
        if self.carried.insert(departure.id(), departure.clone()).is_some()
            || self.carried.len() < self.forget_at
        {
            return;
        }
        self.carried.retain(|_, departure| departure.live());
        self.forget_at = FORGET_AT.max(self.carried.len() * 2);
    }
}

/// How long a write that does not get on is waited for, and how long an aborted transfer's blocks are still read.
struct Patience {
    stalled_at: Instant,
    fence_by: Option<Instant>,
}

impl Patience {
    fn new(terms: &Terms) -> Self {
        Self { stalled_at: Instant::now() + terms.waits.stall, fence_by: None }
    }

    fn progressed(&mut self, terms: &Terms) {
        self.stalled_at = Instant::now() + terms.waits.stall;
    }

    /// Waits until the stream takes more. Reports the ticket once its transfer has been aborted for long enough.
    async fn wait(&mut self, stream: &TcpStream, ticket: &mut Ticket, terms: &Terms) -> io::Result<()> {
        let departure = ticket.departure().clone();
        let fenced = ticket.settled();
        let fence_by = self.fence_by.filter(|_| !fenced);
        if fence_by.is_some_and(|by| by <= Instant::now()) {
            ticket.failed("the transfer was aborted");
            return Ok(());
        }
        tokio::select! {
            biased;
            ready = stream.writable() => ready?,
            () = departure.revoked().cancelled(), if !fenced && fence_by.is_none() => {
                self.fence_by = Some(Instant::now() + terms.waits.fence_grace);
            }
            () = sleep_until(fence_by.unwrap_or(self.stalled_at)), if fence_by.is_some() => {}
            () = sleep_until(self.stalled_at) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no more slices"));
            }
        }
        Ok(())
    }
}

/// Resolves when an idle connection is closed by the peer, which has nothing to say on it.
async fn closed(stream: &TcpStream) -> io::Error {
    loop {
        if let Err(error) = stream.readable().await {
            return error;
        }
        match stream.try_read(&mut [0; 64]) {
            Ok(0) => return io::Error::other("the peer closed the data connection"),
            Ok(_) => return io::Error::other("the peer wrote on the data connection"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return error,
        }
    }
}
