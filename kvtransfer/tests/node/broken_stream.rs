//! The control stream, or a data connection, breaks with the process still alive, in every phase: what is not whole is over
//! on both sides, and how a sealed transfer ended is asked again.

use std::time::{Duration, Instant};

use crate::support::{scripted::*, *};
use baton_kvtransfer::{Outgoing, TransferError};
use baton_proto::{ApiError, ErrorCode, TransferId, v1};
use v1::{receiver_message, sender_message::Body as FromSender};

const BLOCKS_LENT: [u32; 3] = [10, 40, 20];

#[tokio::test]
async fn the_senders_stream_breaks_in_every_phase() {
    let decode = Peer::start("decode-0");
    for phase in ["offered", "accepted", "in a frame", "between frames", "seal without its last slices"] {
        let mut sender = ScriptedSender::open(&decode, "prefill-9", 1).await.expect("welcome");
        let id = TransferId::generate();
        let expect = || decode.node.expect(expect_spec(id, &instance("prefill-9"), &BLOCKS_LENT));
        if phase == "offered" {
            sender.offer(id, 3, 1).await;
            until("the offer is held", || decode.node.stats().held_offers == 1).await;
            drop(sender);
            until("it is let go", || decode.node.stats().held_offers == 0).await;
            assert_eq!(expect().expect_err("its offer is gone").code(), ErrorCode::InstanceLost);
            continue;
        }
        let mut incoming = expect().expect("room");
        sender.offer(id, 3, 1).await;
        let key = sender.accepted().await;
        let mut data = sender.connect_data().await;
        let frame = RawFrame::new(id, &key, 0, 0, slices(1, 0, 0..3)).bytes();
        match phase {
            "in a frame" => write(&mut data, &frame[..frame.len() / 2]).await,
            "between frames" => write(&mut data, &frame).await,
            "seal without its last slices" => {
                let all: Vec<_> =
                    (0..LAYERS * 3).map(|n| (n / 3, n % 3, pattern(1, n / 3, n % 3, SLICE))).collect();
                sender.say(id, FromSender::Seal(seal(1, &all))).await;
            }
            _ => {}
        }
        drop(sender);
        let error = within("noticing", 5, incoming.sealed()).await.expect_err(phase);
        assert!(matches!(error, TransferError::LinkLost(_)), "{phase}: {error}");
        assert_eq!(within("the fence", 5, incoming.close()).await, BLOCKS_LENT, "{phase}");
    }
    decode.idle().await;
}

#[tokio::test]
async fn a_restarted_sender_ends_what_its_earlier_start_began() {
    let decode = Peer::start("decode-0");
    let mut earlier = ScriptedSender::open(&decode, "prefill-9", 1).await.expect("welcome");
    let id = TransferId::generate();
    let mut incoming =
        decode.node.expect(expect_spec(id, &instance("prefill-9"), &BLOCKS_LENT)).expect("room");
    earlier.offer(id, 3, 1).await;
    earlier.accepted().await;
    // The earlier process is half gone: its stream still stands when the next one calls.
    let _later = ScriptedSender::open(&decode, "prefill-9", 2).await.expect("welcome");
    let error = within("noticing", 5, incoming.sealed()).await.expect_err("replaced");
    assert_eq!(error.code(), ErrorCode::InstanceLost);
    assert_eq!(incoming.close().await, BLOCKS_LENT);
}

