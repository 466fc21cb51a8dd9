//! What fails: that the reader is told in time, and that nothing writes to its memory afterwards.

use std::{
    env,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    thread,
};

use super::*;
use crate::transport::rdma::parameters::{Answer, Request, Window};

/// Takes these devices some seconds to read.
const LARGE: usize = 24 << 20;
/// Retries take half a second to two, and the emulated machine has its own pace.
const NOTICED: Duration = Duration::from_secs(8);
const PATTERN: u8 = 0xa5;

/// Reads all that the owner has, and has `fault` strike once the first bytes are here. Returns the error.
fn read_until(reader: &Node, mut peer: PeerRegion, fault: impl FnOnce()) -> io::Error {
    thread::scope(|scope| {
        let reading = scope.spawn(move || {
            let outcome = peer.read(&[reader.piece(0, 0, LARGE)], soon());
            reader.fill(PATTERN);
            let again = peer.read(&[reader.piece(0, 0, 1)], soon());
            assert_eq!(again.map_err(|error| error.kind()), Err(io::ErrorKind::NotConnected), "poisoned");
            (outcome, Instant::now())
        });
        while reader.byte(0) == BLANK {
            thread::yield_now();
        }
        fault();
        let struck = Instant::now();
        let (outcome, ended) = reading.join().expect("the reader has not panicked");
        let error = outcome.expect_err("the fault struck while it read");
        eprintln!("noticed after {:?}: {error}", ended.duration_since(struck));
        assert!(ended.duration_since(struck) < NOTICED);
        error
    })
}

/// The reader's memory was filled after its read had ended, and stays so.
fn nothing_writes(reader: &Node) {
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        assert!(reader.holds(|_| PATTERN), "something still writes");
        thread::sleep(Duration::from_millis(20));
    }
}

fn reads_again(reader: &Node, owner: &Node) {
    let (_serving, mut peer) = reader.dial(owner);
    peer.read(&[reader.piece(0, 0, 1 << 20)], soon()).expect("read");
    assert!((0..1 << 20).all(|at| reader.byte(at) == content(at)));
}

/// Small pieces, as these devices do all of a request's work while it is posted.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn a_read_that_is_late_is_given_up() {
    const PIECE: usize = 4096;
    let (owner, reader) = (Node::owner(LARGE), Node::reader(LARGE));
    let (_serving, mut peer) = reader.dial(&owner);
    let pieces: Vec<_> = (0..LARGE / PIECE).map(|at| reader.piece(at * PIECE, at * PIECE, PIECE)).collect();
    let started = Instant::now();
    let deadline = started + Duration::from_millis(200);
    let error = peer.read(&pieces, deadline).expect_err("too much for the time");
    eprintln!("given up after {:?}", started.elapsed());
    assert_eq!((error.kind(), reader.byte(0)), (io::ErrorKind::TimedOut, content(0)));
    assert!(started.elapsed() < Duration::from_secs(3));
    reader.fill(PATTERN);
    nothing_writes(&reader);
    reads_again(&reader, &owner);

    let (_serving, mut peer) = reader.dial(&owner);
    reader.fill(BLANK);
    let error = peer.read(&[reader.piece(0, 0, 1)], Instant::now()).expect_err("no time at all");
    assert_eq!((error.kind(), reader.byte(0)), (io::ErrorKind::TimedOut, BLANK));
}

/// Requests are on the way when the time is up, and the owner begins to answer after that.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn an_answer_that_is_late_goes_nowhere() {
    let (owner, reader) = (Node::owner(1 << 20), Node::reader(1 << 20));
    let (dial, request) = Dial::new(&reader.rails).expect("rails");
    let request = Request::decode(&request).expect("parameters");
    let rails = owner.rails.active().expect("rails");
    let ends: Vec<_> = rails.iter().map(|rail| rail.serving_end(rail.place).expect("a queue pair")).collect();
    let windows = rails.iter().map(|rail| rail.memory());
    let windows = windows.map(|memory| Window { key: memory.remote_key(), base: memory.base() });
    let answer =
        Answer { region_bytes: 1 << 20, rails: ends.iter().map(|(_, end)| *end).zip(windows).collect() };
    let mut peer = dial.connect(&answer.encode()).expect("connected");

    let deadline = Instant::now() + Duration::from_millis(100);
    let pieces = [reader.piece(0, 0, 4096), reader.piece(4096, 4096, 4096)];
    let error = peer.read(&pieces, deadline).expect_err("no answer");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    reader.fill(PATTERN);
    for ((rail, (pair, end)), peer) in rails.iter().zip(&ends).zip(&request.rails) {
        pair.connect(&rail.port, peer, end.reads).expect("ready to answer");
    }
    nothing_writes(&reader);
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn a_fault_of_the_owners_queue_pair_ends_the_read() {
    let (owner, reader) = (Node::owner(LARGE), Node::reader(LARGE));
    let (serving, peer) = reader.dial(&owner);
    read_until(&reader, peer, || serving.fail().expect("set to error"));
    nothing_writes(&reader);
    reads_again(&reader, &owner);
}

/// All of the owner goes: first what lets the peer in, then the memory.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn an_owner_that_is_dropped_ends_the_read() {
    let (owner, reader) = (Node::owner(LARGE), Node::reader(LARGE));
    let (serving, peer) = reader.dial(&owner);
    read_until(&reader, peer, || {
        drop(serving);
        drop(owner);
    });
    nothing_writes(&reader);
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn nothing_can_be_read_once_the_owner_has_closed() {
    let (owner, reader) = (Node::owner(LARGE), Node::reader(LARGE));
    let (serving, mut peer) = reader.dial(&owner);
    drop(serving);
    let started = Instant::now();
    let error = peer.read(&[reader.piece(0, 0, 4096)], soon()).expect_err("closed");
    eprintln!("refused after {:?}: {error}", started.elapsed());
    assert!(started.elapsed() < NOTICED);
    assert!(reader.holds(|_| BLANK));
    reads_again(&reader, &owner);
}

