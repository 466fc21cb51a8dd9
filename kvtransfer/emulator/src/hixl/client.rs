//! The client: created, given its memory, connected; then batches, each done by the client's own thread.

use std::{
    collections::HashMap,
    ffi::{CString, c_char, c_void},
    io::{self, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    BAD_PARAMETER, CONFIG_LEN, DESC_LEN, FAILED, OK, Registered, TIMED_OUT,
    batch::{COMPLETED, Piece, WAITING, run},
    endpoint_is_right, reserved_is_zero, socket_address, wire,
};
use crate::{
    acl::{explain, has_context},
    fault::{self, Fault},
    handles::{Table, fresh, lock},
    raw,
};

static CLIENTS: Table<Client> = Table::new();

/// A client may have this many tasks that it has not queried to their end.
const MOST_TASKS: usize = 4096;

pub(crate) fn live_clients() -> usize {
    CLIENTS.len()
}

/// As `CommMem` is laid out, for the list that is given to the caller.
#[repr(C)]
struct Described {
    kind: i32,
    padding: u32,
    start: u64,
    len: u64,
}

struct Client {
    server: SocketAddr,
    inner: Mutex<Inner>,
    tasks: Arc<Mutex<HashMap<usize, Task>>>,
    /// A batch failed: nothing more is taken.
    poisoned: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

#[derive(Default)]
struct Inner {
    memory: HashMap<usize, Registered>,
    link: Option<Link>,
    remote: Vec<Registered>,
    listed: Vec<Described>,
    tags: Vec<CString>,
    tag_pointers: Vec<usize>,
}

struct Link {
    stream: TcpStream,
    batches: Option<mpsc::Sender<Batch>>,
    worker: Option<JoinHandle<()>>,
}

struct Task {
    status: i32,
    pieces: usize,
}

struct Batch {
    id: usize,
    pieces: Vec<Piece>,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSClientCreate(
    desc: *const c_void,
    config: *const c_void,
    place: *mut *mut c_void,
) -> u32 {
    if desc.is_null() || config.is_null() || place.is_null() {
        return explain(BAD_PARAMETER, c"neither the description nor the configuration may be NULL");
    }
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    // SAFETY: both are the caller's and of the documented size: local endpoint, remote endpoint, the server's host
    // address at 16, its port at 24, traffic class and service level at 28 and 29.
    let (right, server, clean) = unsafe {
        (
            endpoint_is_right(raw::field(desc, 0)) && endpoint_is_right(raw::field(desc, 8)),
            socket_address(raw::field(desc, 16), raw::field(desc, 24)),
            reserved_is_zero(desc, 30, DESC_LEN) && reserved_is_zero(config, 0, CONFIG_LEN),
        )
    };
    let (Some(server), true, true) = (server, right, clean) else {
        return explain(BAD_PARAMETER, c"the description is not filled in as documented");
    };
    let client = Client {
        server,
        inner: Mutex::default(),
        tasks: Arc::default(),
        poisoned: Arc::default(),
        stop: Arc::default(),
    };
    // SAFETY: not NULL, and the caller's.
    unsafe { place.write(CLIENTS.insert(Arc::new(client))) };
    OK
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSClientRegMem(
    handle: *mut c_void,
    tag: *const c_char,
    mem: *const c_void,
    place: *mut *mut c_void,
) -> u32 {
    let Some(client) = CLIENTS.get(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    // SAFETY: both are the caller's.
    let Some(region) = (unsafe { Registered::read(mem, tag) }) else { return BAD_PARAMETER };
    let mut inner = lock(&client.inner);
    if inner.link.is_some() {
        return explain(FAILED, c"connected: too late to register");
    }
    let id = fresh();
    // SAFETY: NULL or the caller's.
    if !unsafe { raw::give(place, std::ptr::without_provenance_mut(id)) } {
        return BAD_PARAMETER;
    }
    inner.memory.insert(id, region);
    OK
}

#[unsafe(no_mangle)]
extern "C" fn HixlCSClientUnregMem(handle: *mut c_void, region: *mut c_void) -> u32 {
    let Some(client) = CLIENTS.get(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    if !lock(&client.tasks).is_empty() {
        return explain(FAILED, c"a batch may still write there");
    }
    match lock(&client.inner).memory.remove(&region.addr()) {
        Some(_) => OK,
        None => explain(BAD_PARAMETER, c"no such region"),
    }
}

#[unsafe(no_mangle)]
extern "C" fn HixlCSClientConnect(handle: *mut c_void, timeout_ms: u32) -> u32 {
    let Some(client) = CLIENTS.get(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    let mut inner = lock(&client.inner);
    if inner.memory.is_empty() || inner.link.is_some() {
        return explain(FAILED, c"memory must be registered first, and connecting is for once");
    }
    let until = Instant::now() + Duration::from_millis(timeout_ms.into());
    let stream = loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return explain(TIMED_OUT, c"the server was not reached in time");
        }
        match TcpStream::connect_timeout(&client.server, left) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5).min(left)),
        }
    };
    let Ok(link) = client.link(stream) else { return explain(FAILED, c"the connection failed") };
    inner.link = Some(link);
    OK
}

impl Client {
    fn link(&self, stream: TcpStream) -> io::Result<Link> {
        stream.set_nodelay(true)?;
        let (batches, todo) = mpsc::channel::<Batch>();
        let mut worker_stream = stream.try_clone()?;
        let (tasks, poisoned, stop) = (self.tasks.clone(), self.poisoned.clone(), self.stop.clone());
        let worker = std::thread::Builder::new().name("emulated-hixl".into()).spawn(move || {
            for batch in todo {
                let status = run(&mut worker_stream, &batch.pieces, &poisoned, &stop);
                if stop.load(Ordering::Acquire) {
                    return;
                }
                if status != COMPLETED {
                    poisoned.store(true, Ordering::Release);
                }
                if let Some(task) = lock(&tasks).get_mut(&batch.id) {
                    task.status = status;
                }
            }
        })?;
        Ok(Link { stream, batches: Some(batches), worker: Some(worker) })
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSClientGetRemoteMem(
    handle: *mut c_void,
    mems: *mut *mut c_void,
    tags: *mut *mut *mut c_char,
    count: *mut u32,
    _timeout_ms: u32,
) -> u32 {
    let Some(client) = CLIENTS.get(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    let mut guard = lock(&client.inner);
    let inner = &mut *guard;
    let Some(link) = &mut inner.link else { return explain(FAILED, c"not connected") };
    let regions = link.stream.write_all(&[wire::LIST]).and_then(|()| wire::read_regions(&mut link.stream));
    let Ok(regions) = regions else { return explain(FAILED, c"the server is gone") };
    inner.listed = regions
        .iter()
        .map(|region| Described { kind: region.kind, padding: 0, start: region.start, len: region.len })
        .collect();
    inner.tags = regions.iter().map(|region| CString::new(&*region.tag).unwrap_or_default()).collect();
    inner.tag_pointers = inner.tags.iter().map(|tag| tag.as_ptr().expose_provenance()).collect();
    inner.remote = regions;
    // SAFETY: each is NULL or the caller's. What they point to lives until the next call or the client's end.
    let given = unsafe {
        raw::give(mems, inner.listed.as_mut_ptr().cast())
            && raw::give(tags, inner.tag_pointers.as_mut_ptr().cast())
            && raw::give(count, inner.listed.len() as u32)
    };
    if given { OK } else { BAD_PARAMETER }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSClientBatchGetAsync(
    handle: *mut c_void,
    count: u32,
    list: *const c_void,
    place: *mut *mut c_void,
) -> u32 {
    fault::BATCHES.fetch_add(1, Ordering::Relaxed);
    let Some(client) = CLIENTS.get(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    if count == 0 || list.is_null() || place.is_null() {
        return explain(BAD_PARAMETER, c"an empty batch");
    }
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    if client.poisoned.load(Ordering::Acquire) {
        return explain(FAILED, c"an earlier batch failed: destroy the client");
    }
    // SAFETY: `list` holds `count` descriptions of 24 bytes: remote address, local address, length.
    let piece = |at: usize| unsafe {
        let desc = list.byte_add(at * 24);
        Piece { remote: raw::field(desc, 0), local: raw::field(desc, 8), len: raw::field(desc, 16) }
    };
    let pieces: Vec<Piece> = (0..count as usize).map(piece).collect();
    let inner = lock(&client.inner);
    let Some(Link { batches: Some(batches), .. }) = &inner.link else {
        return explain(FAILED, c"not connected");
    };
    let known = |piece: &Piece| {
        piece.len > 0
            && inner.remote.iter().any(|region| region.holds(piece.remote, piece.len))
            && inner.memory.values().any(|region| region.holds(piece.local, piece.len))
    };
    if !pieces.iter().all(known) {
        return explain(BAD_PARAMETER, c"a piece lies outside of what is registered");
    }
    let mut tasks = lock(&client.tasks);
    if tasks.len() >= MOST_TASKS || fault::is(Fault::QueueExhausted) {
        return explain(FAILED, c"too many tasks have not been queried");
    }
    let id = fresh();
    tasks.insert(id, Task { status: WAITING, pieces: pieces.len() });
    fault::MOST_TASKS.fetch_max(tasks.len() as u64, Ordering::Relaxed);
    let waiting: usize = tasks.values().map(|task| task.pieces).sum();
    fault::MOST_PIECES.fetch_max(waiting as u64, Ordering::Relaxed);
    drop(tasks);
    let _ = batches.send(Batch { id, pieces });
    // SAFETY: not NULL, and the caller's.
    unsafe { place.write(std::ptr::without_provenance_mut(id)) };
    OK
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSClientQueryCompleteStatus(
    handle: *mut c_void,
    task: *mut c_void,
    place: *mut i32,
) -> u32 {
    let Some(client) = CLIENTS.get(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    let mut tasks = lock(&client.tasks);
    let Some(status) = tasks.get(&task.addr()).map(|task| task.status) else {
        return explain(BAD_PARAMETER, c"no such task, or its end was queried before");
    };
    if status != WAITING {
        tasks.remove(&task.addr());
    }
    // SAFETY: NULL or the caller's.
    if unsafe { raw::give(place, status) } { OK } else { BAD_PARAMETER }
}

/// When it returns `OK`, nothing writes to the client's memory any more.
#[unsafe(no_mangle)]
extern "C" fn HixlCSClientDestroy(handle: *mut c_void) -> u32 {
    if fault::is(Fault::Unfenced) {
        return explain(FAILED, c"the endpoint cannot be taken down");
    }
    let Some(client) = CLIENTS.remove(handle) else { return explain(BAD_PARAMETER, c"no such client") };
    let Some(mut link) = lock(&client.inner).link.take() else { return OK };
    link.batches = None;
    if lock(&client.tasks).is_empty() {
        let left = link.stream.write_all(&[wire::LEAVE]).and_then(|()| wire::u8(&mut link.stream));
        drop(left);
    }
    client.stop.store(true, Ordering::Release);
    let _ = link.stream.shutdown(Shutdown::Both);
    if let Some(worker) = link.worker.take() {
        let _ = worker.join();
    }
    OK
}
