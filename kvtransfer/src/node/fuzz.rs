//! A live node for the fuzz targets that have one: bytes as a data connection, and messages as a control stream.

use std::{
    collections::HashSet,
    future::poll_fn,
    pin::pin,
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    task::Poll,
};

use baton_proto::{Incarnation, InstanceId, PromptDigest};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    sync::mpsc,
};
use tonic::Status;
use v1::{receiver_message, sender_message};

use super::{
    control_queue::ControlQueue,
    link_up::LinkUp,
    peer_link::PeerLink,
    secret::{Party, nonce},
    wire::from_status,
    *,
};
use crate::{
    DataPortConfig, FirstTokens, Region,
    session::{SliceRun, Tally, crc32c},
    transport::{
        DataKey, Outbox,
        frame::{End, Entry, Form, Header},
        hello::Hello,
    },
};

/// None runs out.
const LEASE: Duration = Duration::from_secs(3600);
const LAYERS: u32 = 2;
const POOL: u32 = 8;
const SLICE_BYTES: u64 = 24;
/// The transfer's blocks; the third is held, so nothing may be written there either.
const BLOCKS: [u32; 4] = [6, 1, 4, 3];
const HELD: u32 = 2;
const PEER: &str = "peer:1";
/// A script's frames are few and small, so that many scripts run in a second.
const MOST_FRAMES: usize = 32;

/// Of every transfer.
fn prompt() -> PromptDigest {
    PromptDigest::of(&[1, 2, 3])
}

struct Stage {
    runtime: Runtime,
    kv: KvNode,
    link: Arc<PeerLink>,
    answers: tokio::sync::Mutex<mpsc::Receiver<Result<v1::ReceiverMessage, Status>>>,
    ids: AtomicU32,
}

static STAGE: LazyLock<Stage> = LazyLock::new(Stage::new);

impl Stage {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let layout = KvLayout {
            model_revision: "r".into(),
            format: "f".into(),
            dtype: "f32".into(),
            block_tokens: 16,
            layers: LAYERS,
            kv_heads: 1,
            head_dim: 1,
            rope_dim: 0,
            tensor_parallel: 1,
            slice_bytes: SLICE_BYTES,
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let config = NodeConfig {
            instance_id: instance("here"),
            incarnation: Incarnation(1),
            layout,
            region: Region::zeroed((u64::from(LAYERS * POOL) * SLICE_BYTES) as usize),
            blocks: POOL,
            data_port: DataPortConfig::new(listener),
            transports: vec![TransportConfig::Tcp { connections: 1 }],
            dial: Arc::new(Plaintext),
            secret: None,
            convert: true,
            lease: LEASE,
            limits: Limits { remembered_transfers: 64, ..Limits::for_lease(LEASE) },
            reclaim: Arc::new(|_| {}),
        };
        let entered = runtime.enter();
        let kv = KvNode::start(config, CancellationToken::new()).expect("a node");
        drop(entered);
        let (messages, answers) = mpsc::channel(4096);
        let link = PeerLink::new(
            std::time::Instant::now(),
            1,
            Party { id: instance("peer"), incarnation: Incarnation(9) },
            ControlQueue::new(messages, Arc::default()),
            CancellationToken::new(),
        );
        let (link, answers) = (Arc::new(link), tokio::sync::Mutex::new(answers));
        kv.node.admit_peer(&link).expect("room");
        Self { runtime, kv, link, answers, ids: AtomicU32::new(0) }
    }

