//! Transfers between nodes that lay their caches out differently, over real transports: what arrives is, value by value,
//! what the receiver would keep of the same cache, and everything else is as between nodes that are alike.

use std::ops::Range;

use crate::support::{
    caches::{Dtype::*, Form, Order, assert_holds, fill, panel},
    *,
};
use baton_kvtransfer::{
    ExpectSpec, Faults, Incoming, KvLayout, OfferSpec, Outgoing, TransferError, TransportConfig,
};
use baton_proto::{ErrorCode, TransferId};

const SEED: u64 = 77;

fn tcp() -> TransportConfig {
    TransportConfig::Tcp { connections: 2 }
}

fn setup(form: Form, transport: TransportConfig) -> Setup {
    Setup { layout: form.layout(), transports: vec![transport], convert: true, ..Setup::default() }
}

/// Two nodes, and how each keeps its cache.
struct Duo {
    prefill: Peer,
    decode: Peer,
    from: Form,
    to: Form,
}

/// A transfer between them.
struct Transfer {
    incoming: Incoming,
    outgoing: Outgoing,
    here: Vec<u32>,
    there: Vec<u32>,
}

impl Duo {
    fn start(transport: &TransportConfig, from: Form, to: Form) -> Self {
        Self::with(transport, from, setup(to, transport.clone()), to)
    }

    fn with(transport: &TransportConfig, from: Form, decode: Setup, to: Form) -> Self {
        let prefill = Peer::start_with("prefill-0", setup(from, transport.clone()));
        Self { prefill, decode: Peer::start_with("decode-0", decode), from, to }
    }

    /// Begins to hand a prompt over that prefill has computed; the receiver holds some blocks.
    fn begin(&self, seed: u64, tokens: usize, held: &[u32]) -> Transfer {
        let id = TransferId::generate();
        // Scattered, and not the same on both sides.
        let here: Vec<u32> = (0..self.from.blocks(tokens) as u32).map(|block| block * 5 % 64).collect();
        let there: Vec<u32> = (0..self.to.blocks(tokens) as u32).map(|block| 63 - block * 3 % 64).collect();
        fill(&self.prefill.pool, self.from, seed, &here, tokens);
        let expect = ExpectSpec {
            prompt_tokens: tokens as u32,
            held: held.to_vec(),
            ..expect_spec(id, &self.prefill.name, &there)
        };
        let offer = OfferSpec { prompt_tokens: tokens as u32, ..offer_spec(id, &self.decode, &here) };
        let incoming = self.decode.node.expect(expect).expect("room");
        let outgoing = self.prefill.node.offer(offer).expect("room");
        Transfer { incoming, outgoing, here, there }
    }

    fn assert_holds(&self, seed: u64, transfer: &Transfer, tokens: usize, held: &[u32]) {
        assert_holds(&self.decode.pool, (self.to, self.from), seed, &transfer.there, tokens, held);
    }

    async fn idle(&self) {
        self.prefill.idle().await;
        self.decode.idle().await;
    }
}

impl Transfer {
    fn ready(&self, layers: Range<u32>) {
        let progress = self.outgoing.progress();
        layers.for_each(|layer| progress.ready(layer, 0..self.here.len() as u32));
    }

    /// Hands all of it over; how many slices went.
    async fn finish(&mut self) -> u64 {
        self.outgoing.seal(4242);
        let sealed = within("sealed", 10, self.incoming.sealed()).await.expect("whole");
        let sent = within("finished", 10, self.outgoing.finished()).await.expect("released");
        assert_eq!((sealed.slices, sealed.bytes), (sent.slices, sent.bytes));
        sent.slices
    }

    async fn close(self) {
        assert_eq!(within("the receiver's fence", 10, self.incoming.close()).await, self.there);
        assert_eq!(within("the sender's fence", 10, self.outgoing.close()).await, self.here);
    }
}