/// A network device of the machine's two, which comes back when this is dropped.
struct Unplugged(String);

impl Unplugged {
    fn new(port: usize) -> Self {
        let devices = env::var("BATON_TEST_RDMA_NETWORK")
            .expect("BATON_TEST_RDMA_NETWORK names two devices to set down");
        let unplugged = Self(devices.split(' ').nth(port).expect("two devices").to_owned());
        unplugged.set("down");
        unplugged
    }

    fn set(&self, state: &str) {
        let status = Command::new("ip").args(["link", "set", &self.0, state]).status().expect("ip runs");
        assert!(status.success());
    }
}

impl Drop for Unplugged {
    fn drop(&mut self) {
        self.set("up");
    }
}

/// The port's network device is set down, while both sides go on with what they have registered.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn a_port_that_goes_down_ends_the_read_and_the_other_goes_on() {
    let (owner, reader) = (Node::owner(LARGE), Node::reader(LARGE));
    let (_serving, peer) = reader.dial(&owner);
    let mut unplugged = None;
    let error = read_until(&reader, peer, || unplugged = Some(Unplugged::new(1)));
    assert!(error.to_string().contains("rail rxe1/1"), "{error}");
    nothing_writes(&reader);

    let rails_of = |reader: &Node, owner: &Node| {
        let (serving, mut peer) = reader.dial(owner);
        reader.fill(BLANK);
        peer.read(&[reader.piece(0, 0, 1 << 20)], soon()).expect("read");
        assert!((0..1 << 20).all(|at| reader.byte(at) == content(at)));
        assert_eq!(serving.rails(), peer.rails());
        peer.rails()
    };
    assert_eq!(rails_of(&reader, &owner), 1);
    // Started while the port is down.
    let late = Node::reader(1 << 20);
    assert_eq!(rails_of(&late, &owner), 1);
    drop(unplugged);
    assert_eq!((rails_of(&reader, &owner), rails_of(&late, &owner)), (2, 2));
}

/// The one that is left is the second: the owner must not answer on its first, which another network would be.
#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn a_reader_with_one_port_is_answered_on_the_same() {
    let (owner, reader) = (Node::owner(1 << 20), Node::reader(1 << 20));
    let unplugged = Unplugged::new(0);
    let (dial, request) = Dial::new(&reader.rails).expect("rails");
    drop(unplugged);
    let (serving, answer) = Serving::new(&owner.rails, &request).expect("served");
    let mut peer = dial.connect(&answer).expect("connected");
    let end = Answer::decode(&answer).expect("parameters").rails[0].0;
    assert_eq!((end.place, end.gid[12..].to_owned()), (1, vec![10, 77, 1, 1]));
    assert_eq!((serving.rails(), peer.rails()), (1, 1));
    peer.read(&[reader.piece(0, 0, 1 << 20)], soon()).expect("read");
    assert!(reader.holds(content));
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn without_a_port_that_is_up_there_is_a_reason() {
    let (owner, reader) = (Node::owner(1 << 20), Node::reader(1 << 20));
    let unplugged = [Unplugged::new(0), Unplugged::new(1)];
    let why = probe().expect_err("no port is up").to_string();
    assert!(why.contains("rxe0 port 1 is down") && why.contains("rxe1 port 1 is down"), "{why}");
    let why = reader.try_dial(&owner).err().expect("no port is up").to_string();
    assert!(why.contains("rxe1 port 1 is down"), "{why}");
    drop(unplugged);
    reads_again(&reader, &owner);
}

/// The part of the owner in the next test, which starts this as a process of its own.
#[test]
#[ignore = "a part of the next test"]
fn an_owner_of_its_own() {
    let Ok(request) = env::var("BATON_TEST_RDMA_REQUEST") else { return };
    let request: Vec<_> = request.split('.').map(|byte| byte.parse().expect("a byte")).collect();
    let owner = Node::owner(LARGE);
    let (_serving, answer) = Serving::new(&owner.rails, &request).expect("served");
    println!("answer {}", dotted(&answer));
    let _ = io::stdin().read_line(&mut String::new()); // until the other process is done
}

fn dotted(bytes: &[u8]) -> String {
    bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(".")
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs the ports of deploy/emulated/roce"]
fn an_owner_that_is_killed_ends_the_read() {
    let reader = Node::reader(LARGE);
    let (dial, request) = Dial::new(&reader.rails).expect("rails");
    let owner = Command::new(env::current_exe().expect("a program"))
        .args(["an_owner_of_its_own", "--ignored", "--nocapture"])
        .env("BATON_TEST_RDMA_REQUEST", dotted(&request))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut owner = Killed(owner.expect("started"));
    let lines = BufReader::new(owner.0.stdout.take().expect("piped")).lines();
    let answer = lines.map_while(Result::ok).find_map(|line| {
        let (_, answer) = line.split_once("answer ")?;
        answer.split('.').map(|byte| byte.parse().ok()).collect::<Option<Vec<u8>>>()
    });
    let mut peer = dial.connect(&answer.expect("the owner answers")).expect("connected");
    peer.read(&[reader.piece(5, 7, 100_000)], soon()).expect("another process's memory is read");
    assert!((0..100_000).all(|at| reader.byte(7 + at) == content(5 + at)));

    reader.fill(BLANK);
    read_until(&reader, peer, || drop(owner));
    nothing_writes(&reader);
}
