//! The ACL runtime: devices, contexts, memory, streams.

use std::{
    cell::Cell,
    ffi::{CStr, c_char, c_int, c_void},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    fault::{self, Fault},
    handles::{Table, fresh, lock},
    memory::{self, Kind},
    raw,
    stream::{Stream, Synchronised},
};

const OK: c_int = 0;
const REPEATED_INIT: c_int = 100_002;
const NOT_INITIALISED: c_int = 100_001;
const BAD_PARAMETER: c_int = 107_000;
const NO_CONTEXT: c_int = 107_002;
const SYNC_TIMEOUT: c_int = 107_020;
const OUT_OF_MEMORY: c_int = 207_001;

const DEVICES: u32 = 2;

static INITIALISED: AtomicBool = AtomicBool::new(false);
/// The primary context of each device, once it was set.
static CONTEXTS: Mutex<[usize; DEVICES as usize]> = Mutex::new([0; DEVICES as usize]);
static STREAMS: Table<Stream> = Table::new();

thread_local! {
    static CONTEXT: Cell<usize> = const { Cell::new(0) };
    static MESSAGE: Cell<&'static CStr> = const { Cell::new(c"") };
}

/// Says why a call of this thread fails.
pub(crate) fn explain<T>(status: T, message: &'static CStr) -> T {
    MESSAGE.set(message);
    status
}

/// Whether the calling thread has a device's context.
pub(crate) fn has_context() -> bool {
    CONTEXT.get() != 0 && !fault::is(Fault::ContextLost)
}

pub(crate) fn stream(handle: *const c_void) -> Option<Arc<Stream>> {
    STREAMS.get(handle)
}

pub(crate) fn live_streams() -> usize {
    STREAMS.len()
}

#[unsafe(no_mangle)]
extern "C" fn aclInit(_config: *const c_char) -> c_int {
    if INITIALISED.swap(true, Ordering::AcqRel) { explain(REPEATED_INIT, c"initialised already") } else { OK }
}

#[unsafe(no_mangle)]
extern "C" fn aclFinalize() -> c_int {
    if INITIALISED.swap(false, Ordering::AcqRel) { OK } else { explain(NOT_INITIALISED, c"not initialised") }
}

#[unsafe(no_mangle)]
extern "C" fn aclGetRecentErrMsg() -> *const c_char {
    let message = MESSAGE.replace(c"");
    if message.is_empty() { std::ptr::null() } else { message.as_ptr() }
}

