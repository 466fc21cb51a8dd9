//! Registered memory: the node's region, known to one device.

use std::{io, mem::ManuallyDrop, ptr::NonNull, sync::Arc};

use super::{
    abi,
    device::{Device, check, made},
};
use crate::Region;

/// What the device's addresses of the region start from is cut to this, see [`MemoryRegion::base`].
const LARGEST_PAGE: u64 = 1 << 21;

/// What keeps the objects of one device together.
pub(super) struct ProtectionDomain {
    device: Arc<Device>,
    pointer: NonNull<abi::RawProtectionDomain>,
}

// SAFETY: libibverbs may be called from any thread, and what is here does not change.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(super) fn new(device: Arc<Device>) -> io::Result<Self> {
        // SAFETY: an open device.
        let pointer = unsafe { (device.library().alloc_pd)(device.context()) };
        Ok(Self { pointer: made(pointer, "make a protection domain")?, device })
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Valid as long as `self`.
    pub(super) fn pointer(&self) -> *mut abi::RawProtectionDomain {
        self.pointer.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: freed once; everything made in it holds it and has gone before.
        let code = unsafe { (self.device.library().dealloc_pd)(self.pointer()) };
        if let Err(error) = check(code, "free a protection domain") {
            tracing::warn!(device = self.device.name(), %error, "RDMA object not freed");
        }
    }
}

/// The node's region as registered with one device: readable for peers that have its key and a queue pair here.
pub(super) struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    pointer: NonNull<abi::RawMemoryRegion>,
    base: u64,
    local_key: u32,
    remote_key: u32,
    region: ManuallyDrop<Region>,
}

// SAFETY: libibverbs may be called from any thread, and what is here does not change.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    pub(super) fn register(domain: Arc<ProtectionDomain>, region: &Region) -> io::Result<Self> {
        let (start, device) = (region.base(), domain.device());
        if region.len() as u64 > device.max_region_bytes() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{} registers at most {} bytes", device.name(), device.max_region_bytes()),
            ));
        }
        let base = start.as_ptr() as u64 % LARGEST_PAGE;
        let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_READ;
        // SAFETY: the bytes are valid for as long as the region is held, which is until they are registered no more. That
        // the device writes them is what the contract of `Region::new` allows transports: it does so only where
        // `QueuePair::post_reads` tells it to. A peer that reads what is just being written gets torn bytes, which is
        // its own loss.
        let pointer = unsafe {
            (device.library().reg_mr_iova)(
                domain.pointer(),
                start.as_ptr().cast(),
                region.len(),
                base,
                access,
            )
        };
        let what = format!(
            "register {} bytes with {} (the limit of locked memory, `ulimit -l`, must allow it)",
            region.len(),
            device.name()
        );
        let pointer = made(pointer, &what)?;
        // SAFETY: the library has just made it; its keys never change.
        let (local_key, remote_key) =
            unsafe { ((*pointer.as_ptr()).local_key, (*pointer.as_ptr()).remote_key) };
        Ok(Self { domain, pointer, base, local_key, remote_key, region: ManuallyDrop::new(region.clone()) })
    }

    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    pub(super) fn local_key(&self) -> u32 {
        self.local_key
    }

    pub(super) fn remote_key(&self) -> u32 {
        self.remote_key
    }

    /// What peers call the region's first byte. Not its address; but kernels insist that it lie in a page where the
    /// address does, and devices use large pages only where that holds for those too.
    pub(super) fn base(&self) -> u64 {
        self.base
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: freed once; queue pairs whose requests name it hold it and have gone before.
        let code = unsafe { (self.domain.device().library().dereg_mr)(self.pointer.as_ptr()) };
        match check(code, "end the registration of memory") {
            // SAFETY: not used after this.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.region) },
            // The device may still reach the memory: it is never given back.
            Err(error) => {
                tracing::error!(device = self.domain.device().name(), %error, "memory kept for good")
            }
        }
    }
}