    fn next_id(&self) -> TransferId {
        let mut id = *b"....a fuzzed one"; // so that bytes hardly ever name it by chance
        id[..4].copy_from_slice(&self.ids.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        TransferId::from_bytes(id)
    }

    fn expect(&self, id: TransferId) -> Incoming {
        let spec = ExpectSpec {
            id,
            sender: instance("peer"),
            sender_incarnation: None,
            prompt_tokens: 16 * BLOCKS.len() as u32,
            prompt_digest: prompt(),
            blocks: BLOCKS.to_vec(),
            held: vec![HELD],
            deadline: self.kv.node.now() + Duration::from_secs(600),
        };
        self.kv.expect(spec).expect("room")
    }

    fn say(&self, id: TransferId, body: sender_message::Body) {
        let message = v1::SenderMessage { transfer_id: id.as_bytes().to_vec().into(), body: Some(body) };
        service::handle(&self.kv.node, &self.link, message).expect("a message that is in order");
    }

    /// Fills the pool with what every byte's place says.
    fn fill(&self) {
        for (layer, block) in pool() {
            let slices = &self.kv.node.pool.slices;
            slices.io_slice_mut(layer, block, 0).expect("in the pool").copy_from_slice(&before(layer, block));
        }
    }

    fn content(&self, layer: u32, block: u32) -> &[u8] {
        self.kv.node.pool.slices.source(layer, block).expect("in the pool")
    }

    /// Nothing but the transfer's own blocks has changed.
    fn check_others(&self) {
        for (layer, block) in pool() {
            let index = BLOCKS.iter().position(|&own| own == block);
            if index.is_none_or(|index| index == HELD as usize) {
                assert_eq!(self.content(layer, block), before(layer, block), "layer {layer}, block {block}");
            }
        }
    }

    /// The transfer gives its blocks back, and nothing is left of it.
    async fn close(&self, incoming: Incoming) {
        let blocks = tokio::time::timeout(Duration::from_secs(20), incoming.close()).await;
        assert_eq!(blocks.expect("blocks come back"), BLOCKS);
        let all: Vec<_> = (0..POOL).collect();
        drop(self.kv.node.pool.claims.claim(&all, &[]).expect("no claim is left"));
    }
}

fn instance(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a valid name")
}

fn pool() -> impl Iterator<Item = (u32, u32)> {
    (0..LAYERS).flat_map(|layer| (0..POOL).map(move |block| (layer, block)))
}

fn before(layer: u32, block: u32) -> [u8; SLICE_BYTES as usize] {
    std::array::from_fn(|at| (layer as u8).wrapping_mul(64) ^ (block as u8).wrapping_mul(8) ^ at as u8 ^ 0xA5)
}

/// What the sender has in a slice.
fn sent(layer: u32, block: u32) -> [u8; SLICE_BYTES as usize] {
    before(layer, block).map(|byte| byte.wrapping_mul(3))
}

fn seal() -> sender_message::Body {
    let mut tally = Tally::default();
    for layer in 0..LAYERS {
        for block in (0..BLOCKS.len() as u32).filter(|&block| block != HELD) {
            tally.add(layer, block, crc32c(&sent(layer, block)), SLICE_BYTES);
        }
    }
    let Tally { slices, bytes, checksum } = tally;
    sender_message::Body::Seal(v1::Seal { first_tokens: vec![5], slices, bytes, checksum })
}

/// Bytes read as decisions.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    /// Mostly small numbers.
    fn number(&mut self) -> Option<u32> {
        let byte = self.byte()?;
        if byte < 0xF0 {
            return Some(u32::from(byte % 8));
        }
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A frame that its sender has proven, whatever else is wrong with it.
    fn frame(&mut self, id: TransferId, key: &DataKey) -> Option<Vec<u8>> {
        let how = self.byte()?;
        let (layer, first, count) = (self.number()?, self.number()?, self.number()?);
        let count = count.min(64);
        let mut transfer = *id.as_bytes();
        transfer[15] ^= u8::from(how & 1 != 0);
        let slice_bytes = if how & 2 == 0 { SLICE_BYTES as u32 } else { self.number()? };
        let form = if how & 4 == 0 { Form::Carried } else { Form::Announced };
        let run = SliceRun { layer, first, count };
        let header = Header { form, transfer: TransferId::from_bytes(transfer), run, slice_bytes };
        let slices = || (0..count).map(|n| sent(layer, first.wrapping_add(n)));
        let lie = u32::from(how & 8 != 0);
        let entries = slices().map(|slice| Entry { offset: 0, sum: crc32c(&slice) ^ lie });
        let mut bytes = Vec::new();
        header.encode(key, entries, &mut bytes);
        if how & 16 != 0 {
            let at = self.byte()? as usize % bytes.len();
            bytes[at] ^= 1 << (how >> 5);
        }
        slices().for_each(|slice| bytes.extend(slice));
        let end = if lie != 0 && first % 2 != 0 { End::CutShort } else { End::Whole };
        bytes.extend(end.bytes());
        if how & 32 != 0 {
            let cut = self.byte()? as usize;
            bytes.truncate(bytes.len().saturating_sub(cut));
        }
        if how & 64 != 0 {
            let at = self.byte()? as usize % bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1;
            }
        }
        Some(bytes)
    }
}

