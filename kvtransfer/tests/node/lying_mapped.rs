//! Senders that lie about a layout that is mapped, or use it to reach what is not theirs: what they send stays in staging
//! memory, and each lie ends in one clear refusal with every block back.

use crate::support::{
    caches::{Dtype::*, Form, fill, panel},
    scripted::*,
    *,
};
use baton_kvtransfer::{ExpectSpec, Incoming, KvLayout, Limits};
use baton_proto::{ErrorCode, TransferId, v1};
use tokio::net::TcpStream;
use v1::sender_message::Body;

const LIAR: &str = "liar";
const THERE: [u32; 3] = [10, 40, 20];
/// The liar has 32 tokens in a block, the receiver 16.
const TOKENS: usize = 40;

fn theirs() -> Form {
    panel(Bf16, 32)
}

fn ours() -> Form {
    panel(Bf16, 16)
}

fn hello(name: &str, layout: &KvLayout) -> Body {
    Body::Hello(v1::SenderHello {
        oldest_protocol: 1,
        newest_protocol: 1,
        instance_id: name.into(),
        incarnation: 1,
        layout: Some(layout.into()),
        nonce: vec![1; 16].into(),
    })
}

fn receiver(limits: Limits) -> Peer {
    Peer::start_with("decode-0", Setup { layout: ours().layout(), limits, ..Setup::default() })
}

/// A receiver with an accepted transfer whose first block it holds, and the scripted sender of it.
struct Scene {
    decode: Peer,
    sender: ScriptedSender,
    data: TcpStream,
    id: TransferId,
    key: Vec<u8>,
    incoming: Incoming,
}

async fn scene(limits: Limits) -> Scene {
    let decode = receiver(limits);
    let hello = hello(LIAR, &theirs().layout());
    let mut sender = ScriptedSender::open_with(&decode, hello).await.expect("welcome");
    let id = TransferId::generate();
    let incoming = decode.node.expect(spec(id, LIAR)).expect("room");
    sender.say(id, Body::Offer(offer(2))).await;
    let key = sender.accepted().await;
    let data = sender.connect_data().await;
    Scene { decode, sender, data, id, key, incoming }
}

fn spec(id: TransferId, sender: &str) -> ExpectSpec {
    ExpectSpec { prompt_tokens: TOKENS as u32, held: vec![0], ..expect_spec(id, &instance(sender), &THERE) }
}

fn offer(blocks: u32) -> v1::Offer {
    v1::Offer {
        prompt_tokens: TOKENS as u32,
        blocks,
        layers: LAYERS,
        sender_epoch: 1,
        prompt_digest: prompt().as_bytes().to_vec().into(),
    }
}

impl Scene {
    fn frame(&self, first: u32, count: usize) -> RawFrame {
        let payload = vec![vec![0xAB; theirs().slice_bytes()]; count];
        let frame = RawFrame::new(self.id, &self.key, 0, first, payload);
        RawFrame { slice_bytes: theirs().slice_bytes() as u32, ..frame }
    }

    fn assert_untouched(&self) {
        for (layer, block) in (0..LAYERS).flat_map(|layer| (0..BLOCKS).map(move |block| (layer, block))) {
            let slice = self.decode.pool.read(layer, block);
            assert!(slice.iter().all(|&byte| byte == 0), "layer {layer} block {block}");
        }
    }

    async fn fails(mut self, code: ErrorCode, names: &str) {
        let error = within("the refusal", 10, self.incoming.sealed()).await.expect_err("must not be taken");
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(names), "{error}");
        assert_eq!(self.sender.aborted().await.code(), code.to_wire());
        self.assert_untouched();
        assert_eq!(within("the fence", 10, self.incoming.close()).await, THERE);
        self.decode.idle().await;
    }
}

