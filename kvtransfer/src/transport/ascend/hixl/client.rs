//! The side that reads: one client for each peer, connected once and used by one thread at a time.
//!
//! States: connected -> poisoned (destroyed). A batch cannot be cancelled; when one fails, or is not done by its
//! deadline, the client is destroyed before the error is returned. Destroying is the fence: the library takes the
//! connection down and then nothing can arrive any more.

use std::{
    collections::VecDeque,
    ffi::{CStr, c_void},
    io,
    ptr::null_mut,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Endpoint, Hixl, HixlAddress, Memory, TAG,
    abi::{COMPLETED, ClientDesc, Config, OK, OneSideOp, STATUS_TIMED_OUT, TIMED_OUT, WAITING},
    described, host_text,
};
use crate::{
    Region,
    transport::{
        ascend::acl::Device,
        fence,
        fetch::{Piece, RemoteRegion},
    },
};

/// Pieces in a batch, and batches under way. The library's limit is 4,096 tasks that have not been queried; its documents
/// also speak of 4,000 pieces at a time. This keeps to both, and with blocks of 16 KiB 48 MiB are under way: plenty.
pub(super) const MOST_PIECES: usize = 1024;
pub(super) const MOST_BATCHES: usize = 3;

/// Slices side by side are read as one piece up to this size: each piece is a task of its own to the library.
const JOINED_BYTES: usize = 1 << 20;

/// Between two looks at a batch: a few microseconds at first, then longer, so that a long read does not burn a core.
const FIRST_PAUSE: Duration = Duration::from_micros(5);
const LAST_PAUSE: Duration = Duration::from_micros(500);

/// A peer's region, through HIXL.
pub(crate) struct HixlClient {
    peer: HixlAddress,
    /// Pieces must lie within it.
    region: Region,
    /// `None` once poisoned.
    live: Option<Live>,
}

/// A client that has not been destroyed.
struct Live {
    hixl: Arc<Hixl>,
    device: Arc<Device>,
    handle: *mut c_void,
    registration: Option<*mut c_void>,
    /// The peer's region, where the peer has it.
    remote: *mut c_void,
    remote_len: u64,
}

// SAFETY: the handles may be used from any thread that has set its context, by one at a time (`&mut self` or by value).
unsafe impl Send for Live {}

impl HixlClient {
    /// Connects to the server at `peer`, to read from its region into `region`.
    pub(crate) fn connect(
        hixl: &Arc<Hixl>,
        device: &Arc<Device>,
        endpoint: Endpoint,
        peer: HixlAddress,
        region: &Region,
        memory: Memory,
        deadline: Instant,
    ) -> io::Result<Self> {
        if region.is_empty() {
            return Err(io::Error::other("nothing can be read into an empty region"));
        }
        let mut live = Live::create(hixl, device, endpoint, peer)?;
        if let Err(error) = live.prepare(region, memory, deadline) {
            live.close();
            return Err(io::Error::new(error.kind(), format!("HIXL server {peer}: {error}")));
        }
        Ok(Self { peer, region: region.clone(), live: Some(live) })
    }

    fn ops(&self, live: &Live, pieces: &[Piece]) -> io::Result<Vec<OneSideOp>> {
        let (base, size) = (self.region.base().addr().get(), self.region.len());
        let op = |piece: &Piece| {
            let len = piece.len as u64;
            let there = piece.remote.checked_add(len).is_some_and(|end| end <= live.remote_len);
            let here = piece.local.addr().get().checked_sub(base);
            let here = here.is_some_and(|at| at.checked_add(piece.len).is_some_and(|end| end <= size));
            if !there || !here {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "{} bytes at {} lie outside of the peer's {} bytes or of this node's region",
                        piece.len, piece.remote, live.remote_len
                    ),
                ));
            }
            // Only an address to hand back: the peer's memory is never touched from here.
            let remote = live.remote.wrapping_byte_add(piece.remote as usize);
            Ok(OneSideOp { remote, local: piece.local.as_ptr().cast(), len })
        };
        pieces.iter().filter(|piece| piece.len > 0).map(op).collect()
    }
}

