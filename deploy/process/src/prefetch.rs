//! Memory asked for before it is read.
//!
//! Who goes through many things that were last touched long ago waits for each of them, one after the other, as long as
//! the processor cannot guess what is read next. To name all of them first costs next to nothing, and they come side by side.

/// Bytes that come at a time, on every processor that is built for.
const LINE: usize = 64;
/// More of one thing is not asked for: it would push out what was.
const BYTES_MOST: usize = 4 << 10;

/// Has the processor fetch the bytes of `value`, and waits for nothing. What they refer to is left alone.
#[inline]
pub fn prefetch<T: ?Sized>(value: &T) {
    prefetch_at(std::ptr::from_ref(value).cast(), size_of_val(value));
}

/// The same of bytes at an address, whatever lies there.
#[inline]
pub fn prefetch_at(from: *const u8, bytes: usize) {
    let first = from.wrapping_sub(from.addr() % LINE);
    let end = from.addr() % LINE + bytes.min(BYTES_MOST);
    for offset in (0..end).step_by(LINE) {
        fetch(first.wrapping_add(offset));
    }
}

#[inline]
#[cfg(target_arch = "x86_64")]
fn fetch(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint; it reads nothing that anybody sees, and of an address that is none it makes nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
}

#[inline]
#[cfg(target_arch = "aarch64")]
fn fetch(line: *const u8) {
    // SAFETY: a hint; it reads nothing that anybody sees, and of an address that is none it makes nothing.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) line, options(nostack, preserves_flags, readonly))
    }
}

#[inline]
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn fetch(_: *const u8) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fault would end the test's process.
    #[test]
    fn anything_may_be_asked_for() {
        let value = Box::new([7u8; 1000]);
        prefetch(&*value);
        prefetch("");
        prefetch::<[u32]>(&[]);
        for address in [0, 1, usize::MAX - 3] {
            prefetch_at(std::ptr::without_provenance(address), usize::MAX);
        }
    }
}
