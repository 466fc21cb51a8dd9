//! Peers that say exactly what a test tells them, over the real wire: a sender and a receiver of `Handoff`, and frames
//! written byte by byte from the protocol's description, independently of the crate's own code.

use std::{net::SocketAddr, time::Duration};

use baton_kvtransfer::KvLayout;
use baton_proto::{TransferId, v1};
use crc_fast::{CrcAlgorithm, checksum};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use v1::{
    handoff_client::HandoffClient, handoff_server, receiver_message::Body as FromReceiver,
    sender_message::Body as FromSender,
};

use super::{LAYERS, Peer, SLICE, layout, within};

/// A sender that follows a script.
pub struct ScriptedSender {
    pub to_peer: mpsc::Sender<v1::SenderMessage>,
    pub from_peer: Streaming<v1::ReceiverMessage>,
    pub data: SocketAddr,
    pub pass: Pass,
    /// The kinds of transport it was told of.
    pub told: Vec<String>,
}

/// What data connections show.
#[derive(Clone)]
pub struct Pass {
    pub id: Vec<u8>,
    pub key: Vec<u8>,
}

impl ScriptedSender {
    pub async fn open(peer: &Peer, name: &str, incarnation: u64) -> Result<Self, Status> {
        let hello = v1::SenderHello {
            oldest_protocol: 1,
            newest_protocol: 1,
            instance_id: name.into(),
            incarnation,
            layout: Some((&layout()).into()),
            nonce: vec![1; 16].into(),
        };
        Self::open_with(peer, FromSender::Hello(hello)).await
    }

    pub async fn open_with(peer: &Peer, first: FromSender) -> Result<Self, Status> {
        let (to_peer, queue) = mpsc::channel(64);
        let message = v1::SenderMessage { transfer_id: Default::default(), body: Some(first) };
        to_peer.send(message).await.expect("open");
        let mut client = HandoffClient::connect(format!("http://{}", peer.address)).await.expect("reachable");
        let mut from_peer = client.exchange(ReceiverStream::new(queue)).await?.into_inner();
        let hello = from_peer.message().await?.and_then(|message| message.body);
        let Some(FromReceiver::Hello(hello)) = hello else { panic!("no hello first") };
        assert_eq!(hello.nonce.len(), 16);
        let proof = FromSender::Proof(v1::Proof::default());
        let message = v1::SenderMessage { transfer_id: Default::default(), body: Some(proof) };
        to_peer.send(message).await.expect("open");
        let welcome = from_peer.message().await?.and_then(|message| message.body);
        let Some(FromReceiver::Welcome(welcome)) = welcome else { panic!("no welcome second") };
        let tcp = welcome.endpoints.iter().find(|endpoint| endpoint.transport == "tcp").expect("tcp");
        let data = tcp.address.parse().expect("an address");
        let pass = Pass { id: welcome.link_id.to_vec(), key: welcome.link_key.to_vec() };
        let told = welcome.endpoints.into_iter().map(|endpoint| endpoint.transport).collect();
        Ok(Self { to_peer, from_peer, data, pass, told })
    }

    /// A data connection of this sender, hellos exchanged.
    pub async fn connect_data(&self) -> TcpStream {
        let mut stream = connect_data(self.data).await;
        write(&mut stream, &data_hello(&self.pass, 0)).await;
        let mut answer = [0; 32];
        within("the answer", 10, stream.read_exact(&mut answer)).await.expect("welcome");
        assert_eq!(&answer[..4], b"BKA1");
        stream
    }

    pub async fn say(&self, id: TransferId, body: FromSender) {
        let message = v1::SenderMessage { transfer_id: id.as_bytes().to_vec().into(), body: Some(body) };
        self.to_peer.send(message).await.expect("the stream stands");
    }

    pub async fn offer(&self, id: TransferId, blocks: u32, incarnation: u64) {
        let prompt_tokens = blocks * super::BLOCK_TOKENS;
        let offer = v1::Offer {
            prompt_tokens,
            blocks,
            layers: LAYERS,
            sender_epoch: incarnation,
            prompt_digest: super::prompt().as_bytes().to_vec().into(),
        };
        self.say(id, FromSender::Offer(offer)).await;
    }

