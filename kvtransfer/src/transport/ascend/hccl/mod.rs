//! HCCL communicators, the fallback where HIXL is missing: two ranks to a pair of nodes, each side names what it sends or
//! receives, in the same order and sizes.
//!
//! Each operation has a high fixed cost (0.7 GB/s at 16 KiB, 20 GB/s at 2 MiB on A2), so slices that lie side by side at
//! both ends are one piece; scattered ones are one each. A card has room for some 512 communicators, so a node keeps one
//! for each peer.
//!
//! States: joined -> failed (destroyed). What is queued cannot be cancelled alone; on failure or timeout the communicator
//! and the stream are destroyed before the error is returned, which is the fence: then memory may be used again.

mod medium;

use std::{
    ffi::{c_int, c_void},
    io,
    mem::size_of,
    path::PathBuf,
    ptr::{NonNull, null_mut},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    acl::{Acl, Device, Stream},
    library::{Search, Unavailable, functions},
};
use crate::{Region, transport::fence};

pub(crate) use medium::HcclMedium;
#[cfg(test)]
pub(crate) use medium::MOST_JOINING;

/// How rank 0 is found; the other side gets its bytes over the control stream.
#[repr(C)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct RootInfo([u8; 4108]);

const _: () = assert!(size_of::<RootInfo>() == 4108);

impl RootInfo {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// `HCCL_DATA_TYPE_INT8`: plain bytes.
const INT8: c_int = 0;
const SUCCESS: c_int = 0;

/// Between two looks at the communicator while its operations run.
const LOOK_EVERY: Duration = Duration::from_millis(20);

functions! {
    /// `libhcomm.so`. `HcclResult` and the data type are `int`s, a communicator is a `void *`.
    HcclFunctions {
        root_info = HcclGetRootInfo(*mut RootInfo) -> c_int;
        init = HcclCommInitRootInfo(u32, *const RootInfo, u32, *mut *mut c_void) -> c_int;
        send = HcclSend(*mut c_void, u64, c_int, u32, *mut c_void, *mut c_void) -> c_int;
        receive = HcclRecv(*mut c_void, u64, c_int, u32, *mut c_void, *mut c_void) -> c_int;
        async_error = HcclGetCommAsyncError(*mut c_void, *mut c_int) -> c_int;
        destroy = HcclCommDestroy(*mut c_void) -> c_int;
    }
}

/// The library and the runtime it stands on.
pub(crate) struct Hccl {
    functions: HcclFunctions,
    acl: Arc<Acl>,
    pub(crate) file: PathBuf,
}

impl Hccl {
    pub(crate) fn open(search: &Search, acl: Arc<Acl>) -> Result<Arc<Self>, Unavailable> {
        let library = search.open(&["libhcomm.so", "libhccl.so"])?;
        let functions = HcclFunctions::load(&library)?;
        Ok(Arc::new(Self { functions, acl, file: library.keep() }))
    }

    pub(crate) fn device(&self, id: u32) -> io::Result<Arc<Device>> {
        self.acl.device(id)
    }

    /// What the other side needs to join this one. For one pair only.
    pub(crate) fn root_info(&self, device: &Device) -> io::Result<RootInfo> {
        device.enter()?;
        let mut info = RootInfo([0; 4108]);
        // SAFETY: `info` may be written and has the size that the documents give.
        let status = unsafe { (self.functions.root_info)(&mut info) };
        if status == SUCCESS { Ok(info) } else { Err(device.failed("HcclGetRootInfo", status.into())) }
    }
}

/// Which side of a pair this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    /// Made the root info.
    Root,
    /// Was given it.
    Other,
}

/// Two nodes that exchange bytes between their regions.
pub(crate) struct HcclPair {
    peer: u32,
    /// Pieces must lie within it.
    region: Region,
    /// `None` once it failed.
    live: Option<Live>,
}

/// What has not been destroyed.
struct Live {
    hccl: Arc<Hccl>,
    device: Arc<Device>,
    communicator: *mut c_void,
    stream: Stream,
}

// SAFETY: communicators may be used from any thread that has set its context, by one at a time (`&mut self` or by value).
unsafe impl Send for Live {}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

impl HcclPair {
    /// Joins the other side. Blocks until it is there, or for as long as the library waits (`HCCL_CONNECT_TIMEOUT`
    /// seconds, 120 by default; it takes no deadline). `region` is device memory.
    pub(crate) fn join(
        hccl: &Arc<Hccl>,
        device: &Arc<Device>,
        root: &RootInfo,
        rank: Rank,
        region: &Region,
    ) -> io::Result<Self> {
        device.enter()?;
        let (rank, peer) = match rank {
            Rank::Root => (0, 1),
            Rank::Other => (1, 0),
        };
        let stream = device.stream()?;
        let mut communicator = null_mut();
        // SAFETY: the root info lives through the call; `communicator` may be written.
        let status = unsafe { (hccl.functions.init)(2, root, rank, &mut communicator) };
        if status != SUCCESS {
            let error = device.failed("HcclCommInitRootInfo", status.into());
            if let Err(error) = stream.destroy() {
                tracing::warn!(%error, "an idle stream could not be destroyed");
            }
            return Err(error);
        }
        let live = Live { hccl: hccl.clone(), device: device.clone(), communicator, stream };
        Ok(Self { peer, region: region.clone(), live: Some(live) })
    }

