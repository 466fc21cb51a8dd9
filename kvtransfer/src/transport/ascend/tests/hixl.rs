//! Reading another process's memory through HIXL, and what happens when that fails.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    os::unix::process::ExitStatusExt,
    ptr::NonNull,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_ascend_emulator::fault::{self, Fault, count};

use super::{DeviceMemory, Turn, pattern, peer::Peer, soon, turn};
use crate::{
    Region,
    transport::{
        ascend::{
            Device,
            hixl::{Endpoint, HixlAddress, HixlClient, HixlMedium, HixlServer, Memory},
        },
        fetch::{Medium, Piece, RemoteRegion},
    },
};

const MIB: usize = 1 << 20;

/// As a host's configuration has it; device 0 of the emulator is physically 4.
pub(super) fn endpoint(device: &Device) -> Endpoint {
    let conf = "address_0=29.1.2.1\naddress_4 = 29.1.2.3\nnetmask_4=255.255.0.0\naddress_40=x\n";
    let endpoint = Endpoint::configured(device, conf).expect("device 0");
    assert_eq!((endpoint.address.to_string().as_str(), endpoint.physical_device), ("29.1.2.3", 4));
    endpoint
}

/// A peer that lends `len` bytes, memory to read into, and the client between them.
struct Scene {
    client: HixlClient,
    memory: Arc<DeviceMemory>,
    peer: Peer,
    /// Ends last.
    turn: Turn,
}

fn connect(
    turn: &Turn,
    address: HixlAddress,
    region: &Region,
    memory: Memory,
) -> std::io::Result<HixlClient> {
    let device = turn.hixl().device(0).expect("a device");
    let deadline = Instant::now() + Duration::from_secs(5);
    HixlClient::connect(turn.hixl(), &device, endpoint(&device), address, region, memory, deadline)
}

fn scene(remote: usize, local: usize) -> Scene {
    let turn = turn();
    let mut peer = Peer::start(&format!("lend {remote}"));
    let address: HixlAddress = peer.hear("lending").parse().expect("an address");
    let memory = turn.memory(local);
    let client = connect(&turn, address, &memory.region(), Memory::Device).expect("connected");
    assert_eq!(client.len(), remote as u64);
    assert_eq!(turn.count(count::LIVE_CLIENTS), 1);
    Scene { turn, memory, client, peer }
}

#[test]
fn reads_of_many_sizes_are_exact_and_touch_nothing_else() {
    let mut scene = scene(8 * MIB, 8 * MIB);
    let theirs = pattern(8 * MIB);
    let mut expected = vec![0; 8 * MIB];
    let mut pieces = Vec::new();
    let mut to = 5;
    for len in
        [1, 2, 3, 7, 8, 63, 64, 65, 511, 4095, 4096, 4097, 16_384, 65_535, 65_536, 65_537, MIB, MIB + 1]
    {
        let from = 8 * MIB - len - to % 97;
        pieces.push(Piece { remote: from as u64, local: scene.memory.at(to), len });
        expected[to..to + len].copy_from_slice(&theirs[from..from + len]);
        to += len + 3;
    }
    scene.client.read(&pieces, soon()).expect("read");
    assert!(scene.memory.read() == expected);

    // The first and the last byte, nothing at all, an empty piece, and the whole.
    let ends = [
        Piece { remote: 0, local: scene.memory.at(0), len: 1 },
        Piece { remote: (8 * MIB - 1) as u64, local: scene.memory.at(1), len: 1 },
        Piece { remote: (8 * MIB) as u64, local: scene.memory.at(2), len: 0 },
    ];
    scene.client.read(&ends, soon()).expect("read");
    assert_eq!(scene.memory.read()[..2], [theirs[0], theirs[8 * MIB - 1]]);
    scene.client.read(&[], soon()).expect("nothing");
    let all = [Piece { remote: 0, local: scene.memory.at(0), len: 8 * MIB }];
    scene.client.read(&all, soon()).expect("read");
    assert!(scene.memory.read() == theirs);
}

#[test]
fn ten_thousand_pieces_stay_within_the_librarys_limits() {
    let mut scene = scene(10_000 * 64, 10_000 * 64);
    let theirs = pattern(10_000 * 64);
    // Backwards, so that no two neighbours stay neighbours.
    let piece =
        |at: usize| Piece { remote: ((9_999 - at) * 64) as u64, local: scene.memory.at(at * 64), len: 64 };
    let pieces: Vec<Piece> = (0..10_000).map(piece).collect();
    scene.client.read(&pieces, soon()).expect("read");
    let expected: Vec<u8> = theirs.chunks(64).rev().flatten().copied().collect();
    assert!(scene.memory.read() == expected);
    assert!(scene.turn.count(count::MOST_TASKS) <= 4096);
    assert!((1024..=4000).contains(&scene.turn.count(count::MOST_PIECES)));
}