/// A data connection to a node that has accepted a transfer: any bytes, frames with the transfer's proof that say
/// anything, the seal and the owner's cancel in between.
pub(crate) fn connection(bytes: &[u8]) {
    let stage = &*STAGE;
    stage.runtime.block_on(async {
        stage.fill();
        let mut answers = stage.answers.lock().await;
        while answers.try_recv().is_ok() {}
        let id = stage.next_id();
        let mut incoming = stage.expect(id);
        let (prompt_tokens, blocks) = (16 * BLOCKS.len() as u32, BLOCKS.len() as u32);
        let offer = v1::Offer {
            prompt_tokens,
            blocks,
            layers: LAYERS,
            sender_epoch: 9,
            prompt_digest: prompt().as_bytes().to_vec().into(),
        };
        stage.say(id, sender_message::Body::Offer(offer));
        let Some(Ok(v1::ReceiverMessage { body: Some(receiver_message::Body::Accept(accept)), .. })) =
            answers.recv().await
        else {
            panic!("the offer is accepted");
        };
        let key = DataKey::from_wire(&accept.data_key).expect("a key");
        let (_, address) = stage.kv.transports().remove(0);
        let mut stream = TcpStream::connect(address).await.expect("the data port is open");
        let (hello, _) = Hello::encode(TransportKind::Tcp, stage.link.pass(), &[]);
        stream.write_all(&hello).await.expect("open");
        let mut script = Script(bytes);
        for _ in 0..MOST_FRAMES {
            let Some(what) = script.byte() else { break };
            let frame = match what % 8 {
                0..=4 => script.frame(id, &key).unwrap_or_default(),
                5 => {
                    stage.say(id, seal());
                    continue;
                }
                6 if what > 128 => {
                    incoming.cancel("fuzz");
                    continue;
                }
                _ => script.bytes(what as usize).to_vec(),
            };
            // The node may have had enough of this connection.
            if stream.write_all(&frame).await.is_err() {
                break;
            }
            if what >= 64 {
                tokio::task::yield_now().await;
            }
        }
        let _ = stream.shutdown().await;
        let closed = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut Vec::new())).await;
        assert!(closed.is_ok(), "the connection is not let go of");
        stage.check_others();
        stage.say(id, sender_message::Body::Abort(v1::Abort { reason: None }));
        if let Ok(sealed) = incoming.sealed().await {
            assert_eq!(sealed.slices, 6);
            for layer in 0..LAYERS {
                for (index, &block) in BLOCKS.iter().enumerate().filter(|(index, _)| *index != HELD as usize)
                {
                    assert_eq!(stage.content(layer, block), sent(layer, index as u32), "not what was sealed");
                }
            }
        }
        stage.close(incoming).await;
        stage.check_others();
    });
}

