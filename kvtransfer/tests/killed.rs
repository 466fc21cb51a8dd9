//! A process that is killed with SIGKILL, or frozen with SIGSTOP, in each phase of a transfer: the other side notices,
//! aborts, has its blocks back and serves on; one that thaws again harms nothing. The victim is this test binary itself,
//! started as a child.

mod support;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use baton_kvtransfer::{Limits, NodeStats, TransferError, TransportConfig};
use baton_proto::{ErrorCode, TransferId};
use rustix::process::{Pid, Signal, kill_process};
use support::*;

const VICTIM: &str = "BATON_TEST_KV_VICTIM";
const THERE: [u32; 3] = [1, 2, 3];
const HERE: [u32; 3] = [7, 8, 9];
/// Of both sides.
const LEASE: Duration = Duration::from_secs(1);

/// How far the transfer is when a process of it is struck. "sealed", of a receiver: everything is there, and the seal
/// finds nobody; of a sender, which has a test of its own: it has said so, and what it said may arrive or not.
const SENDER: &[&str] = &["offered", "accepted", "moving", "moved"];
const RECEIVER: &[&str] = &["offered", "accepted", "moving", "moved", "sealed"];
const TRANSPORTS: &[&str] = &["tcp", "shm"];

fn over(transport: &str) -> Setup {
    let transports = match transport {
        "tcp" => vec![TransportConfig::Tcp { connections: 2 }],
        "shm" => vec![TransportConfig::Shm],
        "rdma" => vec![TransportConfig::Rdma],
        other => panic!("not a transport: {other}"),
    };
    Setup { lease: LEASE, limits: Limits::for_lease(LEASE), transports, ..Setup::default() }
}

/// What is ready of the transfer in a phase: so many layers.
fn layers_in(phase: &str) -> u32 {
    match phase {
        "moving" => 1,
        "moved" | "sealed" => LAYERS, // all, and not sealed before it is struck
        _ => 0,
    }
}

/// Whether a sender's transfer is in a phase.
fn there(stats: &NodeStats, phase: &str) -> bool {
    match phase {
        "offered" => stats.by_transport[0].opened == 1,
        "accepted" => stats.outgoing_accepted == 1,
        _ => stats.slices_sent == u64::from(3 * layers_in(phase)),
    }
}

/// Not a test of its own: the process that is struck. Its role comes through the environment; as an ordinary test it
/// has nothing to do.
#[tokio::test]
async fn victim() {
    let Ok(role) = std::env::var(VICTIM) else { return };
    let words: Vec<&str> = role.split(' ').collect();
    match words[..] {
        ["prefill", transport, phase, decode, id] => {
            let peer = Peer::start_with("victim", over(transport));
            peer.fill(3, &THERE);
            let mut spec = offer_spec(parse_id(id), &peer, &THERE);
            (spec.peer, spec.receiver) = (decode.into(), instance("survivor"));
            let outgoing = peer.node.offer(spec).expect("room");
            (0..layers_in(phase)).for_each(|layer| outgoing.progress().ready(layer, 0..3));
            if phase == "sealed" {
                outgoing.seal(1);
            }
            until(phase, || there(&peer.node.stats(), phase)).await;
            println!("\nthere");
            std::future::pending::<()>().await;
        }
        ["decode", transport, phase, id] => {
            let peer = Peer::start_with("victim", over(transport));
            let incoming =
                || peer.node.expect(expect_spec(parse_id(id), &instance("survivor"), &HERE)).expect("room");
            let _incoming = (phase != "offered").then(incoming);
            println!("\nthere {}", peer.address);
            std::future::pending::<()>().await;
        }
        // A receiver that says how its transfer ended.
        ["take", transport, id] => {
            let peer = Peer::start_with("victim", over(transport));
            let spec = expect_spec(parse_id(id), &instance("survivor"), &HERE);
            let mut incoming = peer.node.expect(spec).expect("room");
            println!("\nthere {}", peer.address);
            match incoming.sealed().await {
                Ok(_) => println!("\nended sealed {}", peer.holds(3, &HERE)),
                Err(error) => println!("\nended {:?} {error}", error.code()),
            }
            std::future::pending::<()>().await;
        }
        _ => panic!("not a role: {role}"),
    }
}

fn parse_id(hex: &str) -> TransferId {
    let byte = |at: usize| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex");
    TransferId::from_bytes(std::array::from_fn(byte))
}

/// Ended also when the test fails.
struct Victim(Child, Option<BufReader<ChildStdout>>);

