//! Transfers that end early: cancelled, dropped, refused, cut off, in every phase. Each side hears why, and every block
//! comes back exactly once.

use std::time::Duration;

use crate::support::{scripted::*, *};
use baton_kvtransfer::{Incoming, Limits, Outgoing, TransferError};
use baton_proto::{ApiError, ErrorCode, Incarnation, TransferId, v1};
use tokio::io::AsyncReadExt;
use v1::sender_message::Body as FromSender;

const FROM: [u32; 3] = [5, 6, 9];
const TO: [u32; 3] = [60, 2, 31];

/// How far a transfer between two nodes has come.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Decode expects it, prefill has not offered.
    Expected,
    /// Decode holds the offer and does not expect it yet.
    Offered,
    Accepted,
    /// One layer has arrived.
    Moving,
    /// All but one slice have arrived.
    AlmostAll,
}

const BOTH_SIDES: [Phase; 4] = [Phase::Offered, Phase::Accepted, Phase::Moving, Phase::AlmostAll];

struct Pair {
    prefill: Peer,
    decode: Peer,
    incoming: Option<Incoming>,
    outgoing: Option<Outgoing>,
}

async fn pair_in(phase: Phase) -> Pair {
    pair_with(phase, Peer::start("prefill-0"), Peer::start("decode-0")).await
}

async fn pair_with(phase: Phase, prefill: Peer, decode: Peer) -> Pair {
    let id = TransferId::generate();
    let incoming = (phase != Phase::Offered)
        .then(|| decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect("room"));
    let outgoing =
        (phase != Phase::Expected).then(|| prefill.node.offer(offer_spec(id, &decode, &FROM)).expect("room"));
    let ready = match phase {
        Phase::Moving => (0..1, 0..0),
        Phase::AlmostAll => (0..LAYERS - 1, 0..2),
        _ => (0..0, 0..0),
    };
    if phase == Phase::Offered {
        until("the offer is held", || decode.node.stats().held_offers == 1).await;
    }
    if let (Some(outgoing), Some(_)) = (&outgoing, &incoming) {
        until("it is accepted", || prefill.node.stats().outgoing_accepted == 1).await;
        let last = LAYERS - 1;
        let count = 3 * ready.0.len() as u64 + ready.1.len() as u64;
        ready.0.for_each(|layer| outgoing.progress().ready(layer, 0..3));
        outgoing.progress().ready(last, ready.1);
        until("slices have arrived", || decode.node.stats().slices_received == count).await;
    }
    Pair { prefill, decode, incoming, outgoing }
}

impl Pair {
    /// Both handles see an abort with these codes, blocks come back, nothing is left.
    async fn ends(self, decode_sees: Option<ErrorCode>, prefill_sees: Option<ErrorCode>) {
        if let (Some(mut incoming), Some(code)) = (self.incoming, decode_sees) {
            let error = within("decode's answer", 10, incoming.sealed()).await.expect_err("aborted");
            assert_eq!(error.code(), code, "{error}");
            assert_eq!(within("decode's fence", 10, incoming.close()).await, TO);
        }
        if let (Some(mut outgoing), Some(code)) = (self.outgoing, prefill_sees) {
            let error = within("prefill's answer", 10, outgoing.finished()).await.expect_err("aborted");
            assert_eq!(error.code(), code, "{error}");
            assert_eq!(error, within("the same again", 1, outgoing.aborted()).await);
            assert_eq!(within("prefill's fence", 10, outgoing.close()).await, FROM);
        }
        self.prefill.idle().await;
        self.decode.idle().await;
        assert!(self.prefill.reclaimed_blocks().is_empty() && self.decode.reclaimed_blocks().is_empty());
    }
}

#[tokio::test]
async fn prefill_cancels_in_every_phase() {
    for phase in BOTH_SIDES {
        let pair = pair_in(phase).await;
        pair.outgoing.as_ref().expect("offered").cancel("the client has left");
        pair.ends(Some(ErrorCode::Cancelled), Some(ErrorCode::Cancelled)).await;
    }
}

#[tokio::test]
async fn decode_cancels_in_every_phase() {
    for phase in [Phase::Expected, Phase::Accepted, Phase::Moving, Phase::AlmostAll] {
        let pair = pair_in(phase).await;
        pair.incoming.as_ref().expect("expected").cancel("the client has left");
        pair.ends(Some(ErrorCode::Cancelled), Some(ErrorCode::Cancelled)).await;
    }
}