    /// The next message that is not a renewal.
    pub async fn hear(&mut self) -> (TransferId, FromReceiver) {
        loop {
            let message =
                within("a message", 10, self.from_peer.message()).await.expect("no error").expect("open");
            let id = TransferId::try_from(message.transfer_id.as_ref()).expect("an id");
            match message.body.expect("a body") {
                FromReceiver::Renew(_) => {}
                body => return (id, body),
            }
        }
    }

    /// Waits for the accept and gives its data key.
    pub async fn accepted(&mut self) -> Vec<u8> {
        match self.hear().await.1 {
            FromReceiver::Accept(accept) => accept.data_key.to_vec(),
            other => panic!("not an accept: {other:?}"),
        }
    }

    /// Waits for an abort and gives its reason.
    pub async fn aborted(&mut self) -> v1::ErrorDetail {
        match self.hear().await.1 {
            FromReceiver::Abort(abort) => abort.reason.expect("a reason"),
            other => panic!("not an abort: {other:?}"),
        }
    }
}

/// A frame, field by field.
#[derive(Clone)]
pub struct RawFrame {
    pub id: TransferId,
    pub layer: u32,
    pub first: u32,
    pub payload: Vec<Vec<u8>>,
    pub key: Vec<u8>,
    /// XORed into the first slice's CRC.
    pub crc_error: u32,
    pub slice_bytes: u32,
    pub end: [u8; 4],
}

/// How a frame ends that was written from its blocks to the last byte, and how one whose rest is zeros.
pub const WHOLE: [u8; 4] = *b"BKE1";
pub const CUT_SHORT: [u8; 4] = *b"BKX1";

impl RawFrame {
    pub fn new(id: TransferId, key: &[u8], layer: u32, first: u32, payload: Vec<Vec<u8>>) -> Self {
        let (key, slice_bytes) = (key.to_vec(), SLICE as u32);
        Self { id, layer, first, payload, key, crc_error: 0, slice_bytes, end: WHOLE }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut head = b"BKV2".to_vec();
        head.extend(self.layer.to_le_bytes());
        head.extend(self.id.as_bytes());
        head.extend(self.first.to_le_bytes());
        head.extend([0; 4]);
        head.extend((self.payload.len() as u32).to_le_bytes());
        head.extend(self.slice_bytes.to_le_bytes());
        head.extend([0; 8]);
        let crcs = self.payload.iter().map(|slice| crc32c(slice));
        let crcs = crcs.enumerate().map(|(i, crc)| if i == 0 { crc ^ self.crc_error } else { crc });
        let table: Vec<u8> = crcs.flat_map(u32::to_le_bytes).collect();
        let proof = hmac(&self.key, &[&head, &table]);
        head.extend(proof);
        head.extend(table);
        head.extend(self.payload.concat());
        head.extend(self.end);
        head
    }
}