impl Victim {
    fn start(role: String) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "victim", "--nocapture"])
            .env(VICTIM, role)
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test starts");
        let output = child.stdout.take().map(BufReader::new);
        Self(child, output)
    }

    /// Waits until it is where it is to be struck, or listens; what it says beside.
    async fn there(&mut self) -> String {
        self.says("there").await
    }

    /// Waits for a line that begins so; the rest of it.
    async fn says(&mut self, what: &'static str) -> String {
        let mut output = self.1.take().expect("piped");
        let said = tokio::task::spawn_blocking(move || {
            let mut lines = output.by_ref().lines().map_while(Result::ok);
            let line = lines.find(|line| line.starts_with(what)).expect("the child says so");
            (line.trim_start_matches(what).trim().to_owned(), output)
        });
        let (said, output) = within("the child", 20, said).await.expect("no panic");
        self.1 = Some(output);
        said
    }

    /// Lets a frozen one go on, until it has run and has nothing left to do; where it was killed there is nothing to do.
    async fn thaw(&self, struck: Signal) {
        if struck != Signal::STOP {
            return;
        }
        let frozen = self.switches();
        self.signal(Signal::CONT);
        let mut last = frozen.clone();
        let quiet = async {
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let now = self.switches();
                if now != frozen && now == last {
                    return;
                }
                last = now;
            }
        };
        within("the thawed one to run", 10, quiet).await;
    }

    /// Kills or freezes it; none of its threads does anything any more.
    async fn strike(&self, signal: Signal) {
        self.signal(signal);
        let still = |state: String| state.starts_with(['T', 'Z']);
        until("it is struck", || self.of_threads("State:").into_values().all(still)).await;
    }

    /// How often each of its threads has gone to sleep. Not their sum: one that ends may leave as much as another adds.
    fn switches(&self) -> BTreeMap<OsString, String> {
        self.of_threads("voluntary_ctxt_switches:")
    }

    /// What the system says of each of its threads, by their ids.
    fn of_threads(&self, what: &str) -> BTreeMap<OsString, String> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).expect("a child of ours");
        let said = |thread: std::fs::DirEntry| {
            let status = std::fs::read_to_string(thread.path().join("status")).ok()?; // it may end meanwhile
            let said = status.lines().find_map(|line| line.strip_prefix(what))?.trim().to_owned();
            Some((thread.file_name(), said))
        };
        threads.flatten().filter_map(said).collect()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, signal).expect("a child of ours");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Strikes with SIGKILL or SIGSTOP; a frozen one thaws at the end.
fn cases(
    transports: &'static [&str],
    phases: &'static [&str],
) -> impl Iterator<Item = (&'static str, &'static str, Signal)> {
    transports.iter().flat_map(|&transport| {
        phases.iter().flat_map(move |&phase| {
            [Signal::KILL, Signal::STOP].into_iter().map(move |signal| (transport, phase, signal))
        })
    })
}

fn noticed(error: &TransferError, case: &dyn std::fmt::Debug) {
    // The last: whoever has sealed waits for the answer longer than a lease.
    let codes = [ErrorCode::InstanceLost, ErrorCode::HandoffFailed, ErrorCode::DeadlineExceeded];
    assert!(codes.contains(&error.code()), "{case:?}: {error}");
}

#[tokio::test]
async fn decode_outlives_a_prefill_that_is_killed_or_frozen_in_any_phase() {
    decode_outlives(TRANSPORTS).await;
}

#[tokio::test]
async fn prefill_outlives_a_decode_that_is_killed_or_frozen_in_any_phase() {
    prefill_outlives(TRANSPORTS).await;
}

/// On a machine with RoCE ports to itself, as `tests/rdma.rs`.
#[tokio::test]
#[ignore = "needs RoCE ports"]
async fn over_rdma_either_side_outlives_the_other_that_is_killed_or_frozen_in_any_phase() {
    decode_outlives(&["rdma"]).await;
    prefill_outlives(&["rdma"]).await;
}

async fn decode_outlives(transports: &'static [&str]) {
    for case in cases(transports, SENDER) {
        let (transport, phase, signal) = case;
        let decode = Peer::start_with("survivor", over(transport));
        let id = TransferId::generate();
        let expect = || decode.node.expect(expect_spec(id, &instance("victim"), &HERE)).expect("room");
        let expected = (phase != "offered").then(expect);
        let mut victim = Victim::start(format!("prefill {transport} {phase} {} {id}", decode.address));
        victim.there().await;
        let landed = u64::from(3 * layers_in(phase));
        until(phase, || decode.node.stats().slices_received == landed).await;
        victim.strike(signal).await;
        if let Some(mut incoming) = expected {
            let error = within("noticing", 10, incoming.sealed()).await.expect_err("struck");
            noticed(&error, &case);
            assert_eq!(within("the fence", 10, incoming.close()).await, HERE, "{case:?}");
        }
        decode.idle().await;
        // The blocks are another's now, and stay so when the frozen one goes on.
        let other = Peer::start_with("other", over(transport));
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &other.name, &HERE)).expect("room");
        let mut outgoing = other.node.offer(offer_spec(id, &decode, &THERE)).expect("room");
        other.fill(4, &THERE);
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        outgoing.seal(1);
        within("sealed", 10, incoming.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        victim.thaw(signal).await;
        assert!(decode.holds(4, &HERE), "{case:?}");
    }
}

