//! The C interface of libibverbs, as far as this crate uses it: names of our own over a layout that is the library's.
//!
//! Structures are declared whole where we make them, and only up to the last field we read where the library does. Their
//! sizes and the places of those fields are checked when this is compiled; the numbers are those of rdma-core on 64-bit
//! Linux, which keeps them the same for ever (`libibverbs.so.1`).

use std::{
    ffi::{c_int, c_uint, c_void},
    mem::{offset_of, size_of},
};

/// Things of the library that we only hold pointers to.
macro_rules! opaque {
    ($($name:ident),*) => { $(#[repr(C)] pub(super) struct $name { _private: [u8; 0] })* };
}
opaque!(RawDevice, RawProtectionDomain, RawCompletionQueue);

/// An opened device. Sending and polling are no symbols of the library: each driver puts its functions in here.
#[repr(C)]
pub(super) struct RawContext {
    device: *mut RawDevice,
    others: [*mut c_void; 11],
    pub(super) poll_cq: Option<PollCq>,
    more: [*mut c_void; 13],
    pub(super) post_send: Option<PostSend>,
}
pub(super) type PollCq = unsafe extern "C" fn(*mut RawCompletionQueue, c_int, *mut WorkCompletion) -> c_int;
pub(super) type PostSend =
    unsafe extern "C" fn(*mut RawQueuePair, *mut WorkRequest, *mut *mut WorkRequest) -> c_int;
const _: () = assert!(offset_of!(RawContext, poll_cq) == 96 && offset_of!(RawContext, post_send) == 208);

/// A queue pair; read up to its number.
#[repr(C)]
pub(super) struct RawQueuePair {
    pointers: [*mut c_void; 6],
    handle: u32,
    pub(super) number: u32,
}
const _: () = assert!(offset_of!(RawQueuePair, number) == 52);

/// Registered memory.
#[repr(C)]
pub(super) struct RawMemoryRegion {
    context: *mut RawContext,
    domain: *mut RawProtectionDomain,
    address: *mut c_void,
    length: usize,
    handle: u32,
    pub(super) local_key: u32,
    pub(super) remote_key: u32,
}
const _: () = assert!(size_of::<RawMemoryRegion>() == 48 && offset_of!(RawMemoryRegion, local_key) == 36);

#[repr(C)]
pub(super) struct DeviceAttributes {
    firmware: [u8; 64],
    guids: [u64; 2],
    pub(super) max_mr_size: u64,
    page_sizes: u64,
    identity: [u32; 3],
    max_qp: c_int,
    pub(super) max_qp_wr: c_int,
    capabilities: c_uint,
    max_sge: [c_int; 2],
    max_cq: c_int,
    pub(super) max_cqe: c_int,
    max_mr: c_int,
    max_pd: c_int,
    /// RDMA READs that a queue pair can answer at a time.
    pub(super) max_qp_rd_atom: c_int,
    max_other_rd_atom: [c_int; 2],
    /// RDMA READs that a queue pair can have on the way at a time.
    pub(super) max_qp_init_rd_atom: c_int,
    others: [c_int; 16],
    max_pkeys: u16,
    ack_delay: u8,
    pub(super) ports: u8,
}
const _: () = assert!(size_of::<DeviceAttributes>() == 232 && offset_of!(DeviceAttributes, ports) == 227);
const _: () = assert!(offset_of!(DeviceAttributes, max_qp_wr) == 112);
const _: () = assert!(offset_of!(DeviceAttributes, max_qp_init_rd_atom) == 156);

#[repr(C)]
pub(super) struct PortAttributes {
    pub(super) state: c_int,
    max_mtu: c_int,
    pub(super) active_mtu: c_int,
    pub(super) gid_entries: c_int,
    capabilities: u32,
    pub(super) max_message_bytes: u32,
    counters: [u32; 2],
    words: [u16; 3],
    bytes: [u8; 8],
    pub(super) link_layer: u8,
    flags: u8,
    capabilities2: u16,
}
const _: () = assert!(size_of::<PortAttributes>() == 52 && offset_of!(PortAttributes, link_layer) == 46);
const _: () = assert!(offset_of!(PortAttributes, max_message_bytes) == 20);

pub(super) const PORT_ACTIVE: c_int = 4;
pub(super) const LINK_LAYER_ETHERNET: u8 = 2;

/// One of the addresses of a device. Aligned as the library's, which has an integer in place of the bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct GidEntry {
    pub(super) gid: [u8; 16],
    pub(super) index: u32,
    pub(super) port: u32,
    pub(super) kind: u32,
    pub(super) interface: u32,
}
const _: () = assert!(size_of::<GidEntry>() == 32);

pub(super) const GID_ROCE_V2: u32 = 2;

pub(super) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(super) const ACCESS_REMOTE_READ: c_int = 1 << 2;

#[repr(C)]
pub(super) struct QueueSizes {
    pub(super) send_requests: u32,
    pub(super) receive_requests: u32,
    pub(super) send_entries: u32,
    pub(super) receive_entries: u32,
    pub(super) inline_bytes: u32,
}
const _: () = assert!(size_of::<QueueSizes>() == 20);

#[repr(C)]
pub(super) struct NewQueuePair {
    pub(super) cookie: *mut c_void,
    pub(super) send_queue: *mut RawCompletionQueue,
    pub(super) receive_queue: *mut RawCompletionQueue,
    pub(super) shared_receive: *mut c_void,
    pub(super) sizes: QueueSizes,
    pub(super) kind: c_int,
    pub(super) signal_all: c_int,
}
const _: () = assert!(size_of::<NewQueuePair>() == 64 && offset_of!(NewQueuePair, kind) == 52);

/// Reliable connection.
pub(super) const KIND_RC: c_int = 2;

/// The way to a peer's port.
#[repr(C, align(8))]
pub(super) struct Path {
    pub(super) gid: [u8; 16],
    pub(super) flow_label: u32,
    pub(super) own_gid_index: u8,
    pub(super) hop_limit: u8,
    pub(super) traffic_class: u8,
    padding: u8,
    pub(super) lid: u16,
    pub(super) service_level: u8,
    pub(super) path_bits: u8,
    pub(super) static_rate: u8,
    pub(super) is_global: u8,
    pub(super) port: u8,
}
const _: () = assert!(size_of::<Path>() == 32 && offset_of!(Path, lid) == 24 && offset_of!(Path, port) == 30);

#[repr(C)]
pub(super) struct QueuePairAttributes {
    pub(super) state: c_int,
    current_state: c_int,
    pub(super) mtu: c_int,
    migration: c_int,
    qkey: u32,
    pub(super) receive_psn: u32,
    pub(super) send_psn: u32,
    pub(super) peer_number: u32,
    pub(super) access: c_int,
    sizes: QueueSizes,
    pub(super) path: Path,
    other_path: Path,
    pub(super) pkey_index: u16,
    other_pkey_index: u16,
    drains: [u8; 2],
    pub(super) reads_out: u8,
    pub(super) reads_in: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) port: u8,
    pub(super) timeout: u8,
    pub(super) retries: u8,
    pub(super) rnr_retries: u8,
    others: [u8; 2],
    rate_limit: u32,
}
const _: () = assert!(size_of::<QueuePairAttributes>() == 144 && offset_of!(QueuePairAttributes, path) == 56);
const _: () = assert!(offset_of!(QueuePairAttributes, pkey_index) == 120);
const _: () = assert!(offset_of!(QueuePairAttributes, port) == 129);
const _: () = assert!(offset_of!(QueuePairAttributes, rnr_retries) == 132);

