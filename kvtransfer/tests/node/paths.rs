//! Which transport carries the slices: the best that works, the next one where it does not; and whole transfers over each.

use std::time::Duration;

use crate::support::{scripted::*, *};
use baton_kvtransfer::{
    Faults, FleetSecret, FleetSecrets, KvNode, Limits, TransferError, TransportConfig, TransportKind,
};
use baton_proto::{ErrorCode, TransferId};
use tokio::io::AsyncReadExt;

use TransportKind::{Shm, Tcp};

const FROM: [u32; 9] = [7, 3, 60, 22, 21, 20, 5, 63, 0];
const TO: [u32; 9] = [1, 50, 2, 49, 3, 48, 4, 47, 5];

fn over(transports: &[TransportKind]) -> Setup {
    let config = |kind: &TransportKind| match kind {
        Shm => TransportConfig::Shm,
        Tcp => TransportConfig::Tcp { connections: 1 },
        other => panic!("{other} needs what this host may not have"),
    };
    Setup { transports: transports.iter().map(config).collect(), ..Setup::default() }
}

/// One whole transfer, checked byte for byte.
async fn transfer(prefill: &Peer, decode: &Peer, seed: u64) {
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, decode, &FROM)).expect("room");
    for layer in 0..LAYERS {
        prefill.fill_layer(seed, layer, &FROM, 0..9);
        outgoing.progress().ready(layer, 0..9);
    }
    outgoing.seal(3);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
    assert!(decode.holds(seed, &TO));
    assert_eq!((incoming.close().await, outgoing.close().await), (TO.to_vec(), FROM.to_vec()));
}

/// Bytes that have come in by each kind.
fn received(node: &KvNode) -> Vec<(TransportKind, u64)> {
    node.stats()
        .by_transport
        .iter()
        .map(|one| (one.kind, one.bytes_received))
        .filter(|(_, bytes)| *bytes > 0)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_best_transport_in_common_carries_everything() {
    let all = u64::from(LAYERS) * 9 * SLICE as u64;
    for (ours, theirs, carried) in [
        (&[Shm, Tcp][..], &[Shm, Tcp][..], Shm),
        (&[Tcp, Shm], &[Shm, Tcp], Tcp),
        (&[Shm, Tcp], &[Tcp], Tcp),
        (&[Shm], &[Tcp, Shm], Shm),
    ] {
        let prefill = Peer::start_with("prefill-0", over(ours));
        let decode = Peer::start_with("decode-0", over(theirs));
        transfer(&prefill, &decode, 1).await;
        transfer(&prefill, &decode, 2).await;
        assert_eq!(received(&decode.node), [(carried, 2 * all)], "{ours:?} to {theirs:?}");
        prefill.idle().await;
        decode.idle().await;
    }
}

#[tokio::test]
async fn without_a_transport_in_common_the_offer_fails_and_both_lists_are_named() {
    let prefill = Peer::start_with("prefill-0", over(&[Shm]));
    let decode = Peer::start_with("decode-0", over(&[Tcp]));
    let mut outgoing = prefill.node.offer(offer_spec(TransferId::generate(), &decode, &FROM)).expect("room");
    let error = within("the refusal", 10, outgoing.finished()).await.expect_err("nothing in common");
    assert!(error.to_string().contains("this node has shm, the peer tcp"), "{error}");
}

#[tokio::test]
async fn a_transport_that_cannot_be_opened_gives_way_to_the_next_and_nothing_is_lost() {
    let mut receiver = ScriptedReceiver::start().await;
    receiver.shm = Some("baton-kv-of-nobody".into());
    let prefill = Peer::start_with("prefill-0", over(&[Shm, Tcp]));
    let decode = Peer::start("decode-0"); // gives the spec its form only
    let mut spec = offer_spec(TransferId::generate(), &decode, &[1, 2, 3]);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let outgoing = prefill.node.offer(spec).expect("room");
    outgoing.progress().ready(0, 0..3);
    let mut stream = receiver.stream("decode-9", 1).await;
    let (id, _) = stream.hear().await;
    stream.accept(id, Duration::from_secs(20)).await;
    let mut data = receiver.data().await;
    within("the frame", 10, data.read_exact(&mut vec![0; frame_bytes(3)])).await.expect("whole");
}

/// With this seed the first two attempts to open a path fail, and none of the next ones.
#[tokio::test]
async fn a_better_transport_that_works_again_takes_over_in_the_midst_of_a_transfer() {
    let faults = Faults { seed: 69, closed: 0.5, ..Faults::default() };
    let [shm, tcp] = [TransportConfig::Shm, TransportConfig::Tcp { connections: 1 }];
    let limits = Limits { better_path: Duration::from_millis(50), ..limits() };
    let transports = vec![TransportConfig::Faulty(Box::new(shm), faults), tcp];
    let prefill = Peer::start_with("prefill-0", Setup { transports, limits, ..Setup::default() });
    let decode = Peer::start_with("decode-0", over(&[Shm, Tcp]));
    let sent = |kind: TransportKind| {
        let by_transport = prefill.node.stats().by_transport;
        by_transport.iter().find(|one| one.kind == kind).map(|one| (one.slices_sent, one.opened, one.failed))
    };
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &FROM)).expect("room");
    prefill.fill(1, &FROM);
    outgoing.progress().ready(0, 0..9);
    until("a layer is there", || decode.node.stats().slices_received == 9).await;
    assert_eq!(sent(Tcp), Some((9, 1, 0)));
    // The next attempt fails as well; then it is there again, and takes what comes. The old path stays for what it took.
    until("shared memory can be had again", || sent(Shm) == Some((0, 1, 2))).await;
    tokio::time::sleep(Duration::from_millis(100)).await; // several looks at whether it is over
    (1..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..9));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
    assert!(decode.holds(1, &TO));
    drop((incoming, outgoing));
    transfer(&prefill, &decode, 2).await;
    assert_eq!(sent(Tcp), Some((9, 1, 0)), "nothing more than before");
    assert_eq!(sent(Shm), Some((9 * u64::from(2 * LAYERS - 1), 1, 2)));
}

