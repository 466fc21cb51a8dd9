//! Whole transfers between two nodes over loopback, with real memory.

use std::sync::{Arc, Mutex};

use crate::support::*;
use baton_kvtransfer::{Dial, Dialling, ExpectSpec, OfferSpec, TransferError};
use baton_proto::{ErrorCode, InstanceId, PromptDigest, TransferId};
use tonic::transport::Endpoint;

const MANY: [u32; 9] = [7, 3, 60, 22, 21, 20, 5, 63, 0];
const THERE: [u32; 9] = [1, 50, 2, 49, 3, 48, 4, 47, 5];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_in_scattered_blocks_while_the_sender_still_produces() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &THERE)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &MANY)).expect("room");
    let progress = outgoing.progress();
    for chunk in [0..4, 4..8, 8..9] {
        for layer in 0..LAYERS {
            prefill.fill_layer(11, layer, &MANY, chunk.clone());
            progress.ready(layer, chunk.clone());
        }
        let sent = u64::from(LAYERS) * u64::from(chunk.end);
        until("the chunk has arrived", || decode.node.stats().slices_received == sent).await;
    }
    outgoing.seal(4242);
    let sealed = within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert_eq!((sealed.first_tokens, sealed.slices), (4242.into(), 36));
    assert_eq!(sealed.bytes, 36 * SLICE as u64);
    let stats = within("finished", 10, outgoing.finished()).await.expect("released");
    assert_eq!((stats.slices, stats.bytes), (36, 36 * SLICE as u64));
    assert!(decode.holds(11, &THERE));
    assert_eq!(incoming.close().await, THERE);
    assert_eq!(outgoing.close().await, MANY);
    prefill.idle().await;
    decode.idle().await;
    assert!(prefill.reclaimed_blocks().is_empty() && decode.reclaimed_blocks().is_empty());
    assert_eq!(prefill.node.stats().outgoing_completed, 1);
}

#[tokio::test]
async fn everything_ready_before_the_receiver_expects_it() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let id = TransferId::generate();
    prefill.fill(5, &MANY);
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &MANY)).expect("room");
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..9));
    outgoing.seal(1);
    until("the offer is held", || decode.node.stats().held_offers == 1).await;
    assert_eq!(decode.node.stats().incoming_active, 0);
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &THERE)).expect("room");
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
    assert!(decode.holds(5, &THERE));
    assert_eq!(decode.node.stats().held_offers, 0);
}

#[tokio::test]
async fn a_receiver_can_wait_for_the_offer_before_it_reserves() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let (id, expected) = (TransferId::generate(), TransferId::generate());
    let waiting = tokio::spawn(decode.node.offered(id));
    let stranger = tokio::spawn(decode.node.offered(TransferId::generate()));
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    let _outgoing = prefill.node.offer(offer_spec(id, &decode, &MANY)).expect("room");
    within("the offer", 10, waiting).await.expect("no panic");
    assert_eq!(decode.node.stats().held_offers, 1);
    within("an offer that is held", 10, decode.node.offered(id)).await;
    let _incoming = decode.node.expect(expect_spec(expected, &prefill.name, &[9])).expect("room");
    within("an expected transfer", 10, decode.node.offered(expected)).await;
    assert!(!stranger.is_finished(), "another transfer's offer is not its own");
    stranger.abort();
}

#[tokio::test]
async fn held_blocks_are_not_sent() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let id = TransferId::generate();
    prefill.fill(6, &MANY);
    for layer in 0..LAYERS {
        // What decode holds is marked, so that a write to it would show.
        [0u32, 1, 8].iter().for_each(|&i| decode.pool.write(layer, THERE[i as usize], &[0xEE; SLICE]));
    }
    let mut spec = expect_spec(id, &prefill.name, &THERE);
    spec.held = vec![0, 8, 1];
    let mut incoming = decode.node.expect(spec).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &MANY)).expect("room");
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..9));
    outgoing.seal(1);
    let sealed = within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert_eq!(sealed.slices, 6 * u64::from(LAYERS));
    within("finished", 10, outgoing.finished()).await.expect("released");
    for layer in 0..LAYERS {
        for index in 0..9u32 {
            let got = decode.pool.read(layer, THERE[index as usize]);
            let held = [0, 1, 8].contains(&index);
            assert_eq!(got, if held { vec![0xEE; SLICE] } else { pattern(6, layer, index, SLICE) });
        }
    }
}