/// What a future has now, if it does.
async fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Messages of a control stream, from either end, to a node with a transfer that they may be about.
pub(crate) fn messages(bytes: &[u8]) {
    let stage = &*STAGE;
    let Some((&how, bytes)) = bytes.split_first() else { return };
    let _ = from_status(&Status::with_details(tonic::Code::Internal, "fuzz", bytes.to_vec().into()));
    stage.runtime.block_on(async {
        let id = stage.next_id();
        let own: bytes::Bytes = id.as_bytes().to_vec().into();
        let mut script = Script(bytes);
        let mut parts = std::iter::from_fn(|| {
            let length = usize::from(script.byte()?);
            Some(script.bytes(length))
        });
        if how % 2 == 0 {
            while stage.answers.lock().await.try_recv().is_ok() {}
            let incoming = (how & 2 == 0).then(|| stage.expect(id));
            for part in parts.by_ref().take(MOST_FRAMES) {
                let Ok(mut message) = v1::SenderMessage::decode(part) else { continue };
                if let Some(sender_message::Body::Hello(hello)) = &message.body {
                    let _ = (InstanceId::new(hello.instance_id.clone()), nonce(&hello.nonce));
                    let _ = hello.layout.as_ref().map(|layout| stage.kv.node.layout.of_peer(layout));
                }
                if message.transfer_id.is_empty() {
                    message.transfer_id = own.clone();
                }
                let _ = service::handle(&stage.kv.node, &stage.link, message);
            }
            if let Some(incoming) = incoming {
                stage.close(incoming).await;
            }
            for held in stage.kv.node.incoming.all() {
                held.cancel(TransferError::ShuttingDown);
            }
            assert_eq!(stage.kv.node.incoming.counts().held, 0);
            return;
        }
        let to = Destination { endpoint: PEER.into(), receiver: instance("peer") };
        let link = Link::new(to.clone());
        stage.kv.node.links.put(to, link.clone());
        let (messages, mut said) = mpsc::channel(64);
        let messages = ControlQueue::new(messages, Arc::default());
        let (now, outbox) = (stage.kv.node.now(), Outbox::default());
        let up = LinkUp::new(now, messages, instance("peer"), Incarnation(9), None, outbox);
        link.rise(&up);
        let spec = OfferSpec {
            id,
            peer: PEER.into(),
            receiver: instance("peer"),
            receiver_incarnation: None,
            prompt_tokens: 16 * BLOCKS.len() as u32,
            prompt_digest: prompt(),
            blocks: BLOCKS.to_vec(),
            priority: 0,
            deadline: stage.kv.node.now() + Duration::from_secs(600),
        };
        let outgoing = stage.kv.offer(spec).expect("room");
        let progress = outgoing.progress();
        (0..LAYERS).for_each(|layer| progress.ready(layer, 0..BLOCKS.len() as u32));
        let mut taken = HashSet::new();
        for (n, part) in parts.by_ref().take(MOST_FRAMES).enumerate() {
            let Ok(mut message) = v1::ReceiverMessage::decode(part) else { continue };
            if let Some(receiver_message::Body::Hello(hello)) = &message.body {
                let _ = (InstanceId::new(hello.instance_id.clone()), nonce(&hello.nonce));
                let _ = hello.layout.as_ref().map(|layout| stage.kv.node.layout.of_peer(layout));
            }
            if message.transfer_id.is_empty() {
                message.transfer_id = own.clone();
            }
            link.dispatch(&stage.kv.node, &up, message);
            while let Some(ticket) = at_once(up.outbox().next(u32::from(how / 64) + 1)).await {
                let run = ticket.run();
                for block in run.blocks() {
                    assert!(taken.insert((run.layer, block)), "sent twice");
                }
                let sums: Vec<_> = run.blocks().map(|block| crc32c(&sent(run.layer, block))).collect();
                ticket.sent(&sums);
            }
            if n == usize::from(how / 16 % 4) {
                progress.seal(FirstTokens::from(5));
            }
        }
        let blocks = tokio::time::timeout(Duration::from_secs(20), outgoing.close()).await;
        assert_eq!(blocks.expect("blocks come back"), BLOCKS);
        assert!(link.is_empty());
        while said.try_recv().is_ok() {}
    });
}
