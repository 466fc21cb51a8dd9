//! Queue pairs: one end of a reliable connection between two ports.
//!
//! States: made INIT, to *ready to receive* once the peer's end is known (it answers reads), to *ready to send* (it reads
//! too), and to *error*, from which nothing leads back.

use std::{
    ffi::c_int,
    io, ptr,
    ptr::NonNull,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    abi::{self, Zeroed, sets},
    completion::CompletionQueue,
    device::{ActivePort, check, made},
    memory::MemoryRegion,
    parameters::{Endpoint, Window},
    stripe::Chunk,
};
use crate::transport::{Waits, fence};

/// Most requests handed to the device at a time.
pub(super) const BATCH: usize = 16;

/// 4.096 us * 2^14 = 67 ms without an answer, and as many times again as there are retries: half a second to two, as devices
/// choose, until a peer that is gone is noticed. Less where a read has less time. Not seven retries, the most there can be:
/// Soft-RoCE takes that for endlessly many.
const LONGEST_TIMEOUT: u8 = 14;
const RETRIES: u8 = 6;
/// Devices wait for up to so many times as long as they are told.
const DEVICES_CHOICE: u32 = 4;
/// A read needs no receive buffer; a device that pages memory in may still ask for a little time.
const RNR_RETRIES: u8 = 6;
/// 0.64 ms.
const MIN_RNR_TIMER: u8 = 12;
const HOP_LIMIT: u8 = 64;
/// Pause between two attempts to destroy what the device would not.
const DESTROY_PAUSE: Duration = Duration::from_millis(100);

/// The device's number for how long it waits for an answer: a peer that is gone is noticed before a read is given up, if
/// that may take `stall`.
fn timeout(stall: Duration) -> u8 {
    let noticed =
        |timeout: &u8| Duration::from_nanos(4096 << timeout) * (1 + u32::from(RETRIES)) * DEVICES_CHOICE;
    (1..=LONGEST_TIMEOUT).rev().find(|timeout| noticed(timeout) < stall).unwrap_or(1)
}

/// One end of a connection. Dropping it returns once the device can no longer touch memory on its behalf.
pub(super) struct QueuePair {
    pointer: NonNull<abi::RawQueuePair>,
    number: u32,
    post: abi::PostSend,
    /// Its requests and its peer's name this memory.
    memory: Arc<MemoryRegion>,
    completions: CompletionQueue,
    waits: Waits,
}