#[tokio::test]
async fn the_scripted_sender_can_tell_the_truth() {
    let mut scene = scene(limits()).await;
    let from = Pool::new(LAYERS, 2, theirs().slice_bytes());
    fill(&from, theirs(), 5, &[0, 1], TOKENS);
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        for block in 0..2 {
            let payload = from.read(layer, block);
            let frame = RawFrame { layer, payload: vec![payload.clone()], ..scene.frame(block, 1) };
            write(&mut scene.data, &frame.bytes()).await;
            all.push((layer, block, payload));
        }
    }
    scene.sender.say(scene.id, Body::Seal(seal(9, &all))).await;
    within("sealed", 10, scene.incoming.sealed()).await.expect("whole");
    caches::assert_holds(&scene.decode.pool, (ours(), theirs()), 5, &THERE, TOKENS, &[0]);
    assert!(scene.decode.pool.read(0, THERE[0]).iter().all(|&byte| byte == 0), "it was held");
}

#[tokio::test]
async fn flipped_bits_stay_in_staging_memory() {
    for at in [0, 5, theirs().slice_bytes() - 1] {
        let mut scene = scene(limits()).await;
        let mut bytes = scene.frame(1, 1).bytes();
        bytes[64 + 4 + at] ^= 0x10;
        write(&mut scene.data, &bytes).await;
        scene.fails(ErrorCode::KvDamaged, "block 1").await;
    }
}

#[tokio::test]
async fn blocks_that_the_transfer_does_not_have_are_refused() {
    for (first, count) in [(2, 1), (1, 2), (u32::MAX, 1)] {
        let mut scene = scene(limits()).await;
        let frame = scene.frame(first, count).bytes();
        write(&mut scene.data, &frame).await;
        scene.fails(ErrorCode::HandoffFailed, "outside the transfer").await;
    }
}

#[tokio::test]
async fn slices_of_the_receivers_size_or_of_none_close_the_connection() {
    for slice_bytes in [ours().slice_bytes() as u32, 1, u32::MAX] {
        let mut scene = scene(limits()).await;
        let frame = RawFrame { slice_bytes, ..scene.frame(1, 1) };
        write(&mut scene.data, &frame.bytes()).await;
        closed_by_peer(&mut scene.data).await;
        scene.assert_untouched();
        assert_eq!(scene.incoming.close().await, THERE);
    }
}

#[tokio::test]
async fn a_transfer_takes_slices_of_its_own_size_only_whichever_connection_they_come_over() {
    let mut scene = scene(limits()).await;
    // The same liar by another name, with a layout that is not mapped.
    let alike = ScriptedSender::open_with(&scene.decode, hello("other", &ours().layout())).await;
    let alike = alike.expect("welcome");
    let mut data = alike.connect_data().await;
    let payload = vec![vec![0xAB; ours().slice_bytes()]];
    let slice_bytes = ours().slice_bytes() as u32;
    let frame = RawFrame { slice_bytes, payload, ..scene.frame(1, 1) };
    write(&mut data, &frame.bytes()).await;
    closed_by_peer(&mut data).await;
    // And the other way round: a transfer that is not mapped, over a connection of one that is.
    let id = TransferId::generate();
    let spec = ExpectSpec { prompt_tokens: 16, ..expect_spec(id, &instance("other"), &[5]) };
    let plain = scene.decode.node.expect(spec).expect("room");
    let mut alike = alike;
    alike.say(id, Body::Offer(v1::Offer { prompt_tokens: 16, ..offer(1) })).await;
    let key = alike.accepted().await;
    let frame = RawFrame { id, key, ..scene.frame(0, 1) };
    write(&mut scene.data, &frame.bytes()).await;
    closed_by_peer(&mut scene.data).await;
    scene.assert_untouched();
    assert_eq!((plain.close().await, scene.incoming.close().await), (vec![5], THERE.to_vec()));
}