#[unsafe(no_mangle)]
extern "C" fn aclrtSetDevice(device: i32) -> c_int {
    if !INITIALISED.load(Ordering::Acquire) {
        return explain(NOT_INITIALISED, c"aclInit was not called");
    }
    let mut contexts = lock(&CONTEXTS);
    let Some(context) = usize::try_from(device).ok().and_then(|device| contexts.get_mut(device)) else {
        return explain(BAD_PARAMETER, c"no such device");
    };
    if *context == 0 {
        *context = fresh();
    }
    CONTEXT.set(*context);
    OK
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetDeviceCount(count: *mut u32) -> c_int {
    // SAFETY: NULL or the caller's.
    if unsafe { raw::give(count, DEVICES) } { OK } else { BAD_PARAMETER }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetPhyDevIdByLogicDevId(logical: i32, physical: *mut i32) -> c_int {
    if !(0..DEVICES as i32).contains(&logical) {
        return explain(BAD_PARAMETER, c"no such device");
    }
    // Not the same number, so that whoever mixes them up is found out.
    // SAFETY: NULL or the caller's.
    if unsafe { raw::give(physical, logical + 4) } { OK } else { BAD_PARAMETER }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtGetCurrentContext(context: *mut *mut c_void) -> c_int {
    if !has_context() {
        return explain(NO_CONTEXT, c"the thread has no context");
    }
    // SAFETY: NULL or the caller's.
    let given = unsafe { raw::give(context, std::ptr::without_provenance_mut(CONTEXT.get())) };
    if given { OK } else { BAD_PARAMETER }
}

#[unsafe(no_mangle)]
extern "C" fn aclrtSetCurrentContext(context: *mut c_void) -> c_int {
    if context.is_null() || !lock(&CONTEXTS).contains(&context.addr()) {
        return explain(BAD_PARAMETER, c"no such context");
    }
    CONTEXT.set(context.addr());
    OK
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtMalloc(place: *mut *mut c_void, len: usize, _policy: c_int) -> c_int {
    if !has_context() {
        return explain(NO_CONTEXT, c"the thread has no context");
    }
    // SAFETY: NULL or the caller's.
    unsafe { allocate(place, len, Kind::Device) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtMallocHost(place: *mut *mut c_void, len: usize) -> c_int {
    // SAFETY: NULL or the caller's.
    unsafe { allocate(place, len, Kind::Pinned) }
}

/// # Safety
/// `place` is NULL or may be written.
unsafe fn allocate(place: *mut *mut c_void, len: usize, kind: Kind) -> c_int {
    if place.is_null() || len == 0 {
        return explain(BAD_PARAMETER, c"nothing to allocate");
    }
    let Some(start) = memory::allocate(len, kind) else { return explain(OUT_OF_MEMORY, c"out of memory") };
    // SAFETY: promised by the caller, and not NULL.
    unsafe { place.write(start.cast()) };
    OK
}

#[unsafe(no_mangle)]
extern "C" fn aclrtFree(start: *mut c_void) -> c_int {
    if memory::free(start.cast(), Kind::Device) { OK } else { explain(BAD_PARAMETER, c"not device memory") }
}

#[unsafe(no_mangle)]
extern "C" fn aclrtFreeHost(start: *mut c_void) -> c_int {
    if memory::free(start.cast(), Kind::Pinned) { OK } else { explain(BAD_PARAMETER, c"not pinned memory") }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtMemcpy(
    to: *mut c_void,
    room: usize,
    from: *const c_void,
    len: usize,
    kind: c_int,
) -> c_int {
    if !has_context() {
        return explain(NO_CONTEXT, c"the thread has no context");
    }
    if len > room {
        return explain(BAD_PARAMETER, c"more bytes than room");
    }
    let right = |address: usize, device: bool| match device {
        true => memory::on_device(address, len),
        false => address != 0 && !memory::touches_device(address, len),
    };
    let (from_device, to_device) = match kind {
        0 => (false, false),
        1 => (false, true),
        2 => (true, false),
        3 => (true, true),
        _ => return explain(BAD_PARAMETER, c"no such kind of copy"),
    };
    if !right(from.addr(), from_device) || !right(to.addr(), to_device) {
        return explain(BAD_PARAMETER, c"memory is not where the kind of copy says");
    }
    // SAFETY: device memory was found in the list, host memory is the caller's; copied as if they might overlap.
    unsafe { std::ptr::copy(from.cast::<u8>(), to.cast::<u8>(), len) };
    OK
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtCreateStream(place: *mut *mut c_void) -> c_int {
    if !has_context() {
        return explain(NO_CONTEXT, c"the thread has no context");
    }
    let Ok(stream) = Stream::start() else { return explain(OUT_OF_MEMORY, c"no thread for a stream") };
    // SAFETY: NULL or the caller's.
    if unsafe { raw::give(place, STREAMS.insert(Arc::new(stream))) } { OK } else { BAD_PARAMETER }
}

/// As documented it lets the tasks end first, however long they take.
#[unsafe(no_mangle)]
extern "C" fn aclrtDestroyStream(handle: *mut c_void) -> c_int {
    let Some(stream) = STREAMS.remove(handle) else { return explain(BAD_PARAMETER, c"no such stream") };
    let _ = stream.synchronise(None);
    stream.stop();
    OK
}

#[unsafe(no_mangle)]
extern "C" fn aclrtDestroyStreamForce(handle: *mut c_void) -> c_int {
    let Some(stream) = STREAMS.remove(handle) else { return explain(BAD_PARAMETER, c"no such stream") };
    stream.stop();
    OK
}

#[unsafe(no_mangle)]
extern "C" fn aclrtSynchronizeStreamWithTimeout(handle: *mut c_void, timeout_ms: i32) -> c_int {
    if !has_context() {
        return explain(NO_CONTEXT, c"the thread has no context");
    }
    let Some(stream) = STREAMS.get(handle) else { return explain(BAD_PARAMETER, c"no such stream") };
    let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
    match stream.synchronise(timeout) {
        Synchronised::Done => OK,
        Synchronised::TimedOut => SYNC_TIMEOUT,
        Synchronised::Failed(error) => error,
    }
}
