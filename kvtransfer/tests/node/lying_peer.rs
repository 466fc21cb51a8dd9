//! Senders that break the protocol: nothing they write lands outside what was accepted, and each lie ends in one clear
//! refusal with every block back.

use std::time::Duration;

use crate::support::{scripted::*, *};
use baton_kvtransfer::{Incoming, KvLayout, Limits, TransferError};
use baton_proto::{ErrorCode, TransferId, v1};
use tokio::net::TcpStream;
use v1::sender_message::Body;

const LIAR: &str = "liar";
const BLOCKS_LENT: [u32; 3] = [10, 40, 20];

/// A decode node with an accepted transfer of three blocks, and the scripted sender of it.
struct Scene {
    decode: Peer,
    sender: ScriptedSender,
    data: TcpStream,
    id: TransferId,
    key: Vec<u8>,
    incoming: Incoming,
}

async fn scene() -> Scene {
    let decode = Peer::start("decode-0");
    let mut sender = ScriptedSender::open(&decode, LIAR, 1).await.expect("welcome");
    let id = TransferId::generate();
    let incoming = decode.node.expect(expect_spec(id, &instance(LIAR), &BLOCKS_LENT)).expect("room");
    sender.offer(id, 3, 1).await;
    let key = sender.accepted().await;
    let data = sender.connect_data().await;
    Scene { decode, sender, data, id, key, incoming }
}

impl Scene {
    fn frame(&self, layer: u32, first: u32, count: u32) -> RawFrame {
        RawFrame::new(self.id, &self.key, layer, first, slices(1, layer, first..first + count))
    }

    async fn send(&mut self, frame: &RawFrame) {
        write(&mut self.data, &frame.bytes()).await;
    }

    /// Everything, frame by frame; the seal that fits it.
    async fn send_all(&mut self) -> v1::Seal {
        let mut all = Vec::new();
        for layer in 0..LAYERS {
            self.send(&self.frame(layer, 0, 3)).await;
            all.extend((0..3).map(|block| (layer, block, pattern(1, layer, block, SLICE))));
        }
        seal(9, &all)
    }

    /// The transfer fails with `code` on both sides and its blocks come back.
    async fn fails(mut self, code: ErrorCode) -> (TransferError, Peer) {
        let error = within("the refusal", 10, self.incoming.sealed()).await.expect_err("must not be taken");
        assert_eq!(error.code(), code, "{error}");
        assert_eq!(self.sender.aborted().await.code(), code.to_wire());
        assert_eq!(within("the fence", 10, self.incoming.close()).await, BLOCKS_LENT);
        self.decode.idle().await;
        (error, self.decode)
    }
}

#[tokio::test]
async fn the_scripted_sender_can_tell_the_truth() {
    let mut scene = scene().await;
    let seal = scene.send_all().await;
    scene.sender.say(scene.id, Body::Seal(seal)).await;
    let sealed = within("sealed", 10, scene.incoming.sealed()).await.expect("whole");
    assert_eq!(sealed.first_tokens, 9.into());
    assert!(scene.decode.holds(1, &BLOCKS_LENT));
    assert!(matches!(scene.sender.hear().await.1, v1::receiver_message::Body::Released(_)));
}

#[tokio::test]
async fn a_frame_without_the_key_closes_the_connection_and_touches_nothing() {
    let mut scene = scene().await;
    let mut forged = scene.frame(0, 0, 3);
    forged.key = vec![0; 16];
    scene.send(&forged).await;
    closed_by_peer(&mut scene.data).await;
    assert_eq!(scene.decode.pool.read(0, BLOCKS_LENT[0]), vec![0; SLICE]);
    // The true sender is not harmed.
    scene.data = scene.sender.connect_data().await;
    let seal = scene.send_all().await;
    scene.sender.say(scene.id, Body::Seal(seal)).await;
    within("sealed", 10, scene.incoming.sealed()).await.expect("whole");
}

