//! HCCL communicators of two ranks. The root info is the address at which rank 0 waits for rank 1.

use std::{
    collections::HashMap,
    ffi::{c_int, c_void},
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    acl::{self, explain, has_context},
    fault::{self, Fault},
    handles::{Table, lock},
    memory, raw,
    stream::Task,
};

const OK: c_int = 0;
const BAD_PARAMETER: c_int = 1;
const INTERNAL: c_int = 4;
const TIMED_OUT: c_int = 9;
const REMOTE: c_int = 21;

/// What synchronising a stream says of an operation that failed.
const ACL_HCCL_FAILED: c_int = 507_018;

const ROOT_INFO_LEN: usize = 4108;
const MAGIC: &[u8; 8] = b"emulated";

static COMMUNICATORS: Table<Communicator> = Table::new();
/// Where the roots of this process wait, by address.
static ROOTS: LazyLock<Mutex<HashMap<SocketAddr, TcpListener>>> = LazyLock::new(Mutex::default);

struct Communicator {
    rank: u32,
    link: Arc<TcpStream>,
    closed: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
}

pub(crate) fn live_communicators() -> usize {
    COMMUNICATORS.len()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclGetRootInfo(place: *mut c_void) -> c_int {
    if place.is_null() {
        return explain(BAD_PARAMETER, c"no place for the root info");
    }
    if !has_context() {
        return explain(INTERNAL, c"the thread has no context");
    }
    let waits = TcpListener::bind("127.0.0.1:0").and_then(|listener| Ok((listener.local_addr()?, listener)));
    let Ok((address, listener)) = waits else { return explain(INTERNAL, c"no address to wait at") };
    let mut info = [0u8; ROOT_INFO_LEN];
    info[..8].copy_from_slice(MAGIC);
    let text = address.to_string();
    info[8] = text.len() as u8;
    info[9..9 + text.len()].copy_from_slice(text.as_bytes());
    // The last byte counts as well: whoever sends less than all of it is found out.
    info[ROOT_INFO_LEN - 1] = 0xa5;
    lock(&ROOTS).insert(address, listener);
    // SAFETY: not NULL, and the caller gives room for a root info.
    unsafe { place.cast::<[u8; ROOT_INFO_LEN]>().write(info) };
    OK
}

fn parse(info: &[u8; ROOT_INFO_LEN]) -> Option<SocketAddr> {
    if info[..8] != MAGIC[..] || info[ROOT_INFO_LEN - 1] != 0xa5 {
        return None;
    }
    std::str::from_utf8(info.get(9..9 + usize::from(info[8]))?).ok()?.parse().ok()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclCommInitRootInfo(
    ranks: u32,
    info: *const c_void,
    rank: u32,
    place: *mut *mut c_void,
) -> c_int {
    if info.is_null() || place.is_null() || ranks != 2 || rank > 1 {
        return explain(BAD_PARAMETER, c"two ranks, 0 and 1");
    }
    if !has_context() {
        return explain(INTERNAL, c"the thread has no context");
    }
    // SAFETY: not NULL, and the caller gives a root info.
    let info = unsafe { raw::field::<[u8; ROOT_INFO_LEN]>(info, 0) };
    let Some(address) = parse(&info) else { return explain(BAD_PARAMETER, c"not a root info") };
    let until = Instant::now() + connect_timeout();
    let link = match rank {
        0 => wait_at(address, until),
        _ => TcpStream::connect_timeout(&address, connect_timeout()),
    };
    let Ok(link) = link else { return explain(TIMED_OUT, c"the other rank did not come") };
    let usable = link.set_nodelay(true).and_then(|()| link.set_nonblocking(false));
    if usable.and_then(|()| link.set_read_timeout(Some(Duration::from_millis(10)))).is_err() {
        return explain(INTERNAL, c"the connection failed");
    }
    let communicator =
        Communicator { rank, link: Arc::new(link), closed: Arc::default(), broken: Arc::default() };
    // SAFETY: not NULL, and the caller's.
    unsafe { place.write(COMMUNICATORS.insert(Arc::new(communicator))) };
    OK
}

/// As the real library, by the environment, in seconds.
fn connect_timeout() -> Duration {
    let seconds = std::env::var("HCCL_CONNECT_TIMEOUT").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(120))
}

fn wait_at(address: SocketAddr, until: Instant) -> io::Result<TcpStream> {
    let listener = lock(&ROOTS).remove(&address).ok_or(io::ErrorKind::NotFound)?;
    listener.set_nonblocking(true)?;
    while Instant::now() < until {
        match listener.accept() {
            Ok((link, _)) => return Ok(link),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[unsafe(no_mangle)]
extern "C" fn HcclSend(
    buffer: *mut c_void,
    count: u64,
    kind: c_int,
    peer: u32,
    handle: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    exchange(buffer, count, kind, peer, handle, stream, true)
}

#[unsafe(no_mangle)]
extern "C" fn HcclRecv(
    buffer: *mut c_void,
    count: u64,
    kind: c_int,
    peer: u32,
    handle: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    exchange(buffer, count, kind, peer, handle, stream, false)
}

fn exchange(
    buffer: *mut c_void,
    count: u64,
    kind: c_int,
    peer: u32,
    handle: *mut c_void,
    stream: *mut c_void,
    sends: bool,
) -> c_int {
    fault::EXCHANGES.fetch_add(1, Ordering::Relaxed);
    const INT8: c_int = 0;
    let Some(communicator) = COMMUNICATORS.get(handle) else {
        return explain(BAD_PARAMETER, c"no such communicator");
    };
    let Some(stream) = acl::stream(stream) else { return explain(BAD_PARAMETER, c"no such stream") };
    if !has_context() {
        return explain(INTERNAL, c"the thread has no context");
    }
    let Ok(len) = usize::try_from(count) else { return explain(BAD_PARAMETER, c"too many") };
    if kind != INT8 || len == 0 || peer != 1 - communicator.rank || !memory::on_device(buffer.addr(), len) {
        return explain(BAD_PARAMETER, c"bytes of device memory, to or from the other rank");
    }
    let address = buffer.expose_provenance();
    let task: Task = Box::new(move |given_up| {
        let stop = || given_up.load(Ordering::Acquire) || communicator.closed.load(Ordering::Acquire);
        if fault::is(Fault::CommunicatorBroken) {
            communicator.broken.store(true, Ordering::Release);
            // Not ended by destroying the communicator: only without its stream does it leave the memory alone.
            while !given_up.load(Ordering::Acquire) {
                if !sends {
                    store(address, &[0xee]);
                }
                std::thread::yield_now();
            }
            return Err(ACL_HCCL_FAILED);
        }
        let done = match sends {
            true => send(&communicator.link, address, len, &stop),
            false => receive(&communicator.link, address, len, &stop),
        };
        done.map_err(|_| {
            communicator.broken.store(true, Ordering::Release);
            ACL_HCCL_FAILED
        })
    });
    stream.push(task);
    OK
}

fn send(mut link: &TcpStream, address: usize, len: usize, stop: &dyn Fn() -> bool) -> io::Result<()> {
    link.write_all(&(len as u64).to_le_bytes())?;
    let mut buffer = vec![0u8; len.min(1 << 16)];
    let mut at = 0;
    while at < len {
        if stop() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let chunk = &mut buffer[..(len - at).min(1 << 16)];
        let from = std::ptr::with_exposed_provenance::<u8>(address + at);
        // SAFETY: within device memory (checked when it was submitted), which its owner keeps until the stream has been
        // synchronised or destroyed.
        unsafe { std::ptr::copy_nonoverlapping(from, chunk.as_mut_ptr(), chunk.len()) };
        link.write_all(chunk)?;
        at += chunk.len();
    }
    Ok(())
}

fn receive(link: &TcpStream, address: usize, len: usize, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let mut announced = [0; 8];
    read_all(link, &mut announced, stop)?;
    if u64::from_le_bytes(announced) != len as u64 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut buffer = vec![0u8; len.min(1 << 16)];
    let mut at = 0;
    while at < len {
        let chunk = &mut buffer[..(len - at).min(1 << 16)];
        read_all(link, chunk, stop)?;
        store(address + at, chunk);
        at += chunk.len();
    }
    Ok(())
}

/// As `read_exact`, but leaves off when told to.
fn read_all(mut link: &TcpStream, mut into: &mut [u8], stop: &dyn Fn() -> bool) -> io::Result<()> {
    while !into.is_empty() {
        if stop() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match link.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => into = &mut into[read..],
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn store(address: usize, bytes: &[u8]) {
    let to = std::ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: within device memory (checked when it was submitted), which its owner keeps until the stream has been
    // synchronised or destroyed.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HcclGetCommAsyncError(handle: *mut c_void, place: *mut c_int) -> c_int {
    let Some(communicator) = COMMUNICATORS.get(handle) else {
        return explain(BAD_PARAMETER, c"no such communicator");
    };
    let state = if communicator.broken.load(Ordering::Acquire) { REMOTE } else { OK };
    // SAFETY: NULL or the caller's.
    if unsafe { raw::give(place, state) } { OK } else { BAD_PARAMETER }
}

/// Its operations leave off; it does not wait for them, the stream's end does.
#[unsafe(no_mangle)]
extern "C" fn HcclCommDestroy(handle: *mut c_void) -> c_int {
    let Some(communicator) = COMMUNICATORS.remove(handle) else {
        return explain(BAD_PARAMETER, c"no such communicator");
    };
    communicator.closed.store(true, Ordering::Release);
    let _ = communicator.link.shutdown(Shutdown::Both);
    OK
}
