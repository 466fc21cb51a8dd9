//! Zeroed memory on a cache line's border, for packed weights.

use std::{alloc, ptr::NonNull, slice};

use crate::RuntimeError;

/// A fixed run of bytes.
pub(crate) struct AlignedBytes {
    base: NonNull<u8>,
    allocation: alloc::Layout,
    length: usize,
}

// SAFETY: owns plain bytes, like a boxed slice.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    const ALIGN: usize = 64;

    pub(crate) fn zeroed(length: usize) -> Result<Self, RuntimeError> {
        let exhausted = || RuntimeError::Memory { bytes: length };
        let allocation =
            alloc::Layout::from_size_align(length.max(1), Self::ALIGN).map_err(|_| exhausted())?;
        // SAFETY: `allocation` has a size of at least one byte.
        let base = NonNull::new(unsafe { alloc::alloc_zeroed(allocation) }).ok_or_else(exhausted)?;
        Ok(Self { base, allocation, length })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `length` initialised bytes from `base` are ours.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes them ours alone.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this very layout.
        unsafe { alloc::dealloc(self.base.as_ptr(), self.allocation) }
    }
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
