//! Memory of the device and pinned memory of the host: ordinary memory, and a list that says which is which.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::BTreeMap,
    sync::Mutex,
};

use crate::handles::lock;

/// What an allocation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Device,
    Pinned,
}

struct Allocation {
    len: usize,
    kind: Kind,
}

static ALLOCATIONS: Mutex<BTreeMap<usize, Allocation>> = Mutex::new(BTreeMap::new());

/// As the runtime: 512 bytes for device memory.
const ALIGN: usize = 512;

/// `None` where the memory cannot be had.
pub(crate) fn allocate(len: usize, kind: Kind) -> Option<*mut u8> {
    let layout = Layout::from_size_align(len, ALIGN).ok().filter(|layout| layout.size() > 0)?;
    // SAFETY: the size is not zero.
    let start = unsafe { alloc_zeroed(layout) };
    if start.is_null() {
        return None;
    }
    lock(&ALLOCATIONS).insert(start.addr(), Allocation { len, kind });
    Some(start)
}

/// False if that is not the start of an allocation of this kind.
pub(crate) fn free(start: *mut u8, kind: Kind) -> bool {
    let mut allocations = lock(&ALLOCATIONS);
    if allocations.get(&start.addr()).is_none_or(|allocation| allocation.kind != kind) {
        return false;
    }
    let Some(allocation) = allocations.remove(&start.addr()) else { return false };
    let Ok(layout) = Layout::from_size_align(allocation.len, ALIGN) else { return false };
    // SAFETY: allocated above with this layout and, being in the list until now, not freed since.
    unsafe { dealloc(start, layout) };
    true
}

/// Whether the bytes lie within one allocation on the device.
pub(crate) fn on_device(start: usize, len: usize) -> bool {
    let allocations = lock(&ALLOCATIONS);
    let Some((base, allocation)) = allocations.range(..=start).next_back() else { return false };
    let inside = start.checked_add(len).is_some_and(|end| end <= base + allocation.len);
    inside && allocation.kind == Kind::Device
}

/// Whether any of the bytes is the device's.
pub(crate) fn touches_device(start: usize, len: usize) -> bool {
    let end = start.saturating_add(len);
    lock(&ALLOCATIONS)
        .range(..end)
        .next_back()
        .is_some_and(|(base, allocation)| allocation.kind == Kind::Device && base + allocation.len > start)
}