impl RemoteRegion for HixlClient {
    fn len(&self) -> u64 {
        self.live.as_ref().map_or(0, |live| live.remote_len)
    }

    fn joins(&self) -> usize {
        JOINED_BYTES
    }

    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()> {
        let Some(live) = self.live.take() else {
            return Err(io::Error::other(format!("HIXL client of {} failed before", self.peer)));
        };
        let ops = match self.ops(&live, pieces) {
            Ok(ops) => ops,
            Err(error) => {
                // Nothing is under way.
                live.close();
                return Err(error);
            }
        };
        if let Err(error) = live.read(&ops, deadline) {
            live.destroy();
            return Err(io::Error::new(error.kind(), format!("HIXL server {}: {error}", self.peer)));
        }
        self.live = Some(live);
        Ok(())
    }
}

impl Drop for HixlClient {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            live.close();
        }
    }
}

impl Live {
    fn create(
        hixl: &Arc<Hixl>,
        device: &Arc<Device>,
        endpoint: Endpoint,
        peer: HixlAddress,
    ) -> io::Result<Self> {
        device.enter()?;
        let (host, local, remote) = (host_text(peer.host)?, endpoint.described(), peer.endpoint.described());
        let desc = ClientDesc {
            local: &local,
            remote: &remote,
            host: host.as_ptr(),
            port: peer.host.port().into(),
            traffic_class: 0,
            service_level: 0,
            reserved: [0; 98],
        };
        let mut handle = null_mut();
        // SAFETY: the description, what it points to and the configuration live through the call; `handle` may be
        // written.
        let status = unsafe { (hixl.functions.client_create)(&desc, &Config::DEFAULT, &mut handle) };
        if status != OK {
            return Err(device.failed("HixlCSClientCreate", status.into()));
        }
        let (hixl, device) = (hixl.clone(), device.clone());
        Ok(Self { hixl, device, handle, registration: None, remote: null_mut(), remote_len: 0 })
    }

    /// Registers this side's memory, connects, and finds the peer's region.
    fn prepare(&mut self, region: &Region, memory: Memory, deadline: Instant) -> io::Result<()> {
        let functions = &self.hixl.functions;
        let (mem, mut registration) = (described(region, memory), null_mut());
        // SAFETY: a live client, and a region that outlives it (`HixlClient` holds it, and drops it after); the tag and
        // the description live through the call; `registration` may be written.
        let status =
            unsafe { (functions.client_register)(self.handle, TAG.as_ptr(), &mem, &mut registration) };
        if status != OK {
            return Err(self.device.failed("HixlCSClientRegMem", status.into()));
        }
        self.registration = Some(registration);
        // SAFETY: a live client.
        let status = unsafe { (functions.client_connect)(self.handle, milliseconds_until(deadline)?) };
        match status {
            OK => self.find_region(deadline),
            TIMED_OUT => Err(timed_out("connecting")),
            _ => Err(self.device.failed("HixlCSClientConnect", status.into())),
        }
    }

    fn find_region(&mut self, deadline: Instant) -> io::Result<()> {
        let (mut mems, mut tags, mut count) = (null_mut(), null_mut(), 0);
        let left = milliseconds_until(deadline)?;
        let get = self.hixl.functions.client_remote_memory;
        // SAFETY: a live, connected client; the three places may be written.
        let status = unsafe { get(self.handle, &mut mems, &mut tags, &mut count, left) };
        if status != OK {
            return Err(self.device.failed("HixlCSClientGetRemoteMem", status.into()));
        }
        for at in 0..count as usize {
            if mems.is_null() || tags.is_null() {
                break;
            }
            // SAFETY: not NULL, so both lists have `count` entries and, like the strings, live until the next call.
            let (mem, tag) = unsafe { (*mems.add(at), *tags.add(at)) };
            // SAFETY: as above; a region without a tag has NULL.
            if !tag.is_null() && unsafe { CStr::from_ptr(tag) } == TAG {
                (self.remote, self.remote_len) = (mem.address, mem.size);
                return Ok(());
            }
        }
        Err(io::Error::other("lends no region of KV blocks; is it a Baton server that has just started?"))
    }

