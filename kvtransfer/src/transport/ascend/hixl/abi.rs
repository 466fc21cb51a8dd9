//! What crosses to `libcann_hixl.so` (HIXL-CS, plain C): structures in the layout that its documents give, and functions.
//! Our own declarations; sizes and offsets are checked when this is compiled.

use std::{
    ffi::{c_char, c_int, c_void},
    mem::{offset_of, size_of},
    net::IpAddr,
};

use super::super::library::functions;

pub(super) const OK: u32 = 0;
pub(super) const TIMED_OUT: u32 = 103_901;

/// What `QueryCompleteStatus` says of a batch.
pub(super) const WAITING: c_int = 0;
pub(super) const COMPLETED: c_int = 1;
pub(super) const STATUS_TIMED_OUT: c_int = 2;

const PROTOCOL_ROCE: i32 = 1;
const ADDRESS_V4: i32 = 0;
const ADDRESS_V6: i32 = 1;
const PLACE_DEVICE: i32 = 0;

/// Where an end of a connection is on the network of the devices.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EndpointDesc {
    protocol: i32,
    address_kind: i32,
    address: [u8; 36],
    place: i32,
    physical_device: u32,
    super_device: u32,
    server_index: u32,
    super_pod: u32,
    place_rest: [u8; 44],
    reserved: [u8; 52],
}

const _: () = assert!(size_of::<EndpointDesc>() == 160 && align_of::<EndpointDesc>() == 4);
const _: () = assert!(offset_of!(EndpointDesc, address_kind) == 4 && offset_of!(EndpointDesc, address) == 8);
const _: () =
    assert!(offset_of!(EndpointDesc, place) == 44 && offset_of!(EndpointDesc, physical_device) == 48);
const _: () = assert!(offset_of!(EndpointDesc, reserved) == 108);

impl EndpointDesc {
    /// A device's own RoCE port. What is not set is all ones, as the vendor's initialiser leaves it: "reserved".
    pub(super) fn device(address: IpAddr, physical_device: u32) -> Self {
        let mut bytes = [0xff; 36];
        let address_kind = match address {
            IpAddr::V4(ip) => {
                bytes[..4].copy_from_slice(&ip.octets());
                ADDRESS_V4
            }
            IpAddr::V6(ip) => {
                bytes[..16].copy_from_slice(&ip.octets());
                ADDRESS_V6
            }
        };
        Self {
            protocol: PROTOCOL_ROCE,
            address_kind,
            address: bytes,
            place: PLACE_DEVICE,
            physical_device,
            super_device: 0,
            server_index: 0,
            super_pod: 0,
            place_rest: [0xff; 44],
            reserved: [0xff; 52],
        }
    }
}

/// Memory to register, or that a peer has registered.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CommMem {
    pub(super) kind: i32,
    pub(super) address: *mut c_void,
    pub(super) size: u64,
}

const _: () = assert!(size_of::<CommMem>() == 24);
const _: () = assert!(offset_of!(CommMem, address) == 8 && offset_of!(CommMem, size) == 16);

#[repr(C)]
pub(super) struct ServerDesc {
    pub(super) endpoints: *const EndpointDesc,
    pub(super) host: *const c_char,
    pub(super) port: u32,
    pub(super) endpoint_count: u32,
    pub(super) reserved: [u8; 104],
}

const _: () = assert!(size_of::<ServerDesc>() == 128);
const _: () = assert!(offset_of!(ServerDesc, host) == 8 && offset_of!(ServerDesc, port) == 16);
const _: () = assert!(offset_of!(ServerDesc, endpoint_count) == 20);

#[repr(C)]
pub(super) struct ClientDesc {
    pub(super) local: *const EndpointDesc,
    pub(super) remote: *const EndpointDesc,
    pub(super) host: *const c_char,
    pub(super) port: u32,
    pub(super) traffic_class: u8,
    pub(super) service_level: u8,
    pub(super) reserved: [u8; 98],
}

const _: () = assert!(size_of::<ClientDesc>() == 128);
const _: () = assert!(offset_of!(ClientDesc, host) == 16 && offset_of!(ClientDesc, port) == 24);
const _: () =
    assert!(offset_of!(ClientDesc, traffic_class) == 28 && offset_of!(ClientDesc, service_level) == 29);

/// A server's or a client's configuration: all zero is the default; NULL is not allowed. Newer libraries keep a pointer
/// in it, so it is aligned as one.
#[repr(C, align(8))]
pub(super) struct Config([u8; 128]);

const _: () = assert!(size_of::<Config>() == 128);

impl Config {
    pub(super) const DEFAULT: Self = Self([0; 128]);
}

/// One piece of a batch.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct OneSideOp {
    pub(super) remote: *mut c_void,
    pub(super) local: *mut c_void,
    pub(super) len: u64,
}

const _: () = assert!(size_of::<OneSideOp>() == 24);
const _: () = assert!(offset_of!(OneSideOp, local) == 8 && offset_of!(OneSideOp, len) == 16);

functions! {
    /// `libcann_hixl.so`. Status is `uint32_t`, 0 is success; all handles are `void *`.
    HixlFunctions {
        server_create = HixlCSServerCreate(*const ServerDesc, *const Config, *mut *mut c_void) -> u32;
        server_register = HixlCSServerRegMem(*mut c_void, *const c_char, *const CommMem, *mut *mut c_void) -> u32;
        server_listen = HixlCSServerListen(*mut c_void, u32) -> u32;
        server_unregister = HixlCSServerUnregMem(*mut c_void, *mut c_void) -> u32;
        server_destroy = HixlCSServerDestroy(*mut c_void) -> u32;
        client_create = HixlCSClientCreate(*const ClientDesc, *const Config, *mut *mut c_void) -> u32;
        client_register = HixlCSClientRegMem(*mut c_void, *const c_char, *const CommMem, *mut *mut c_void) -> u32;
        client_unregister = HixlCSClientUnregMem(*mut c_void, *mut c_void) -> u32;
        client_connect = HixlCSClientConnect(*mut c_void, u32) -> u32;
        client_remote_memory =
            HixlCSClientGetRemoteMem(*mut c_void, *mut *mut CommMem, *mut *mut *mut c_char, *mut u32, u32) -> u32;
        client_batch_get = HixlCSClientBatchGetAsync(*mut c_void, u32, *const OneSideOp, *mut *mut c_void) -> u32;
        client_query = HixlCSClientQueryCompleteStatus(*mut c_void, *mut c_void, *mut c_int) -> u32;
        client_destroy = HixlCSClientDestroy(*mut c_void) -> u32;
    }
}

impl HixlFunctions {
    pub(super) fn open(
        library: &super::super::library::Opened,
    ) -> Result<Self, super::super::library::Unavailable> {
        Self::load(library)
    }
}