async fn prefill_outlives(transports: &'static [&str]) {
    for case in cases(transports, RECEIVER) {
        let (transport, phase, signal) = case;
        let prefill = Peer::start_with("survivor", over(transport));
        let id = TransferId::generate();
        let mut victim = Victim::start(format!("decode {transport} {phase} {id}"));
        let mut spec = offer_spec(id, &prefill, &THERE);
        (spec.peer, spec.receiver) = (victim.there().await, instance("victim"));
        let mut outgoing = prefill.node.offer(spec).expect("room");
        (0..layers_in(phase)).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        until(phase, || there(&prefill.node.stats(), phase)).await;
        victim.strike(signal).await;
        if phase == "sealed" {
            outgoing.seal(1);
        }
        let error = within("noticing", 10, outgoing.finished()).await.expect_err("struck");
        noticed(&error, &case);
        assert_eq!(within("the fence", 10, outgoing.close()).await, THERE, "{case:?}");
        prefill.idle().await;
        victim.thaw(signal).await;
        prefill.idle().await;
    }
}

#[tokio::test]
async fn a_sender_struck_as_it_seals_leaves_a_whole_cache_or_a_reason() {
    for case in cases(TRANSPORTS, &["sealed"]) {
        let (transport, phase, signal) = case;
        let decode = Peer::start_with("survivor", over(transport));
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &instance("victim"), &HERE)).expect("room");
        let mut victim = Victim::start(format!("prefill {transport} {phase} {} {id}", decode.address));
        victim.there().await;
        victim.strike(signal).await;
        match within("an end", 10, incoming.sealed()).await {
            Ok(_) => assert!(decode.holds(3, &HERE), "{case:?}"),
            Err(error) => noticed(&error, &case),
        }
        assert_eq!(within("the fence", 10, incoming.close()).await, HERE, "{case:?}");
        decode.idle().await;
        decode.fill(5, &HERE);
        victim.thaw(signal).await;
        assert!(decode.holds(5, &HERE), "{case:?}");
        decode.idle().await;
    }
}

/// The sender's blocks are lent on and written anew while the receiver, which maps them, cannot notice anything.
#[tokio::test]
async fn a_receiver_that_thaws_never_takes_blocks_in_that_the_sender_has_freed() {
    for (early, sealed) in [(0, false), (0, true), (LAYERS - 1, true)] {
        let prefill = Peer::start_with("survivor", over("shm"));
        prefill.fill(3, &THERE);
        let id = TransferId::generate();
        let mut victim = Victim::start(format!("take shm {id}"));
        let mut spec = offer_spec(id, &prefill, &THERE);
        (spec.peer, spec.receiver) = (victim.there().await, instance("victim"));
        let mut outgoing = prefill.node.offer(spec).expect("room");
        (0..early).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        until("it is accepted", || prefill.node.stats().outgoing_accepted == 1).await;
        until("it is opened", || prefill.node.stats().by_transport[0].opened == 1).await;
        until("some is there", || prefill.node.stats().slices_sent == u64::from(3 * early)).await;
        victim.strike(Signal::STOP).await;
        // Announced, and not read.
        (early..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        if sealed {
            outgoing.seal(1);
        }
        within("noticing", 10, outgoing.finished()).await.expect_err("frozen");
        assert_eq!(within("the fence", 10, outgoing.close()).await, THERE);
        prefill.fill(4, &THERE);
        victim.signal(Signal::CONT);
        let ended = victim.says("ended").await;
        assert!(!ended.starts_with("sealed"), "{ended}");
        // Nor does it take them for damage: what the sender had before was sound.
        assert!(!ended.contains("KvDamaged"), "{ended}");
    }
}

#[tokio::test]
async fn a_restarted_sender_transfers_at_once_and_the_receiver_need_not_restart() {
    for case in cases(TRANSPORTS, &["moving"]) {
        let (transport, phase, signal) = case;
        let decode = Peer::start_with("survivor", over(transport));
        let lost = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(lost, &instance("victim"), &HERE)).expect("room");
        let mut victim = Victim::start(format!("prefill {transport} {phase} {} {lost}", decode.address));
        victim.there().await;
        victim.strike(signal).await;
        // The same instance again, before any lease has run out.
        let again = Peer::start_with("victim", Setup { incarnation: 2, ..over(transport) });
        again.fill(6, &THERE);
        let id = TransferId::generate();
        let mut next = decode.node.expect(expect_spec(id, &again.name, &[20, 21, 22])).expect("room");
        let mut outgoing = again.node.offer(offer_spec(id, &decode, &THERE)).expect("room");
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        outgoing.seal(1);
        let started = std::time::Instant::now();
        within("sealed", 10, next.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        assert!(started.elapsed() < LEASE, "{case:?}: it waited for the old one's lease");
        assert!(decode.holds(6, &[20, 21, 22]), "{case:?}");
        let error = within("noticing", 10, incoming.sealed()).await.expect_err("of the old one");
        noticed(&error, &case);
        assert_eq!(within("the fence", 10, incoming.close()).await, HERE, "{case:?}");
        decode.fill(5, &HERE);
        victim.thaw(signal).await;
        assert!(decode.holds(5, &HERE) && decode.holds(6, &[20, 21, 22]), "{case:?}");
        decode.idle().await;
    }
}