    fn read(&self, ops: &[OneSideOp], deadline: Instant) -> io::Result<()> {
        self.device.enter()?;
        let mut batches = ops.chunks(MOST_PIECES);
        let mut waiting: VecDeque<*mut c_void> = VecDeque::with_capacity(MOST_BATCHES);
        let mut pause = FIRST_PAUSE;
        loop {
            if Instant::now() >= deadline {
                return Err(timed_out("reading"));
            }
            while waiting.len() < MOST_BATCHES
                && let Some(batch) = batches.next()
            {
                waiting.push_back(self.submit(batch)?);
            }
            let before = waiting.len();
            let mut failed = None;
            waiting.retain(|batch| match self.completed(*batch) {
                Ok(done) => !done,
                Err(error) => {
                    failed.get_or_insert(error);
                    false
                }
            });
            if let Some(error) = failed {
                return Err(error);
            }
            if waiting.is_empty() && batches.len() == 0 {
                return Ok(());
            }
            if waiting.len() < before {
                pause = FIRST_PAUSE;
            } else {
                std::thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }

    fn submit(&self, batch: &[OneSideOp]) -> io::Result<*mut c_void> {
        let mut handle = null_mut();
        // SAFETY: a live, connected client; `batch` outlives the batch (`HixlClient::read` holds the pieces until it is
        // done or the client destroyed), each piece lies within both regions, and the local bytes are the caller's to
        // write until `read` returns; `handle` may be written.
        let status = unsafe {
            (self.hixl.functions.client_batch_get)(
                self.handle,
                batch.len() as u32,
                batch.as_ptr(),
                &mut handle,
            )
        };
        if status != OK {
            return Err(self.device.failed("HixlCSClientBatchGetAsync", status.into()));
        }
        Ok(handle)
    }

    fn completed(&self, batch: *mut c_void) -> io::Result<bool> {
        let mut state = WAITING;
        // SAFETY: a live client and a batch whose end has not been seen yet; `state` may be written.
        let status = unsafe { (self.hixl.functions.client_query)(self.handle, batch, &mut state) };
        match (status, state) {
            (OK, COMPLETED) => Ok(true),
            (OK, WAITING) => Ok(false),
            (OK, STATUS_TIMED_OUT) => Err(io::Error::other("a batch timed out within HIXL")),
            (OK, state) => Err(self.device.failed("a batch", state.into())),
            (status, _) => Err(self.device.failed("HixlCSClientQueryCompleteStatus", status.into())),
        }
    }

    /// The fence. When it returns, nothing that was under way can write any more.
    fn destroy(self) {
        fence::established("HixlCSClientDestroy", self.end());
    }

    /// Ends a client that has nothing under way.
    fn close(mut self) {
        if let Some(registration) = self.registration.take() {
            // The documents would have memory unregistered before; destroying gives it back as well.
            let entered = self.device.enter();
            // SAFETY: a live client's registration, with nothing under way.
            let status = unsafe { (self.hixl.functions.client_unregister)(self.handle, registration) };
            if entered.is_err() || status != OK {
                tracing::debug!(
                    status,
                    "HIXL memory could not be unregistered before its client was destroyed"
                );
            }
        }
        if let Err(error) = self.end() {
            tracing::warn!(%error, "an idle HIXL client could not be destroyed");
        }
    }

    fn end(self) -> io::Result<()> {
        // Tried without a context as well: the fence matters more than why the context cannot be set.
        let entered = self.device.enter();
        // SAFETY: a live client, not used again: `self` ends here.
        let status = unsafe { (self.hixl.functions.client_destroy)(self.handle) };
        match status {
            OK => Ok(()),
            _ => entered.and_then(|()| Err(self.device.failed("HixlCSClientDestroy", status.into()))),
        }
    }
}

fn timed_out(doing: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("not done {doing} by the deadline"))
}

/// As the library takes it: at least 1, so that it is not taken for "no limit".
fn milliseconds_until(deadline: Instant) -> io::Result<u32> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(timed_out("connecting"));
    }
    Ok(u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1))
}