pub fn crc32c(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The seal that fits these (layer, block, bytes).
pub fn seal(first_token: u32, slices: &[(u32, u32, Vec<u8>)]) -> v1::Seal {
    let mut checksum = 0;
    for (layer, block, bytes) in slices {
        let mut record = layer.to_le_bytes().to_vec();
        record.extend(block.to_le_bytes());
        record.extend(crc32c(bytes).to_le_bytes());
        checksum ^= crc32c(&record);
    }
    let bytes = slices.iter().map(|(_, _, bytes)| bytes.len() as u64).sum();
    v1::Seal { first_tokens: vec![first_token], slices: slices.len() as u64, bytes, checksum }
}

/// What a data connection begins with.
pub fn data_hello(pass: &Pass, kind: u8) -> Vec<u8> {
    data_hello_with(pass, kind, &[])
}

/// With terms.
pub fn data_hello_with(pass: &Pass, kind: u8, terms: &[u8]) -> Vec<u8> {
    let mut head = b"BKH1".to_vec();
    head.extend([kind, 0, 0, 0]);
    head.extend(&pass.id);
    head.extend((terms.len() as u32).to_le_bytes());
    head.extend([0; 4]);
    head.extend([5; 16]);
    let proof = hmac(&pass.key, &[&head, terms]);
    head.extend(proof);
    head.extend(terms);
    head
}

/// An announcement, field by field.
#[derive(Clone)]
pub struct RawNotice {
    pub id: TransferId,
    pub layer: u32,
    pub first: u32,
    /// (offset in the sender's region, digest) of each slice; that of so short a slice is its CRC32C.
    pub entries: Vec<(u64, u32)>,
    pub key: Vec<u8>,
}

impl RawNotice {
    pub fn bytes(&self) -> Vec<u8> {
        let mut head = b"BKN2".to_vec();
        head.extend(self.layer.to_le_bytes());
        head.extend(self.id.as_bytes());
        head.extend(self.first.to_le_bytes());
        head.extend([0; 4]);
        head.extend((self.entries.len() as u32).to_le_bytes());
        head.extend((SLICE as u32).to_le_bytes());
        head.extend([0; 8]);
        let table: Vec<u8> = self
            .entries
            .iter()
            .flat_map(|(offset, sum)| [&offset.to_le_bytes()[..], &sum.to_le_bytes()].concat())
            .collect();
        let proof = hmac(&self.key, &[&head, &table]);
        head.extend(proof);
        head.extend(table);
        head
    }
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes()[..16].try_into().expect("16 bytes")
}

pub async fn connect_data(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).await.expect("listening");
    stream.set_nodelay(true).expect("a socket");
    stream
}

pub async fn write(stream: &mut TcpStream, bytes: &[u8]) {
    within("a write", 10, stream.write_all(bytes)).await.expect("open");
}

/// Waits until the other side closes the connection.
pub async fn closed_by_peer(stream: &mut TcpStream) {
    let read = within("the close", 10, stream.read(&mut [0; 1])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "the peer wrote something");
}

type Exchange = (Streaming<v1::SenderMessage>, mpsc::Sender<Result<v1::ReceiverMessage, Status>>);

/// A receiver that follows a script: each control stream that comes in is handed to the test.
pub struct ScriptedReceiver {
    pub address: SocketAddr,
    data_address: SocketAddr,
    /// Data connections, hellos exchanged.
    data: mpsc::Receiver<TcpStream>,
    /// Where it says that it takes slices in over shared memory.
    pub shm: Option<String>,
    /// Of other transports that it says it has, kind and address, the best.
    pub also: Vec<(&'static str, String)>,
    streams: mpsc::Receiver<Exchange>,
}

struct Service(mpsc::Sender<Exchange>);

#[tonic::async_trait]
impl handoff_server::Handoff for Service {
    type ExchangeStream = ReceiverStream<Result<v1::ReceiverMessage, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::SenderMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let (messages, queue) = mpsc::channel(64);
        self.0.send((request.into_inner(), messages)).await.map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(ReceiverStream::new(queue)))
    }
}

/// One control stream of a scripted receiver.
pub struct ReceiverStreamEnd {
    pub from_peer: Streaming<v1::SenderMessage>,
    pub to_peer: mpsc::Sender<Result<v1::ReceiverMessage, Status>>,
}

