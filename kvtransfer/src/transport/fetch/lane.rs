//! The sender's end of a connection over which slices are announced.
//!
//! A connection's credit ([`CREDIT`] announced runs) bounds what the receiver has before it; each stays taken until the
//! receiver is done with it, so that its blocks are not lent again while they may still be read.

use std::{collections::VecDeque, io};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{DONE, JOINED, Lent, WANTED, digest::digest};
use crate::{
    TransferError,
    session::SliceRun,
    transport::{
        DataKey, Departure, Outbox, PathEnd, Terms, Ticket,
        frame::{Entry, Form, Header},
    },
};

/// Runs announced and not done with.
const CREDIT: usize = 4;

/// An announced run.
struct Announced {
    ticket: Ticket,
    entries: Vec<Entry>,
    /// The pieces in which the receiver is about to fetch it, and how many of its slices it has said that of.
    wanted: Vec<(u64, usize)>,
    told: usize,
    /// When its transfer was seen to be over.
    over: Option<Instant>,
}

impl Announced {
    /// The receiver fetches the next slice, of so many bytes, in a piece of its own or in the one before; whether that was
    /// the last one. `None` if it cannot be.
    fn fetches_next(&mut self, bytes: usize, joined: bool) -> Option<bool> {
        let offset = self.entries.get(self.told)?.offset;
        match (joined, self.wanted.last_mut()) {
            (false, _) => self.wanted.push((offset, bytes)),
            (true, Some((from, len))) if *from + *len as u64 == offset => *len += bytes,
            (true, _) => return None,
        }
        self.told += 1;
        Some(self.told == self.entries.len())
    }

    /// Whether the receiver has said it of none of the slices, or of all.
    fn told_wholly(&self) -> bool {
        self.told == 0 || self.told == self.entries.len()
    }
}

/// One connection's worth of announcing.
pub(crate) struct Lane {
    terms: Terms,
    outbox: Outbox,
    announced: VecDeque<Announced>,
    /// When the oldest announced run became the oldest.
    since: Instant,
    bytes: Vec<u8>,
    /// What lets the receiver read.
    lent: Option<Box<dyn Lent>>,
}

impl Lane {
    pub(crate) fn new(terms: Terms, outbox: Outbox, lent: Option<Box<dyn Lent>>) -> Self {
        Self {
            terms,
            outbox,
            announced: VecDeque::with_capacity(CREDIT),
            since: Instant::now(),
            bytes: Vec::new(),
            lent,
        }
    }

    /// Announces until the path ends. Then the memory is taken back, and whatever the receiver is not done with is
    /// reported as failed.
    pub(crate) async fn run(mut self, mut stream: impl AsyncRead + AsyncWrite + Unpin, path: PathEnd) {
        let why = match path.ended().run_until_cancelled(self.work(&mut stream)).await {
            Some(error) => error.to_string(),
            None => "the data path was given up".into(),
        };
        tracing::debug!(%why, "connection for announced slices ended");
        drop(stream);
        if let Some(lent) = self.lent.take() {
            let _ = spawn_blocking(move || drop(lent)).await;
        }
        self.announced.drain(..).for_each(|mut announced| announced.ticket.failed(&why));
        path.broken(why);
    }

    async fn work(&mut self, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Error {
        let mut said = [0; 256];
        // Not a sleep of each turn: a receiver that keeps talking is given up all the same.
        let mut looks = interval(self.terms.waits.fence_grace);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let room = self.announced.len() < CREDIT;
            let result = tokio::select! {
                biased;
                _ = looks.tick(), if !self.announced.is_empty() => self.look(),
                read = stream.read(&mut said) => match read {
                    Ok(0) => Err(io::Error::other("the peer closed the connection")),
                    Ok(bytes) => self.hear(&said[..bytes]),
                    Err(error) => Err(error),
                },
                ticket = self.outbox.next(self.terms.frame_slices), if room => {
                    self.announce(stream, ticket).await
                }
            };
            if let Err(error) = result {
                return error;
            }
        }
    }

    async fn announce(&mut self, stream: &mut (impl AsyncWrite + Unpin), ticket: Ticket) -> io::Result<()> {
        let (run, departure) = (ticket.run(), ticket.departure().clone());
        let key = departure.data_key().ok_or_else(|| io::Error::other("no data key"))?;
        let slice_bytes = self.terms.slice_bytes;
        // The ticket goes with the work: should the path end meanwhile, its blocks stay taken until it is done.
        let (entries, ticket) = if departure.is_on_device() {
            let (departure, key) = (departure.clone(), key.clone());
            let work = move || Ok::<_, io::Error>((entries(&*departure, &key, run, slice_bytes)?, ticket));
            spawn_blocking(work).await.map_err(io::Error::other)??
        } else {
            (entries(&*departure, &key, run, slice_bytes)?, ticket)
        };
        let header = Header { form: Form::Announced, transfer: departure.id(), run, slice_bytes };
        header.encode(&key, entries.iter().copied(), &mut self.bytes);
        if self.announced.is_empty() {
            self.since = Instant::now();
        }
        self.announced.push_back(Announced { ticket, entries, wanted: Vec::new(), told: 0, over: None });
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the peer does not read what is announced");
        timeout(self.terms.waits.stall, stream.write_all(&self.bytes)).await.map_err(late)?
    }

    /// What the receiver says is about the oldest run.
    fn hear(&mut self, said: &[u8]) -> io::Result<()> {
        let bytes = self.terms.slice_bytes as usize;
        let nonsense = || io::Error::other("the peer says what it cannot of an announced run");
        for &byte in said {
            match (byte, self.announced.front_mut(), &mut self.lent) {
                (DONE, Some(announced), _) if announced.told_wholly() => {
                    if let Some(Announced { ticket, entries, .. }) = self.announced.pop_front() {
                        let sums: Vec<_> = entries.iter().map(|entry| entry.sum).collect();
                        ticket.sent(&sums);
                        self.since = Instant::now();
                    }
                }
                (WANTED | JOINED, Some(announced), Some(lent)) if lent.hears() => {
                    match announced.fetches_next(bytes, byte == JOINED) {
                        Some(true) => lent.wanted(&announced.wanted)?,
                        Some(false) => {}
                        None => return Err(nonsense()),
                    }
                }
                _ => return Err(nonsense()),
            }
        }
        Ok(())
    }

    /// Gives a receiver up that does not get on.
    fn look(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let Self { terms, announced, since, .. } = self;
        let mut stuck = !announced.is_empty() && now - *since >= terms.waits.given_up;
        for run in announced.iter_mut() {
            if run.over.is_none() && run.ticket.departure().revoked().is_cancelled() {
                run.over = Some(now);
            }
            stuck |= run.over.is_some_and(|over| now - over >= terms.waits.let_go);
        }
        match stuck {
            true => Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no more slices")),
            false => Ok(()),
        }
    }
}

/// Where each slice of a run is, and its digest.
fn entries(
    departure: &dyn Departure,
    key: &DataKey,
    run: SliceRun,
    slice_bytes: u32,
) -> io::Result<Vec<Entry>> {
    let entry = |block| {
        let copy_out = |from, into: &mut [u8]| departure.copy_out(run.layer, block, from, into);
        let sum = digest(key, (run.layer, block), slice_bytes as usize, copy_out)?;
        Ok(Entry { offset: departure.offset(run.layer, block)?, sum })
    };
    let entries: Result<_, TransferError> = run.blocks().map(entry).collect();
    entries.map_err(io::Error::other)
}