#[test]
fn threads_without_a_context_get_one() {
    let Scene { turn, memory, mut client, peer } = scene(4096, 4096);
    let whole = [Piece { remote: 0, local: memory.at(0), len: 4096 }].map(SendPiece);
    let reader = std::thread::spawn(move || {
        let SendPiece(piece) = { whole }[0];
        client.read(&[piece], soon()).expect("read");
        drop(client);
    });
    reader.join().expect("no panic");
    assert!(memory.read() == pattern(4096));
    assert_eq!(turn.count(count::LIVE_CLIENTS), 0);
    drop(peer);
}

#[derive(Clone, Copy)]
struct SendPiece(Piece);
// SAFETY: an address in memory that outlives the thread it is sent to.
unsafe impl Send for SendPiece {}

/// Each fault: an error that says what happened, no later than the deadline; the client is gone, the memory quiet, and
/// nothing more is asked of the library.
#[test]
fn a_fault_is_an_error_in_time_and_ends_the_client_before_it_returns() {
    for (fault, kind, says) in [
        (Fault::BatchFails, ErrorKind::Other, "a batch failed with status 3"),
        (Fault::BatchTimesOut, ErrorKind::Other, "timed out within HIXL"),
        (Fault::BatchNeverCompletes, ErrorKind::TimedOut, "not done reading by the deadline"),
        (Fault::QueueExhausted, ErrorKind::Other, "too many tasks have not been queried"),
        (Fault::ContextLost, ErrorKind::Other, "the thread has no context"),
    ] {
        let Scene { turn, memory, mut client, peer } = scene(MIB, MIB);
        let pieces: Vec<Piece> = (0..256)
            .map(|at| Piece { remote: at * 4096, local: memory.at(at as usize * 4096), len: 4096 })
            .collect();
        turn.fault(fault);
        let started = Instant::now();
        let error = client.read(&pieces, started + Duration::from_millis(200)).expect_err(fault.name());
        let took = started.elapsed();
        turn.set("");
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{text}");
        assert!(text.contains(says) && text.contains("HIXL server 127."), "{}: {text}", fault.name());
        assert!(took < Duration::from_secs(5), "{}: {took:?}", fault.name());
        assert_eq!(turn.count(count::LIVE_CLIENTS), 0, "{}", fault.name());
        memory.quiet();
        let batches = turn.count(count::BATCHES);
        let again = client.read(&pieces, soon()).expect_err("poisoned");
        assert!(again.to_string().contains("failed before"), "{again}");
        assert_eq!(turn.count(count::BATCHES), batches, "a poisoned client is not used");
        drop((client, peer));
    }
}

#[test]
fn a_deadline_in_the_past_reads_nothing() {
    let mut scene = scene(4096, 4096);
    let whole = [Piece { remote: 0, local: scene.memory.at(0), len: 4096 }];
    let error = scene.client.read(&whole, Instant::now()).expect_err("late");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(scene.memory.quiet().iter().all(|&byte| byte == 0));
}

#[test]
fn a_peer_that_is_killed_is_an_error_and_not_a_wait() {
    let mut scene = scene(MIB, MIB);
    scene.peer.kill();
    let whole = [Piece { remote: 0, local: scene.memory.at(0), len: MIB }];
    let started = Instant::now();
    scene.client.read(&whole, soon()).expect_err("nobody there");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(scene.turn.count(count::LIVE_CLIENTS), 0);
    scene.memory.quiet();
}

#[test]
fn pieces_outside_of_either_region_never_reach_the_library() {
    let other = [0u8; 64];
    let refused = |make: fn(&DeviceMemory) -> Piece, stray: Option<NonNull<u8>>| {
        let mut scene = scene(4096, 8192);
        let mut piece = make(&scene.memory);
        piece.local = stray.unwrap_or(piece.local);
        let good = Piece { remote: 0, local: scene.memory.at(0), len: 64 };
        let batches = scene.turn.count(count::BATCHES);
        let error = scene.client.read(&[good, piece], soon()).expect_err("outside");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert_eq!(scene.turn.count(count::BATCHES), batches);
        assert!(scene.memory.quiet().iter().all(|&byte| byte == 0));
    };
    refused(|memory| Piece { remote: 4096, local: memory.at(0), len: 1 }, None);
    refused(|memory| Piece { remote: 4033, local: memory.at(0), len: 64 }, None);
    refused(|memory| Piece { remote: u64::MAX, local: memory.at(0), len: 64 }, None);
    refused(|memory| Piece { remote: 0, local: memory.at(8129), len: 64 }, None);
    refused(|memory| Piece { remote: 0, local: memory.at(1), len: usize::MAX }, None);
    refused(|memory| Piece { remote: 0, local: memory.at(0), len: 64 }, Some(NonNull::from(&other).cast()));
}

