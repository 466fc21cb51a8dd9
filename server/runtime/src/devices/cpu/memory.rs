//! Zeroed memory for packed weights, and pointers into memory that tasks share.

use std::{ptr::NonNull, slice, sync::Arc};

use memmap2::MmapMut;

use crate::RuntimeError;

/// Least bytes of one mapping; what is not used of it costs no memory.
const MAPPING_BYTES: usize = 64 << 20;

/// A mapping that several matrices share.
struct Mapping {
    base: NonNull<u8>,
    /// Owns what `base` points to.
    _memory: MmapMut,
}

// SAFETY: plain memory; each `AlignedBytes` touches its own part of it only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Hands out memory for one model's weights. Neighbours share large pages: the hardware looks far fewer of them up.
#[derive(Default)]
pub(crate) struct Arena {
    mapping: Option<Arc<Mapping>>,
    /// Bytes of the mapping that are handed out, and all of them.
    used: usize,
    length: usize,
}

impl Arena {
    /// Zeroed bytes on a cache line's border.
    pub(crate) fn zeroed(&mut self, length: usize) -> Result<AlignedBytes, RuntimeError> {
        let exhausted = || RuntimeError::Memory { bytes: length };
        let needed = length.checked_next_multiple_of(AlignedBytes::ALIGN).ok_or_else(exhausted)?;
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
                let mapping = Arc::new(Mapping { base, _memory: memory });
                Arc::clone(self.mapping.insert(mapping))
            }
        };
        // SAFETY: `needed` bytes from `used` on are within the mapping.
        let base = unsafe { mapping.base.add(self.used) };
        self.used += needed;
        Ok(AlignedBytes { base, length, _mapping: mapping })
    }
}

/// A fixed run of bytes.
pub(crate) struct AlignedBytes {
    base: NonNull<u8>,
    length: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the only one that has these plain bytes, like a boxed slice.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    const ALIGN: usize = 64;

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `length` initialised bytes from `base` are ours.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes them ours alone.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
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
