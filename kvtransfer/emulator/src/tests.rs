//! The rules that the emulator enforces, through its C symbols: tests of the bindings mean little if it lets things pass.
#![allow(non_snake_case)]

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr::{null, null_mut},
};

const OK: u32 = 0;
const BAD_PARAMETER: u32 = 103_900;
const FAILED: u32 = 503_900;

unsafe extern "C" {
    safe fn aclInit(config: *const c_char) -> c_int;
    safe fn aclrtSetDevice(device: i32) -> c_int;
    fn aclrtMalloc(place: *mut *mut c_void, len: usize, policy: c_int) -> c_int;
    safe fn aclrtFree(start: *mut c_void) -> c_int;
    fn aclrtMemcpy(to: *mut c_void, room: usize, from: *const c_void, len: usize, kind: c_int) -> c_int;
    fn HixlCSServerCreate(desc: *const c_void, config: *const c_void, place: *mut *mut c_void) -> u32;
    fn HixlCSServerRegMem(
        server: *mut c_void,
        tag: *const c_char,
        mem: *const c_void,
        place: *mut *mut c_void,
    ) -> u32;
    safe fn HixlCSServerListen(server: *mut c_void, backlog: u32) -> u32;
    safe fn HixlCSServerUnregMem(server: *mut c_void, registration: *mut c_void) -> u32;
    safe fn HixlCSServerDestroy(server: *mut c_void) -> u32;
    fn HixlCSClientCreate(desc: *const c_void, config: *const c_void, place: *mut *mut c_void) -> u32;
    fn HixlCSClientRegMem(
        client: *mut c_void,
        tag: *const c_char,
        mem: *const c_void,
        place: *mut *mut c_void,
    ) -> u32;
    safe fn HixlCSClientConnect(client: *mut c_void, timeout_ms: u32) -> u32;
    fn HixlCSClientGetRemoteMem(
        client: *mut c_void,
        mems: *mut *mut c_void,
        tags: *mut *mut *mut c_char,
        count: *mut u32,
        timeout_ms: u32,
    ) -> u32;
    fn HixlCSClientBatchGetAsync(
        client: *mut c_void,
        count: u32,
        list: *const c_void,
        place: *mut *mut c_void,
    ) -> u32;
    fn HixlCSClientQueryCompleteStatus(client: *mut c_void, task: *mut c_void, place: *mut c_int) -> u32;
    safe fn HixlCSClientDestroy(client: *mut c_void) -> u32;
}

type Create = unsafe extern "C" fn(*const c_void, *const c_void, *mut *mut c_void) -> u32;

/// A structure as bytes, aligned for pointers.
#[repr(C, align(8))]
struct Bytes<const N: usize>([u8; N]);

impl<const N: usize> Bytes<N> {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_pointer<T>(&mut self, at: usize, pointer: *const T) {
        self.put(at, &pointer.expose_provenance().to_ne_bytes());
    }

    fn ptr(&self) -> *const c_void {
        self.0.as_ptr().cast()
    }
}

fn endpoint() -> Bytes<160> {
    let mut bytes = Bytes([0xff; 160]);
    bytes.put(0, &1i32.to_ne_bytes());
    bytes.put(4, &0i32.to_ne_bytes());
    bytes.put(44, &0i32.to_ne_bytes());
    bytes.put(48, &4i32.to_ne_bytes());
    bytes
}

fn comm_mem(kind: i32, start: *mut c_void, len: u64) -> Bytes<24> {
    let mut bytes = Bytes([0; 24]);
    bytes.put(0, &kind.to_ne_bytes());
    bytes.put_pointer(8, start);
    bytes.put(16, &len.to_ne_bytes());
    bytes
}

const NO_CONFIG: Bytes<128> = Bytes([0; 128]);

/// A server's or client's description and what it points to.
struct Described {
    desc: Bytes<128>,
    _host: CString,
    _endpoint: Box<Bytes<160>>,
}

fn described(endpoint: Bytes<160>, port: u32, server: bool) -> Described {
    let host = CString::new("127.77.0.1").expect("a host");
    let endpoint = Box::new(endpoint);
    let mut desc = Bytes([0; 128]);
    desc.put_pointer(0, &raw const *endpoint);
    if server {
        desc.put_pointer(8, host.as_ptr());
        desc.put(16, &port.to_ne_bytes());
        desc.put(20, &1u32.to_ne_bytes());
    } else {
        desc.put_pointer(8, &raw const *endpoint);
        desc.put_pointer(16, host.as_ptr());
        desc.put(24, &port.to_ne_bytes());
    }
    Described { desc, _host: host, _endpoint: endpoint }
}

