//! Threads that keep cores busy beside what is measured.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

/// They compute until this is dropped.
pub(super) struct Hogs {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Hogs {
    pub(super) fn start(count: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let spin = |stop: Arc<AtomicBool>| {
            let mut state = 1_u64;
            while !stop.load(Ordering::Relaxed) {
                state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            }
        };
        let threads = (0..count)
            .map(|_| {
                thread::spawn({
                    let stop = Arc::clone(&stop);
                    move || spin(stop)
                })
            })
            .collect();
        Self { stop, threads }
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked computes no more either.
            let _ = thread.join();
        }
    }
}
