//! A transfer being received: its owner, the sender's control stream, two data connections, the clock and a mishap, all
//! at once, on the real shell.

use shuttle::{future::block_on, thread};
use tokio::sync::mpsc;
use tonic::Status;
use v1::{receiver_message::Body, sender_message};

use super::*;
use crate::node::{control_queue::ControlQueue, secret::Party, table::Counts};

const ID: u8 = 1;
const BLOCKS_OF_IT: [u32; 2] = [3, 1];

/// What goes wrong, at whatever moment.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mishap {
    Nothing,
    PeerAborts,
    StreamEnds,
    /// Once all is sealed, and the sender asks over the new one how it ended.
    StreamReplaced,
    ClockRunsOut,
    Damage,
    Interruption,
    ConnectionDropped,
    Refused,
}

impl Mishap {
    fn pick() -> Self {
        use Mishap::*;
        let all = [
            Nothing,
            PeerAborts,
            StreamEnds,
            StreamReplaced,
            ClockRunsOut,
            Damage,
            Interruption,
            ConnectionDropped,
            Refused,
        ];
        all[pick(all.len() as u64) as usize]
    }
}

fn link(node: &Node) -> (Arc<PeerLink>, mpsc::Receiver<Result<v1::ReceiverMessage, Status>>) {
    let (messages, answers) = mpsc::channel(64);
    let broken = CancellationToken::new();
    let link = PeerLink::new(
        node.now(),
        node.peers.next_number(),
        Party { id: name("prefill-0"), incarnation: Incarnation(9) },
        ControlQueue::new(messages, Arc::default()),
        broken,
    );
    (Arc::new(link), answers)
}

fn say(node: &Arc<Node>, link: &Arc<PeerLink>, body: sender_message::Body) {
    let message = v1::SenderMessage { transfer_id: id(ID).as_bytes().to_vec().into(), body: Some(body) };
    service::handle(node, link, message).expect("the stream stands");
}

/// A data connection that brings some of the slices.
fn lane(node: &Node, watch: &Watch, runs: Vec<SliceRun>, mishap: Mishap) {
    for run in runs {
        let Found::Live(live) = node.find(&id(ID)) else { return };
        let Some(mut claimed) = live.claim(run, &[sum(run.layer, run.first)]) else { continue };
        watch.touch(BLOCKS_OF_IT[run.first as usize], || {
            let mut target = claimed.landing().target(run.layer, run.first, 0).expect("claimed");
            target.copy_from_slice(&sum(run.layer, run.first).to_le_bytes());
        });
        match mishap {
            Mishap::Damage => claimed.damaged(run.first),
            Mishap::Interruption => claimed.interrupted("test"),
            Mishap::ConnectionDropped => drop(claimed),
            _ => claimed.landed(),
        }
    }
}

fn seal() -> sender_message::Body {
    let Tally { slices, bytes, checksum } = whole();
    sender_message::Body::Seal(v1::Seal { first_tokens: vec![5], slices, bytes, checksum })
}

/// The next thing that the sender is told, if it is before the end.
fn told(
    answers: &mut mpsc::Receiver<Result<v1::ReceiverMessage, Status>>,
    over: &CancellationToken,
) -> Option<Body> {
    let answer = block_on(async {
        tokio::select! {
            biased;
            answer = answers.recv() => answer,
            () = over.cancelled() => None,
        }
    });
    answer?.ok()?.body
}

/// The sender's end of the control stream. Returns what it was told of the transfer's end.
fn sender(
    stage: &Stage,
    link: &Arc<PeerLink>,
    mut answers: mpsc::Receiver<Result<v1::ReceiverMessage, Status>>,
    mishap: Mishap,
    over: &CancellationToken,
) -> Option<Body> {
    let (node, watch) = (&stage.node, &stage.watch);
    let (layers, blocks) = (LAYERS, 2);
    let offer =
        v1::Offer { prompt_tokens: 32, blocks, layers, sender_epoch: 9, prompt_digest: vec![7; 32].into() };
    say(node, link, sender_message::Body::Offer(offer));
    let mut lanes = Vec::new();
    let mut ends = Vec::new();
    while let Some(body) = told(&mut answers, over) {
        if let Body::Accept(_) = body {
            let (mut first, second): (Vec<_>, Vec<_>) = slices().partition(|run| run.layer == 0);
            first.push(second[0]); // both bring this one
            for (runs, mishap) in [(first, Mishap::Nothing), (second, mishap)] {
                let (node, watch) = (node.clone(), watch.clone());
                lanes.push(thread::spawn(move || lane(&node, &watch, runs, mishap)));
            }
            let body = if mishap == Mishap::PeerAborts {
                sender_message::Body::Abort(v1::Abort { reason: None })
            } else {
                seal()
            };
            say(node, link, body);
            if mishap == Mishap::StreamReplaced {
                let (next, mut answers) = self::link(node);
                node.admit_peer(&next).expect("the same start");
                say(node, &next, seal());
                ends.extend(told(&mut answers, over));
            }
        } else {
            ends.push(body);
        }
    }
    lanes.into_iter().for_each(|lane| lane.join().expect("no panic"));
    let mut ends = ends.into_iter().filter(|body| matches!(body, Body::Released(_) | Body::Abort(_)));
    let first = ends.next();
    for more in ends {
        // A seal that crosses with an abort is answered with it once more.
        assert_eq!(Some(&more), first.as_ref(), "told two things");
    }
    first
}

