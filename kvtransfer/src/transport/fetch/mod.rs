//! Transports whose receiver copies slices out of the sender's memory: what they have in common.
//!
//! The sender announces slices that are ready (`lane`), over a connection of its own; the receiver copies each run into
//! its blocks, compares a digest of samples, and says that it is done with it (`port`). What copies is a
//! [`RemoteRegion`]: a mapping of the other process's memory, reads over RDMA. It is the receiver that writes, always: no
//! peer can reach into a block that has been lent again, however late it wakes up.

mod digest;
mod lane;
mod port;

use std::{io, ptr::NonNull, time::Instant};

pub(crate) use lane::Lane;
pub(crate) use port::{Closed, Wire, serve};

/// One piece to copy from the peer's region into this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it starts in the peer's region, in bytes.
    pub(crate) remote: u64,
    /// Where it goes.
    pub(crate) local: NonNull<u8>,
    pub(crate) len: usize,
}

/// A peer's region, readable from here.
pub(crate) trait RemoteRegion: Send {
    /// Bytes of the region. Pieces beyond it are never asked for.
    fn len(&self) -> u64;

    /// Copies all pieces or fails; after it returns nothing writes to `local` any more. Blocks. An error poisons it:
    /// it is not used again.
    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()>;
}
