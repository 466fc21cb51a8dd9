//! Exchanging bytes with another process through an HCCL communicator, and what happens when that fails.

use std::{
    io::ErrorKind,
    ptr::NonNull,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_ascend_emulator::fault::{Fault, count};
use tokio_util::task::TaskTracker;

use super::{
    DeviceMemory, Turn, pattern,
    peer::{Peer, hex},
    soon, turn,
};
use crate::transport::{
    Medium,
    ascend::hccl::{HcclMedium, HcclPair, MOST_JOINING, Rank, RootInfo},
};

/// For joining.
const DEADLINE: Duration = Duration::from_millis(200);

const SIZES: [usize; 6] = [1, 131_072, 4097, 1 << 20, 64, 200_001];

/// This side is the root; the other one is a process that shall send or receive pieces of these sizes.
struct Scene {
    pair: HcclPair,
    memory: Arc<DeviceMemory>,
    peer: Peer,
    /// Ends last.
    turn: Turn,
}

fn scene(role: &str, sizes: &[usize]) -> Scene {
    let turn = turn();
    let device = turn.hccl().device(0).expect("a device");
    let root = turn.hccl().root_info(&device).expect("a root");
    let listed = sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let peer = Peer::start(&format!("{role} {} {listed}", hex(root.as_bytes())));
    let memory = turn.memory(sizes.iter().sum());
    let pair = HcclPair::join(turn.hccl(), &device, &root, Rank::Root, &memory.region()).expect("joined");
    assert_eq!(turn.count(count::LIVE_COMMUNICATORS), 1);
    Scene { turn, memory, pair, peer }
}

fn pieces(memory: &DeviceMemory, sizes: &[usize]) -> Vec<(NonNull<u8>, usize)> {
    let starts = sizes.iter().scan(0, |end, size| {
        *end += size;
        Some(*end - size)
    });
    starts.zip(sizes).map(|(start, &size)| (memory.at(start), size)).collect()
}

#[test]
fn pieces_of_many_sizes_arrive_whole_both_ways() {
    let Scene { turn, memory, mut pair, mut peer } = scene("send", &SIZES);
    peer.tell();
    // What goes in one call may come in several: it is the order that counts.
    let all = pieces(&memory, &SIZES);
    pair.recv(&all[..2], soon()).expect("received");
    pair.recv(&all[2..3], soon()).expect("received");
    pair.recv(&all[3..], soon()).expect("received");
    assert_eq!(peer.hear("sent"), "Ok(())");
    assert!(memory.read() == pattern(memory.len));
    drop(pair);
    assert_eq!((turn.count(count::LIVE_COMMUNICATORS), turn.count(count::LIVE_STREAMS)), (0, 0));
    drop((peer, turn));

    let mut out = scene("receive", &SIZES);
    out.memory.write(&pattern(out.memory.len));
    out.pair.send(&pieces(&out.memory, &SIZES), soon()).expect("sent");
    assert_eq!(out.peer.hear("received"), "Ok(()) true");
}

/// The pair has failed as it must: gone before the error was returned, quiet, and never used again.
fn failed(turn: &Turn, memory: &DeviceMemory, pair: &mut HcclPair) {
    assert_eq!((turn.count(count::LIVE_COMMUNICATORS), turn.count(count::LIVE_STREAMS)), (0, 0));
    memory.quiet();
    let exchanges = turn.count(count::EXCHANGES);
    let again = pair.recv(&pieces(memory, &[1]), soon()).expect_err("it failed");
    assert!(again.to_string().contains("failed before"), "{again}");
    assert_eq!(turn.count(count::EXCHANGES), exchanges);
}

#[test]
fn a_peer_that_does_not_send_is_a_timeout() {
    let Scene { turn, memory, mut pair, peer } = scene("send", &[4096]);
    let started = Instant::now();
    let error =
        pair.recv(&pieces(&memory, &[4096]), started + Duration::from_millis(200)).expect_err("silent");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    failed(&turn, &memory, &mut pair);
    drop(peer);
}

#[test]
fn a_broken_communicator_is_an_error_before_the_deadline() {
    let Scene { turn, memory, mut pair, peer } = scene("send", &[4096]);
    turn.fault(Fault::CommunicatorBroken);
    let started = Instant::now();
    let error = pair.recv(&pieces(&memory, &[4096]), soon()).expect_err("broken");
    turn.set("");
    assert!(error.to_string().contains("communicator broke: result 21"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    failed(&turn, &memory, &mut pair);
    drop(peer);
}

#[test]
fn sides_that_disagree_on_a_size_both_fail() {
    let Scene { turn, memory, mut pair, mut peer } = scene("send", &[4096]);
    peer.tell();
    let error = pair.recv(&pieces(&memory, &[4095]), soon()).expect_err("one short");
    assert!(error.to_string().contains("communicator broke"), "{error}");
    failed(&turn, &memory, &mut pair);
}

#[test]
fn a_peer_that_is_killed_is_an_error_and_not_a_wait() {
    let Scene { turn, memory, mut pair, mut peer } = scene("send", &[4096]);
    peer.kill();
    let started = Instant::now();
    pair.recv(&pieces(&memory, &[4096]), soon()).expect_err("nobody there");
    assert!(started.elapsed() < Duration::from_secs(10));
    failed(&turn, &memory, &mut pair);
}

#[test]
fn pieces_outside_of_the_region_never_reach_the_library() {
    let other = [0u8; 64];
    let stray = (NonNull::from(&other).cast(), 64);
    for at in 0..4 {
        let Scene { turn, memory, mut pair, peer } = scene("send", &[4096]);
        let bad = [stray, (memory.at(1), 4096), (memory.at(0), 0), (memory.at(1), usize::MAX)][at];
        let exchanges = turn.count(count::EXCHANGES);
        let error = pair.recv(&[(memory.at(0), 64), bad], soon()).expect_err("outside");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains("piece 1"), "{error}");
        assert_eq!(turn.count(count::EXCHANGES), exchanges);
        failed(&turn, &memory, &mut pair);
        drop(peer);
    }
}

#[test]
fn a_root_info_that_is_not_one_is_refused() {
    let turn = turn();
    let device = turn.hccl().device(0).expect("a device");
    let memory = turn.memory(64);
    assert!(RootInfo::from_bytes(&[0; 4107]).is_none());
    let nonsense = RootInfo::from_bytes(&[7; 4108]).expect("long enough");
    let joined = HcclPair::join(turn.hccl(), &device, &nonsense, Rank::Other, &memory.region());
    let error = joined.err().expect("refused").to_string();
    assert!(error.contains("HcclCommInitRootInfo") && error.contains("not a root info"), "{error}");
}

#[test]
fn joining_is_given_up_at_its_deadline_and_its_thread_is_counted() {
    let (turn, threads) = (turn(), TaskTracker::new());
    let (device, memory) = (turn.hccl().device(0).expect("a device"), turn.memory(4096));
    let medium = HcclMedium::new(turn.hccl(), &device, &memory.region(), DEADLINE, threads.clone());
    let (asking, request) = medium.ask().expect("a root");
    let started = Instant::now();
    let error = asking.connect(&4096u64.to_le_bytes(), started + DEADLINE).err().expect("nobody joins");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(started.elapsed() < 20 * DEADLINE, "{:?}", started.elapsed());
    assert_eq!(threads.len(), 1, "the library holds it still");
    // The other side comes after all: the thread ends its pair, and so does the one that lends.
    let (lent, _) = medium.lend(&request).expect("lent");
    while threads.len() > 1 {
        assert!(started.elapsed() < Duration::from_secs(20), "the thread does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(lent);
    while !threads.is_empty() || turn.count(count::LIVE_COMMUNICATORS) > 0 {
        assert!(started.elapsed() < Duration::from_secs(20), "the pair is not destroyed");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn no_more_pairs_wait_for_their_other_side_than_may() {
    let (turn, threads) = (turn(), TaskTracker::new());
    let (device, memory) = (turn.hccl().device(0).expect("a device"), turn.memory(4096));
    let medium = HcclMedium::new(turn.hccl(), &device, &memory.region(), DEADLINE, threads.clone());
    let (asking, request) = medium.ask().expect("a root");
    asking.connect(&4096u64.to_le_bytes(), Instant::now() + DEADLINE).err().expect("nobody joins");
    let mut asking: Vec<_> = (1..MOST_JOINING).map(|_| medium.ask().expect("room")).collect();
    // At once, whichever side it is: the one that is late has its place still.
    let (began, full) = (Instant::now(), "64 HCCL pairs wait for their other side");
    for refused in [medium.ask().err(), medium.lend(&request).err()] {
        let refused = refused.expect("no room");
        assert_eq!(refused.kind(), ErrorKind::ResourceBusy);
        assert!(refused.to_string().contains(full), "{refused}");
    }
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    assert_eq!(threads.len(), 1);
    asking.pop();
    // The other side comes after all: both have joined, and the thread that nobody waits for ends.
    let (lent, _) = medium.lend(&request).expect("room again");
    let ended = |left| {
        while threads.len() > left {
            assert!(began.elapsed() < Duration::from_secs(20), "a thread does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    ended(1);
    drop((lent, asking));
    ended(0);
    let all: Vec<_> = (0..MOST_JOINING).map(|_| medium.ask().expect("room")).collect();
    drop(all);
}