#[tokio::test]
async fn a_transfer_that_decode_holds_already_moves_nothing() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let id = TransferId::generate();
    let mut spec = expect_spec(id, &prefill.name, &THERE);
    spec.held = (0..9).collect();
    let mut incoming = decode.node.expect(spec).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &MANY)).expect("room");
    outgoing.seal(77);
    let sealed = within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert_eq!((sealed.first_tokens, sealed.slices, sealed.bytes), (77.into(), 0, 0));
    within("finished", 10, outgoing.finished()).await.expect("released");
}

#[tokio::test]
async fn a_transfer_id_is_used_once() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let id = TransferId::generate();
    for round in 0..2 {
        let expected = decode.node.expect(expect_spec(id, &prefill.name, &[1]));
        let offered = prefill.node.offer(offer_spec(id, &decode, &[1]));
        if round == 1 {
            assert_eq!(expected.map(|_| ()), Err(TransferError::AlreadyExists(id)));
            assert_eq!(offered.map(|_| ()), Err(TransferError::AlreadyExists(id)));
            break;
        }
        let (mut incoming, mut outgoing) = (expected.expect("fresh"), offered.expect("fresh"));
        // While it lives, too.
        assert!(decode.node.expect(expect_spec(id, &prefill.name, &[2])).is_err());
        assert!(prefill.node.offer(offer_spec(id, &decode, &[2])).is_err());
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
        outgoing.seal(1);
        within("sealed", 10, incoming.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
    }
    // The sender's process has forgotten (a restart), the receiver has not.
    let again = Peer::start_with("prefill-0", Setup { incarnation: 2, ..Setup::default() });
    let mut outgoing = again.node.offer(offer_spec(id, &decode, &[1])).expect("fresh there");
    let error = within("refused", 10, outgoing.finished()).await.expect_err("used before");
    assert_eq!(error.code(), ErrorCode::AlreadyExists);
}

#[tokio::test]
async fn blocks_in_use_are_not_lent_twice() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let first =
        decode.node.expect(expect_spec(TransferId::generate(), &prefill.name, &[1, 2])).expect("free");
    for blocks in [&[2u32, 3][..], &[3, 3], &[BLOCKS]] {
        let error = decode.node.expect(expect_spec(TransferId::generate(), &prefill.name, blocks));
        assert_eq!(error.expect_err("in use").code(), ErrorCode::HandoffFailed);
    }
    assert!(decode.node.offer(offer_spec(TransferId::generate(), &prefill, &[1])).is_err());
    assert_eq!(first.close().await, [1, 2]);
    decode.node.expect(expect_spec(TransferId::generate(), &prefill.name, &[3, 2, 1])).expect("free again");
    // Any number may send the same block.
    let one = prefill.node.offer(offer_spec(TransferId::generate(), &decode, &[9])).expect("free");
    let two = prefill.node.offer(offer_spec(TransferId::generate(), &decode, &[9])).expect("shared");
    one.close().await;
    two.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_at_once() {
    const EACH: u32 = 3;
    const COUNT: u32 = 200;
    let setup = || Setup { blocks: COUNT * EACH, ..Setup::default() };
    let (prefill, decode) = (Peer::start_with("prefill-0", setup()), Peer::start_with("decode-0", setup()));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..COUNT {
        let id = TransferId::generate();
        let from: Vec<u32> = (0..EACH).map(|i| n * EACH + i).collect();
        let to: Vec<u32> = (0..EACH).map(|i| i * COUNT + n).collect();
        prefill.fill(n.into(), &from);
        let expect = |to: &[u32]| decode.node.expect(expect_spec(id, &prefill.name, to)).expect("room");
        let early = (n % 2 == 0).then(|| expect(&to));
        let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &from)).expect("room");
        let mut incoming = early.unwrap_or_else(|| expect(&to));
        tasks.spawn(async move {
            for layer in 0..LAYERS {
                outgoing.progress().ready(layer, 0..EACH);
                tokio::task::yield_now().await;
            }
            outgoing.seal(n);
            let sealed = incoming.sealed().await.expect("whole");
            outgoing.finished().await.expect("released");
            assert_eq!(sealed.first_tokens, n.into());
            (n, incoming.close().await, outgoing.close().await)
        });
    }
    let mut returned = (Vec::new(), Vec::new());
    while let Some(done) = within("one of them", 30, tasks.join_next()).await {
        let (n, to, from) = done.expect("no panic");
        assert!(decode.holds(n.into(), &to), "transfer {n}");
        returned.0.extend(to);
        returned.1.extend(from);
    }
    for mut blocks in [returned.0, returned.1] {
        blocks.sort_unstable();
        assert_eq!(blocks, (0..COUNT * EACH).collect::<Vec<_>>(), "each block exactly once");
    }
    prefill.idle().await;
    decode.idle().await;
    let stats = (prefill.node.stats(), decode.node.stats());
    assert_eq!((stats.0.outgoing_completed, stats.1.incoming_completed), (COUNT.into(), COUNT.into()));
    assert!(stats.0.aborted.is_empty() && stats.1.aborted.is_empty(), "{stats:?}");
}