#[tokio::test]
async fn dropped_handles_abort_and_their_blocks_are_reclaimed_once() {
    for phase in BOTH_SIDES {
        let mut pair = pair_in(phase).await;
        drop(pair.outgoing.take());
        if let Some(mut incoming) = pair.incoming.take() {
            let error = within("decode's answer", 10, incoming.sealed()).await.expect_err("aborted");
            assert_eq!(error.code(), ErrorCode::Cancelled);
            drop(incoming);
            until("decode's blocks are back", || pair.decode.reclaimed_blocks() == [2, 31, 60]).await;
        }
        until("prefill's blocks are back", || pair.prefill.reclaimed_blocks() == FROM).await;
        pair.prefill.idle().await;
        pair.decode.idle().await;
    }
}

#[tokio::test]
async fn a_sealed_transfer_dropped_later_returns_its_blocks_too() {
    let mut pair = pair_in(Phase::AlmostAll).await;
    let (outgoing, mut incoming) =
        (pair.outgoing.take().expect("offered"), pair.incoming.take().expect("expected"));
    outgoing.progress().ready(LAYERS - 1, 2..3);
    outgoing.seal(3);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert!(pair.decode.reclaimed_blocks().is_empty(), "still the sequence's");
    drop(incoming);
    assert_eq!(pair.decode.reclaimed_blocks(), [2, 31, 60]);
}

#[tokio::test]
async fn prefill_stops_in_every_phase() {
    for phase in BOTH_SIDES {
        let mut pair = pair_in(phase).await;
        pair.prefill.stop.cancel();
        within("prefill's end", 10, pair.prefill.node.stopped()).await;
        let seen = match &mut pair.incoming {
            Some(incoming) => {
                Some(within("the end", 10, incoming.sealed()).await.expect_err("aborted").code())
            }
            None => None,
        };
        // By its farewell or by the broken stream, whichever is read first.
        assert!(matches!(seen, None | Some(ErrorCode::InstanceLost | ErrorCode::Unavailable)), "{seen:?}");
        pair.ends(seen, Some(ErrorCode::Unavailable)).await;
    }
}

#[tokio::test]
async fn decode_stops_in_every_phase() {
    for phase in BOTH_SIDES {
        let mut pair = pair_in(phase).await;
        pair.decode.stop.cancel();
        within("decode's end", 10, pair.decode.node.stopped()).await;
        let error = pair.outgoing.as_mut().expect("offered").finished().await.expect_err("aborted");
        // By its farewell or by the broken stream, whichever is read first.
        assert!(matches!(error.code(), ErrorCode::InstanceLost | ErrorCode::Unavailable), "{error}");
        pair.ends(Some(ErrorCode::Unavailable), Some(error.code())).await;
    }
}

#[tokio::test]
async fn nobody_there() {
    let prefill = Peer::start("prefill-0");
    let decode = Peer::start("decode-0");
    let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
    spec.peer = "127.0.0.1:1".into();
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let error = within("giving up", 10, outgoing.finished()).await.expect_err("nobody there");
    assert!(matches!(error, TransferError::Unreachable { .. }), "{error}");
    assert_eq!(error.code(), ErrorCode::InstanceLost);
    assert_eq!(outgoing.close().await, FROM);
    let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
    spec.peer = "not a host".into();
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let error = within("refusal", 10, outgoing.finished()).await.expect_err("no address");
    assert_eq!(error.code(), ErrorCode::HandoffFailed);
}

#[tokio::test]
async fn layouts_that_differ_are_refused_by_name() {
    let prefill = Peer::start("prefill-0");
    let mut other = layout();
    other.dtype = "bf16".into();
    let decode = Peer::start_with("decode-0", Setup { layout: other, ..Setup::default() });
    let mut outgoing = prefill.node.offer(offer_spec(TransferId::generate(), &decode, &FROM)).expect("room");
    let error = within("the refusal", 10, outgoing.finished()).await.expect_err("differs");
    assert_eq!(error.code(), ErrorCode::Unsupported);
    assert!(error.to_string().contains("dtype is bf16"), "{error}");
}

#[tokio::test]
async fn another_start_of_the_peer_is_not_taken_for_the_one_meant() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
    spec.receiver_incarnation = Some(Incarnation(2));
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let error = within("the refusal", 10, outgoing.finished()).await.expect_err("stale");
    assert_eq!(error.code(), ErrorCode::StaleEpoch);

    let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
    spec.receiver = instance("decode-1");
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let error = within("the refusal", 10, outgoing.finished()).await.expect_err("someone else");
    assert_eq!(error.code(), ErrorCode::HandoffFailed);

    let id = TransferId::generate();
    let mut spec = expect_spec(id, &prefill.name, &TO);
    spec.sender_incarnation = Some(Incarnation(2));
    let _incoming = decode.node.expect(spec).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &FROM)).expect("room");
    let error = within("the refusal", 10, outgoing.finished()).await.expect_err("stale");
    assert_eq!(error.code(), ErrorCode::StaleEpoch);
}

