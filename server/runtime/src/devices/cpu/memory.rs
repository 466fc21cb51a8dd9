//! Memory for packed weights, the system's or a file's, and pointers into memory that tasks share.

use std::{fs::File, io, ptr::NonNull, slice, sync::Arc};

use memmap2::{Mmap, MmapMut};

use crate::RuntimeError;

/// Where weights begin: on a cache line's border.
pub(crate) const ALIGN: usize = 64;
/// Least bytes of one mapping; what is not used of it costs no memory.
const MAPPING_BYTES: usize = 64 << 20;

/// A mapping that several matrices share.
struct Mapping {
    base: NonNull<u8>,
    /// Owns what `base` points to.
    _memory: Memory,
}

/// Kept for its end only.
#[allow(dead_code, reason = "what is mapped is reached through the mapping's base")]
enum Memory {
    Anonymous(MmapMut),
    File(Mmap),
}

// SAFETY: plain memory; each part of it is written before the `Bytes` of it are made, and only read afterwards.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Bytes that do not change any more.
pub(crate) struct Bytes {
    base: NonNull<u8>,
    length: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: plain memory that is only read.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `length` initialised bytes from `base` are there as long as the mapping, and nobody writes them.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }
}

/// Hands out memory for one model's weights. Neighbours share large pages: the hardware looks far fewer of them up.
#[derive(Default)]
pub(crate) struct Arena {
    mapping: Option<Arc<Mapping>>,
    /// Bytes of the mapping that are handed out, and all of them.
    used: usize,
    length: usize,
}

impl Arena {
    /// Bytes that `fill`, which finds zeros, has written.
    pub(crate) fn filled(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Bytes, RuntimeError> {
        let exhausted = || RuntimeError::Memory { bytes: length };
        let needed = length.checked_next_multiple_of(ALIGN).ok_or_else(exhausted)?;
        let mapping = match &self.mapping {
            Some(mapping) if needed <= self.length - self.used => Arc::clone(mapping),
            _ => {
                let bytes = needed.max(MAPPING_BYTES);
                let mut memory = MmapMut::map_anon(bytes).map_err(|_| exhausted())?;
                // Advice only: without large pages all works as well, a little slower.
                #[cfg(target_os = "linux")]
                let _ = memory.advise(memmap2::Advice::HugePage);
                let base = NonNull::new(memory.as_mut_ptr()).ok_or_else(exhausted)?;
                (self.used, self.length) = (0, bytes);
                let mapping = Arc::new(Mapping { base, _memory: Memory::Anonymous(memory) });
                Arc::clone(self.mapping.insert(mapping))
            }
        };
        // SAFETY: `needed` bytes from `used` on are within the mapping, and nobody else has them.
        let base = unsafe { mapping.base.add(self.used) };
        // SAFETY: as above; they are zero.
        fill(unsafe { slice::from_raw_parts_mut(base.as_ptr(), length) });
        self.used += needed;
        Ok(Bytes { base, length, _mapping: mapping })
    }
}

/// A whole file mapped for reading. All processes that map it share its memory.
pub(crate) struct MappedFile {
    mapping: Arc<Mapping>,
    length: usize,
}

impl MappedFile {
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: only read. Should somebody change the file meanwhile, which nothing of ours does, the bytes read change;
        // should somebody cut it short, the process ends with SIGBUS. So it is with a checkpoint's files.
        let memory = unsafe { Mmap::map(file) }?;
        let length = memory.len();
        let base = NonNull::new(memory.as_ptr().cast_mut()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { mapping: Arc::new(Mapping { base, _memory: Memory::File(memory) }), length })
    }

    /// Some bytes of the file; `None` if it has not so many.
    pub(crate) fn bytes(&self, start: usize, length: usize) -> Option<Bytes> {
        start.checked_add(length).filter(|&end| end <= self.length)?;
        // SAFETY: `start` lies within the mapping or at its end.
        let base = unsafe { self.mapping.base.add(start) };
        Some(Bytes { base, length, _mapping: Arc::clone(&self.mapping) })
    }
}

/// Makes room for `length` values; they hold whatever was there.
pub(crate) fn grow<T: Default + Clone>(values: &mut Vec<T>, length: usize) -> &mut [T] {
    if values.len() < length {
        values.resize(length, T::default());
    }
    &mut values[..length]
}

/// A pointer to memory of which concurrent tasks write disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<T>(*mut T);

// SAFETY: only a pointer; whoever dereferences it vouches that no two tasks touch the same part.
unsafe impl<T> Send for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    pub(crate) fn pointer(self) -> *mut T {
        self.0
    }

    /// # Safety
    /// The elements lie within the slice this was made from, which must still be borrowed, and no other task touches
    /// them while the result lives.
    pub(crate) unsafe fn slice<'a>(self, start: usize, length: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { slice::from_raw_parts_mut(self.0.add(start), length) }
    }
}
