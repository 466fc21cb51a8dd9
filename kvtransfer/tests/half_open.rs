//! A network that drops every packet and says nothing: no end of a connection, no reset. Two processes, each in a network
//! namespace of its own with a veth pair between; in each phase of a transfer the one's frames go to an address that
//! nobody has. Both sides end in time, blocks come back and stay whole, and what comes after the link has healed is as
//! quick as ever.
//!
//! Needs `unshare` and `ip`, and a system on which this user may make namespaces; says so where that is not the case.

mod support;

use std::{
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use baton_kvtransfer::{Limits, Outgoing};
use baton_proto::{ErrorCode, TransferId};
use support::*;
use tokio::sync::mpsc;

const ROLE: &str = "BATON_TEST_KV_HALF_OPEN";
const PREFILL: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const DECODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PREFILL_MAC: &str = "02:00:00:00:00:01";
const DECODE_MAC: &str = "02:00:00:00:00:02";
/// Of nobody.
const NOWHERE: [&str; 2] = ["02:00:00:00:00:98", "02:00:00:00:00:99"];

/// Of both sides.
const LEASE: Duration = Duration::from_secs(1);
/// For what a loaded machine adds to a deadline.
const SLACK: Duration = Duration::from_secs(2);
/// Until TCP's own retransmissions are many seconds apart: on the old connection nothing comes for long after the healing.
const LONG: Duration = Duration::from_secs(7);
const THERE: [u32; 3] = [1, 2, 3];
/// What decode makes of blocks that have come back to it.
const OWN: u64 = 99;

fn setup(host: Ipv4Addr) -> Setup {
    Setup { host: host.into(), lease: LEASE, limits: Limits::for_lease(LEASE), ..Setup::default() }
}

#[test]
fn half_open_connections_end_in_every_phase_and_new_ones_take_their_place() {
    let unshare = |how: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(how);
        command
    };
    let mut why = String::new();
    for how in [&["--user", "--map-root-user", "--net"][..], &["--net"]] {
        let tried = unshare(how).args("ip link add kv0 type veth peer name kv1".split(' ')).output();
        match tried {
            Ok(output) if output.status.success() => {
                let mut prefill = unshare(how);
                prefill.arg(std::env::current_exe().expect("this test"));
                prefill.args(["--exact", "process", "--nocapture"]).env(ROLE, "prefill");
                assert!(prefill.status().expect("it starts").success(), "see above");
                return;
            }
            Ok(output) => why = String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => why = format!("unshare: {error}"),
        }
    }
    // Past what the harness captures of tests that pass.
    let said = writeln!(std::io::stderr(), "not run, because no network of its own can be made here: {why}");
    said.expect("stderr");
}

/// Not a test of its own: either of the two processes, as the environment says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process() {
    match std::env::var(ROLE).as_deref() {
        Ok("prefill") => prefill().await,
        Ok("decode") => decode().await,
        _ => {}
    }
}

async fn prefill() {
    let mut decode = Decode::start();
    decode.hear("there").await;
    ip(&format!("link add kv0 address {PREFILL_MAC} type veth peer name kv1 address {DECODE_MAC}"));
    ip(&format!("link set kv1 netns {}", decode.child.id()));
    ip(&format!("addr add {PREFILL}/30 dev kv0"));
    ip("link set kv0 up");
    heal();
    decode.say("go");
    let address = decode.hear("listens").await;
    let prefill = Peer::start_with("prefill-0", setup(PREFILL));
    prefill.fill(7, &THERE);
    let mut pair = Pair { prefill, decode, address, landed: 0, block: 1 };

    pair.whole().await;
    pair.cut_while_offered().await;
    pair.cut_while_moving().await;
    pair.cut_before_the_seal().await;
    pair.cut_before_the_answer().await;
}

struct Pair {
    prefill: Peer,
    decode: Decode,
    address: String,
    /// Slices that have landed at decode so far.
    landed: u64,
    /// Where decode's next transfer goes.
    block: u32,
}

impl Pair {
    fn offer(&self, id: TransferId) -> Outgoing {
        let mut spec = offer_spec(id, &self.prefill, &THERE);
        (spec.peer, spec.receiver) = (self.address.clone(), instance("decode-0"));
        self.prefill.node.offer(spec).expect("room")
    }