#[tokio::test]
async fn the_receivers_stream_breaks_in_every_phase() {
    let mut receiver = ScriptedReceiver::start().await;
    let prefill = Peer::start_with("prefill-0", one_lane());
    let decode = Peer::start("decode-0"); // gives the spec its form only
    for phase in ["hello", "offered", "accepted", "moving"] {
        let mut spec = offer_spec(TransferId::generate(), &decode, &BLOCKS_LENT);
        (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
        let mut outgoing: Outgoing = prefill.node.offer(spec).expect("room");
        let mut stream = receiver.stream("decode-9", 1).await;
        if phase != "hello" {
            let (id, _) = stream.hear().await;
            if phase != "offered" {
                stream.accept(id, Duration::from_secs(20)).await;
                until("it is accepted", || prefill.node.stats().outgoing_accepted > 0).await;
            }
        }
        if phase == "moving" {
            let sent = prefill.node.stats().slices_sent;
            outgoing.progress().ready(0, 0..3);
            until("slices are on their way", || prefill.node.stats().slices_sent == sent + 3).await;
        }
        drop(stream);
        // An offer that had not gone out would wait for the next stream; these have all gone out, or go out there.
        if phase == "hello" {
            tokio::select! {
                _ = outgoing.finished() => {}
                mut stream = receiver.stream("decode-9", 1) => {
                    stream.hear().await;
                    drop(stream);
                }
            }
        }
        let error = within("noticing", 5, outgoing.finished()).await.expect_err(phase);
        assert!(matches!(error, TransferError::LinkLost(_)), "{phase}: {error}");
        assert_eq!(within("the fence", 5, outgoing.close()).await, BLOCKS_LENT, "{phase}");
    }
    prefill.idle().await;
}

#[tokio::test]
async fn a_sealed_transfer_whose_connection_broke_is_doubted_and_ends_at_once() {
    // The sender's side: it says so, and waits for the verdict.
    let mut receiver = ScriptedReceiver::start().await;
    let prefill = Peer::start_with("prefill-0", one_lane());
    let decode = Peer::start("decode-0");
    let mut spec = offer_spec(TransferId::generate(), &decode, &BLOCKS_LENT);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let mut stream = receiver.stream("decode-9", 1).await;
    let (id, _) = stream.hear().await;
    stream.accept(id, Duration::from_secs(20)).await;
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
    outgoing.seal(5);
    assert!(matches!(stream.hear().await.1, FromSender::Seal(_)));
    drop(receiver.data().await);
    assert!(matches!(stream.hear().await.1, FromSender::Doubt(_)));
    stream.say(id, receiver_message::Body::Released(v1::Released {})).await;
    within("the answer", 10, outgoing.finished()).await.expect("it had arrived all the same");

    // The receiver's side: what it lacks will not come; what it has counts.
    let mut sender = ScriptedSender::open(&decode, "prefill-9", 1).await.expect("welcome");
    for whole in [false, true] {
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &instance("prefill-9"), &[3])).expect("room");
        sender.offer(id, 1, 1).await;
        let key = sender.accepted().await;
        let mut data = sender.connect_data().await;
        let all: Vec<_> = (0..LAYERS).map(|layer| (layer, 0, pattern(1, layer, 0, SLICE))).collect();
        let received = decode.node.stats().slices_received;
        for layer in 0..LAYERS - u32::from(!whole) {
            write(&mut data, &RawFrame::new(id, &key, layer, 0, slices(1, layer, 0..1)).bytes()).await;
        }
        let sent = u64::from(LAYERS - u32::from(!whole));
        until("they have landed", || decode.node.stats().slices_received == received + sent).await;
        sender.say(id, FromSender::Seal(seal(1, &all))).await;
        sender.say(id, FromSender::Doubt(v1::Doubt {})).await;
        let started = Instant::now();
        let sealed = within("an end", 5, incoming.sealed()).await;
        assert!(started.elapsed() < Duration::from_secs(5), "not only once the seal's grace is over");
        match sealed {
            Ok(_) if whole => assert!(matches!(sender.hear().await.1, receiver_message::Body::Released(_))),
            Err(TransferError::DataPath(_)) if !whole => {
                assert_eq!(sender.aborted().await.code(), v1::ErrorCode::HandoffFailed);
            }
            other => panic!("whole {whole}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_seal_whose_answer_was_lost_is_asked_again() {
    let mut receiver = ScriptedReceiver::start().await;
    let prefill = Peer::start_with("prefill-0", one_lane());
    let decode = Peer::start("decode-0");
    let mut before = None;
    for released in [true, false] {
        let mut spec = offer_spec(TransferId::generate(), &decode, &BLOCKS_LENT);
        (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
        let mut outgoing = prefill.node.offer(spec).expect("room");
        let mut stream = match before.take() {
            Some(stream) => stream,
            None => receiver.stream("decode-9", 1).await,
        };
        let (id, _) = stream.hear().await;
        stream.accept(id, Duration::from_secs(20)).await;
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
        outgoing.seal(5);
        let data = receiver.data().await;
        let draining = tokio::spawn(drain(data));
        let (_, first) = stream.hear().await;
        drop(stream);
        let mut stream = receiver.stream("decode-9", 1).await;
        let (again, second) = stream.hear().await;
        assert_eq!((again, &second), (id, &first), "the same seal");
        assert!(matches!(second, FromSender::Seal(_)));
        let reason = Some(ApiError::new(ErrorCode::HandoffFailed, "it was not whole").into());
        stream
            .say(
                id,
                match released {
                    true => receiver_message::Body::Released(v1::Released {}),
                    false => receiver_message::Body::Abort(v1::Abort { reason }),
                },
            )
            .await;
        let result = within("the answer", 10, outgoing.finished()).await.map_err(|error| error.code());
        assert_eq!(
            result.map(|stats| stats.slices),
            if released { Ok(12) } else { Err(ErrorCode::HandoffFailed) }
        );
        within("the first stream's data connection", 10, draining).await.expect("no panic");
        before = Some(stream);
    }
}

async fn drain(mut data: tokio::net::TcpStream) {
    let _ = tokio::io::copy(&mut data, &mut tokio::io::sink()).await;
}

#[tokio::test]
async fn decode_answers_a_repeated_seal_as_the_transfer_ended() {
    let decode = Peer::start("decode-0");
    let mut sender = ScriptedSender::open(&decode, "prefill-9", 1).await.expect("welcome");
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &instance("prefill-9"), &[3])).expect("room");
    sender.offer(id, 1, 1).await;
    let key = sender.accepted().await;
    let mut data = sender.connect_data().await;
    let all: Vec<_> = (0..LAYERS).map(|layer| (layer, 0, pattern(1, layer, 0, SLICE))).collect();
    for layer in 0..LAYERS {
        write(&mut data, &RawFrame::new(id, &key, layer, 0, slices(1, layer, 0..1)).bytes()).await;
    }
    let seal = seal(1, &all);
    sender.say(id, FromSender::Seal(seal.clone())).await;
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    drop(sender);
    let mut sender = ScriptedSender::open(&decode, "prefill-9", 1).await.expect("welcome");
    sender.say(id, FromSender::Seal(seal.clone())).await;
    assert!(matches!(sender.hear().await.1, receiver_message::Body::Released(_)));
    let mut other = ScriptedSender::open(&decode, "meddler", 1).await.expect("welcome");
    other.say(id, FromSender::Seal(seal)).await;
    assert_eq!(other.aborted().await.code(), v1::ErrorCode::HandoffFailed);
}
