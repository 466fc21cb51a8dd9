//! Completion queues, and how to wait for one without keeping a core busy.

use std::{
    ffi::c_int,
    io, ptr,
    ptr::NonNull,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    abi::{self, Zeroed},
    device::{Device, check, made},
};

/// Most completions taken at a time.
const BATCH: usize = 16;

/// Where a queue pair reports its requests.
pub(super) struct CompletionQueue {
    device: Arc<Device>,
    pointer: NonNull<abi::RawCompletionQueue>,
    poll: abi::PollCq,
}

// SAFETY: libibverbs may be called from any thread.
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    /// With room for `entries` completions.
    pub(super) fn new(device: Arc<Device>, entries: u32) -> io::Result<Self> {
        let entries = c_int::try_from(entries).map_err(io::Error::other)?;
        // SAFETY: an open device; no cookie, no channel for events, and interrupt vector 0, which every device has.
        let pointer = unsafe {
            (device.library().create_cq)(device.context(), entries, ptr::null_mut(), ptr::null_mut(), 0)
        };
        let pointer = made(pointer, "make a completion queue")?;
        // SAFETY: an open device; its driver has set its functions.
        let poll = unsafe { (*device.context()).poll_cq };
        let poll = poll.ok_or_else(|| io::Error::other("the RDMA driver cannot poll"))?;
        Ok(Self { device, pointer, poll })
    }

    /// Valid as long as `self`.
    pub(super) fn pointer(&self) -> *mut abi::RawCompletionQueue {
        self.pointer.as_ptr()
    }

    /// Hands what has completed to `each`: the id of a request, and why it failed if it did. Says how many there were.
    pub(super) fn poll(&mut self, mut each: impl FnMut(u64, Result<(), String>)) -> io::Result<usize> {
        let mut found = [abi::WorkCompletion::zeroed(); BATCH];
        // SAFETY: a queue of ours, and room for as many completions as are asked for.
        let count = unsafe { (self.poll)(self.pointer(), BATCH as c_int, found.as_mut_ptr()) };
        let count = usize::try_from(count)
            .map_err(|_| io::Error::other(format!("the completion queue cannot be polled ({count})")))?;
        for completion in &found[..count.min(BATCH)] {
            let outcome = match completion.status {
                0 => Ok(()),
                status => Err(format!(
                    "{} (status {status}, vendor's {})",
                    self.device.library().describe(status),
                    completion.vendor_error
                )),
            };
            each(completion.id, outcome);
        }
        Ok(count)
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: freed once; the queue pair that reports to it has gone before.
        let code = unsafe { (self.device.library().destroy_cq)(self.pointer()) };
        if let Err(error) = check(code, "free a completion queue") {
            tracing::warn!(device = self.device.name(), %error, "RDMA object not freed");
        }
    }
}

/// How to wait between polls: a little while at full speed, for what takes microseconds, then in ever longer naps.
#[derive(Default)]
pub(super) struct Patience {
    turns: u32,
}

impl Patience {
    const SPINS: u32 = 100;
    const SHORTEST: Duration = Duration::from_micros(20);
    /// The sixth doubling of the shortest: 1.28 ms.
    const DOUBLINGS: u32 = 6;

    /// Something happened: the next wait is short again.
    pub(super) fn reset(&mut self) {
        self.turns = 0;
    }

    /// Waits a turn, at most until `deadline`.
    pub(super) fn wait(&mut self, deadline: Instant) {
        if self.turns < Self::SPINS {
            std::hint::spin_loop();
        } else {
            let nap = Self::SHORTEST * (1 << (self.turns - Self::SPINS).min(Self::DOUBLINGS));
            thread::sleep(nap.min(deadline.saturating_duration_since(Instant::now())));
        }
        self.turns = self.turns.saturating_add(1);
    }
}