// SAFETY: libibverbs may be called from any thread.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair with room for `depth` requests, which lets its peer read the region if `readable`.
    pub(super) fn new(
        memory: Arc<MemoryRegion>,
        port: &ActivePort,
        depth: u32,
        readable: bool,
        waits: Waits,
    ) -> io::Result<Self> {
        let domain = memory.domain();
        let device = domain.device();
        let completions = CompletionQueue::new(device.clone(), depth + 1)?;
        let mut wanted = abi::NewQueuePair {
            cookie: ptr::null_mut(),
            send_queue: completions.pointer(),
            receive_queue: completions.pointer(),
            shared_receive: ptr::null_mut(),
            sizes: abi::QueueSizes {
                send_requests: depth,
                receive_requests: 1,
                send_entries: 1,
                receive_entries: 1,
                inline_bytes: 0,
            },
            kind: abi::KIND_RC,
            signal_all: 0,
        };
        // SAFETY: a protection domain and a completion queue that are alive, and a whole request.
        let pointer = unsafe { (device.library().create_qp)(domain.pointer(), &mut wanted) };
        let pointer = made(pointer, "make a queue pair")?;
        // SAFETY: the library has just made it, on an open device whose driver has set its functions.
        let (number, post) = unsafe { ((*pointer.as_ptr()).number, (*device.context()).post_send) };
        let post = post.unwrap_or(post_nothing);
        let pair = Self { pointer, number, post, memory, completions, waits };
        let mut to = abi::QueuePairAttributes::zeroed();
        to.state = abi::STATE_INIT;
        to.port = port.number;
        to.access = if readable { abi::ACCESS_REMOTE_READ } else { 0 };
        pair.modify(&mut to, sets::STATE | sets::PKEY_INDEX | sets::PORT | sets::ACCESS)?;
        Ok(pair)
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn completions(&mut self) -> &mut CompletionQueue {
        &mut self.completions
    }

    /// Lets the peer's end reach this one, with as many reads at a time as `reads_in`.
    pub(super) fn connect(&self, port: &ActivePort, peer: &Endpoint, reads_in: u8) -> io::Result<()> {
        let mut to = abi::QueuePairAttributes::zeroed();
        to.state = abi::STATE_READY_TO_RECEIVE;
        to.mtu = port.mtu.min(peer.mtu).into();
        to.peer_number = peer.number;
        to.receive_psn = peer.psn;
        to.reads_in = reads_in;
        to.min_rnr_timer = MIN_RNR_TIMER;
        to.path.gid = peer.gid;
        to.path.is_global = 1;
        to.path.own_gid_index = port.gid_index;
        to.path.hop_limit = HOP_LIMIT;
        to.path.port = port.number;
        let set = sets::STATE
            | sets::PATH
            | sets::MTU
            | sets::PEER_NUMBER
            | sets::RECEIVE_PSN
            | sets::READS_IN
            | sets::MIN_RNR_TIMER;
        self.modify(&mut to, set)
    }

    /// Lets this end read, once it is connected: as many reads at a time as `reads_out`.
    pub(super) fn start(&self, own_psn: u32, reads_out: u8) -> io::Result<()> {
        let mut to = abi::QueuePairAttributes::zeroed();
        to.state = abi::STATE_READY_TO_SEND;
        to.send_psn = own_psn;
        to.reads_out = reads_out;
        to.timeout = timeout(self.waits.stall);
        to.retries = RETRIES;
        to.rnr_retries = RNR_RETRIES;
        let set = sets::STATE
            | sets::SEND_PSN
            | sets::READS_OUT
            | sets::TIMEOUT
            | sets::RETRIES
            | sets::RNR_RETRIES;
        self.modify(&mut to, set)
    }

    /// Ends the connection: what is on the way completes with an error.
    pub(super) fn fail(&self) -> io::Result<()> {
        let mut to = abi::QueuePairAttributes::zeroed();
        to.state = abi::STATE_ERROR;
        self.modify(&mut to, sets::STATE)
    }

    fn modify(&self, to: &mut abi::QueuePairAttributes, set: c_int) -> io::Result<()> {
        let library = self.memory.domain().device().library();
        // SAFETY: a queue pair that is alive, and attributes that are whole.
        let code = unsafe { (library.modify_qp)(self.pointer.as_ptr(), to, set) };
        check(code, &format!("set a queue pair to state {}", to.state))
    }

    /// Asks for up to [`BATCH`] reads; the first has id `first`, the others follow. Reports those `signalled` picks.
    ///
    /// # Errors
    /// If the device refuses, or a chunk goes outside the node's region. Some of them may be on the way then.
    pub(super) fn post_reads(
        &mut self,
        chunks: &[Chunk],
        window: &Window,
        first: u64,
        signalled: impl Fn(u64) -> bool,
    ) -> io::Result<()> {
        if chunks.is_empty() || chunks.len() > BATCH {
            return Err(io::Error::other("a batch of no reads or of too many"));
        }
        let mut entries = [abi::ScatterEntry::zeroed(); BATCH];
        let mut requests = [abi::WorkRequest::zeroed(); BATCH];
        for ((chunk, entry), (request, id)) in
            chunks.iter().zip(&mut entries).zip(requests.iter_mut().zip(first..))
        {
            let end = chunk.local.checked_add(chunk.len.into());
            if end.is_none_or(|end| end > self.memory.region().len() as u64) {
                return Err(io::Error::other("a piece would be read to outside the node's region"));
            }
            entry.address = self.memory.base() + chunk.local; // the device's name for it, not its address
            entry.length = chunk.len;
            entry.local_key = self.memory.local_key();
            request.id = id;
            request.entries = entry;
            request.entry_count = 1;
            request.operation = abi::OPERATION_READ;
            request.flags = if signalled(id) { abi::FLAG_SIGNALLED } else { 0 };
            request.remote_address = window.base.wrapping_add(chunk.remote);
            request.remote_key = window.key;
        }
        let start = requests.as_mut_ptr();
        for at in 1..chunks.len() {
            // SAFETY: both are within the array.
            unsafe { (*start.add(at - 1)).next = start.add(at) };
        }
        let mut refused = ptr::null_mut();
        // SAFETY: a queue pair that is alive, and a chain of requests which, with their entries, lives until this returns:
        // the device has its own copy then. The memory they name is registered and inside the region (checked above), and
        // `self` holds it until the device can no longer write to it.
        let code = unsafe { (self.post)(self.pointer.as_ptr(), start, &mut refused) };
        check(code, "ask for a read")
    }
}

/// Stands in for a driver that cannot send.
unsafe extern "C" fn post_nothing(
    _: *mut abi::RawQueuePair,
    _: *mut abi::WorkRequest,
    _: *mut *mut abi::WorkRequest,
) -> c_int {
    95 // not supported
}

impl Drop for QueuePair {
    /// Memory that the device may still write to, or a peer read, must not be used for anything else: so this returns
    /// only once the device has agreed. The kernel answers yes for devices that are gone.
    fn drop(&mut self) {
        let device = self.memory.domain().device();
        let until = Instant::now() + self.waits.destroy;
        let destroyed = loop {
            // SAFETY: destroyed once: the library keeps it if it says no.
            let code = unsafe { (device.library().destroy_qp)(self.pointer.as_ptr()) };
            let tried = check(code, "destroy a queue pair");
            let left = until.saturating_duration_since(Instant::now());
            if tried.is_ok() || left.is_zero() {
                break tried;
            }
            thread::sleep(DESTROY_PAUSE.min(left));
        };
        fence::established(device.name(), destroyed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_is_gone_is_noticed_before_a_read_is_given_up() {
        for (millis, number) in [(10_000, 14), (1879, 13), (1000, 13), (100, 9), (30, 8), (0, 1)] {
            assert_eq!(timeout(Duration::from_millis(millis)), number, "{millis} ms");
        }
    }
}