#[tokio::test]
async fn a_path_that_breaks_is_opened_again() {
    let mut receiver = ScriptedReceiver::start().await;
    let prefill = Peer::start_with("prefill-0", one_lane());
    let decode = Peer::start("decode-0"); // gives the spec its form only
    let mut spec = offer_spec(TransferId::generate(), &decode, &[1, 2, 3]);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let outgoing = prefill.node.offer(spec).expect("room");
    let mut stream = receiver.stream("decode-9", 1).await;
    let (id, _) = stream.hear().await;
    drop(receiver.data().await); // nothing of the transfer has gone over it
    let mut data = receiver.data().await;
    stream.accept(id, Duration::from_secs(20)).await;
    outgoing.progress().ready(0, 0..3);
    within("the frame", 10, data.read_exact(&mut vec![0; frame_bytes(3)])).await.expect("whole");
}

#[tokio::test]
async fn a_peer_whose_data_paths_all_fail_fails_the_transfers_that_wait_for_them() {
    let mut receiver = ScriptedReceiver::start_without_data().await;
    let limits = Limits { handshake: Duration::from_millis(100), connect_attempts: 2, ..limits() };
    let prefill = Peer::start_with("prefill-0", Setup { limits, ..Setup::default() });
    let decode = Peer::start("decode-0"); // gives the spec its form only
    let mut spec = offer_spec(TransferId::generate(), &decode, &[1, 2, 3]);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let _stream = receiver.stream("decode-9", 1).await; // nobody answers on its data connections
    let error = within("the failure", 5, outgoing.finished()).await.expect_err("no path");
    assert!(error.to_string().contains("no data path to the peer (tcp: "), "{error}");
    assert_eq!(outgoing.close().await, [1, 2, 3]);
}

#[tokio::test]
async fn shared_memory_lets_go_when_either_side_ends() {
    for ends_first in ["prefill", "decode"] {
        let (prefill, decode) =
            (Peer::start_with("prefill-0", over(&[Shm])), Peer::start_with("decode-0", over(&[Shm])));
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect("room");
        let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &FROM)).expect("room");
        prefill.fill(1, &FROM);
        outgoing.progress().ready(0, 0..9);
        until("a layer is there", || decode.node.stats().slices_received == 9).await;
        let stops = if ends_first == "prefill" { &prefill } else { &decode };
        stops.stop.cancel();
        within("its end", 5, stops.node.stopped()).await;
        let (there, here) = (incoming.sealed().await.map(|_| ()), outgoing.finished().await.map(|_| ()));
        assert!(there.is_err() && here.is_err(), "{there:?} {here:?}");
        assert_eq!((incoming.close().await, outgoing.close().await), (TO.to_vec(), FROM.to_vec()));
        // The other one serves on.
        let survivor = if ends_first == "prefill" { decode } else { prefill };
        let other = Peer::start_with("other-0", over(&[Shm]));
        match ends_first {
            "prefill" => transfer(&other, &survivor, 5).await,
            _ => transfer(&survivor, &other, 5).await,
        }
    }
}

#[tokio::test]
async fn a_fleet_with_a_secret_takes_its_own_only() {
    let secret = |byte| Some(FleetSecrets::from(FleetSecret::new([byte; 32]).expect("long enough")));
    let peer = |name, secret| Peer::start_with(name, Setup { secret, ..Setup::default() });
    let decode = peer("decode-0", secret(1));
    transfer(&peer("prefill-0", secret(1)), &decode, 1).await;
    for stranger in [secret(2), None] {
        let prefill = peer("prefill-1", stranger);
        let mut outgoing =
            prefill.node.offer(offer_spec(TransferId::generate(), &decode, &FROM)).expect("room");
        let error = within("the refusal", 10, outgoing.finished()).await.expect_err("a stranger");
        assert!(
            matches!(error, TransferError::Unauthenticated),
            "the receiver's own proof is looked at: {error}"
        );
        assert_eq!(error.code(), ErrorCode::HandoffFailed);
    }
    // A stranger that does not look at proofs: refused before it is told anything, and it displaces nobody.
    let _true_one = peer("prefill-2", secret(1));
    let refused = ScriptedSender::open(&decode, "prefill-2", 99).await.err().expect("refused");
    assert!(refused.message().contains("handoff secret"), "{refused}");
    transfer(&_true_one, &decode, 7).await;
}

