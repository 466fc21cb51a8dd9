//! Reading from a peer's memory: what shared memory, RDMA and HIXL have in common, below the engine that moves slices.

use std::{io, ptr::NonNull, time::Instant};

/// One piece to copy from the peer's region into this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it starts in the peer's region, in bytes.
    pub(crate) remote: u64,
    pub(crate) local: NonNull<u8>,
    pub(crate) len: usize,
}

/// A peer's region, readable from here.
pub(crate) trait RemoteRegion: Send {
    /// Copies all pieces or fails; after it returns nothing writes to `local` any more. An error poisons it: never used
    /// again. Blocks the calling thread, until `deadline` at most.
    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()>;
}
