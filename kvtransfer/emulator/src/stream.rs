//! A stream: a thread that does one task after another. The first task that fails stops it for good.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::handles::lock;

/// Work for a stream; `Err` carries the ACL error that synchronising shall report.
pub(crate) type Task = Box<dyn FnOnce(&AtomicBool) -> Result<(), i32> + Send>;

#[derive(Default)]
struct State {
    waiting: VecDeque<Task>,
    running: bool,
    failed: Option<i32>,
}

/// How a stream stands after waiting for it.
pub(crate) enum Synchronised {
    Done,
    TimedOut,
    Failed(i32),
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Set when the stream is given up: tasks leave off.
    stop: AtomicBool,
}

pub(crate) struct Stream {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Stream {
    pub(crate) fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let worker = std::thread::Builder::new().name("emulated-stream".into()).spawn({
            let shared = shared.clone();
            move || work(&shared)
        })?;
        Ok(Self { shared, worker: Mutex::new(Some(worker)) })
    }

    pub(crate) fn push(&self, task: Task) {
        lock(&self.shared.state).waiting.push_back(task);
        self.shared.changed.notify_all();
    }

    /// Waits until all tasks are done; for ever where `timeout` is `None`.
    pub(crate) fn synchronise(&self, timeout: Option<Duration>) -> Synchronised {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(error) = state.failed {
                return Synchronised::Failed(error);
            }
            if state.waiting.is_empty() && !state.running {
                return Synchronised::Done;
            }
            let left = match until {
                None => Duration::from_secs(3600),
                Some(until) => until.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                return Synchronised::TimedOut;
            }
            state = match self.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Lets go of all tasks, those under way as well; when it returns none of them touches memory any more.
    pub(crate) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.changed.notify_all();
        if let Some(worker) = lock(&self.worker).take() {
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut state = lock(&shared.state);
    while !shared.stop.load(Ordering::Acquire) {
        let Some(task) = state.waiting.pop_front().filter(|_| state.failed.is_none()) else {
            // Woken a little late at worst: `stop` does not hold the lock when it notifies.
            let waited = shared.changed.wait_timeout(state, Duration::from_millis(20));
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            continue;
        };
        state.running = true;
        drop(state);
        let result = task(&shared.stop);
        state = lock(&shared.state);
        state.running = false;
        if let Err(error) = result {
            state.failed = Some(error);
        }
        shared.changed.notify_all();
    }
}
