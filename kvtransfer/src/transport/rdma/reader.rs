//! The reading end: asks an owner to be let in, then reads its region over all rails that both have.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{
    completion::Patience,
    parameters::{Answer, Endpoint, Request},
    queue_pair::QueuePair,
    rail::{Rail, Share},
    rails::{ActiveRail, Rails},
    stripe::{Chunk, Span, stripe},
};
use crate::{
    Region,
    transport::fetch::{Piece, RemoteRegion},
};

/// Most bytes in one request: so that a large piece is shared among the rails.
const CHUNK_BYTES: u32 = 1 << 20;

/// A reader that has asked to be let in and waits for the answer.
pub(crate) struct Dial {
    region: Region,
    drain: Duration,
    ends: Vec<(ActiveRail, QueuePair, Endpoint)>,
}

impl Dial {
    /// Makes queue pairs for every rail that is up, and the request that `Serving::new` answers.
    pub(crate) fn new(rails: &Rails) -> io::Result<(Self, Vec<u8>)> {
        let mut ends = Vec::new();
        for rail in rails.active()? {
            let (pair, end) = rail.reading_end()?;
            ends.push((rail, pair, end));
        }
        let request = Request { rails: ends.iter().map(|(_, _, end)| *end).collect() };
        let (region, drain) = (rails.region().clone(), rails.waits().drain);
        Ok((Self { region, drain, ends }, request.encode()))
    }

    /// Connects to the owner that gave `answer`.
    pub(crate) fn connect(self, answer: &[u8]) -> io::Result<PeerRegion> {
        let answer = Answer::decode(answer)?;
        let mut rails = Vec::new();
        let mut most = CHUNK_BYTES;
        let mut answers = answer.rails.into_iter().peekable();
        for (local, pair, own) in self.ends {
            let Some((peer, window)) = answers.next_if(|(peer, _)| peer.place == own.place) else { continue };
            pair.connect(&local.port, &peer, 0)?;
            pair.start(own.psn, own.reads.min(peer.reads))?;
            most = most.min(local.port.max_message_bytes);
            rails.push(Rail { name: local.name(), pair, window, depth: local.depth() as usize });
        }
        if answers.next().is_some() {
            let error = "the peer answers for a rail that it was not asked for";
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        let (region, drain) = (self.region, self.drain);
        Ok(PeerRegion { rails, region, drain, peer_bytes: answer.region_bytes, most })
    }
}

/// A peer's region, read by this machine's RDMA devices.
pub(crate) struct PeerRegion {
    /// None once a read has failed.
    rails: Vec<Rail>,
    region: Region,
    /// How long a failed rail may take to give its requests up, before it is destroyed with them.
    drain: Duration,
    peer_bytes: u64,
    most: u32,
}

impl PeerRegion {
    /// How many rails the two nodes share.
    pub(crate) fn rails(&self) -> usize {
        self.rails.len()
    }

    fn spans(&self, pieces: &[Piece]) -> io::Result<Vec<Span>> {
        let outside = |whose| io::Error::new(io::ErrorKind::InvalidInput, format!("a piece outside {whose}"));
        let span = |piece: &Piece| {
            let len = piece.len as u64;
            let end = piece.remote.checked_add(len);
            end.filter(|end| *end <= self.peer_bytes).ok_or_else(|| outside("the peer's region"))?;
            let local = self.region.offset_of(piece.local, piece.len);
            let local = local.ok_or_else(|| outside("this node's region"))? as u64;
            Ok(Span { remote: piece.remote, local, len })
        };
        pieces.iter().map(span).collect()
    }

    /// Reads what each rail is given, or fails with no rail left.
    pub(super) fn read_chunks(&mut self, chunks: Vec<Vec<Chunk>>, deadline: Instant) -> io::Result<()> {
        let mut shares: Vec<_> = chunks.into_iter().map(Share::new).collect();
        let outcome = self.run(&mut shares, deadline);
        if outcome.is_err() {
            let deadline = Instant::now() + self.drain;
            for (rail, share) in self.rails.iter_mut().zip(&mut shares) {
                rail.give_up(share, deadline);
            }
            self.rails.clear(); // destroys the queue pairs: nothing writes after that
        }
        outcome
    }

    fn run(&mut self, shares: &mut [Share], deadline: Instant) -> io::Result<()> {
        let mut patience = Patience::default();
        loop {
            if Instant::now() >= deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer's region was not read in time",
                ));
            }
            let mut moved = false;
            for (rail, share) in self.rails.iter_mut().zip(&mut *shares) {
                moved |= rail.advance(share)?;
            }
            if shares.iter().all(Share::is_done) {
                return Ok(());
            }
            if moved {
                patience.reset();
            } else {
                patience.wait(deadline);
            }
        }
    }
}

impl RemoteRegion for PeerRegion {
    fn len(&self) -> u64 {
        self.peer_bytes
    }

    /// No more than one request: what is larger is cut again.
    fn joins(&self) -> usize {
        CHUNK_BYTES as usize
    }

    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()> {
        if self.rails.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "an earlier read of this region failed"));
        }
        let spans = self.spans(pieces).inspect_err(|_| self.rails.clear())?;
        let chunks = stripe(&spans, self.rails.len(), self.most);
        self.read_chunks(chunks, deadline)
    }
}