#[tokio::test]
async fn a_run_that_finds_no_staging_memory_is_refused() {
    let limits = Limits { staging_bytes: 64 << 10, ..limits() };
    let decode = receiver(limits);
    let hello = hello(LIAR, &theirs().layout());
    let mut sender = ScriptedSender::open_with(&decode, hello).await.expect("welcome");
    let (id, there) = (TransferId::generate(), (0..40).collect::<Vec<_>>());
    let spec = ExpectSpec { prompt_tokens: 640, ..expect_spec(id, &instance(LIAR), &there) };
    let mut incoming = decode.node.expect(spec).expect("room");
    sender.say(id, Body::Offer(v1::Offer { prompt_tokens: 640, ..offer(20) })).await;
    let key = sender.accepted().await;
    let mut data = sender.connect_data().await;
    let payload = vec![vec![0xAB; theirs().slice_bytes()]; 20];
    let slice_bytes = theirs().slice_bytes() as u32;
    let frame = RawFrame { slice_bytes, ..RawFrame::new(id, &key, 0, 0, payload) };
    assert!(20 * theirs().slice_bytes() > 64 << 10);
    write(&mut data, &frame.bytes()).await;
    let error = within("the refusal", 10, incoming.sealed()).await.expect_err("no room");
    assert_eq!(error.code(), ErrorCode::QueueFull, "{error}");
    assert_eq!(within("the fence", 10, incoming.close()).await, there);
    decode.idle().await;
}

#[tokio::test]
async fn an_offer_of_other_blocks_than_the_layout_gives_is_refused() {
    for blocks in [3, 1, 0, u32::MAX] {
        let decode = receiver(limits());
        let hello = hello(LIAR, &theirs().layout());
        let mut sender = ScriptedSender::open_with(&decode, hello).await.expect("welcome");
        let id = TransferId::generate();
        let incoming = decode.node.expect(spec(id, LIAR)).expect("room");
        sender.say(id, Body::Offer(offer(blocks))).await;
        assert_eq!(sender.aborted().await.code(), v1::ErrorCode::HandoffFailed);
        assert_eq!(within("the fence", 10, incoming.close()).await, THERE);
    }
}

#[tokio::test]
async fn layouts_that_do_not_hold_together_are_refused() {
    let decode = receiver(limits());
    type Change = fn(&mut KvLayout);
    let changes: [(&str, Change); 7] = [
        ("slice_bytes", |l| l.slice_bytes -= 1),
        ("slice_bytes", |l| l.block_tokens = u32::MAX),
        ("slice_bytes", |l| l.head_dim = u32::MAX),
        ("slice_bytes", |l| l.kv_heads = u32::MAX),
        ("rope_dim", |l| l.rope_dim = u32::MAX),
        ("tensor_parallel", |l| l.tensor_parallel = 0),
        ("block_tokens", |l| l.block_tokens = 0),
    ];
    for (field, change) in changes {
        let mut layout = theirs().layout();
        change(&mut layout);
        let refused = ScriptedSender::open_with(&decode, hello(LIAR, &layout)).await.err().expect("refused");
        assert!(refused.message().contains(field), "{field}: {refused}");
    }
    let mut wire = v1::KvLayout::from(&theirs().layout());
    wire.fingerprint = v1::KvLayout::from(&ours().layout()).fingerprint;
    let lie = Body::Hello(v1::SenderHello {
        oldest_protocol: 1,
        newest_protocol: 1,
        instance_id: LIAR.into(),
        incarnation: 1,
        layout: Some(wire),
        nonce: vec![1; 16].into(),
    });
    let refused = ScriptedSender::open_with(&decode, lie).await.err().expect("refused");
    assert!(refused.message().contains("model_revision"), "{refused}");
}

#[tokio::test]
async fn layouts_that_are_mapped_at_a_time_are_few() {
    let decode = receiver(limits());
    let name = |at: usize| format!("{LIAR}-{at}");
    let mut open = Vec::new();
    for (at, block) in [32, 48, 64, 8].into_iter().enumerate() {
        let hello = hello(&name(at), &panel(Bf16, block).layout());
        open.push(ScriptedSender::open_with(&decode, hello).await.expect("welcome"));
    }
    let hello = |at| hello(&name(at), &panel(Bf16, 24).layout());
    let refused = ScriptedSender::open_with(&decode, hello(7)).await.err().expect("a fifth");
    assert!(refused.message().contains("no more than 4 KV layouts"), "{refused}");
    open.pop();
    // Its stream ends when the receiver has seen that.
    let by = in_secs(10);
    while let Err(refused) = ScriptedSender::open_with(&decode, hello(8)).await {
        assert!(std::time::Instant::now() < by, "{refused}");
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}
