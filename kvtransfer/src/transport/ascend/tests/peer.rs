//! The other process: this test binary as a child, told by the environment what it is.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    net::{Ipv4Addr, SocketAddr},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    ptr::NonNull,
    time::{Duration, Instant},
};

use super::{hixl::endpoint, pattern, soon, turn};
use crate::transport::{
    ascend::{
        Search,
        hccl::{HcclPair, Rank, RootInfo},
        hixl::{HixlAddress, HixlClient, HixlServer, Memory},
        probe,
    },
    fetch::{Piece, RemoteRegion},
};

const ROLE: &str = "BATON_TEST_ASCEND_ROLE";

/// Not a test of its own: the other process. As an ordinary test it has nothing to do.
#[test]
fn peer() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<&str> = role.split(' ').collect();
    match words[..] {
        ["lend", len] => lend(len.parse().expect("a length")),
        ["read-unfenced", address] => read_unfenced(&address.parse().expect("an address")),
        ["send", info, sizes] => exchange(info, sizes, true),
        ["receive", info, sizes] => exchange(info, sizes, false),
        ["probe"] => say("found", &probe(&Search::system())),
        _ => panic!("not a role: {role}"),
    }
}

fn say(what: &str, value: &dyn std::fmt::Display) {
    println!("\n{what} {value}");
}

fn wait_for_word() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("the parent");
}

/// Lends a pattern until told to stop, tells how that went, and stays until told to end.
fn lend(len: usize) {
    let turn = turn();
    let memory = turn.memory(len);
    memory.write(&pattern(len));
    let device = turn.hixl().device(0).expect("a device");
    // An address of this process alone, so that its port is free.
    let [_, a, b, c] = std::process::id().to_be_bytes();
    let host = SocketAddr::from((Ipv4Addr::new(127, a | 0x40, b, c), 21_000));
    let server =
        HixlServer::start(turn.hixl(), &device, host, endpoint(&device), &memory.region(), Memory::Device)
            .expect("a server");
    say("lending", &server.address());
    wait_for_word();
    drop(server);
    say("memory-users", &(std::sync::Arc::strong_count(&memory) - 1));
    wait_for_word();
}

fn read_unfenced(address: &HixlAddress) {
    let turn = turn();
    let memory = turn.memory(4096);
    let device = turn.hixl().device(0).expect("a device");
    let (region, local) = (memory.region(), endpoint(&device));
    let mut client =
        HixlClient::connect(turn.hixl(), &device, local, *address, &region, Memory::Device, soon())
            .expect("connected");
    say("reading", &"");
    let pieces = [Piece { remote: 0, local: memory.at(0), len: 4096 }];
    let result = client.read(&pieces, Instant::now() + Duration::from_millis(50));
    say("returned", &format!("{result:?}"));
}

fn exchange(info: &str, sizes: &str, sends: bool) {
    let turn = turn();
    let sizes: Vec<usize> = sizes.split(',').map(|size| size.parse().expect("a size")).collect();
    let len = sizes.iter().sum();
    let memory = turn.memory(len);
    let device = turn.hccl().device(1).expect("a device");
    let info = RootInfo::from_bytes(&unhex(info)).expect("whole");
    let mut pair =
        HcclPair::join(turn.hccl(), &device, &info, Rank::Other, &memory.region()).expect("joined");
    say("joined", &"");
    let mut at = 0;
    let mut piece = |len: usize| -> (NonNull<u8>, usize) {
        let start = memory.at(at);
        at += len;
        (start, len)
    };
    let pieces: Vec<_> = sizes.iter().map(|&size| piece(size)).collect();
    if sends {
        memory.write(&pattern(len));
        wait_for_word();
        let result = pair.send(&pieces, soon());
        say("sent", &format!("{result:?}"));
    } else {
        let result = pair.recv(&pieces, soon());
        say("received", &format!("{result:?} {}", memory.read() == pattern(len)));
    }
    wait_for_word();
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).expect("hex"));
    digits.map(|pair| u8::from_str_radix(pair, 16).expect("hex")).collect()
}

/// A child, which ends with the test.
pub(super) struct Peer {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    pub(super) fn start(role: &str) -> Self {
        Self::start_with(role, &[])
    }

    pub(super) fn start_with(role: &str, variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "transport::ascend::tests::peer::peer", "--nocapture"])
            .env(ROLE, role)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("this test starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines }
    }

    /// What the child says of `what`.
    pub(super) fn hear(&mut self, what: &str) -> String {
        for line in &mut self.lines {
            if let Some(value) = line.expect("text").strip_prefix(&format!("{what} ")) {
                return value.to_owned();
            }
        }
        panic!("the other process ended without saying {what}: {}", self.errors());
    }

    /// Lets the child go on.
    pub(super) fn tell(&mut self) {
        self.child.stdin.as_mut().expect("piped").write_all(b"\n").expect("the child");
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    pub(super) fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("ended")
    }

    pub(super) fn errors(&mut self) -> String {
        let errors = self.child.stderr.take().expect("piped");
        BufReader::new(errors).lines().map_while(Result::ok).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