async fn arrives(from: Form, to: Form, prompts: &[usize]) {
    for transport in [tcp(), TransportConfig::Shm] {
        let duo = Duo::start(&transport, from, to);
        for &tokens in prompts {
            let seed = SEED + tokens as u64;
            let mut transfer = duo.begin(seed, tokens, &[]);
            transfer.ready(0..LAYERS);
            let slices = transfer.finish().await;
            assert_eq!(slices as usize, LAYERS as usize * from.blocks(tokens));
            duo.assert_holds(seed, &transfer, tokens, &[]);
            transfer.close().await;
        }
        let (sent, received) = (duo.prefill.node.stats(), duo.decode.node.stats());
        assert_eq!(sent.slices_sent, received.slices_received);
        assert_eq!(sent.bytes_sent, received.bytes_received);
        assert_eq!(sent.bytes_sent, sent.slices_sent * from.slice_bytes() as u64);
        duo.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_another_size_are_cut_anew_exactly() {
    for dtype in [F32, Bf16, Int8] {
        for (from, to) in [(16, 32), (32, 16), (24, 16)] {
            arrives(panel(dtype, from), panel(dtype, to), &[1, 16, 31, 40, 97, 128]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_arrangement_is_turned_round() {
    let npu = |block| Form { order: Order::TokenMajor, ..panel(Bf16, block) };
    arrives(npu(128), panel(Bf16, 16), &[5, 129, 300]).await;
    arrives(panel(Bf16, 16), npu(64), &[5, 129, 300]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_become_what_the_receiver_keeps_of_them() {
    arrives(panel(Bf16, 16), panel(Int8, 16), &[1, 40, 97]).await;
    arrives(panel(Int8, 16), panel(Bf16, 16), &[1, 40, 97]).await;
    arrives(panel(Bf16, 16), panel(Int8, 32), &[1, 40, 97]).await;
    arrives(Form { order: Order::TokenMajor, ..panel(Bf16, 32) }, panel(Int8, 16), &[33, 97]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_blocks_are_not_written_and_what_lies_in_them_alone_is_not_sent() {
    // Blocks of the sender that need not be sent: those whose tokens all lie in held ones.
    let cases: [(usize, usize, usize, &[u32], usize); 7] = [
        (16, 32, 97, &[0], 2),
        (16, 32, 97, &[0, 2], 4),
        (16, 32, 97, &[3], 1),
        (32, 16, 97, &[0, 1, 2], 1),
        (32, 16, 97, &[1, 2], 0),
        (32, 16, 97, &[0, 1, 2, 3, 6], 3),
        (24, 16, 96, &[0, 1, 2], 2),
    ];
    for transport in [tcp(), TransportConfig::Shm] {
        for dtypes in [(Bf16, Bf16), (Bf16, Int8)] {
            for (from, to, tokens, held, left_out) in cases {
                let (from, to) = (panel(dtypes.0, from), panel(dtypes.1, to));
                let duo = Duo::start(&transport, from, to);
                let mark = vec![0x3C; to.slice_bytes()];
                let all = (0..LAYERS).flat_map(|layer| (0..BLOCKS).map(move |block| (layer, block)));
                all.clone().for_each(|(layer, block)| duo.decode.pool.write(layer, block, &mark));
                let mut transfer = duo.begin(SEED, tokens, held);
                transfer.ready(0..LAYERS);
                let slices = transfer.finish().await;
                assert_eq!(slices as usize, LAYERS as usize * (from.blocks(tokens) - left_out));
                duo.assert_holds(SEED, &transfer, tokens, held);
                let lent = |block| transfer.there.iter().position(|&lent| lent == block);
                for (layer, block) in all {
                    if lent(block).is_none_or(|index| held.contains(&(index as u32))) {
                        assert!(duo.decode.pool.read(layer, block) == mark, "block {block} was written");
                    }
                }
                transfer.close().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_is_held_may_be_read_by_others_meanwhile() {
    let duo = Duo::start(&tcp(), panel(Bf16, 16), panel(Bf16, 32));
    let mut transfer = duo.begin(SEED, 97, &[0, 1]);
    let shared = &transfer.there[..2];
    let other = OfferSpec { prompt_tokens: 64, ..offer_spec(TransferId::generate(), &duo.prefill, shared) };
    let reading = duo.decode.node.offer(other).expect("readers share");
    transfer.ready(0..LAYERS);
    transfer.finish().await;
    reading.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_side_can_end_it_in_the_middle_and_the_blocks_are_let_go_of() {
    for transport in [tcp(), TransportConfig::Shm] {
        let duo = Duo::start(&transport, panel(Bf16, 16), panel(Int8, 32));
        for sender_ends_it in [true, false] {
            let before = duo.decode.node.stats().slices_received;
            let mut transfer = duo.begin(SEED, 500, &[]);
            transfer.ready(0..1);
            until("some of it is in", || duo.decode.node.stats().slices_received > before).await;
            transfer.ready(1..LAYERS);
            if sender_ends_it {
                transfer.outgoing.cancel("a test");
            } else {
                transfer.incoming.cancel("a test");
            }
            within("the abort", 10, transfer.incoming.sealed()).await.expect_err("aborted");
            within("the abort", 10, transfer.outgoing.finished()).await.expect_err("aborted");
            let there = transfer.there.clone();
            transfer.close().await;
            // The blocks are another's now: nothing reaches them any more.
            let mark = vec![0x3C; duo.to.slice_bytes()];
            let all = || (0..LAYERS).flat_map(|layer| there.iter().map(move |&block| (layer, block)));
            all().for_each(|(layer, block)| duo.decode.pool.write(layer, block, &mark));
            duo.idle().await;
            assert!(all().all(|(layer, block)| duo.decode.pool.read(layer, block) == mark));
        }
        let mut transfer = duo.begin(SEED, 97, &[]);
        transfer.ready(0..LAYERS);
        transfer.finish().await;
        duo.assert_holds(SEED, &transfer, 97, &[]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slice_that_is_damaged_on_its_way_never_reaches_a_block() {
    for transport in [tcp(), TransportConfig::Shm] {
        let to = panel(Int8, 32);
        let faults = Faults { damaged: 1.0, ..Faults::default() };
        let decode = setup(to, TransportConfig::Faulty(Box::new(transport.clone()), faults));
        let duo = Duo::with(&transport, panel(Bf16, 16), decode, to);
        let mut transfer = duo.begin(SEED, 97, &[]);
        transfer.ready(0..LAYERS);
        let error = within("the refusal", 10, transfer.incoming.sealed()).await.expect_err("damaged");
        assert_eq!(error.code(), ErrorCode::KvDamaged, "{error}");
        let error = within("the refusal", 10, transfer.outgoing.finished()).await.expect_err("damaged");
        assert_eq!(error.code(), ErrorCode::KvDamaged, "{error}");
        let there = transfer.there.clone();
        transfer.close().await;
        let untouched = vec![0; to.slice_bytes()];
        for (layer, &block) in (0..LAYERS).flat_map(|layer| there.iter().map(move |block| (layer, block))) {
            assert_eq!(duo.decode.pool.read(layer, block), untouched);
        }
        duo.idle().await;
    }
}

async fn refused(from: KvLayout, decode: Setup) -> TransferError {
    let prefill = Peer::start_with("prefill-0", Setup { layout: from, ..Setup::default() });
    let decode = Peer::start_with("decode-0", decode);
    let offer = OfferSpec { prompt_tokens: 1, ..offer_spec(TransferId::generate(), &decode, &[3]) };
    let mut outgoing = prefill.node.offer(offer).expect("room");
    within("the refusal", 10, outgoing.finished()).await.expect_err("cannot be mapped")
}

#[tokio::test]
async fn what_cannot_be_mapped_is_refused_with_the_name_of_the_field() {
    let ours = panel(Bf16, 16);
    type Change = fn(&mut KvLayout);
    let changes: [(&str, Change); 8] = [
        ("model_revision", |l| l.model_revision = "r2".into()),
        ("format", |l| l.format = "of another world".into()),
        ("dtype", |l| l.dtype = "fp4".into()),
        ("layers", |l| l.layers = 5),
        ("kv_heads", |l| (l.kv_heads, l.slice_bytes) = (1, l.slice_bytes / 2)),
        ("rope_dim", |l| l.rope_dim = 24),
        ("tensor_parallel", |l| l.tensor_parallel = 2),
        ("slice_bytes", |l| l.slice_bytes += 2),
    ];
    for (field, change) in changes {
        let mut theirs = ours.layout();
        change(&mut theirs);
        let error = refused(theirs, setup(ours, tcp())).await;
        assert_eq!(error.code(), ErrorCode::Unsupported, "{error}");
        assert!(error.to_string().contains(field), "{field}: {error}");
    }
    let error = refused(panel(F32, 16).layout(), setup(ours, tcp())).await;
    assert!(error.to_string().contains("dtype f32"), "{error}");
}

#[tokio::test]
async fn values_are_changed_only_where_that_is_wanted() {
    let not_wanted = Setup { convert: false, ..setup(panel(Int8, 16), tcp()) };
    let error = refused(panel(Bf16, 16).layout(), not_wanted).await;
    assert_eq!(error.code(), ErrorCode::Unsupported);
    assert!(error.to_string().contains("handoff.convert") && error.to_string().contains("dtype"), "{error}");
    let exact = Setup { convert: false, ..setup(panel(Bf16, 32), tcp()) };
    let duo = Duo::with(&tcp(), panel(Bf16, 16), exact, panel(Bf16, 32));
    let mut transfer = duo.begin(SEED, 40, &[]);
    transfer.ready(0..LAYERS);
    transfer.finish().await;
    duo.assert_holds(SEED, &transfer, 40, &[]);
}

#[tokio::test]
async fn a_slice_larger_than_the_memory_to_map_it_in_is_refused_at_once() {
    let mut decode = setup(panel(Bf16, 16), tcp());
    decode.limits.staging_bytes = 1000;
    let error = refused(panel(Bf16, 32).layout(), decode).await;
    assert!(error.to_string().contains("slice_bytes"), "{error}");
}