/// From the old secret to a new one, whichever end hears of it first: no transfer fails for it.
#[tokio::test]
async fn a_secret_is_changed_while_nodes_run() {
    let [old, new] = [1, 2].map(|byte| FleetSecret::new([byte; 32]).expect("long enough"));
    let secrets = [(); 3].map(|()| FleetSecrets::from(old.clone()));
    let peer = |name, secrets: &FleetSecrets| {
        Peer::start_with(name, Setup { secret: Some(secrets.clone()), ..Setup::default() })
    };
    let (prefill, decode) = (peer("prefill-0", &secrets[0]), peer("decode-0", &secrets[1]));
    let keep = Duration::from_secs(3600);

    // A sender that knows the new one and a receiver that does not.
    secrets[0].set(new.clone(), None, keep);
    transfer(&prefill, &decode, 1).await;
    // The stream stands, whatever is changed, and its transfers with it.
    secrets[1].set(new.clone(), None, keep);
    transfer(&prefill, &decode, 2).await;
    // One that began with the new one, and a receiver that knows the new one and a sender that does not.
    transfer(&peer("prefill-1", &FleetSecrets::from(new.clone())), &decode, 3).await;
    transfer(&peer("prefill-2", &secrets[2]), &decode, 4).await;

    // Once its time is over, the old one is nobody's: whoever has only that is believed by none, in neither direction.
    let hasty = FleetSecrets::from(old);
    hasty.set(new, None, Duration::ZERO);
    let ends =
        [("prefill-3", &hasty), ("decode-1", &secrets[2]), ("prefill-4", &secrets[2]), ("decode-2", &hasty)];
    let ends = ends.map(|(name, secrets)| peer(name, secrets));
    for pair in ends.chunks(2) {
        let mut outgoing =
            pair[0].node.offer(offer_spec(TransferId::generate(), &pair[1], &FROM)).expect("room");
        let error = within("the refusal", 10, outgoing.finished()).await.expect_err("the old secret");
        assert!(matches!(error, TransferError::Unauthenticated), "{error}");
    }
}

#[tokio::test]
async fn a_peer_that_takes_no_connection_is_asked_ever_less_often() {
    let limits = Limits { connect_attempts: 100, ..limits() };
    let prefill = Peer::start_with("prefill-0", Setup { limits, ..Setup::default() });
    let decode = Peer::start("decode-0"); // gives the spec its form only
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    // However many transfers wait, one link asks for them all.
    let outgoing: Vec<_> = (0..20)
        .map(|block| {
            let mut spec = offer_spec(TransferId::generate(), &decode, &[block]);
            spec.peer = listener.local_addr().expect("bound").to_string();
            prefill.node.offer(spec).expect("room")
        })
        .collect();
    // An attempt may take two connections at once, as the first is lost under it.
    let (mut pauses, mut before) = (Vec::new(), None::<std::time::Instant>);
    while pauses.len() < 5 {
        drop(within("a connection", 10, listener.accept()).await.expect("listening"));
        let pause =
            before.replace(std::time::Instant::now()).map_or(Duration::ZERO, |before| before.elapsed());
        if pause > Duration::from_millis(40) {
            pauses.push(pause);
        }
    }
    for (pause, least) in pauses.iter().zip([50, 100, 200, 400, 800]) {
        assert!(*pause >= Duration::from_millis(least) - Duration::from_millis(10), "{pauses:?}");
    }
    drop(outgoing);
    prefill.idle().await;
}

/// A peer at whose data port every connection is taken, and ended at once.
#[tokio::test]
async fn a_path_that_opens_and_breaks_is_opened_ever_less_often() {
    let prefill = Peer::start_with("prefill-0", over(&[Tcp]));
    let decode = Peer::start("decode-0"); // gives the spec its form only
    let mut receiver = ScriptedReceiver::start().await;
    let mut spec = offer_spec(TransferId::generate(), &decode, &[1]);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let _outgoing = prefill.node.offer(spec).expect("room");
    let _stream = receiver.stream("decode-9", 1).await;
    let mut times = Vec::new();
    while times.len() < 7 {
        drop(receiver.data().await);
        times.push(std::time::Instant::now());
    }
    for (pair, least) in times.windows(2).zip([10, 20, 40, 80, 160, 320]) {
        let pause = pair[1] - pair[0];
        assert!(pause >= Duration::from_millis(least) - Duration::from_millis(5), "{pause:?} of {least} ms");
    }
}