    /// An offered transfer that is expected, with so many layers landed; and its first block at decode.
    async fn with_layers(&mut self, layers: u32) -> (Outgoing, u32) {
        let (id, block) = (TransferId::generate(), self.block);
        self.block += 3;
        self.decode.say(&format!("expect {id} {block}"));
        self.decode.hear("expected").await;
        let outgoing = self.offer(id);
        (0..layers).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        self.landed += u64::from(3 * layers);
        self.decode.say(&format!("landed {}", self.landed));
        self.decode.hear("landed").await;
        (outgoing, block)
    }

    /// A transfer with nothing in its way.
    async fn whole(&mut self) {
        let started = Instant::now();
        let (mut outgoing, _) = self.with_layers(LAYERS).await;
        outgoing.seal(1);
        assert_eq!(self.decode.hear("sealed").await, "whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        assert_eq!(outgoing.close().await, THERE);
        let prompt = Limits::for_lease(LEASE).handshake + LEASE + SLACK;
        assert!(started.elapsed() < prompt, "it took {:?}", started.elapsed());
    }

    /// The sender learns that its transfer is over, and has its blocks.
    async fn sender_ends(&self, mut outgoing: Outgoing, cut: Instant, deadline: Duration) {
        let error = within("the sender's end", 15, outgoing.finished()).await.expect_err("nobody answers");
        assert!(cut.elapsed() < deadline + SLACK, "the sender's end took {:?}: {error}", cut.elapsed());
        let codes = [ErrorCode::InstanceLost, ErrorCode::HandoffFailed, ErrorCode::DeadlineExceeded];
        assert!(codes.contains(&error.code()), "{error}");
        assert_eq!(within("its blocks", 2, outgoing.close()).await, THERE);
        self.prefill.idle().await;
    }

    /// So does the receiver.
    async fn receiver_ends(&mut self, cut: Instant, block: u32) {
        self.decode.hear("failed").await;
        assert_eq!(self.decode.hear("back").await, format!("{block}"));
        assert!(cut.elapsed() < LEASE + SLACK, "the receiver's end took {:?}", cut.elapsed());
    }

    /// The link is whole again: the next transfer goes at once, and nothing late comes into blocks that came back.
    async fn goes_on(&mut self, block: Option<u32>) {
        heal();
        self.whole().await;
        if let Some(block) = block {
            self.decode.say(&format!("own {block}"));
            assert_eq!(self.decode.hear("own").await, "true", "blocks were written after they came back");
        }
    }

    async fn cut_while_offered(&mut self) {
        let id = TransferId::generate();
        let outgoing = self.offer(id);
        self.decode.say(&format!("offered {id}"));
        self.decode.hear("offered").await;
        cut();
        let at = Instant::now();
        self.sender_ends(outgoing, at, LEASE).await;
        self.decode.say("idle");
        self.decode.hear("idle").await;
        assert!(at.elapsed() < LEASE + SLACK, "the receiver's end took {:?}", at.elapsed());
        tokio::time::sleep(LONG.saturating_sub(at.elapsed())).await;
        self.goes_on(None).await;
    }

    async fn cut_while_moving(&mut self) {
        let (outgoing, block) = self.with_layers(1).await;
        cut();
        let at = Instant::now();
        (1..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        self.receiver_ends(at, block).await;
        self.sender_ends(outgoing, at, LEASE).await;
        self.goes_on(Some(block)).await;
    }

    async fn cut_before_the_seal(&mut self) {
        let (outgoing, block) = self.with_layers(LAYERS).await;
        cut();
        let at = Instant::now();
        outgoing.seal(1);
        self.receiver_ends(at, block).await;
        self.sender_ends(outgoing, at, Limits::for_lease(LEASE).seal_grace).await;
        self.goes_on(Some(block)).await;
    }

    /// Decode has all of it, and nobody hears so until the lease is long over.
    async fn cut_before_the_answer(&mut self) {
        let (mut outgoing, _) = self.with_layers(LAYERS).await;
        cut_answers();
        outgoing.seal(1);
        assert_eq!(self.decode.hear("sealed").await, "whole");
        let unheard = tokio::time::timeout(LEASE * 3 / 2, outgoing.finished()).await;
        assert!(unheard.is_err(), "decode owns it, and the sender says {unheard:?}");
        heal();
        within("the answer", 10, outgoing.finished()).await.expect("decode owns it");
        assert_eq!(outgoing.close().await, THERE);
        self.whole().await;
    }
}

/// From here on frames go nowhere, either way. The interface stays up and routes stay: no error tells anybody.
fn cut() {
    address(NOWHERE[0], NOWHERE[1]);
}

/// From here on frames of decode's go nowhere.
fn cut_answers() {
    address(NOWHERE[0], DECODE_MAC);
}

fn heal() {
    address(PREFILL_MAC, DECODE_MAC);
}

/// Which address this side has, and which one it takes decode to have. The first forgets the second, so comes first.
fn address(own: &str, decode: &str) {
    ip(&format!("link set dev kv0 address {own}"));
    ip(&format!("neigh replace {DECODE} lladdr {decode} dev kv0 nud permanent"));
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The other process, as prefill's talks to it: over pipes, which no network cuts.
struct Decode {
    child: Child,
    to: ChildStdin,
    lines: mpsc::UnboundedReceiver<String>,
    /// Heard, and not asked for yet.
    early: Vec<String>,
}

impl Decode {
    fn start() -> Self {
        let mut child = Command::new("unshare")
            .arg("--net")
            .arg(std::env::current_exe().expect("this test"))
            .args(["--exact", "process", "--nocapture"])
            .env(ROLE, "decode")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test starts");
        let (to, from) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        Self { child, to, lines: lines(BufReader::new(from)), early: Vec::new() }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.to, "{line}").expect("it listens");
    }

    /// The rest of the next line that begins with this word.
    async fn hear(&mut self, word: &str) -> String {
        let rest = |line: &String| line.strip_prefix(word).map(|rest| rest.trim().to_owned());
        if let Some(at) = self.early.iter().position(|line| rest(line).is_some()) {
            return rest(&self.early.remove(at)).expect("just found");
        }
        loop {
            let line = within(word, 20, self.lines.recv()).await.expect("decode has ended");
            match rest(&line) {
                Some(rest) => return rest,
                None => self.early.push(line),
            }
        }
    }
}

impl Drop for Decode {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines as they come; read by a thread of their own.
fn lines(from: impl BufRead + Send + 'static) -> mpsc::UnboundedReceiver<String> {
    let (lines, received) = mpsc::unbounded_channel();
    std::thread::spawn(move || from.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
    received
}

async fn decode() {
    println!("\nthere");
    let mut commands = lines(BufReader::new(std::io::stdin()));
    assert_eq!(commands.recv().await.as_deref(), Some("go"));
    ip(&format!("addr add {DECODE}/30 dev kv1"));
    ip("link set kv1 up");
    ip(&format!("neigh replace {PREFILL} lladdr {PREFILL_MAC} dev kv1 nud permanent"));
    let peer = std::sync::Arc::new(Peer::start_with("decode-0", setup(DECODE)));
    println!("listens {}", peer.address);
    while let Some(command) = commands.recv().await {
        match command.split(' ').collect::<Vec<_>>()[..] {
            ["expect", id, block] => {
                let spec = expect_spec(parse_id(id), &instance("prefill-0"), &three(block));
                let mut incoming = peer.node.expect(spec).expect("room");
                println!("expected");
                let (peer, block) = (peer.clone(), block.to_owned());
                tokio::spawn(async move {
                    let sealed = incoming.sealed().await;
                    let blocks = incoming.close().await;
                    match sealed {
                        Ok(_) if peer.holds(7, &blocks) => println!("sealed whole"),
                        Ok(_) => println!("sealed with wrong bytes"),
                        Err(error) => {
                            peer.fill(OWN, &blocks);
                            println!("failed {error}\nback {block}");
                        }
                    }
                });
            }
            ["offered", id] => {
                peer.node.offered(parse_id(id)).await;
                println!("offered");
            }
            ["landed", slices] => {
                let slices: u64 = slices.parse().expect("a number");
                until("they have landed", || peer.node.stats().slices_received == slices).await;
                println!("landed");
            }
            ["idle"] => {
                peer.idle().await;
                println!("idle");
            }
            ["own", block] => println!("own {}", peer.holds(OWN, &three(block))),
            _ => panic!("not a command: {command}"),
        }
    }
}

fn three(first: &str) -> [u32; 3] {
    let first = first.parse().expect("a block");
    [first, first + 1, first + 2]
}

fn parse_id(hex: &str) -> TransferId {
    let byte = |at: usize| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex");
    TransferId::from_bytes(std::array::from_fn(byte))
}
