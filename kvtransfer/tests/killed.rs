//! A process that is killed with SIGKILL, or frozen with SIGSTOP, in each phase of a transfer: the other side notices,
//! aborts, has its blocks back and serves on; one that thaws again harms nothing. The victim is this test binary itself,
//! started as a child.

mod support;

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
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

/// How far the transfer is when a process of it is struck. "sealed", a receiver's only: everything is there, and the seal
/// finds nobody. A sender that has sealed is needed no more.
const SENDER: &[&str] = &["offered", "accepted", "moving", "moved"];
const RECEIVER: &[&str] = &["offered", "accepted", "moving", "moved", "sealed"];
const TRANSPORTS: [&str; 2] = ["tcp", "shm"];

fn over(transport: &str) -> Setup {
    let transports = match transport {
        "tcp" => vec![TransportConfig::Tcp { connections: 2 }],
        _ => vec![TransportConfig::Shm],
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
        _ => panic!("not a role: {role}"),
    }
}

fn parse_id(hex: &str) -> TransferId {
    let byte = |at: usize| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex");
    TransferId::from_bytes(std::array::from_fn(byte))
}

/// Ended also when the test fails.
struct Victim(Child);

impl Victim {
    fn start(role: String) -> Self {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "victim", "--nocapture"])
            .env(VICTIM, role)
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test starts");
        Self(child)
    }

    /// Waits until it is where it is to be struck, or listens; what it says beside.
    async fn there(&mut self) -> String {
        let output = BufReader::new(self.0.stdout.take().expect("piped"));
        let said = tokio::task::spawn_blocking(move || {
            let mut lines = output.lines().map_while(Result::ok);
            let line = lines.find(|line| line.starts_with("there")).expect("the child says that it is there");
            line.trim_start_matches("there").trim().to_owned()
        });
        within("the child", 20, said).await.expect("no panic")
    }

    /// Lets a frozen one go on, until it has run and has nothing left to do; where it was killed there is nothing to do.
    async fn thaw(&self, struck: Signal) {
        if struck != Signal::STOP {
            return;
        }
        let frozen = self.switches();
        self.signal(Signal::CONT);
        let mut last = frozen;
        let quiet = async {
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let now = self.switches();
                // Fewer where threads have ended.
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
        until("it is struck", || self.of_threads("State:").into_iter().all(still)).await;
    }

    /// How often its threads have gone to sleep.
    fn switches(&self) -> u64 {
        let counts = self.of_threads("voluntary_ctxt_switches:");
        counts.iter().map(|count| count.parse::<u64>().expect("a number")).sum()
    }

    /// What the system says of each of its threads.
    fn of_threads(&self, what: &str) -> Vec<String> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).expect("a child of ours");
        let status = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("status")).ok();
        let statuses = threads.flatten().filter_map(status); // a thread may end meanwhile
        let line =
            |text: String| text.lines().find_map(|line| Some(line.strip_prefix(what)?.trim().to_owned()));
        statuses.filter_map(line).collect()
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
fn cases(phases: &'static [&str]) -> impl Iterator<Item = (&'static str, &'static str, Signal)> {
    TRANSPORTS.into_iter().flat_map(|transport| {
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
    for case in cases(SENDER) {
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

#[tokio::test]
async fn prefill_outlives_a_decode_that_is_killed_or_frozen_in_any_phase() {
    for case in cases(RECEIVER) {
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
