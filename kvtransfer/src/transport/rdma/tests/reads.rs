//! What goes well, and what is refused.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::transport::rdma::{probe::Port, stripe::Chunk};

const MIB: usize = 1 << 20;

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn both_ports_are_found() {
    let port = |at: u8| Port {
        device: format!("rxe{at}"),
        number: 1,
        gid: std::net::Ipv4Addr::new(10, 77, at, 1).to_ipv6_mapped(),
    };
    assert_eq!(probe(), Ok(vec![port(0), port(1)]));
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn pieces_of_every_size_arrive_whole_and_nothing_else_changes() {
    const ALL: usize = 4 * MIB + 8192;
    let (owner, reader) = (Node::owner(ALL), Node::reader(ALL));
    let (serving, mut peer) = reader.dial(&owner);
    assert_eq!((serving.rails(), peer.rails()), (2, 2));
    for len in [1, 2, 63, 1023, 1024, 1025, 4095, 4096, 65_536, 65_537, MIB - 1, MIB, MIB + 1, 4 * MIB] {
        for (remote, local) in [(0, 0), (13, 4097), (ALL - len, ALL - len)] {
            reader.fill(BLANK);
            let started = Instant::now();
            peer.read(&[reader.piece(remote, local, len)], soon()).expect("read");
            if remote == 0 {
                eprintln!("{len} bytes in {:?}", started.elapsed());
            }
            let inside = local..local + len;
            assert!(
                reader.holds(|at| if inside.contains(&at) { content(at - local + remote) } else { BLANK }),
                "{len} bytes from {remote} to {local}"
            );
        }
    }
    assert!(owner.holds(content), "the owner's memory has not changed");
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn scattered_pieces_each_go_to_their_place() {
    const SLOT: usize = 6000;
    const SLOTS: usize = 700; // more than the queues of both rails hold
    let (owner, reader) = (Node::owner(SLOT * SLOTS), Node::reader(SLOT * SLOTS));
    let (_serving, mut peer) = reader.dial(&owner);
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..3 {
        reader.fill(BLANK);
        let mut pieces = Vec::new();
        let mut expected = vec![BLANK; SLOT * SLOTS];
        for slot in 0..SLOTS {
            let len = random.random_range(0..=SLOT);
            let remote = random.random_range(0..=SLOT * SLOTS - len);
            let local = slot * SLOT + random.random_range(0..=SLOT - len).min(SLOT - 1);
            pieces.push(reader.piece(remote, local, len));
            (0..len).for_each(|at| expected[local + at] = content(remote + at));
        }
        peer.read(&pieces, soon()).expect("read");
        assert!(reader.holds(|at| expected[at]));
    }
    peer.read(&[], soon()).expect("nothing is soon read");
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn several_readers_share_an_owner() {
    let owner = Node::owner(2 * MIB);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let reader = Node::reader(2 * MIB);
                let (_serving, mut peer) = reader.dial(&owner);
                for _ in 0..3 {
                    reader.fill(BLANK);
                    peer.read(&[reader.piece(0, 0, 2 * MIB)], soon()).expect("read");
                    assert!(reader.holds(content));
                }
            });
        }
    });
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn a_piece_outside_either_region_is_refused_before_it_is_asked_for() {
    let (owner, reader) = (Node::owner(MIB), Node::reader(MIB));
    let elsewhere = Node::reader(MIB);
    let far = |remote| Piece { remote, ..reader.piece(0, 0, 4096) };
    for (piece, whose) in [
        (reader.piece(MIB - 4095, 0, 4096), "the peer's region"),
        (reader.piece(MIB, 0, 1), "the peer's region"),
        (far(u64::MAX - 100), "the peer's region"),
        (reader.piece(0, MIB - 4095, 4096), "this node's region"),
        (elsewhere.piece(0, 0, 4096), "this node's region"),
    ] {
        let (_serving, mut peer) = reader.dial(&owner);
        let error = peer.read(&[reader.piece(0, 0, 10), piece], soon()).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(whose), "{error}");
        let error = peer.read(&[reader.piece(0, 0, 10)], soon()).expect_err("poisoned");
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    }
    assert!(reader.holds(|_| BLANK));
}

/// A reader that does not keep to its region's bounds, which the owner's device must catch.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn the_device_refuses_what_lies_outside_and_the_owner_goes_on() {
    let (owner, reader) = (Node::owner(MIB), Node::reader(MIB));
    let (_other_serving, mut other) = reader.dial(&owner);
    for remote in [MIB as u64 - 100, MIB as u64, 1 << 40, 0u64.wrapping_sub(100)] {
        let (serving, mut peer) = reader.dial(&owner);
        let chunk = Chunk { remote, local: 0, len: 4096 };
        let error = peer.read_chunks(vec![vec![chunk]], soon()).expect_err("refused");
        assert!(error.to_string().contains("remote access error"), "{error}");
        assert_eq!(peer.rails(), 0, "poisoned");
        drop(serving);
        other.read(&[reader.piece(0, 0, MIB)], soon()).expect("others read on");
        assert!(reader.holds(content));
        reader.fill(BLANK);
    }
    assert!(owner.holds(content));
}

/// The bytes that this machine's devices write are checked a second time, below the code that is told addresses.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn a_request_to_write_outside_this_region_is_refused() {
    let (owner, reader) = (Node::owner(MIB), Node::reader(MIB));
    for local in [MIB as u64 - 100, u64::MAX - 100] {
        let (_serving, mut peer) = reader.dial(&owner);
        let chunk = Chunk { remote: 0, local, len: 4096 };
        let error = peer.read_chunks(vec![vec![chunk]], soon()).expect_err("refused");
        assert!(error.to_string().contains("outside the node's region"), "{error}");
    }
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn garbage_connects_to_nothing() {
    let (owner, reader) = (Node::owner(MIB), Node::reader(MIB));
    assert!(Serving::new(&owner.rails, b"garbage").is_err());
    let (dial, request) = Dial::new(&reader.rails).expect("rails");
    assert!(dial.connect(&request).is_err(), "a request is no answer");
    let (_, answer) = Serving::new(&owner.rails, &request).expect("served");
    assert!(Serving::new(&owner.rails, &answer).is_err(), "an answer is no request");
}