#[tokio::test]
async fn refused_transfers_are_told_now_or_when_they_come() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let reason = || ApiError::new(ErrorCode::KvExhausted, "no blocks");
    for early in [true, false] {
        let id = TransferId::generate();
        if early {
            decode.node.refuse(id, reason());
        }
        let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &FROM)).expect("room");
        if !early {
            until("the offer is held", || decode.node.stats().held_offers == 1).await;
            decode.node.refuse(id, reason());
        }
        let error = within("the refusal", 10, outgoing.finished()).await.expect_err("refused");
        assert_eq!(error.code(), ErrorCode::KvExhausted);
        let late = decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect_err("refused");
        assert_eq!(late.code(), ErrorCode::KvExhausted);
    }
}

#[tokio::test]
async fn a_receiver_that_does_not_read_cannot_keep_the_blocks() {
    let mut receiver = ScriptedReceiver::start().await;
    let mut big = layout();
    big.slice_bytes = 8 << 20; // more than the sockets take in
    let limits = Limits { fence_grace: Duration::from_millis(50), ..limits() };
    let prefill =
        Peer::start_with("prefill-0", Setup { layout: big.clone(), blocks: 2, limits, ..one_lane() });
    let decode = Peer::start("decode-0");
    let mut spec = offer_spec(TransferId::generate(), &decode, &[0]);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("frozen"));
    let outgoing = prefill.node.offer(spec).expect("room");
    let slice = pattern(3, 0, 0, 8 << 20);
    prefill.pool.write(0, 0, &slice);
    let mut stream = receiver.stream_with("frozen", 1, &big).await;
    let (id, _) = stream.hear().await;
    stream.accept(id, Duration::from_secs(20)).await;
    outgoing.progress().ready(0, 0..1);
    let mut data = receiver.data().await;
    let mut start = vec![0; 68 + 1000];
    within("the frame's start", 10, data.read_exact(&mut start)).await.expect("open");
    assert_eq!(start[68..], slice[..1000]);
    assert_eq!(within("the fence", 5, outgoing.close()).await, [0]);
    // The blocks are ours again: what is written there now must not reach the peer.
    prefill.pool.write(0, 0, &[0x77; 8 << 20]);
    let mut rest = vec![0; (8 << 20) - 1000 + 4];
    within("the rest of the frame", 10, data.read_exact(&mut rest))
        .await
        .expect("the connection stays in step");
    assert!(!rest.windows(64).any(|window| window == [0x77; 64]), "new content was sent");
    let (rest, end) = rest.split_at(rest.len() - 4);
    assert!(rest.ends_with(&[0; 4096]), "zeros follow once the blocks are given back");
    assert_eq!(end, CUT_SHORT, "and are not to be taken for damage");
}

#[tokio::test]
async fn a_data_connection_cut_in_a_frame_aborts_both_sides() {
    let mut receiver = ScriptedReceiver::start().await;
    let prefill = Peer::start_with("prefill-0", one_lane());
    let decode = Peer::start("decode-0");
    let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let mut stream = receiver.stream("decode-9", 1).await;
    let (id, _) = stream.hear().await;
    stream.accept(id, Duration::from_secs(20)).await;
    outgoing.progress().ready(0, 0..3);
    let mut data = receiver.data().await;
    data.read_exact(&mut [0; 100]).await.expect("the start of a frame");
    drop(data);
    let error = within("the abort", 10, outgoing.finished()).await.expect_err("cut");
    assert!(matches!(error, TransferError::DataPath(_)), "{error}");
    assert!(matches!(stream.hear().await.1, FromSender::Abort(_)));
}

#[tokio::test]
async fn the_engines_mistakes_abort_and_say_so() {
    type Mistake = fn(&Outgoing);
    let mistakes: [(Mistake, &str); 5] = [
        (|o| o.progress().ready(LAYERS, 0..1), "does not have"),
        (|o| o.progress().ready(0, 2..4), "does not have"),
        (|o| (0..2).for_each(|_| o.progress().ready(0, 1..2)), "twice"),
        (|o| o.seal(1), "before block 0 of layer 0 was ready"),
        (|o| (0..2).for_each(|_| o.seal(1)), "sealed"),
    ];
    for (mistake, says) in mistakes {
        let mut pair = pair_in(Phase::Accepted).await;
        mistake(pair.outgoing.as_ref().expect("offered"));
        let error = pair.outgoing.as_mut().expect("offered").finished().await.expect_err("a mistake");
        assert!(error.to_string().contains(says), "{error}");
        pair.ends(Some(ErrorCode::HandoffFailed), Some(ErrorCode::HandoffFailed)).await;
    }
}
