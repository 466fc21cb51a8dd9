//! Two transfers being sent: their owners, the engine, the control stream and its receiver, two lanes on one outbox, and
//! a mishap, all at once, on the real shell, link and outbox.

use std::collections::BTreeSet;

use shuttle::{future::block_on, thread};
use tokio::sync::mpsc;
use v1::{receiver_message, sender_message::Body};

use super::*;
use crate::{
    node::{control_queue::ControlQueue, link_up::LinkUp},
    transport::{Departure, Outbox},
};

const PEER: &str = "peer:1";
/// By transfer.
const BLOCKS_OF: [[u32; 2]; 2] = [[0, 1], [3, 2]];

/// What goes wrong, at whatever moment.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mishap {
    Nothing,
    ReceiverAborts,
    /// Another path takes the place of the first.
    BetterPath,
    /// The control stream breaks after so many messages, and a new one comes.
    StreamBreaks(u64),
    PathLost,
    ClockRunsOut,
    NotSent,
    ConnectionDropped,
}

impl Mishap {
    fn pick() -> Self {
        use Mishap::*;
        let breaks = StreamBreaks(pick(5));
        let (left, dropped) = (BetterPath, ConnectionDropped);
        [Nothing, ReceiverAborts, left, left, PathLost, ClockRunsOut, NotSent, dropped, breaks, breaks]
            [pick(10) as usize]
    }
}

/// What the lanes have sent, by transfer, layer and block.
type Sent = Arc<std::sync::Mutex<BTreeSet<(u8, u32, u32)>>>;

/// A lane of the data path: takes, reads, reports.
fn lane(outbox: &Outbox, watch: &Watch, sent: &Sent, mishap: Mishap, over: &CancellationToken) {
    loop {
        let next = block_on(async {
            tokio::select! {
                biased;
                ticket = outbox.next(1) => Some(ticket),
                () = over.cancelled() => None,
            }
        });
        let Some(mut ticket) = next else { return };
        let (run, of) = (ticket.run(), ticket.departure().id().as_bytes()[0]);
        watch.touch(BLOCKS_OF[of as usize][run.first as usize], || {
            ticket.departure().source(run.layer, run.first, 0).expect("taken");
        });
        let new = sent.lock().expect("not poisoned").insert((of, run.layer, run.first));
        assert!(new, "slice {run:?} of transfer {of} was taken twice");
        let waiting = outbox.waiting();
        assert_eq!(waiting.iter().collect::<BTreeSet<_>>().len(), waiting.len(), "in line twice");
        match mishap {
            Mishap::NotSent if of == 0 => ticket.failed("test"),
            Mishap::ConnectionDropped if of == 0 => drop(ticket),
            _ => ticket.sent(&[sum(run.layer, run.first)]),
        }
    }
}

/// The receiver's end of one control stream, and the link's task that reads what it says.
fn receiver(
    stage: &Stage,
    link: &Link,
    sent: &Sent,
    mishap: Mishap,
    most: u64,
    over: &CancellationToken,
    lanes: &mut Vec<thread::JoinHandle<()>>,
) {
    let (messages, mut said) = mpsc::channel::<v1::SenderMessage>(64);
    let messages = ControlQueue::new(messages, Arc::default());
    let up =
        LinkUp::new(stage.node.now(), messages, name("decode-0"), Incarnation(7), None, Outbox::default());
    // With one, whoever is to be woken is the only one.
    let mut path = |outbox: &Outbox, of: u64| {
        for _ in 0..of {
            let (outbox, watch) = (outbox.clone(), stage.watch.clone());
            let (sent, over) = (sent.clone(), over.clone());
            lanes.push(thread::spawn(move || lane(&outbox, &watch, &sent, mishap, &over)));
        }
    };
    let first = up.outbox().another();
    path(&first, 1 + pick(2));
    if mishap == Mishap::BetterPath {
        path(&up.outbox().another(), 1);
        lanes.push(thread::spawn(move || first.close()));
    }
    link.rise(&up);
    for _ in 0..most {
        let message = block_on(async {
            tokio::select! {
                biased;
                message = said.recv() => message,
                () = over.cancelled() => None,
            }
        });
        let Some(v1::SenderMessage { transfer_id, body: Some(body) }) = message else { return };
        let answer = match body {
            Body::Offer(_) if mishap == Mishap::ReceiverAborts && transfer_id[0] == 0 => {
                receiver_message::Body::Abort(v1::Abort { reason: None })
            }
            Body::Offer(_) => receiver_message::Body::Accept(v1::Accept {
                held: vec![],
                lease_millis: 60_000,
                data_key: vec![1; 16].into(),
                receiver_epoch: 7,
            }),
            Body::Seal(v1::Seal { slices, bytes, checksum, .. }) => {
                assert_eq!(Tally { slices, bytes, checksum }, whole(), "sealed what was not sent");
                let sent = sent.lock().expect("not poisoned");
                assert_eq!(sent.iter().filter(|(of, ..)| *of == transfer_id[0]).count(), 4);
                receiver_message::Body::Released(v1::Released {})
            }
            _ => continue,
        };
        link.dispatch(&stage.node, &up, v1::ReceiverMessage { transfer_id, body: Some(answer) });
    }
    link.down("test");
}

