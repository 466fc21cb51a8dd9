//! The receiver's end of a connection over which slices are announced, on a thread of its own: copying blocks.

use std::{
    io::{self, Read, Write},
    iter::repeat_n,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use futures::executor::block_on;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{DONE, JOINED, Piece, RemoteRegion, WANTED, digest::digest, piece::join};
use crate::transport::{
    Found, Inbox, Live, Terms,
    frame::{Form, FrameError, HEADER_BYTES, Header},
};

/// A blocking connection whose writes do not wait for ever.
pub(crate) trait Wire: Read + Write {
    /// How long a read may wait; `None` = for ever.
    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()>;

    /// Whether the peer has closed it, though some of what it said may be unread yet.
    fn ended(&self) -> bool;
}

/// [`Wire::ended`] of a socket. One that cannot be asked is taken to have ended.
pub(crate) fn hung_up(socket: &impl AsFd) -> bool {
    let mut asked = [PollFd::new(socket, PollFlags::RDHUP)];
    let over = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut asked, Some(&Timespec::default())).is_err() || asked[0].revents().intersects(over)
}

/// Why a connection is closed from this side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Closed {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a frame without the transfer's proof")]
    Unproven,
    #[error("it announces slices outside its region")]
    Outside,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Copies what is announced until the peer, or whoever holds the other handle of the connection, closes it.
pub(crate) fn serve(
    wire: &mut impl Wire,
    region: &mut dyn RemoteRegion,
    terms: Terms,
    inbox: &dyn Inbox,
) -> Result<(), Closed> {
    let (mut head, mut table) = ([0; HEADER_BYTES], Vec::new());
    while read_head(wire, &mut head, terms.waits.stall)? {
        let header = Header::decode(&head, Form::Announced, terms.slice_bytes)?;
        table.resize(header.table_bytes(), 0);
        wire.read_exact(&mut table)?;
        if let Found::Live(live) = inbox.find(&header.transfer) {
            if !Header::proven(live.landing().data_key(), &head, &table) {
                return Err(Closed::Unproven);
            }
            header.check_slices(live.landing().slice_bytes())?;
            block_on(live.room(header.run));
            fetch(&header, &table, &live, wire, region, terms)?;
        }
        wire.write_all(&[DONE])?;
    }
    Ok(())
}

/// Completes a header; false at the end of the stream. Between frames there is no hurry.
fn read_head(wire: &mut impl Wire, head: &mut [u8; HEADER_BYTES], stall: Duration) -> io::Result<bool> {
    wire.set_patience(None)?;
    let have = loop {
        match wire.read(head) {
            Ok(0) => return Ok(false),
            Ok(have) => break have,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    wire.set_patience(Some(stall))?;
    wire.read_exact(&mut head[have..])?;
    Ok(true)
}

/// What the sender is told of a run whose slices, of `len` bytes each, are fetched in these pieces.
fn asked(pieces: &[Piece], len: usize) -> Vec<u8> {
    let slices = |piece: &Piece| std::iter::once(WANTED).chain(repeat_n(JOINED, piece.len / len - 1));
    pieces.iter().flat_map(slices).collect()
}

/// Copies one run into its blocks. An error ends the connection; what is wrong with the transfer alone ends that.
fn fetch(
    header: &Header,
    table: &[u8],
    live: &Live,
    wire: &mut impl Wire,
    region: &mut dyn RemoteRegion,
    terms: Terms,
) -> Result<(), Closed> {
    let run = header.run;
    let sums: Vec<u32> = header.entries(table).map(|entry| entry.sum).collect();
    let Some(mut claimed) = live.claim(run, &sums) else { return Ok(()) };
    let landing = claimed.landing();
    let len = header.slice_bytes as usize;
    let mut pieces = Vec::with_capacity(sums.len());
    for (block, entry) in run.blocks().zip(header.entries(table)) {
        if entry.offset.checked_add(len as u64).is_none_or(|end| end > region.len()) {
            claimed.interrupted("the peer announced slices outside its region");
            return Err(Closed::Outside);
        }
        let local = landing.place(run.layer, block).map_err(io::Error::other)?;
        join(&mut pieces, Piece { remote: entry.offset, local, len }, region.joins());
    }
    if region.asks() {
        wire.write_all(&asked(&pieces, len))?;
    }
    if let Err(error) = region.read(&pieces, Instant::now() + terms.waits.stall) {
        claimed.interrupted(&format!("the peer's memory cannot be read: {error}"));
        return Err(error.into());
    }
    // The sender closes the connection before it lets go of its blocks. What was copied while it stood is what was
    // announced, or damaged; later the blocks may be another's, and nothing can be said of them.
    if wire.ended() {
        claimed.interrupted("the sender gave the slices up before they were copied");
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    for (block, sum) in run.blocks().zip(sums) {
        let copy_out = |from, into: &mut [u8]| landing.copy_out(run.layer, block, from, into);
        let found =
            digest(landing.data_key(), (run.layer, block), len, copy_out).map_err(io::Error::other)?;
        if found != sum {
            claimed.damaged(block);
            return Ok(());
        }
        if let Err(reason) = landing.arrived(run.layer, block) {
            claimed.interrupted(&reason.to_string());
            return Ok(());
        }
    }
    claimed.landed();
    Ok(())
}
