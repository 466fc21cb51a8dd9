//! Maps files into memory. The only unsafe code of the crate.

use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};

use crate::{CheckpointError, ModelRoot};

/// A range of bytes in one of a checkpoint's files, checked to lie within it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// Index among the checkpoint's files.
    pub(crate) file: usize,
    pub(crate) start: usize,
    pub(crate) length: usize,
}

/// A file mapped for reading.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(crate) fn open(root: &ModelRoot, path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let file = root.open(path)?;
        // SAFETY: the mapping is private and only ever read. Should another process write to the file, the bytes read
        // change, which at worst gives wrong numbers: nothing read from the map again is trusted as a bound. Should it
        // cut the file short, the process ends with SIGBUS; `Checkpoint`'s documentation says so.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.to_owned(), map })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn all(&self) -> &[u8] {
        &self.map
    }

    /// The bytes of an extent of this file.
    pub(crate) fn bytes(&self, extent: &Extent) -> &[u8] {
        &self.map[extent.start..extent.start + extent.length]
    }

    /// Lets the system take back the memory that holds an extent; it is read again from the file when next used.
    pub(crate) fn release(&self, extent: &Extent) {
        // SAFETY: the mapping is of a file and never written, so that pages dropped come back with the same content.
        let advised = unsafe {
            self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, extent.start, extent.length)
        };
        // Advice only: where it is not taken, the pages stay until there is need for them.
        let _ = advised;
    }
}