pub(super) const STATE_INIT: c_int = 1;
pub(super) const STATE_READY_TO_RECEIVE: c_int = 2;
pub(super) const STATE_READY_TO_SEND: c_int = 3;
pub(super) const STATE_ERROR: c_int = 6;

/// Which attributes a change of state sets.
pub(super) mod sets {
    use std::ffi::c_int;

    pub(in super::super) const STATE: c_int = 1;
    pub(in super::super) const ACCESS: c_int = 1 << 3;
    pub(in super::super) const PKEY_INDEX: c_int = 1 << 4;
    pub(in super::super) const PORT: c_int = 1 << 5;
    pub(in super::super) const PATH: c_int = 1 << 7;
    pub(in super::super) const MTU: c_int = 1 << 8;
    pub(in super::super) const TIMEOUT: c_int = 1 << 9;
    pub(in super::super) const RETRIES: c_int = 1 << 10;
    pub(in super::super) const RNR_RETRIES: c_int = 1 << 11;
    pub(in super::super) const RECEIVE_PSN: c_int = 1 << 12;
    pub(in super::super) const READS_OUT: c_int = 1 << 13;
    pub(in super::super) const MIN_RNR_TIMER: c_int = 1 << 15;
    pub(in super::super) const SEND_PSN: c_int = 1 << 16;
    pub(in super::super) const READS_IN: c_int = 1 << 17;
    pub(in super::super) const PEER_NUMBER: c_int = 1 << 20;
}

/// A piece of registered memory here.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ScatterEntry {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) local_key: u32,
}
const _: () = assert!(size_of::<ScatterEntry>() == 16);

/// A request to read. The library has unions where this has what a read uses of them.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct WorkRequest {
    pub(super) id: u64,
    pub(super) next: *mut WorkRequest,
    pub(super) entries: *mut ScatterEntry,
    pub(super) entry_count: c_int,
    pub(super) operation: c_int,
    pub(super) flags: c_uint,
    pub(super) immediate: u32,
    pub(super) remote_address: u64,
    pub(super) remote_key: u32,
    pub(super) unused: [u32; 19],
}
const _: () = assert!(size_of::<WorkRequest>() == 128 && offset_of!(WorkRequest, remote_address) == 40);

pub(super) const OPERATION_READ: c_int = 4;
pub(super) const FLAG_SIGNALLED: c_uint = 1 << 1;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct WorkCompletion {
    pub(super) id: u64,
    pub(super) status: c_int,
    operation: c_int,
    pub(super) vendor_error: u32,
    length: u32,
    immediate: u32,
    queue_pair: u32,
    source: u32,
    flags: c_uint,
    others: [u8; 8],
}
const _: () = assert!(size_of::<WorkCompletion>() == 48 && offset_of!(WorkCompletion, queue_pair) == 28);

/// Structures of integers and pointers alone, of which zeros are a value.
///
/// # Safety
/// All bytes zero is a valid value of the type.
pub(super) unsafe trait Zeroed: Sized {
    fn zeroed() -> Self {
        // SAFETY: the promise of this trait.
        unsafe { std::mem::zeroed() }
    }
}
// SAFETY: integers and arrays of them.
unsafe impl Zeroed for DeviceAttributes {}
// SAFETY: integers and arrays of them.
unsafe impl Zeroed for PortAttributes {}
// SAFETY: integers and arrays of them.
unsafe impl Zeroed for GidEntry {}
// SAFETY: integers, arrays of them and structures of such.
unsafe impl Zeroed for QueuePairAttributes {}
// SAFETY: integers, arrays of them and pointers, which may be null.
unsafe impl Zeroed for WorkRequest {}
// SAFETY: integers.
unsafe impl Zeroed for ScatterEntry {}
// SAFETY: integers and arrays of them.
unsafe impl Zeroed for WorkCompletion {}