impl ScriptedReceiver {
    pub async fn start() -> Self {
        let mut receiver = Self::start_without_data().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        receiver.data_address = listener.local_addr().expect("bound");
        let (connections, data) = mpsc::channel(64);
        receiver.data = data;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = greet(stream).await {
                    let _ = connections.send(stream).await;
                }
            }
        });
        receiver
    }

    /// One at whose data port nobody says anything.
    pub async fn start_without_data() -> Self {
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let data_address = silent.local_addr().expect("bound");
        let (connections, data) = mpsc::channel(1);
        tokio::spawn(async move {
            connections.closed().await;
            drop(silent);
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (sender, streams) = mpsc::channel(8);
        let service = handoff_server::HandoffServer::new(Service(sender));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, data_address, data, shm: None, also: Vec::new(), streams }
    }

    /// The next control stream, hellos exchanged.
    pub async fn stream(&mut self, name: &str, incarnation: u64) -> ReceiverStreamEnd {
        self.stream_with(name, incarnation, &layout()).await
    }

    pub async fn stream_with(
        &mut self,
        name: &str,
        incarnation: u64,
        layout: &KvLayout,
    ) -> ReceiverStreamEnd {
        let (mut from_peer, to_peer) = within("a stream", 10, self.streams.recv()).await.expect("serving");
        let first = from_peer.message().await.expect("no error").and_then(|message| message.body);
        assert!(matches!(first, Some(FromSender::Hello(_))), "hello comes first");
        let hello = v1::ReceiverHello {
            protocol: 1,
            instance_id: name.into(),
            incarnation,
            layout: Some(layout.into()),
            nonce: vec![2; 16].into(),
            proof: Default::default(),
            proofs_before: Default::default(),
        };
        let mut stream = ReceiverStreamEnd { from_peer, to_peer };
        stream.say_first(FromReceiver::Hello(hello)).await;
        let Ok(Some(proof)) = stream.from_peer.message().await else { return stream };
        assert!(matches!(proof.body, Some(FromSender::Proof(_))), "the proof comes second");
        let address = self.data_address.to_string();
        let endpoint = |kind: &str, address| v1::DataEndpoint { transport: kind.into(), address };
        let also = self.also.iter().map(|(kind, address)| endpoint(kind, address.clone()));
        let shm = self.shm.iter().map(|name| endpoint("shm", name.clone()));
        let welcome = v1::Welcome {
            endpoints: also.chain(shm).chain([endpoint("tcp", address)]).collect(),
            link_id: vec![3; 16].into(),
            link_key: vec![4; 16].into(),
        };
        stream.say_first(FromReceiver::Welcome(welcome)).await;
        stream
    }

    /// The next data connection, hellos exchanged.
    pub async fn data(&mut self) -> TcpStream {
        within("a data connection", 10, self.data.recv()).await.expect("listening")
    }
}

/// Answers a data connection's hello.
async fn greet(mut stream: TcpStream) -> std::io::Result<TcpStream> {
    let mut hello = [0; 64];
    stream.read_exact(&mut hello).await?;
    let mut head = b"BKA1".to_vec();
    head.extend([0; 12]);
    let proof = hmac(&[4; 16], &[&hello[32..48], &head]);
    head.extend(proof);
    stream.write_all(&head).await?;
    Ok(stream)
}

impl ReceiverStreamEnd {
    async fn say_first(&self, body: FromReceiver) {
        let message = v1::ReceiverMessage { transfer_id: Default::default(), body: Some(body) };
        self.to_peer.send(Ok(message)).await.expect("open");
    }

    pub async fn say(&self, id: TransferId, body: FromReceiver) {
        let message = v1::ReceiverMessage { transfer_id: id.as_bytes().to_vec().into(), body: Some(body) };
        self.to_peer.send(Ok(message)).await.expect("the stream stands");
    }

    pub async fn accept(&self, id: TransferId, lease: Duration) {
        let lease_millis = lease.as_millis() as u32;
        let accept =
            v1::Accept { held: vec![], lease_millis, data_key: vec![7; 16].into(), receiver_epoch: 1 };
        self.say(id, FromReceiver::Accept(accept)).await;
    }

    /// The next message that is not a renewal.
    pub async fn hear(&mut self) -> (TransferId, FromSender) {
        loop {
            let message =
                within("a message", 10, self.from_peer.message()).await.expect("no error").expect("open");
            let id = TransferId::try_from(message.transfer_id.as_ref()).expect("an id");
            match message.body.expect("a body") {
                FromSender::Renew(_) => {}
                body => return (id, body),
            }
        }
    }
}

/// What a frame with `count` slices weighs on the wire.
pub fn frame_bytes(count: usize) -> usize {
    64 + count * (4 + SLICE) + 4
}

/// Slices of one layer, as a test's transfer has them.
pub fn slices(seed: u64, layer: u32, indices: std::ops::Range<u32>) -> Vec<Vec<u8>> {
    indices.map(|index| super::pattern(seed, layer, index, SLICE)).collect()
}
