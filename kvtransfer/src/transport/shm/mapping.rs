//! Another process's KV pool, mapped for reading.

use std::{fs::File, io, os::fd::AsFd, time::Instant};

use memmap2::{Mmap, MmapOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

use super::stream;
use crate::transport::fetch::{Piece, RemoteRegion};

/// Makes a pool's file fit to be lent: its size stays, and whoever gets it cannot map it for writing.
pub(super) fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
    Ok(fcntl_add_seals(file.as_fd(), seals)?)
}

/// Whether memory can be made that is fit to be lent.
pub(super) fn probe() -> io::Result<()> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    seal(&File::from(memfd_create("baton-kv-probe", flags)?))
}

/// See the module.
pub(super) struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps `len` bytes of a peer's file. Refused if they are not all there, or need not stay.
    pub(super) fn new(file: &File, len: u64) -> io::Result<Self> {
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
        if !fcntl_get_seals(file.as_fd())?.contains(SealFlags::SHRINK) {
            return refused("the peer's memory could shrink");
        }
        let Some(bytes) = usize::try_from(len)
            .ok()
            .filter(|&bytes| bytes > 0 && len <= file.metadata().map_or(0, |it| it.len()))
        else {
            return refused("the peer's memory is smaller than it says");
        };
        // SAFETY: the seal keeps all of it there, so that no read of it can fault; its content may change under us, but it
        // is only ever copied from by address (`read`), never looked at as a slice.
        let map = unsafe { MmapOptions::new().len(bytes).map(file)? };
        Ok(Self { map })
    }
}

impl RemoteRegion for Mapping {
    fn len(&self) -> u64 {
        self.map.len() as u64
    }

    fn read(&mut self, pieces: &[Piece], _: Instant) -> io::Result<()> {
        for &Piece { remote, local, len } in pieces {
            if remote.checked_add(len as u64).is_none_or(|end| end > self.len()) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a piece outside the peer's memory"));
            }
            // SAFETY: just checked to lie within the mapping; `local` is a claimed slice of this node's region, which
            // nobody else touches and which is no part of a mapping of another process's pool.
            unsafe {
                stream::copy(self.map.as_ptr().add(remote as usize), local.as_ptr(), len);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::*;

    fn memory(len: u64, flags: MemfdFlags) -> File {
        let file = File::from(memfd_create("kv-test", flags).expect("a file"));
        file.set_len(len).expect("room");
        file
    }

    #[test]
    fn only_memory_that_stays_is_mapped_and_only_within_it_is_read() {
        let loose = memory(8192, MemfdFlags::ALLOW_SEALING);
        assert!(Mapping::new(&loose, 8192).is_err(), "it could shrink under a copy");
        seal(&loose).expect("can be sealed");
        loose.set_len(4096).expect_err("sealed");
        for len in [0, 8193, u64::MAX] {
            assert!(Mapping::new(&loose, len).is_err(), "{len}");
        }
        let mut mapping = Mapping::new(&loose, 8192).expect("sealed");
        let mut target = vec![7u8; 100];
        let local = NonNull::new(target.as_mut_ptr()).expect("an address");
        let by = Instant::now();
        for remote in [8093, 8192, u64::MAX] {
            mapping.read(&[Piece { remote, local, len: 100 }], by).expect_err("outside");
        }
        mapping.read(&[Piece { remote: 8092, local, len: 100 }], by).expect("its last bytes");
        assert_eq!(target, [0; 100]);
        // SAFETY: never touched; it is refused.
        assert!(unsafe { memmap2::MmapMut::map_mut(&loose) }.is_err(), "whoever gets it cannot write it");
    }
}
