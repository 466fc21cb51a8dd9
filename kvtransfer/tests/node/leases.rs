//! How long a transfer waits: leases that a silent peer loses and a slow one keeps, and deadlines that nothing renews.

use std::time::{Duration, Instant};

use crate::support::{scripted::*, *};
use baton_kvtransfer::TransferError;
use baton_proto::{ErrorCode, TransferId, v1};
use v1::sender_message::Body as FromSender;

const FROM: [u32; 3] = [5, 6, 9];
const TO: [u32; 3] = [60, 2, 31];

#[tokio::test]
async fn expectations_and_offers_have_deadlines() {
    let setup = || Setup { lease: Duration::from_millis(100), ..Setup::default() };
    let (prefill, decode) = (Peer::start_with("prefill-0", setup()), Peer::start_with("decode-0", setup()));
    let mut spec = expect_spec(TransferId::generate(), &prefill.name, &TO);
    spec.deadline = Instant::now() + Duration::from_millis(150);
    let mut incoming = decode.node.expect(spec).expect("room");
    let error = within("its deadline", 5, incoming.sealed()).await.expect_err("never offered");
    assert_eq!(error, TransferError::DeadlineExceeded { waiting_for: "waiting for the offer" });
    // Both renew their leases all the while; what ends it is the deadline.
    let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
    spec.deadline = Instant::now() + Duration::from_millis(400);
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let error = within("its deadline", 5, outgoing.finished()).await.expect_err("never accepted");
    assert_eq!(error.code(), ErrorCode::DeadlineExceeded);
    let mut spec = expect_spec(TransferId::generate(), &prefill.name, &TO);
    spec.deadline = Instant::now() - Duration::from_millis(1);
    let late = decode.node.expect(spec).expect_err("past");
    assert_eq!(late.code(), ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn leases_outlive_long_pauses_of_a_live_peer() {
    let setup = || Setup { lease: Duration::from_millis(90), ..Setup::default() };
    let (prefill, decode) = (Peer::start_with("prefill-0", setup()), Peer::start_with("decode-0", setup()));
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &FROM)).expect("room");
    outgoing.progress().ready(0, 0..3);
    until("slices have arrived", || decode.node.stats().slices_received == 3).await;
    tokio::time::sleep(Duration::from_millis(500)).await; // several leases of doing nothing but renewing
    (1..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..3));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
}

#[tokio::test]
async fn a_frozen_sender_loses_its_lease() {
    let decode =
        Peer::start_with("decode-0", Setup { lease: Duration::from_millis(150), ..Setup::default() });
    let mut sender = ScriptedSender::open(&decode, "frozen", 1).await.expect("welcome");
    let mut others = Vec::new(); // they lose their leases too, and are told so
    for expected in [true, false] {
        let id = TransferId::generate();
        let incoming =
            expected.then(|| decode.node.expect(expect_spec(id, &instance("frozen"), &TO)).expect("room"));
        sender.offer(id, 3, 1).await;
        let started = Instant::now();
        if let Some(mut incoming) = incoming {
            let key = sender.accepted().await;
            // Frozen in the middle of a frame.
            let mut data = sender.connect_data().await;
            let bytes = RawFrame::new(id, &key, 0, 0, slices(1, 0, 0..3)).bytes();
            write(&mut data, &bytes[..200]).await;
            let error = within("the lease", 5, incoming.sealed()).await.expect_err("frozen");
            assert!(matches!(error, TransferError::LeaseExpired { .. }), "{error}");
            assert_eq!(within("the fence", 1, incoming.close()).await, TO);
            assert_eq!(sender.aborted().await.code(), v1::ErrorCode::InstanceLost);
            // It thaws: the rest of the frame must not be written. The connection serves on, so once a frame of another
            // transfer has landed, that rest has been dealt with.
            write(&mut data, &bytes[200..]).await;
            let other = TransferId::generate();
            others.push(decode.node.expect(expect_spec(other, &instance("frozen"), &[8])).expect("room"));
            sender.offer(other, 1, 1).await;
            let key = sender.accepted().await;
            write(&mut data, &RawFrame::new(other, &key, 0, 0, slices(1, 0, 0..1)).bytes()).await;
            until("the other frame has landed", || decode.node.stats().slices_received == 1).await;
            assert_eq!(decode.pool.read(0, TO[1]), vec![0; SLICE]);
            assert_eq!(decode.pool.read(0, TO[2]), vec![0; SLICE]);
        }
        assert_eq!(sender.aborted().await.code(), v1::ErrorCode::InstanceLost);
        assert!(started.elapsed() >= Duration::from_millis(140));
    }
    decode.idle().await;
}

#[tokio::test]
async fn a_frozen_receiver_loses_its_lease_in_every_phase() {
    let mut receiver = ScriptedReceiver::start().await;
    let setup = || Setup { lease: Duration::from_millis(150), ..Setup::default() };
    let prefill = Peer::start_with("prefill-0", setup());
    let decode = Peer::start("decode-0"); // gives the spec its form only
    for accepts in [false, true] {
        let mut spec = offer_spec(TransferId::generate(), &decode, &FROM);
        (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("frozen"));
        let mut outgoing = prefill.node.offer(spec).expect("room");
        let mut stream = receiver.stream("frozen", 1).await;
        let (id, body) = stream.hear().await;
        assert!(matches!(body, FromSender::Offer(_)));
        if accepts {
            stream.accept(id, Duration::from_millis(150)).await;
        }
        let error = within("the lease", 5, outgoing.finished()).await.expect_err("frozen");
        assert!(matches!(error, TransferError::LeaseExpired { .. }), "{error}");
        // The stream, on which nothing came, is given up with it: the next offer takes another.
        let ended = async { while let Ok(Some(_)) = stream.from_peer.message().await {} };
        within("the stream's end", 5, ended).await;
        assert_eq!(outgoing.close().await, FROM);
    }
}