fn server(port: u32) -> *mut c_void {
    let (described, mut handle) = (described(endpoint(), port, true), null_mut());
    // SAFETY: of the documented layouts.
    assert_eq!(unsafe { HixlCSServerCreate(described.desc.ptr(), NO_CONFIG.ptr(), &mut handle) }, OK);
    handle
}

fn client(port: u32) -> *mut c_void {
    let (described, mut handle) = (described(endpoint(), port, false), null_mut());
    // SAFETY: of the documented layouts.
    assert_eq!(unsafe { HixlCSClientCreate(described.desc.ptr(), NO_CONFIG.ptr(), &mut handle) }, OK);
    handle
}

fn device_memory(len: usize) -> *mut c_void {
    aclInit(null());
    assert_eq!(aclrtSetDevice(0), 0);
    let mut start = null_mut();
    // SAFETY: `start` may be written.
    assert_eq!(unsafe { aclrtMalloc(&mut start, len, 0) }, 0);
    start
}

fn lend(server: *mut c_void, mem: &Bytes<24>) -> (u32, *mut c_void) {
    let mut registration = null_mut();
    // SAFETY: of the documented layout.
    let status = unsafe { HixlCSServerRegMem(server, c"test".as_ptr(), mem.ptr(), &mut registration) };
    (status, registration)
}

fn register(client: *mut c_void, mem: &Bytes<24>) -> u32 {
    let mut registration = null_mut();
    // SAFETY: of the documented layout.
    unsafe { HixlCSClientRegMem(client, null(), mem.ptr(), &mut registration) }
}

fn list(client: *mut c_void) -> u32 {
    let (mut mems, mut tags, mut count) = (null_mut(), null_mut(), 0);
    // SAFETY: all three may be written.
    unsafe { HixlCSClientGetRemoteMem(client, &mut mems, &mut tags, &mut count, 1000) }
}

#[test]
fn descriptions_that_are_not_as_documented_are_refused() {
    aclrtFree(device_memory(1));
    let create = |described: &Described, config: *const c_void, server: bool| {
        let (create, mut handle): (Create, _) = match server {
            true => (HixlCSServerCreate, null_mut()),
            false => (HixlCSClientCreate, null_mut()),
        };
        // SAFETY: of the documented sizes, or NULL.
        unsafe { create(described.desc.ptr(), config, &mut handle) }
    };
    for server in [true, false] {
        let right = described(endpoint(), 22_000, server);
        assert_eq!(create(&right, null(), server), BAD_PARAMETER, "a NULL configuration");
        assert_eq!(create(&right, NO_CONFIG.ptr(), server), OK);
        let mut dirty = described(endpoint(), 22_000, server);
        dirty.desc.put(64, &[1]);
        assert_eq!(create(&dirty, NO_CONFIG.ptr(), server), BAD_PARAMETER, "reserved bytes");
        let empty = described(Bytes([0; 160]), 22_000, server);
        assert_eq!(create(&empty, NO_CONFIG.ptr(), server), BAD_PARAMETER, "an endpoint not filled in");
    }
    let without_context = move || create(&described(endpoint(), 22_000, true), NO_CONFIG.ptr(), true);
    let elsewhere = std::thread::spawn(without_context).join().expect("no panic");
    assert_eq!(elsewhere, FAILED, "a thread without a context");
}