#[tokio::test]
async fn slices_outside_the_transfer_abort_it() {
    for (layer, first, count) in
        [(LAYERS, 0, 1), (0, 3, 1), (0, 2, 2), (u32::MAX, u32::MAX, 1), (0, u32::MAX, 3)]
    {
        let mut scene = scene().await;
        let payload = (0..count).map(|_| vec![0xAB; SLICE]).collect();
        scene.send(&RawFrame::new(scene.id, &scene.key, layer, first, payload)).await;
        let (error, decode) = scene.fails(ErrorCode::HandoffFailed).await;
        assert!(error.to_string().contains("outside the transfer"), "{error}");
        for (layer, block) in (0..LAYERS).flat_map(|layer| (0..BLOCKS).map(move |block| (layer, block))) {
            assert_eq!(decode.pool.read(layer, block), vec![0; SLICE], "layer {layer} block {block}");
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_aborts_the_transfer_and_names_the_block() {
    for at in [64 + 12, 64 + 12 + SLICE + 17, frame_bytes(3) - 5] {
        let mut scene = scene().await;
        let mut bytes = scene.frame(2, 0, 3).bytes();
        bytes[at] ^= 0x10;
        write(&mut scene.data, &bytes).await;
        let block = ((at - 64 - 12) / SLICE) as u32;
        let (error, _) = scene.fails(ErrorCode::KvDamaged).await;
        assert_eq!(error, TransferError::Damaged { layer: 2, block });
    }
}

#[tokio::test]
async fn a_frame_that_its_sender_gave_up_is_not_taken_for_damage() {
    // The sender's abort is lost, or late: zeros are all that comes of its end.
    for whole in 0..3 {
        let mut scene = scene().await;
        let mut bytes = RawFrame { end: CUT_SHORT, ..scene.frame(2, 0, 3) }.bytes();
        let len = bytes.len() - 4;
        bytes[64 + 12 + whole * SLICE + 1000..len].fill(0);
        write(&mut scene.data, &bytes).await;
        let (error, decode) = scene.fails(ErrorCode::HandoffFailed).await;
        assert!(matches!(&error, TransferError::DataPath(why) if why.contains("gave")), "{error}");
        let stats = decode.node.stats();
        assert_eq!(stats.by_transport.iter().map(|transport| transport.damaged).sum::<u64>(), 0);
    }
    // Nor is one that does not match and whose end does not come.
    let mut scene = scene().await;
    let mut bytes = scene.frame(2, 0, 3).bytes();
    bytes[64 + 12] ^= 1;
    write(&mut scene.data, &bytes[..bytes.len() - 4]).await;
    scene.data = scene.sender.connect_data().await;
    scene.fails(ErrorCode::HandoffFailed).await;
}

#[tokio::test]
async fn the_connection_of_a_damaged_transfer_serves_others_on() {
    let mut scene = scene().await;
    let mut bytes = scene.frame(0, 0, 3).bytes();
    bytes[64 + 12] ^= 1;
    write(&mut scene.data, &bytes).await;
    within("the refusal", 10, scene.incoming.sealed()).await.expect_err("damaged");
    assert_eq!(scene.sender.aborted().await.code(), v1::ErrorCode::KvDamaged);
    // A late frame of the same transfer is read past, and one of the next transfer lands.
    scene.send(&scene.frame(1, 0, 3)).await;
    scene.id = TransferId::generate();
    let spec = expect_spec(scene.id, &instance(LIAR), &[1, 2, 3]);
    let mut incoming = scene.decode.node.expect(spec).expect("room");
    scene.sender.offer(scene.id, 3, 1).await;
    scene.key = scene.sender.accepted().await;
    let seal = scene.send_all().await;
    scene.sender.say(scene.id, Body::Seal(seal)).await;
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert!(scene.decode.holds(1, &[1, 2, 3]));
    assert_eq!(scene.decode.pool.read(1, BLOCKS_LENT[0]), vec![0; SLICE], "the late frame was not written");
}

#[tokio::test]
async fn a_repeated_slice_is_passed_over_if_equal_and_aborts_if_not() {
    let mut scene = scene().await;
    scene.send(&scene.frame(0, 0, 3)).await;
    scene.send(&scene.frame(0, 1, 1)).await;
    until("three slices are in", || scene.decode.node.stats().slices_received == 3).await;
    let mut other = scene.frame(0, 1, 1);
    other.payload[0][5] ^= 1;
    scene.send(&other).await;
    let (error, decode) = scene.fails(ErrorCode::HandoffFailed).await;
    assert!(error.to_string().contains("repeats"), "{error}");
    assert_eq!(decode.pool.read(0, BLOCKS_LENT[1]), pattern(1, 0, 1, SLICE), "the first one stays");
}

#[tokio::test]
async fn a_seal_that_does_not_fit_aborts() {
    let bend: [fn(&mut v1::Seal); 4] =
        [|s| s.slices -= 1, |s| s.slices += 1, |s| s.bytes -= 1, |s| s.checksum ^= 1];
    for bend in bend {
        let mut scene = scene().await;
        let mut seal = scene.send_all().await;
        bend(&mut seal);
        scene.sender.say(scene.id, Body::Seal(seal)).await;
        let (error, _) = scene.fails(ErrorCode::HandoffFailed).await;
        assert!(matches!(error, TransferError::SealMismatch { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_seal_waits_for_its_last_slices_but_not_for_ever() {
    let lease = Duration::from_millis(500);
    let limits = Limits { seal_grace: Duration::from_millis(600), ..Limits::for_lease(lease) };
    let setup = Setup { lease, limits, ..Setup::default() };
    let decode = Peer::start_with("decode-0", setup);
    let mut sender = ScriptedSender::open(&decode, LIAR, 1).await.expect("welcome");
    let mut outcomes = Vec::new();
    for send_last in [true, false] {
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &instance(LIAR), &[4])).expect("room");
        sender.offer(id, 1, 1).await;
        let key = sender.accepted().await;
        let mut data = sender.connect_data().await;
        let all: Vec<_> = (0..LAYERS).map(|layer| (layer, 0, pattern(1, layer, 0, SLICE))).collect();
        sender.say(id, Body::Seal(seal(1, &all))).await;
        for layer in 0..LAYERS - u32::from(!send_last) {
            write(&mut data, &RawFrame::new(id, &key, layer, 0, slices(1, layer, 0..1)).bytes()).await;
        }
        let alive = async {
            loop {
                sender.say(id, Body::Renew(v1::Renew {})).await;
                tokio::time::sleep(lease / 10).await;
            }
        };
        let outcome = async {
            tokio::select! {
                outcome = incoming.sealed() => outcome,
                () = alive => unreachable!("it renews for ever"),
            }
        };
        outcomes.push(within("an outcome", 10, outcome).await.map_err(|error| error.code()));
        sender.hear().await;
    }
    assert!(outcomes[0].is_ok());
    assert_eq!(outcomes[1], Err(ErrorCode::DeadlineExceeded));
}

#[tokio::test]
async fn messages_out_of_turn_abort() {
    for case in 0..4 {
        let mut scene = scene().await;
        match case {
            0 => scene.sender.offer(scene.id, 3, 1).await,
            1 => scene.sender.say(scene.id, Body::Seal(seal(1, &[]))).await,
            2 => {
                let seal = scene.frame(0, 0, 3);
                let all: Vec<_> = (0..LAYERS * 3).map(|n| (n / 3, n % 3, seal.payload[0].clone())).collect();
                let seal = crate::support::scripted::seal(1, &all);
                scene.sender.say(scene.id, Body::Seal(seal.clone())).await;
                scene.sender.say(scene.id, Body::Seal(seal)).await;
            }
            _ => {
                // A connection that ends inside a slice.
                let mut bytes = scene.frame(0, 0, 1).bytes();
                bytes.truncate(200);
                write(&mut scene.data, &bytes).await;
                scene.data = scene.sender.connect_data().await;
            }
        }
        scene.fails(ErrorCode::HandoffFailed).await;
    }
}

#[tokio::test]
async fn what_is_not_a_frame_closes_the_connection() {
    let scene = scene().await;
    let oversized = RawFrame { slice_bytes: 1 << 30, ..scene.frame(0, 0, 1) }.bytes();
    for bytes in
        [b"GET / HTTP/1.1\r\nHost: decode-0\r\nAccept: text/html, and so on\r\n\r\n".to_vec(), oversized]
    {
        let mut data = scene.sender.connect_data().await;
        write(&mut data, &bytes).await;
        closed_by_peer(&mut data).await;
    }
    assert_eq!(scene.incoming.close().await, BLOCKS_LENT);
}

#[tokio::test]
async fn late_frames_of_a_forgotten_transfer_do_not_harm_others_on_the_connection() {
    let limits = Limits { remembered_transfers: 1, ..limits() };
    let decode = Peer::start_with("decode-0", Setup { limits, ..Setup::default() });
    let mut sender = ScriptedSender::open(&decode, LIAR, 1).await.expect("welcome");
    let mut data = sender.connect_data().await;
    let (forgotten, live) = (TransferId::generate(), TransferId::generate());
    let gone = decode.node.expect(expect_spec(forgotten, &instance(LIAR), &[1, 2, 3])).expect("room");
    sender.offer(forgotten, 3, 1).await;
    let old_key = sender.accepted().await;
    write(&mut data, &RawFrame::new(forgotten, &old_key, 0, 0, slices(1, 0, 0..3)).bytes()).await;
    until("slices are in", || decode.node.stats().slices_received == 3).await;
    gone.close().await;
    sender.aborted().await;
    let mut incoming = decode.node.expect(expect_spec(live, &instance(LIAR), &[4])).expect("room");
    sender.offer(live, 1, 1).await;
    let key = sender.accepted().await;
    // The one place is another's now.
    decode.node.refuse(TransferId::generate(), baton_proto::ApiError::new(ErrorCode::Cancelled, "no"));
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        write(&mut data, &RawFrame::new(forgotten, &old_key, layer, 0, slices(2, layer, 0..3)).bytes()).await;
        write(&mut data, &RawFrame::new(live, &key, layer, 0, slices(1, layer, 0..1)).bytes()).await;
        all.push((layer, 0, pattern(1, layer, 0, SLICE)));
    }
    sender.say(live, Body::Seal(seal(9, &all))).await;
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert!(decode.holds(1, &[4]));
    assert_eq!(decode.pool.read(1, 1), vec![0; SLICE], "the late frames were not written");
}

#[tokio::test]
async fn a_data_connection_without_a_control_stream_is_closed() {
    let decode = Peer::start("decode-0");
    let sender = ScriptedSender::open(&decode, LIAR, 1).await.expect("welcome");
    let (mut no_link, mut no_key) = (sender.pass.clone(), sender.pass.clone());
    no_link.id[0] ^= 1;
    no_key.key[0] ^= 1;
    let (good, mut bent) = (data_hello(&sender.pass, 0), data_hello(&sender.pass, 0));
    bent[40] ^= 1;
    let hellos = [data_hello(&no_link, 0), data_hello(&no_key, 0), data_hello(&sender.pass, 1), bent];
    for hello in hellos {
        let mut data = connect_data(sender.data).await;
        write(&mut data, &hello).await;
        closed_by_peer(&mut data).await;
    }
    // One that has a stream ends with it, and nobody comes back by an ended one.
    let mut data = sender.connect_data().await;
    drop(sender);
    closed_by_peer(&mut data).await;
    let mut data = connect_data(decode.data_address()).await;
    write(&mut data, &good).await;
    closed_by_peer(&mut data).await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let limits = Limits { handshake: Duration::from_millis(100), ..limits() };
    let decode = Peer::start_with("decode-0", Setup { limits, ..Setup::default() });
    let mut data = connect_data(decode.data_address()).await;
    closed_by_peer(&mut data).await;
}

#[tokio::test]
async fn nobody_meddles_with_another_peers_transfer() {
    let mut scene = scene().await;
    let mut other = ScriptedSender::open(&scene.decode, "meddler", 1).await.expect("welcome");
    other.say(scene.id, Body::Abort(v1::Abort { reason: None })).await;
    other.say(scene.id, Body::Seal(seal(1, &[]))).await;
    other.offer(scene.id, 3, 1).await;
    // All three lies have been heard by then.
    for _ in 0..2 {
        assert_eq!(other.aborted().await.code(), v1::ErrorCode::HandoffFailed);
    }
    let seal = scene.send_all().await;
    scene.sender.say(scene.id, Body::Seal(seal)).await;
    within("sealed", 10, scene.incoming.sealed()).await.expect("whole");
}

#[tokio::test]
async fn hellos_are_checked() {
    let decode = Peer::start("decode-0");
    let hello = |change: fn(&mut v1::SenderHello)| {
        let mut hello = v1::SenderHello {
            oldest_protocol: 1,
            newest_protocol: 1,
            instance_id: LIAR.into(),
            incarnation: 1,
            layout: Some((&layout()).into()),
            nonce: vec![1; 16].into(),
        };
        change(&mut hello);
        Body::Hello(hello)
    };
    let cases = [
        (Body::Renew(v1::Renew {}), "hello"),
        (hello(|h| h.instance_id = "No Name".into()), "instance id"),
        (
            hello(|h| (h.oldest_protocol, h.newest_protocol) = (7, 9)),
            "the peer speaks versions 7 to 9 of the handoff protocol, this node version 1",
        ),
        (hello(|h| h.oldest_protocol = 3), "versions 3 to 1 are none"),
        (hello(|h| h.layout = None), "layout"),
        (hello(|h| h.nonce = vec![1; 15].into()), "nonce"),
        (hello(|h| h.layout = Some((&KvLayout { head_dim: 7, ..layout() }).into())), "head_dim"),
        (hello(|h| h.layout.as_mut().expect("set").head_dim = 7), "model_revision"),
        (hello(|h| h.layout.as_mut().expect("set").fingerprint = "0".into()), "model_revision"),
    ];
    for (first, names) in cases {
        let refusal = ScriptedSender::open_with(&decode, first).await.err().expect("refused");
        assert!(refusal.message().contains(names), "{refusal}");
    }
    ScriptedSender::open(&decode, LIAR, 5).await.expect("welcome");
    let held =
        ScriptedSender::open(&decode, LIAR, 5).await.expect("a second stream takes the first one's place");
    let stale = ScriptedSender::open(&decode, LIAR, 4).await.err().expect("an earlier start of the process");
    assert!(stale.message().contains("incarnation"), "{stale}");
    drop(held);
}

#[tokio::test]
async fn an_offer_and_an_accept_of_another_start_of_the_process_are_refused() {
    let decode = Peer::start("decode-0");
    let mut sender = ScriptedSender::open(&decode, LIAR, 5).await.expect("welcome");
    let id = TransferId::generate();
    let incoming = decode.node.expect(expect_spec(id, &instance(LIAR), &[1])).expect("room");
    sender.offer(id, 1, 4).await;
    assert_eq!(sender.aborted().await.code(), v1::ErrorCode::StaleEpoch);
    sender.offer(id, 1, 5).await;
    sender.accepted().await;
    drop(incoming);

    let prefill = Peer::start("prefill-0");
    let mut receiver = ScriptedReceiver::start().await;
    let mut spec = offer_spec(TransferId::generate(), &decode, &[1]);
    (spec.peer, spec.receiver) = (receiver.address.to_string(), instance("decode-9"));
    let mut outgoing = prefill.node.offer(spec).expect("room");
    let mut stream = receiver.stream("decode-9", 2).await;
    let (id, _) = stream.hear().await;
    stream.accept(id, Duration::from_secs(20)).await; // says that it is of start 1
    let error = within("the refusal", 10, outgoing.finished()).await.expect_err("not that start");
    assert!(matches!(error, TransferError::Protocol(_)), "{error}");
}
