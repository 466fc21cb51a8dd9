//! HIXL-CS: a server lends regions, a client reads them. The two meet over TCP at the server's host address.

mod batch;
mod client;
mod server;
mod wire;

use std::{
    ffi::{c_char, c_void},
    net::{IpAddr, SocketAddr},
};

use crate::{acl, memory, raw};

pub(crate) use client::live_clients;

const OK: u32 = 0;
const BAD_PARAMETER: u32 = 103_900;
const TIMED_OUT: u32 = 103_901;
const FAILED: u32 = 503_900;

/// Sizes in the documents.
const DESC_LEN: usize = 128;
const CONFIG_LEN: usize = 128;

/// A registered region.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Registered {
    kind: i32,
    start: u64,
    len: u64,
    tag: String,
}

impl Registered {
    fn holds(&self, start: u64, len: u64) -> bool {
        start >= self.start && start.checked_add(len).is_some_and(|end| end <= self.start + self.len)
    }

    /// Reads a `CommMem` (24 bytes: type, address at 8, size at 16) and checks that the memory is what it says.
    ///
    /// # Safety
    /// `mem` is NULL or points to a `CommMem`, `tag` is NULL or a C string.
    unsafe fn read(mem: *const c_void, tag: *const c_char) -> Option<Self> {
        if mem.is_null() {
            return acl::explain(None, c"no memory is described");
        }
        // SAFETY: promised by the caller.
        let (kind, start, len) =
            unsafe { (raw::field::<i32>(mem, 0), raw::field::<u64>(mem, 8), raw::field::<u64>(mem, 16)) };
        // SAFETY: promised by the caller.
        let tag = unsafe { raw::text(tag) }.unwrap_or_default();
        let (from, bytes) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
        let right = match kind {
            0 => memory::on_device(from, bytes),
            1 => from != 0 && !memory::touches_device(from, bytes),
            _ => return acl::explain(None, c"no such type of memory"),
        };
        if bytes == 0 || !right {
            return acl::explain(None, c"the memory is not of the type it is registered as");
        }
        Some(Self { kind, start, len, tag })
    }
}

/// Whether an endpoint is filled in (160 bytes: protocol, address type at 4, place at 44, physical device at 48).
///
/// # Safety
/// `endpoint` is NULL or points to an `EndpointDesc`.
unsafe fn endpoint_is_right(endpoint: *const c_void) -> bool {
    if endpoint.is_null() {
        return false;
    }
    // SAFETY: promised by the caller, and not NULL.
    let field = |at: usize| unsafe { raw::field::<i32>(endpoint, at) };
    const ROCE: i32 = 1;
    let (protocol, family, place, device) = (field(0), field(4), field(44), field(48));
    // Nothing behind the place's four numbers may be left to chance.
    // SAFETY: as above.
    let rest = unsafe { raw::field::<[u8; 52]>(endpoint, 108) };
    protocol == ROCE
        && matches!(family, 0 | 1)
        && matches!(place, 0 | 1)
        && (place == 1 || (4..6).contains(&device))
        && rest == [0xff; 52]
}

/// Whether the bytes of a structure that callers must leave alone are zero.
///
/// # Safety
/// `base` points to `len` readable bytes.
unsafe fn reserved_is_zero(base: *const c_void, from: usize, len: usize) -> bool {
    // SAFETY: promised by the caller.
    (from..len).all(|at| unsafe { raw::field::<u8>(base, at) } == 0)
}

/// # Safety
/// `ip` is NULL or a C string.
unsafe fn socket_address(ip: *const c_char, port: u32) -> Option<SocketAddr> {
    // SAFETY: promised by the caller.
    let ip: IpAddr = unsafe { raw::text(ip) }?.parse().ok()?;
    Some(SocketAddr::new(ip, u16::try_from(port).ok()?))
}