fn receive() {
    let stage = Arc::new(Stage::new());
    let (node, watch) = (stage.node.clone(), stage.watch.clone());
    let kv = KvNode { node: node.clone() };
    let mishap = Mishap::pick();
    let over = CancellationToken::new();
    let (link, answers) = link(&node);
    node.admit_peer(&link).expect("room");
    let peer = {
        let (stage, link, over) = (stage.clone(), link.clone(), over.clone());
        thread::spawn(move || sender(&stage, &link, answers, mishap, &over))
    };
    let fault = {
        let (kv, link) = (kv.clone(), link.clone());
        thread::spawn(move || match mishap {
            Mishap::StreamEnds => kv.node.peer_lost(&link, "test"),
            Mishap::ClockRunsOut => {
                let late = kv.node.now() + Duration::from_secs(100);
                kv.node.incoming.all().iter().for_each(|inbound| inbound.tick(late));
            }
            Mishap::Refused => kv.refuse(id(ID), ApiError::new(baton_proto::ErrorCode::Unavailable, "test")),
            _ => {}
        })
    };
    let spec = ExpectSpec {
        id: id(ID),
        sender: name("prefill-0"),
        sender_incarnation: None,
        prompt_tokens: 32,
        prompt_digest: baton_proto::PromptDigest::try_from(&[7; 32][..]).expect("32 bytes"),
        blocks: BLOCKS_OF_IT.to_vec(),
        held: vec![],
        deadline: node.now() + Duration::from_secs(60),
    };
    let (mut whole, mut handle) = (None, true);
    match (kv.expect(spec), pick(4)) {
        (Ok(incoming), 0) => drop(incoming),
        (Ok(incoming), 1) => {
            incoming.cancel("test");
            watch.returned(id(ID), &block_on(incoming.close()));
        }
        (Ok(mut incoming), _) if mishap == Mishap::StreamEnds => {
            // The offer may have come after the end of its stream, over which nothing comes any more.
            fault.join().expect("no panic");
            incoming.cancel("test");
            whole = Some(block_on(incoming.sealed()));
            watch.returned(id(ID), &block_on(incoming.close()));
            return end(&stage, &over, peer, None, whole, handle);
        }
        (Ok(mut incoming), _) => {
            let sealed = block_on(incoming.sealed());
            assert!(sealed.is_ok() || mishap != Mishap::Nothing, "{sealed:?}");
            if sealed.is_ok() {
                for run in slices() {
                    let content = node.pool.slices.source(run.layer, BLOCKS_OF_IT[run.first as usize]);
                    assert_eq!(content.expect("ours"), sum(run.layer, run.first).to_le_bytes());
                }
            }
            whole = Some(sealed);
            watch.returned(id(ID), &block_on(incoming.close()));
        }
        (Err(reason), _) => {
            assert!(mishap != Mishap::Nothing, "{reason}");
            handle = false;
        }
    }
    end(&stage, &over, peer, Some(fault), whole, handle);
}

/// Once the owner is done: what must be true of whatever happened.
fn end(
    stage: &Stage,
    over: &CancellationToken,
    peer: thread::JoinHandle<Option<Body>>,
    fault: Option<thread::JoinHandle<()>>,
    whole: Option<Result<Sealed, TransferError>>,
    handle: bool,
) {
    fault.into_iter().for_each(|fault| fault.join().expect("no panic"));
    over.cancel();
    let last = peer.join().expect("no panic");
    if !handle {
        // An offer that came late may still be held, for an owner that has been told no.
        stage.node.incoming.all().iter().for_each(|inbound| inbound.cancel(TransferError::ShuttingDown));
    }
    let (completed, failed) = stage.told(Direction::Incoming);
    assert_eq!(stage.watch.has_returned(id(ID)), handle, "blocks come back if they were lent");
    assert!(completed + failed <= 1 && (!handle || completed + failed == 1), "{completed} {failed}");
    assert_eq!(matches!(last, Some(Body::Released(_))), completed == 1, "the sender was told {last:?}");
    match whole {
        Some(Ok(sealed)) => assert_eq!((completed, sealed.slices), (1, 4)),
        Some(Err(_)) => assert_eq!(failed, 1),
        None => {}
    }
    assert_eq!(stage.node.incoming.counts(), Counts::default(), "a transfer or a held offer is left");
    drop(stage.node.pool.claims.claim(&[0, 1, 2, 3], &[]).expect("no claim is left"));
}

#[test]
fn in_any_order_a_transfer_being_received_ends_once_and_gives_its_blocks_back_once() {
    explore(receive);
}
