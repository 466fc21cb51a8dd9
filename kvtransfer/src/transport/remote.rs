//! Reading a peer's region from here: what shared memory and RDMA have in common, as the code above them sees it.

use std::{io, ptr::NonNull, time::Instant};

/// One piece to copy from the peer's region into this node's.
pub(crate) struct Piece {
    /// Offset in the peer's region, in bytes.
    pub(crate) remote: u64,
    /// Where it goes: inside this node's region, in blocks that the caller has claimed.
    pub(crate) local: NonNull<u8>,
    /// In bytes.
    pub(crate) len: usize,
}

/// A peer's region, readable from here.
pub(crate) trait RemoteRegion: Send {
    /// Copies all pieces or fails; after it returns nothing writes to `local` any more. An error poisons it: it is
    /// never used again.
    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()>;
}