#[test]
fn calls_out_of_order_are_refused() {
    let start = device_memory(64);
    let mem = comm_mem(0, start, 64);
    let unheard = server(22_001);
    let (status, _) = lend(unheard, &mem);
    assert_eq!(status, OK);
    assert_eq!(HixlCSServerListen(unheard, 1), FAILED, "listening after registering");

    let lender = server(22_002);
    assert_eq!(HixlCSServerListen(lender, 1), OK);
    let (status, registration) = lend(lender, &mem);
    assert_eq!(status, OK);

    let reader = client(22_002);
    assert_eq!(HixlCSClientConnect(reader, 1000), FAILED, "connecting with nothing registered");
    assert_eq!(list(reader), FAILED, "listing before connecting");
    assert_eq!(register(reader, &mem), OK);
    assert_eq!(HixlCSClientConnect(reader, 1000), OK);
    assert_eq!(register(reader, &mem), FAILED, "registering after connecting");
    assert_eq!(list(reader), OK);

    assert_eq!(HixlCSServerUnregMem(lender, registration), FAILED, "a client is connected");
    assert_eq!(HixlCSServerDestroy(lender), FAILED, "a client is connected");
    assert_eq!(HixlCSClientDestroy(reader), OK);
    assert_eq!(HixlCSClientDestroy(reader), BAD_PARAMETER, "it is gone");
    assert_eq!(HixlCSServerUnregMem(lender, registration), OK);
    assert_eq!(HixlCSServerUnregMem(lender, registration), BAD_PARAMETER, "it is gone");
    assert_eq!(HixlCSServerDestroy(lender), OK);
    assert_eq!(aclrtFree(start), 0);
}

#[test]
fn more_than_4096_tasks_that_nobody_queried_are_refused() {
    let start = device_memory(64);
    let lender = server(22_003);
    assert_eq!(HixlCSServerListen(lender, 1), OK);
    let mem = comm_mem(0, start, 32);
    assert_eq!(lend(lender, &mem).0, OK);
    let reader = client(22_003);
    let into = start.wrapping_byte_add(32);
    assert_eq!(register(reader, &comm_mem(0, into, 32)), OK);
    assert_eq!(HixlCSClientConnect(reader, 1000), OK);
    assert_eq!(list(reader), OK);

    let submit = |from: *mut c_void| {
        let mut op = Bytes::<24>([0; 24]);
        op.put_pointer(0, from);
        op.put_pointer(8, into);
        op.put(16, &8u64.to_ne_bytes());
        let mut task = null_mut();
        // SAFETY: one piece of the documented layout.
        let status = unsafe { HixlCSClientBatchGetAsync(reader, 1, op.ptr(), &mut task) };
        (status, task)
    };
    assert_eq!(submit(into).0, BAD_PARAMETER, "not the peer's region");
    let (status, first) = submit(start);
    assert_eq!(status, OK);
    for _ in 1..4096 {
        assert_eq!(submit(start).0, OK);
    }
    assert_eq!(submit(start).0, FAILED, "the 4097th");
    let mut state = 0;
    while state == 0 {
        // SAFETY: `state` may be written.
        assert_eq!(unsafe { HixlCSClientQueryCompleteStatus(reader, first, &mut state) }, OK);
    }
    assert_eq!(state, 1);
    // SAFETY: as above.
    let again = unsafe { HixlCSClientQueryCompleteStatus(reader, first, &mut state) };
    assert_eq!(again, BAD_PARAMETER, "its end was seen");
    assert_eq!(submit(start).0, OK, "there is room again");
    assert_eq!(HixlCSClientDestroy(reader), OK);
}

#[test]
fn memory_must_be_where_the_call_says() {
    let start = device_memory(64);
    let mut host = [7u8; 64];
    let outside = host.as_mut_ptr().cast::<c_void>();
    let lender = server(22_004);
    assert_eq!(HixlCSServerListen(lender, 1), OK);
    for (kind, from, len) in [(0, outside, 64), (1, start, 64), (0, start, 65), (0, start, 0), (2, start, 64)]
    {
        assert_eq!(lend(lender, &comm_mem(kind, from, len)).0, BAD_PARAMETER, "kind {kind}, {len} bytes");
    }
    const TO_DEVICE: c_int = 1;
    const TO_HOST: c_int = 2;
    // SAFETY: both are valid for 64 bytes; the calls that would go beyond are refused.
    unsafe {
        assert_eq!(aclrtMemcpy(start, 64, outside, 64, TO_DEVICE), 0);
        assert_ne!(aclrtMemcpy(start, 64, outside, 64, TO_HOST), 0);
        assert_ne!(aclrtMemcpy(start, 63, outside, 64, TO_DEVICE), 0);
        assert_ne!(aclrtMemcpy(outside, 64, outside, 64, TO_HOST), 0);
    }
    assert_ne!(aclrtFree(outside), 0);
    assert_eq!(aclrtFree(start), 0);
}
