//! Maps files into memory. The only unsafe code of the crate.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use crate::CheckpointError;

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
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
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
}