fn engine(progress: &Progress) {
    progress.ready(0, 0..2);
    progress.ready(1, 1..2);
    progress.ready(1, 0..1);
    progress.seal(5);
}

fn send() {
    let stage = Arc::new(Stage::new());
    let node = stage.node.clone();
    let kv = KvNode { node: node.clone() };
    let mishap = Mishap::pick();
    let (over, sent) = (CancellationToken::new(), Sent::default());
    let to = Destination { endpoint: PEER.into(), receiver: name("decode-0") };
    let link = Link::new(to.clone());
    node.links.put(to, link.clone());
    let peer = {
        let (stage, link, over, sent) = (stage.clone(), link.clone(), over.clone(), sent.clone());
        thread::spawn(move || {
            let mut lanes = Vec::new();
            if let Mishap::StreamBreaks(after) = mishap {
                receiver(&stage, &link, &sent, mishap, after, &over, &mut lanes);
            }
            receiver(&stage, &link, &sent, mishap, 64, &over, &mut lanes);
            lanes.into_iter().for_each(|lane| lane.join().expect("no panic"));
        })
    };
    let owners = [0, 1].map(|of| {
        let (stage, kv) = (stage.clone(), kv.clone());
        thread::spawn(move || owner(&stage, &kv, of, mishap))
    });
    let clock = (mishap == Mishap::ClockRunsOut).then(|| {
        let node = node.clone();
        thread::spawn(move || clock(&node))
    });
    owners.into_iter().for_each(|owner| owner.join().expect("no panic"));
    clock.into_iter().for_each(|clock| clock.join().expect("no panic"));
    over.cancel();
    peer.join().expect("no panic");
    let (completed, failed) = stage.told(Direction::Outgoing);
    assert_eq!(completed + failed, 2, "each owner is told once: {completed} {failed}");
    assert!((0..2).all(|of| stage.watch.has_returned(id(of))), "blocks came back");
    assert!(link.is_empty() && node.outgoing.len() == 0, "a transfer is left");
    drop(node.pool.claims.claim(&[0, 1, 2, 3], &[]).expect("no claim is left"));
}

/// Looks now and then, also while the first transfer is being offered, and finds that its time has run out.
fn clock(node: &Node) {
    for _ in 0..6 {
        let late = node.now() + Duration::from_secs(100);
        let live = node.outgoing.all();
        live.iter().filter(|outbound| outbound.id() == id(0)).for_each(|outbound| outbound.tick(late));
        thread::yield_now();
    }
}

/// The owner of one transfer. The first may meet the mishap, the second may be given up.
fn owner(stage: &Arc<Stage>, kv: &KvNode, of: u8, mishap: Mishap) {
    let spec = OfferSpec {
        id: id(of),
        peer: PEER.into(),
        receiver: name("decode-0"),
        receiver_incarnation: None,
        prompt_tokens: 32,
        prompt_digest: baton_proto::PromptDigest::of(&[]),
        blocks: BLOCKS_OF[of as usize].to_vec(),
        priority: 0,
        deadline: kv.node.now() + Duration::from_secs(60),
    };
    let mut outgoing = kv.offer(spec).expect("room");
    let progress = outgoing.progress();
    let engine = thread::spawn(move || engine(&progress));
    if of == 0 {
        let live = kv.node.outgoing.all();
        let meant = live.iter().find(|outbound| outbound.id() == id(of));
        match (mishap, meant) {
            (Mishap::PathLost, Some(outbound)) => outbound.path_lost("test"),
            (Mishap::ClockRunsOut, Some(outbound)) => {
                outbound.tick(kv.node.now() + Duration::from_secs(100));
            }
            _ => {}
        }
    } else if pick(2) == 0 {
        if pick(2) == 0 {
            outgoing.cancel("test");
        } else {
            drop(outgoing);
            return engine.join().expect("no panic");
        }
    }
    let finished = block_on(outgoing.finished());
    assert!(
        finished.is_ok() || !matches!(mishap, Mishap::Nothing | Mishap::BetterPath) || of == 1,
        "{finished:?}"
    );
    stage.watch.returned(id(of), &block_on(outgoing.close()));
    engine.join().expect("no panic");
}

#[test]
fn in_any_order_transfers_being_sent_end_once_and_nothing_ready_is_left() {
    explore(send);
}
