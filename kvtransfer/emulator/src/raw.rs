//! Reading and writing a caller's structures by offset.

use std::{
    ffi::{CStr, c_char, c_void},
    fmt::Debug,
};

/// A field of a caller's structure.
///
/// # Safety
/// `base` points to a structure of at least `at + size_of::<T>()` readable bytes.
pub(crate) unsafe fn field<T: Copy>(base: *const c_void, at: usize) -> T {
    // SAFETY: promised by the caller; no alignment is needed.
    unsafe { base.byte_add(at).cast::<T>().read_unaligned() }
}

/// Gives a result to the caller; false where it gave no place for one.
///
/// # Safety
/// `place` is NULL or may be written with a `T`.
pub(crate) unsafe fn give<T: Debug>(place: *mut T, value: T) -> bool {
    if place.is_null() {
        return false;
    }
    // SAFETY: promised by the caller.
    unsafe { place.write(value) };
    true
}

/// A caller's string; `None` for NULL and for what is not UTF-8.
///
/// # Safety
/// `text` is NULL or a C string.
pub(crate) unsafe fn text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: promised by the caller.
    unsafe { CStr::from_ptr(text) }.to_str().ok().map(str::to_owned)
}