    /// Sends these pieces, in order; the other side receives as many, of the same sizes.
    pub(crate) fn send(&mut self, pieces: &[(NonNull<u8>, usize)], deadline: Instant) -> io::Result<()> {
        self.exchange(pieces, Way::Out, deadline)
    }

    /// Receives into these pieces. After it returns nothing writes to them any more.
    pub(crate) fn recv(&mut self, pieces: &[(NonNull<u8>, usize)], deadline: Instant) -> io::Result<()> {
        self.exchange(pieces, Way::In, deadline)
    }

    /// An error ends the pair: the other side would wait for what does not come, or take one piece for another.
    fn exchange(&mut self, pieces: &[(NonNull<u8>, usize)], way: Way, deadline: Instant) -> io::Result<()> {
        let Some(live) = self.live.take() else {
            return Err(io::Error::other("this HCCL pair failed before"));
        };
        if let Err(error) = self.check(pieces) {
            // Nothing is under way.
            live.close();
            return Err(error);
        }
        let result = live.exchange(pieces, way, self.peer, deadline);
        match result {
            Ok(()) => self.live = Some(live),
            Err(_) => live.destroy(),
        }
        result
    }

    fn check(&self, pieces: &[(NonNull<u8>, usize)]) -> io::Result<()> {
        let (base, size) = (self.region.base().addr().get(), self.region.len());
        let inside = |&(start, len): &(NonNull<u8>, usize)| {
            let at = start.addr().get().checked_sub(base);
            len > 0 && at.and_then(|at| at.checked_add(len)).is_some_and(|end| end <= size)
        };
        match pieces.iter().position(|piece| !inside(piece)) {
            None => Ok(()),
            Some(at) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("piece {at} is empty or lies outside of this node's region"),
            )),
        }
    }
}

impl Drop for HcclPair {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            live.close();
        }
    }
}

impl Live {
    fn exchange(
        &self,
        pieces: &[(NonNull<u8>, usize)],
        way: Way,
        peer: u32,
        deadline: Instant,
    ) -> io::Result<()> {
        self.device.enter()?;
        let (operation, name) = match way {
            Way::Out => (self.hccl.functions.send, "HcclSend"),
            Way::In => (self.hccl.functions.receive, "HcclRecv"),
        };
        for &(start, len) in pieces {
            let buffer = start.as_ptr().cast();
            // SAFETY: a live communicator and stream; the bytes lie within the region (`check`), which the pair keeps
            // alive, and are the caller's until this returns: the stream is synchronised or destroyed by then.
            let status =
                unsafe { operation(buffer, len as u64, INT8, peer, self.communicator, self.stream.handle()) };
            if status != SUCCESS {
                return Err(self.device.failed(name, status.into()));
            }
        }
        self.wait(deadline)
    }

    /// In short waits, as only the communicator knows that the other side is gone.
    fn wait(&self, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = self.stream.synchronise(left.min(LOOK_EVERY));
            // First, as it says more than a stream that failed.
            self.healthy()?;
            if waited? {
                return Ok(());
            }
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the other side of an HCCL pair did not do its part by the deadline",
                ));
            }
        }
    }

    fn healthy(&self) -> io::Result<()> {
        let mut state = SUCCESS;
        // SAFETY: a live communicator; `state` may be written.
        let status = unsafe { (self.hccl.functions.async_error)(self.communicator, &mut state) };
        match (status, state) {
            (SUCCESS, SUCCESS) => Ok(()),
            (SUCCESS, state) => Err(io::Error::other(format!("the HCCL communicator broke: result {state}"))),
            (status, _) => Err(self.device.failed("HcclGetCommAsyncError", status.into())),
        }
    }

    /// The fence. When it returns, nothing that was queued touches memory any more.
    fn destroy(self) {
        fence::established("destroying an HCCL communicator and its stream", self.end());
    }

    /// Ends a pair that has nothing under way.
    fn close(self) {
        if let Err(error) = self.end() {
            tracing::warn!(%error, "an idle HCCL pair could not be destroyed");
        }
    }

    fn end(self) -> io::Result<()> {
        let Self { hccl, device, communicator, stream } = self;
        let leave = || {
            // Tried without a context as well: the fence matters more than why the context cannot be set.
            let entered = device.enter();
            // SAFETY: a live communicator, called once, and not used again: `self` ends here.
            match unsafe { (hccl.functions.destroy)(communicator) } {
                SUCCESS => Ok(()),
                status => entered.and_then(|()| Err(device.failed("HcclCommDestroy", status.into()))),
            }
        };
        // A stream whose end can be forced goes first, as it is what moves bytes. Where it cannot, its queue must run
        // dry, and an operation whose other side is gone ends only with the communicator.
        if stream.can_be_forced() {
            let ended = stream.destroy();
            leave().and(ended)
        } else {
            let left = leave();
            stream.destroy().and(left)
        }
    }
}
