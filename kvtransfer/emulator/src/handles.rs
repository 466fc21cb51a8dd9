//! Handles given to callers: numbers, so that one that is stale or made up is found out and never followed.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Locks what no panic can leave half done.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number no other handle of this process has.
pub(crate) fn fresh() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed) * 0x1000
}

/// The live objects of one kind.
pub(crate) struct Table<T> {
    live: LazyLock<Mutex<HashMap<usize, Arc<T>>>>,
}

impl<T> Table<T> {
    pub(crate) const fn new() -> Self {
        Self { live: LazyLock::new(Mutex::default) }
    }

    pub(crate) fn insert(&self, object: Arc<T>) -> *mut c_void {
        let handle = fresh();
        lock(&self.live).insert(handle, object);
        std::ptr::without_provenance_mut(handle)
    }

    pub(crate) fn get(&self, handle: *const c_void) -> Option<Arc<T>> {
        lock(&self.live).get(&handle.addr()).cloned()
    }

    pub(crate) fn remove(&self, handle: *const c_void) -> Option<Arc<T>> {
        lock(&self.live).remove(&handle.addr())
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.live).len()
    }
}
