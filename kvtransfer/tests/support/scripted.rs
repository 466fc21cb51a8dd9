//! Peers that say exactly what a test tells them, over the real wire: a sender and a receiver of `Handoff`, and frames
//! written byte by byte from the protocol's description, independently of the crate's own code.

use std::{net::SocketAddr, time::Duration};

use baton_kvtransfer::KvLayout;
use baton_proto::{TransferId, v1};
use crc_fast::{CrcAlgorithm, checksum};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::{
    io::AsyncWriteExt,
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
}

impl ScriptedSender {
    pub async fn open(peer: &Peer, name: &str, incarnation: u64) -> Result<Self, Status> {
        let hello = v1::SenderHello {
            instance_id: name.into(),
            incarnation,
            layout: Some((&layout()).into()),
            transports: vec!["tcp".into()],
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
        let data = hello.endpoints[0].address.parse().expect("an address");
        Ok(Self { to_peer, from_peer, data })
    }

    pub async fn say(&self, id: TransferId, body: FromSender) {
        let message = v1::SenderMessage { transfer_id: id.as_bytes().to_vec().into(), body: Some(body) };
        self.to_peer.send(message).await.expect("the stream stands");
    }

    pub async fn offer(&self, id: TransferId, blocks: u32, incarnation: u64) {
        let prompt_tokens = blocks * super::BLOCK_TOKENS;
        let offer = v1::Offer { prompt_tokens, blocks, layers: LAYERS, sender_epoch: incarnation };
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
}

impl RawFrame {
    pub fn new(id: TransferId, key: &[u8], layer: u32, first: u32, payload: Vec<Vec<u8>>) -> Self {
        Self { id, layer, first, payload, key: key.to_vec(), crc_error: 0, slice_bytes: SLICE as u32 }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut head = b"BKV1".to_vec();
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
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(&self.key).expect("any length");
        mac.update(&head);
        mac.update(&table);
        head.extend(&mac.finalize().into_bytes()[..16]);
        head.extend(table);
        head.extend(self.payload.concat());
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
    let read = within("the close", 10, tokio::io::AsyncReadExt::read(stream, &mut [0; 1])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "the peer wrote something");
}

type Exchange = (Streaming<v1::SenderMessage>, mpsc::Sender<Result<v1::ReceiverMessage, Status>>);

/// A receiver that follows a script: each control stream that comes in is handed to the test.
pub struct ScriptedReceiver {
    pub address: SocketAddr,
    pub data: TcpListener,
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
        let data = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (sender, streams) = mpsc::channel(8);
        let service = handoff_server::HandoffServer::new(Service(sender));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, data, streams }
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
        let address = self.data.local_addr().expect("bound").to_string();
        let hello = v1::ReceiverHello {
            instance_id: name.into(),
            incarnation,
            layout: Some(layout.into()),
            endpoints: vec![v1::DataEndpoint { transport: "tcp".into(), address }],
        };
        let message =
            v1::ReceiverMessage { transfer_id: Default::default(), body: Some(FromReceiver::Hello(hello)) };
        to_peer.send(Ok(message)).await.expect("open");
        ReceiverStreamEnd { from_peer, to_peer }
    }
}

impl ReceiverStreamEnd {
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
    64 + count * (4 + SLICE)
}

/// Slices of one layer, as a test's transfer has them.
pub fn slices(seed: u64, layer: u32, indices: std::ops::Range<u32>) -> Vec<Vec<u8>> {
    indices.map(|index| super::pattern(seed, layer, index, SLICE)).collect()
}
