//! Transports whose receiver copies slices out of the sender's memory: what they have in common.
//!
//! The sender announces slices that are ready (`lane`), over a connection of its own; the receiver copies each run into
//! its blocks, compares a digest of samples, and says that it is done with it (`port`). What copies is a
//! [`RemoteRegion`]: a mapping of the other process's memory, reads over RDMA. It is the receiver that writes, always: no
//! peer can reach into a block that has been lent again, however late it wakes up.

mod digest;
mod lane;
mod piece;
mod reader;
mod tcp;
mod thread;

#[cfg(test)]
mod tests;

use std::{io, time::Instant};

use super::TransportKind;

pub(crate) use lane::Lane;
pub(crate) use piece::Piece;
pub(crate) use reader::{Closed, Wire, hung_up, serve};
pub(crate) use tcp::Fetched;
pub(crate) use thread::on_thread;

/// What the receiver says to the sender, a byte each: it is done with the oldest announced run, whatever it did with it.
const DONE: u8 = 1;
/// It is about to fetch that run, where the sender has to know ([`RemoteRegion::asks`]). Said of each slice in turn: a
/// piece begins with it, or ([`JOINED`]) it goes with the one before.
const WANTED: u8 = 2;
const JOINED: u8 = 3;

/// A peer's region, readable from here.
pub(crate) trait RemoteRegion: Send {
    /// Bytes of the region. Pieces beyond it are never asked for.
    fn len(&self) -> u64;

    /// Most bytes of a piece that slices are joined into which lie side by side at both ends; 0 = each slice is one. Only
    /// where every piece lies within one region.
    fn joins(&self) -> usize {
        0
    }

    /// Whether the owner must be told before a read, since it has to act as well.
    fn asks(&self) -> bool {
        false
    }

    /// Copies all pieces or fails; after it returns nothing writes to `local` any more. Blocks. An error poisons it:
    /// it is not used again.
    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()>;
}

/// What lends this node's region to peers and reads theirs, where the two sides talk over the data port.
pub(crate) trait Medium: Send + Sync + 'static {
    fn kind(&self) -> TransportKind;

    /// Asks an owner to be let in; what it is to be told. Blocks.
    fn ask(&self) -> io::Result<(Box<dyn Asking>, Vec<u8>)>;

    /// Lets the peer that asked so in, until the lent thing is dropped; what it is to be told. Blocks, and so does
    /// dropping it: after that the peer reads no more, but over HIXL, where only the peer can end a read. Whatever is read
    /// after a connection has ended is dropped by its reader.
    fn lend(&self, request: &[u8]) -> io::Result<(Box<dyn Lent>, Vec<u8>)>;
}

/// This node's region, lent to one peer. See [`Medium::lend`].
pub(crate) trait Lent: Send {
    /// Whether readers say beforehand what they are about to fetch ([`RemoteRegion::asks`]).
    fn hears(&self) -> bool {
        false
    }

    /// The peer is about to fetch these pieces, (offset in the region, bytes) each. Does not block. At most once for each
    /// run, and only where this [`Self::hears`].
    fn wanted(&mut self, _pieces: &[(u64, usize)]) -> io::Result<()> {
        Ok(())
    }
}

/// A reader that has asked to be let in.
pub(crate) trait Asking: Send {
    /// Connects to the owner that said so. Blocks.
    fn connect(self: Box<Self>, grant: &[u8], deadline: Instant) -> io::Result<Box<dyn RemoteRegion>>;
}