#[tokio::test]
async fn prompts_that_are_as_long_and_not_the_same_never_meet() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let other = PromptDigest::of(&[1, 2, 4]);
    for offered_first in [true, false] {
        let id = TransferId::generate();
        // Of one block the receiver has the content: of its own prompt, which the sender must not fill up.
        let expect = ExpectSpec { held: vec![0], ..expect_spec(id, &prefill.name, &[1, 2]) };
        let offer = OfferSpec { prompt_digest: other, ..offer_spec(id, &decode, &[5, 6]) };
        let expect = || decode.node.expect(expect.clone()).expect("room");
        let early = (!offered_first).then(expect);
        let mut outgoing = prefill.node.offer(offer).expect("room");
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..2));
        outgoing.seal(1);
        within("the offer", 10, decode.node.offered(id)).await;
        let mut incoming = early.unwrap_or_else(expect);
        let error = within("the refusal", 10, incoming.sealed()).await.expect_err("of another prompt");
        let expected = TransferError::OtherPrompt { expected: prompt(), found: other };
        assert_eq!(error, expected);
        let error = within("the refusal", 10, outgoing.finished()).await.expect_err("of another prompt");
        assert!(error.to_string().contains("the prompts differ"), "{error}");
        assert_eq!(error.code(), ErrorCode::HandoffFailed);
        assert_eq!((incoming.close().await, outgoing.close().await), (vec![1, 2], vec![5, 6]));
        assert_eq!(decode.node.stats().slices_received, 0);
    }
}

/// Connects to whoever answers, and notes who should.
#[derive(Default)]
struct Noting(Mutex<Vec<InstanceId>>);

impl Dial for Noting {
    fn dial(&self, peer: Endpoint, receiver: &InstanceId) -> Dialling {
        self.0.lock().expect("not poisoned").push(receiver.clone());
        Box::pin(async move { peer.connect().await })
    }
}

#[tokio::test]
async fn whoever_connects_is_told_who_should_be_there_and_others_there_are_not_spoken_to() {
    let noting = Arc::new(Noting::default());
    let decode = Peer::start("decode-0");
    let prefill = Peer::start_with("prefill-0", Setup { dial: noting.clone(), ..Setup::default() });
    let (id, wrong) = (TransferId::generate(), TransferId::generate());
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &THERE)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &MANY)).expect("room");
    until("it is offered", || decode.node.stats().incoming_active == 1).await;

    let spec = OfferSpec { receiver: instance("decode-1"), ..offer_spec(wrong, &decode, &[1]) };
    let mut nobody = prefill.node.offer(spec).expect("room");
    let (expected, found) = (instance("decode-1"), decode.name.clone());
    let refused = within("refused", 10, nobody.finished()).await;
    assert_eq!(refused.map(drop), Err(TransferError::WrongPeer { expected, found }));
    assert_eq!(*noting.0.lock().expect("not poisoned"), [instance("decode-0"), instance("decode-1")]);

    // The one that has found its receiver is none the wiser.
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..9));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
}