#[test]
fn ordinary_memory_is_not_taken_for_the_devices() {
    let turn = turn();
    let mut peer = Peer::start("lend 4096");
    let address: HixlAddress = peer.hear("lending").parse().expect("an address");
    let mut bytes = vec![0u8; 4096];
    let base = NonNull::new(bytes.as_mut_ptr()).expect("memory");
    // SAFETY: the vector lives in the owner and is left alone.
    let region = unsafe { Region::new(Arc::new(bytes), base, 4096) };
    let error = connect(&turn, address, &region, Memory::Device).err().expect("refused").to_string();
    assert!(error.contains("HixlCSClientRegMem") && error.contains("not of the type"), "{error}");
    assert_eq!(turn.count(count::LIVE_CLIENTS), 0);

    let device = turn.hixl().device(0).expect("a device");
    let host = SocketAddr::from(([127, 3, 2, 1], 21_001));
    let server = HixlServer::start(turn.hixl(), &device, host, endpoint(&device), &region, Memory::Device);
    let error = server.err().expect("refused").to_string();
    assert!(error.contains("HixlCSServerRegMem") && error.contains("not of the type"), "{error}");

    // Registered as what it is, it can be read into.
    let mut client = connect(&turn, address, &region, Memory::Host).expect("connected");
    client.read(&[Piece { remote: 0, local: base, len: 4096 }], soon()).expect("read");
    // SAFETY: alive in the region's owner; the read is over.
    let read = unsafe { std::slice::from_raw_parts(base.as_ptr(), 4096) };
    assert!(read == pattern(4096));
}

#[test]
fn nothing_listens_before_an_entitled_peer_has_asked() {
    let turn = turn();
    let (device, region) = (turn.hixl().device(0).expect("a device"), Region::zeroed(4096));
    let host = SocketAddr::from(([127, 3, 2, 1], 21_002));
    let medium = HixlMedium::new(turn.hixl(), &device, host, endpoint(&device), &region);
    let listens = || TcpStream::connect(host).is_ok();
    assert!(!listens(), "at the node's start");
    let (_asking, request) = medium.ask().expect("asked");
    assert!(!listens(), "who reads does not lend");
    let (_lent, granted) = medium.lend(&request).expect("lent");
    assert!(listens());
    let (_lent, again) = medium.lend(&request).expect("lent");
    assert_eq!(granted, again, "there is one server");
}

/// Unregistering while a client is connected is refused by the library: then the region stays.
#[test]
fn a_server_dropped_too_early_keeps_its_region_alive() {
    let mut early = scene(4096, 4096);
    early.peer.tell();
    assert_eq!(early.peer.hear("memory-users"), "1");
    let whole = [Piece { remote: 0, local: early.memory.at(0), len: 4096 }];
    early.client.read(&whole, soon()).expect("still lent");
    assert!(early.memory.read() == pattern(4096));
    drop(early);

    let Scene { turn: _turn, memory: _memory, client, mut peer } = scene(4096, 4096);
    drop(client);
    peer.tell();
    assert_eq!(peer.hear("memory-users"), "0");
}

#[test]
fn nobody_listening_is_an_error_by_the_deadline() {
    let turn = turn();
    let memory = turn.memory(4096);
    let device = turn.hixl().device(0).expect("a device");
    let host = SocketAddr::from(([127, 3, 2, 2], 21_002));
    let nobody = HixlAddress { host, endpoint: endpoint(&device) };
    let deadline = Instant::now() + Duration::from_millis(100);
    let (region, local) = (memory.region(), endpoint(&device));
    let client = HixlClient::connect(turn.hixl(), &device, local, nobody, &region, Memory::Device, deadline);
    let error = client.err().expect("nobody");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("127.3.2.2:21002/29.1.2.3/4"), "{error}");
    assert_eq!(turn.count(count::LIVE_CLIENTS), 0);
}

/// Where not even destroying the client helps, the process ends rather than hand on memory that is still written.
#[test]
fn without_a_fence_the_process_ends() {
    let mut lender = Peer::start("lend 4096");
    let address = lender.hear("lending");
    let unfenced = [(fault::VARIABLE, Fault::Unfenced.name())];
    let mut reader = Peer::start_with(&format!("read-unfenced {address}"), &unfenced);
    reader.hear("reading");
    const ABORTED: i32 = 6;
    assert_eq!(reader.wait().signal(), Some(ABORTED));
    let errors = reader.errors();
    assert!(errors.contains("memory may still be written by a transfer that failed"), "{errors}");
}

#[test]
fn addresses_are_read_as_they_are_written() {
    for text in ["10.0.0.1:21000/29.1.2.3/4", "[fd00::1]:1/fe80::7/0"] {
        let address: HixlAddress = text.parse().expect(text);
        assert_eq!(address.to_string(), text);
    }
    for text in ["", "10.0.0.1/29.1.2.3/4", "10.0.0.1:1/29.1.2.3", "10.0.0.1:1/29.1.2.3/4/5", "a:1/b/-1"] {
        assert!(text.parse::<HixlAddress>().is_err(), "{text}");
    }
    let turn = turn();
    let device = turn.hixl().device(0).expect("a device");
    for (conf, says) in [("address_5=1.2.3.4", "has no address_4"), ("address_4=nonsense", "is no address")] {
        let error = Endpoint::configured(&device, conf).expect_err(conf).to_string();
        assert!(error.contains(says), "{error}");
    }
}
