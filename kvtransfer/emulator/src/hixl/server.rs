//! The server: created, listening, then given its regions; a trial on CANN 9.0 had `Listen` fail after a registration,
//! so it fails here. Regions come and go only while no client is connected.

use std::{
    collections::HashMap,
    ffi::{c_char, c_void},
    io::{self, BufReader, BufWriter, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use super::{
    BAD_PARAMETER, CONFIG_LEN, DESC_LEN, FAILED, OK, Registered, endpoint_is_right, reserved_is_zero,
    socket_address, wire,
};
use crate::{
    acl::{explain, has_context},
    handles::{Table, fresh, lock},
    raw,
};

static SERVERS: Table<Server> = Table::new();

struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    regions: Mutex<HashMap<usize, Registered>>,
    clients: AtomicUsize,
    stop: AtomicBool,
}

impl Shared {
    fn connected(&self) -> bool {
        self.clients.load(Ordering::Acquire) > 0
    }

    /// The real server registers a flag of its own, which its clients are shown first.
    fn listed(&self) -> Vec<Registered> {
        let own = Registered { kind: 0, start: 0x1000, len: 8, tag: "_hixl_builtin_dev_trans_flag".into() };
        std::iter::once(own).chain(lock(&self.regions).values().cloned()).collect()
    }

    fn holds(&self, start: u64, len: u64) -> bool {
        lock(&self.regions).values().any(|region| region.holds(start, len))
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSServerCreate(
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
    // SAFETY: both are the caller's and of the documented size: endpoints, their host's address, its port at 16, their
    // number at 20.
    let (endpoints, address, count, clean) = unsafe {
        (
            raw::field::<*const c_void>(desc, 0),
            socket_address(raw::field(desc, 8), raw::field(desc, 16)),
            raw::field::<u32>(desc, 20),
            reserved_is_zero(desc, 24, DESC_LEN) && reserved_is_zero(config, 0, CONFIG_LEN),
        )
    };
    // SAFETY: `endpoints` points to `count` of them.
    let right = (count == 1) && unsafe { endpoint_is_right(endpoints) };
    let (Some(address), true, true) = (address, right, clean) else {
        return explain(BAD_PARAMETER, c"the description is not filled in as documented");
    };
    let server = Server { address, shared: Arc::default(), listener: Mutex::default() };
    // SAFETY: not NULL, and the caller's.
    unsafe { place.write(SERVERS.insert(Arc::new(server))) };
    OK
}

#[unsafe(no_mangle)]
extern "C" fn HixlCSServerListen(handle: *mut c_void, _backlog: u32) -> u32 {
    let Some(server) = SERVERS.get(handle) else { return explain(BAD_PARAMETER, c"no such server") };
    if !lock(&server.shared.regions).is_empty() {
        return explain(FAILED, c"listening must come before registering");
    }
    let mut running = lock(&server.listener);
    if running.is_some() {
        return explain(FAILED, c"listening already");
    }
    let Ok(listener) = TcpListener::bind(server.address) else {
        return explain(FAILED, c"the address cannot be listened at");
    };
    let shared = server.shared.clone();
    *running = Some(std::thread::spawn(move || accept(&listener, &shared)));
    OK
}

#[unsafe(no_mangle)]
unsafe extern "C" fn HixlCSServerRegMem(
    handle: *mut c_void,
    tag: *const c_char,
    mem: *const c_void,
    place: *mut *mut c_void,
) -> u32 {
    let Some(server) = SERVERS.get(handle) else { return explain(BAD_PARAMETER, c"no such server") };
    if !has_context() {
        return explain(FAILED, c"the thread has no context");
    }
    // SAFETY: both are the caller's.
    let Some(region) = (unsafe { Registered::read(mem, tag) }) else { return BAD_PARAMETER };
    if server.shared.connected() {
        return explain(FAILED, c"a client is connected: too late to register");
    }
    let id = fresh();
    // SAFETY: NULL or the caller's.
    if !unsafe { raw::give(place, std::ptr::without_provenance_mut(id)) } {
        return BAD_PARAMETER;
    }
    lock(&server.shared.regions).insert(id, region);
    OK
}

#[unsafe(no_mangle)]
extern "C" fn HixlCSServerUnregMem(handle: *mut c_void, region: *mut c_void) -> u32 {
    let Some(server) = SERVERS.get(handle) else { return explain(BAD_PARAMETER, c"no such server") };
    if server.shared.connected() {
        return explain(FAILED, c"a client is still connected");
    }
    match lock(&server.shared.regions).remove(&region.addr()) {
        Some(_) => OK,
        None => explain(BAD_PARAMETER, c"no such region"),
    }
}

#[unsafe(no_mangle)]
extern "C" fn HixlCSServerDestroy(handle: *mut c_void) -> u32 {
    let Some(server) = SERVERS.get(handle) else { return explain(BAD_PARAMETER, c"no such server") };
    if server.shared.connected() {
        return explain(FAILED, c"a client is still connected");
    }
    SERVERS.remove(handle);
    server.shared.stop.store(true, Ordering::Release);
    if let Some(listener) = lock(&server.listener).take() {
        // Wakes `accept`, which then sees that it shall stop.
        drop(TcpStream::connect(server.address));
        let _ = listener.join();
    }
    OK
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for connection in listener.incoming() {
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(connection) = connection else { return };
        shared.clients.fetch_add(1, Ordering::AcqRel);
        let shared = shared.clone();
        std::thread::spawn(move || {
            let leave = serve(&connection, &shared);
            shared.clients.fetch_sub(1, Ordering::AcqRel);
            // The client's `Destroy` waits for this, so that it is not counted any more when it returns.
            if leave.is_ok() {
                let _ = (&connection).write_all(&[wire::LEAVE]);
            }
        });
    }
}

/// Until the client takes leave (`Ok`) or is gone.
fn serve(connection: &TcpStream, shared: &Shared) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let (mut from, mut to) = (BufReader::new(connection), BufWriter::new(connection));
    loop {
        match wire::u8(&mut from)? {
            wire::LIST => wire::write_regions(&mut to, &shared.listed())?,
            wire::READ => {
                // All of the question is read before anything is answered: neither side can block the other.
                let count = wire::u32(&mut from)?;
                let pieces: Vec<(u64, u64)> = (0..count)
                    .map(|_| Ok((wire::u64(&mut from)?, wire::u64(&mut from)?)))
                    .collect::<io::Result<_>>()?;
                for (start, len) in pieces {
                    answer(&mut to, shared, start, len)?;
                }
            }
            wire::LEAVE => return Ok(()),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        to.flush()?;
    }
}

fn answer(to: &mut impl Write, shared: &Shared, start: u64, len: u64) -> io::Result<()> {
    if !shared.holds(start, len) {
        return to.write_all(&[1]);
    }
    to.write_all(&[0])?;
    let mut buffer = vec![0u8; len.min(1 << 16) as usize];
    let mut at = 0;
    while at < len {
        let chunk = &mut buffer[..(len - at).min(1 << 16) as usize];
        let from = std::ptr::with_exposed_provenance::<u8>((start + at) as usize);
        // SAFETY: within a registered region, which its owner keeps until it has unregistered it; that is refused while
        // this client is connected.
        unsafe { std::ptr::copy_nonoverlapping(from, chunk.as_mut_ptr(), chunk.len()) };
        to.write_all(chunk)?;
        at += chunk.len() as u64;
    }
    Ok(())
}
