//! The locks and atomics of what several threads reach at once: a transfer's shell, tables, claims, outboxes, links.
//!
//! Those of `parking_lot` and `std`, except in unit tests built with the feature `explore`. There they are shuttle's,
//! which runs a test under many orders of its threads, one thread at a time, and changes threads at each of these
//! operations (`node::explore`). Tokio's channels, signals and tokens stay what they are: they never block a thread, so
//! under shuttle each of their calls is one step.

#[cfg(not(all(test, feature = "explore")))]
pub(crate) use parking_lot::{Mutex, MutexGuard};
#[cfg(not(all(test, feature = "explore")))]
pub(crate) use std::sync::atomic::AtomicBool;

#[cfg(all(test, feature = "explore"))]
pub(crate) use explored::Mutex;
#[cfg(all(test, feature = "explore"))]
pub(crate) use shuttle::sync::{MutexGuard, atomic::AtomicBool};

/// Where another thread may come in between, though there is no lock or atomic here: before a signal is waited for.
#[cfg(not(all(test, feature = "explore")))]
pub(crate) fn step() {}

#[cfg(all(test, feature = "explore"))]
pub(crate) fn step() {
    shuttle::thread::yield_now();
}

#[cfg(all(test, feature = "explore"))]
mod explored {
    use std::{fmt, sync::PoisonError};

    /// Shuttle's, with the face of `parking_lot`'s.
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> super::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T: fmt::Debug> fmt::Debug for Mutex<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.fmt(f)
        }
    }
}
