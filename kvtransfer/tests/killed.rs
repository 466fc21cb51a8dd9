//! A process that is killed with SIGKILL in the middle of a transfer: the other side notices, aborts and has its blocks
//! back. The victim is this test binary itself, started as a child.

mod support;

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use baton_proto::{ErrorCode, TransferId};
use support::*;

const VICTIM: &str = "BATON_TEST_KV_VICTIM";

/// Not a test of its own: the process that gets killed. Its role comes through the environment; as an ordinary test it
/// has nothing to do.
#[tokio::test]
async fn victim() {
    let Ok(role) = std::env::var(VICTIM) else { return };
    let mut parts = role.split(' ');
    let peer = Peer::start_with("victim", Setup { lease: Duration::from_secs(2), ..Setup::default() });
    match (parts.next(), parts.next(), parts.next()) {
        (Some("prefill"), Some(decode), Some(id)) => {
            let mut spec = offer_spec(parse_id(id), &peer, &[1, 2, 3]);
            (spec.peer, spec.receiver) = (decode.into(), instance("survivor"));
            let outgoing = peer.node.offer(spec).expect("room");
            outgoing.progress().ready(0, 0..3);
            std::future::pending::<()>().await;
        }
        (Some("decode"), Some(id), None) => {
            let _incoming =
                peer.node.expect(expect_spec(parse_id(id), &instance("survivor"), &[7, 8, 9])).expect("room");
            println!("\nlistening {}", peer.address);
            std::future::pending::<()>().await;
        }
        other => panic!("not a role: {other:?}"),
    }
}

fn parse_id(hex: &str) -> TransferId {
    let byte = |at: usize| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex");
    TransferId::from_bytes(std::array::from_fn(byte))
}

/// Kills the child also when the test fails.
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

    fn kill(&mut self) {
        self.0.kill().expect("a child of ours");
        self.0.wait().expect("a child of ours");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn decode_outlives_a_killed_prefill() {
    let decode = Peer::start("survivor");
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &instance("victim"), &[4, 5, 6])).expect("room");
    let mut victim = Victim::start(format!("prefill {} {id}", decode.address));
    until("slices are moving", || decode.node.stats().slices_received == 3).await;
    victim.kill();
    let error = within("noticing", 5, incoming.sealed()).await.expect_err("killed");
    assert!(matches!(error.code(), ErrorCode::InstanceLost | ErrorCode::HandoffFailed), "{error}");
    assert_eq!(within("the fence", 5, incoming.close()).await, [4, 5, 6]);
    decode.idle().await;
}

#[tokio::test]
async fn prefill_outlives_a_killed_decode() {
    let prefill = Peer::start("survivor");
    let id = TransferId::generate();
    let mut victim = Victim::start(format!("decode {id}"));
    let output = BufReader::new(victim.0.stdout.take().expect("piped"));
    let address = tokio::task::spawn_blocking(move || {
        let line = output.lines().map_while(Result::ok).find(|line| line.starts_with("listening "));
        line.expect("the child says where it listens").split(' ').nth(1).map(str::to_owned)
    });
    let mut spec = offer_spec(id, &prefill, &[1, 2, 3]);
    spec.peer = within("the child", 20, address).await.expect("no panic").expect("an address");
    spec.receiver = instance("victim");
    let mut outgoing = prefill.node.offer(spec).expect("room");
    outgoing.progress().ready(0, 0..3);
    until("slices are moving", || prefill.node.stats().slices_sent == 3).await;
    victim.kill();
    let error = within("noticing", 5, outgoing.finished()).await.expect_err("killed");
    assert!(matches!(error.code(), ErrorCode::InstanceLost | ErrorCode::HandoffFailed), "{error}");
    assert_eq!(outgoing.close().await, [1, 2, 3]);
    prefill.idle().await;
}
