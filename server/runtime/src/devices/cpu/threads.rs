//! The threads that share a forward pass's work: one job at a time, split into tasks that whoever is free takes.
//!
//! A job is open from `run` until its tasks are all taken. Workers enter open jobs and the caller waits only for those
//! that did: a worker that the system has not woken yet costs nothing. Between jobs workers spin briefly (jobs follow
//! each other within microseconds), then yield, then park, because other processes share these cores.
//! Results never depend on who ran a task.

use std::{
    any::Any,
    cell::UnsafeCell,
    io,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

/// Pauses (about 20 ns each) before a waiting thread begins to yield.
const SPINS: u32 = 1500;
/// Yields before a worker parks.
const YIELDS: u32 = 20;

/// The low half of the gate counts the workers inside a job.
const INSIDE: u64 = (1 << 31) - 1;
/// The gate is open: workers may enter.
const OPEN: u64 = 1 << 31;
/// The high half of the gate numbers the jobs.
const JOB: u64 = 1 << 32;

type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Job {
    /// The lifetime is erased; `Pool::run` does not return while a worker is inside.
    work: *const Work<'static>,
    tasks: usize,
}

struct Shared {
    gate: AtomicU64,
    next: AtomicUsize,
    stop: AtomicBool,
    parked: Vec<AtomicBool>,
    /// Written by `run` while the gate is closed and nobody inside, read by workers inside.
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only part that is not Sync by itself; the gate orders its one writer and its readers, and the
// work it points to is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used only while what it points to is borrowed by `run`.
unsafe impl Send for Shared {}

impl Shared {
    /// Takes tasks until none is left.
    fn work(&self, worker: usize, job: &Job) {
        // SAFETY: `run` keeps the work borrowed until everyone inside has left.
        let work = unsafe { &*job.work };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            work(worker, task);
        }
    }

    /// A worker's life.
    fn serve(&self, worker: usize) {
        let mut seen = 0;
        while let Some(number) = self.enter(worker, seen) {
            seen = number;
            // SAFETY: inside an open job nobody writes this.
            let job = unsafe { &*self.job.get() };
            let outcome = panic::catch_unwind(AssertUnwindSafe(|| self.work(worker, job)));
            if let Err(payload) = outcome {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an open job other than `seen`, enters it and gives its number; `None` to stop.
    fn enter(&self, worker: usize, seen: u64) -> Option<u64> {
        let mut waited = 0;
        loop {
            let gate = self.gate.load(Ordering::Relaxed);
            if gate & OPEN != 0 && gate / JOB != seen {
                let entered =
                    self.gate.compare_exchange(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed);
                if entered.is_ok() {
                    return Some(gate / JOB);
                }
                continue;
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            waited += 1;
            if waited < SPINS {
                std::hint::spin_loop();
            } else if waited < SPINS + YIELDS {
                thread::yield_now();
            } else {
                self.parked[worker].store(true, Ordering::SeqCst);
                // Looked at once more after saying so: whoever opens a gate looks at `parked` afterwards.
                let gate = self.gate.load(Ordering::SeqCst);
                if (gate & OPEN == 0 || gate / JOB == seen) && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.parked[worker].store(false, Ordering::Relaxed);
                waited = 0;
            }
        }
    }
}

/// A set of threads; the one that calls `run` is worker 0.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// `threads` in all, at least 1, the caller's included.
    pub(crate) fn start(threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            job: UnsafeCell::new(Job { work: std::ptr::from_ref::<Work<'static>>(&|_, _| {}), tasks: 0 }),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new().name(format!("baton-cpu-{worker}"));
            pool.workers.push(builder.spawn(move || shared.serve(worker))?);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(worker, task)` once for every task below `tasks`, on any worker, and returns when all are done.
    /// No two calls at the same time have the same worker.
    pub(crate) fn run(&mut self, tasks: usize, work: &Work<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| work(0, task));
            return;
        }
        // SAFETY: only the lifetime changes. The reference is used by this call and by workers inside the job, and
        // `Closing` keeps this call from ending, even by panic, before they have left.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        let job = Job { work, tasks };
        // SAFETY: the gate is closed and nobody inside, and `&mut self` keeps other callers out.
        unsafe { *self.shared.job.get() = Job { work, tasks } };
        self.shared.next.store(0, Ordering::Relaxed);
        let number = self.shared.gate.load(Ordering::Relaxed) / JOB + 1;
        self.shared.gate.store((number * JOB) | OPEN, Ordering::SeqCst);
        let closing = Closing(&self.shared);
        self.wake();
        self.shared.work(0, &job);
        drop(closing);
        let payload = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = payload {
            panic::resume_unwind(payload);
        }
    }

    fn wake(&self) {
        for (index, worker) in self.workers.iter().enumerate() {
            if self.shared.parked[index + 1].load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker's panics were handed to `run`; there is nothing more to say about it here.
            let _ = worker.join();
        }
    }
}

/// Closes the gate and waits until everyone has left.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // On a panic tasks are left over; nobody is to begin them.
        self.0.next.store(usize::MAX / 2, Ordering::Relaxed);
        self.0.gate.fetch_and(!OPEN, Ordering::Relaxed);
        let mut waited = 0;
        while self.0.gate.load(Ordering::Acquire) & INSIDE != 0 {
            waited += 1;
            if waited < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::start(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100, 3000] {
                let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                let busy: Vec<AtomicBool> = (0..threads).map(|_| AtomicBool::new(false)).collect();
                pool.run(tasks, &|worker, task| {
                    assert!(!busy[worker].swap(true, Ordering::SeqCst), "two tasks on worker {worker}");
                    counts[task].fetch_add(1, Ordering::SeqCst);
                    busy[worker].store(false, Ordering::SeqCst);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::SeqCst) == 1), "{threads} threads");
            }
        }
    }

    #[test]
    fn parked_workers_come_back() {
        let mut pool = Pool::start(2).unwrap();
        for _ in 0..3 {
            while !pool.shared.parked[1].load(Ordering::SeqCst) {
                thread::yield_now();
            }
            // The first task ends only when the second has begun, so a second thread must come.
            let begun = AtomicUsize::new(0);
            pool.run(2, &|_, _| {
                begun.fetch_add(1, Ordering::SeqCst);
                while begun.load(Ordering::SeqCst) < 2 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::start(3).unwrap();
        for bad in [0, 63] {
            let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|_, task| assert_ne!(task, bad, "as the test wants it"));
            }));
            assert!(outcome.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, &|_, task| {
            sum.fetch_add(task, Ordering::SeqCst);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
