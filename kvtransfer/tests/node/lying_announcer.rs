//! Senders over shared memory that break the protocol: what they announce is not fetched, nothing is written, and each
//! lie ends in one clear refusal with every block back.

use std::{
    fs::File,
    io::{IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    time::Duration,
};

use crate::support::{scripted::*, *};
use baton_kvtransfer::{Incoming, TransferError, TransportConfig, TransportKind};
use baton_proto::{TransferId, v1};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use v1::sender_message::Body;

const LIAR: &str = "liar";
const BLOCKS_LENT: [u32; 3] = [10, 40, 20];
const SHM: u8 = 1;
/// What the liar lends: its slices lie one after the other.
const REGION: u64 = (LAYERS as usize * 3 * SLICE) as u64;

/// A decode node with an accepted transfer of three blocks, and the scripted sender of it.
struct Scene {
    decode: Peer,
    sender: ScriptedSender,
    id: TransferId,
    key: Vec<u8>,
    incoming: Incoming,
}

async fn scene() -> Scene {
    let transports = vec![TransportConfig::Shm, TransportConfig::Tcp { connections: 1 }];
    let decode = Peer::start_with("decode-0", Setup { transports, ..Setup::default() });
    let mut sender = ScriptedSender::open(&decode, LIAR, 1).await.expect("welcome");
    let id = TransferId::generate();
    let incoming = decode.node.expect(expect_spec(id, &instance(LIAR), &BLOCKS_LENT)).expect("room");
    sender.offer(id, 3, 1).await;
    let key = sender.accepted().await;
    Scene { decode, sender, id, key, incoming }
}

/// Memory with the transfer's content, sealed or not.
fn memory(seals: SealFlags) -> File {
    let mut file = File::from(memfd_create("liar", MemfdFlags::ALLOW_SEALING).expect("a file"));
    for layer in 0..LAYERS {
        file.write_all(&slices(1, layer, 0..3).concat()).expect("room");
    }
    fcntl_add_seals(&file, seals).expect("sealed");
    file
}

impl Scene {
    /// A connection, with `file` said to hold `bytes`.
    fn connect(&self, pass: &Pass, kind: u8, bytes: u64, file: Option<&File>) -> UnixStream {
        let transports = self.decode.node.transports();
        let (_, name) = transports.iter().find(|(kind, _)| *kind == TransportKind::Shm).expect("shm");
        let stream =
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).expect("a name")).expect("there");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
        let hello = data_hello_with(pass, kind, &bytes.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let fds = file.map(AsFd::as_fd);
        if let Some(fd) = &fds {
            assert!(with.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd))));
        }
        sendmsg(&stream, &[IoSlice::new(&hello)], &mut with, SendFlags::empty()).expect("sent");
        stream
    }

    fn welcome(&self) -> UnixStream {
        let mut stream = self.connect(&self.sender.pass, SHM, REGION, Some(&memory(SealFlags::SHRINK)));
        let mut answer = [0; 32];
        stream.read_exact(&mut answer).expect("welcome");
        stream
    }

    fn notice(&self, layer: u32, first: u32, count: u32) -> RawNotice {
        let at = |block: u32| u64::from(layer * 3 + block) * SLICE as u64;
        let entries =
            (first..first + count).map(|block| (at(block), crc32c(&pattern(1, layer, block, SLICE))));
        RawNotice { id: self.id, layer, first, entries: entries.collect(), key: self.key.clone() }
    }

    fn untouched(&self) -> bool {
        let mut all = (0..LAYERS).flat_map(|layer| (0..BLOCKS).map(move |block| (layer, block)));
        all.all(|(layer, block)| self.decode.pool.read(layer, block) == vec![0; SLICE])
    }

    /// The transfer fails on both sides and its blocks come back.
    async fn fails(&mut self) -> TransferError {
        let error = within("the refusal", 10, self.incoming.sealed()).await.expect_err("must not be taken");
        assert_eq!(self.sender.aborted().await.code(), error.code().to_wire());
        error
    }
}

/// Whether the other side closes the connection without a word.
fn closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scripted_announcer_can_tell_the_truth() {
    let mut scene = scene().await;
    let mut stream = scene.welcome();
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        stream.write_all(&scene.notice(layer, 0, 3).bytes()).expect("open");
        let mut done = [0];
        stream.read_exact(&mut done).expect("open");
        assert_eq!(done, [1]);
        all.extend((0..3).map(|block| (layer, block, pattern(1, layer, block, SLICE))));
    }
    scene.sender.say(scene.id, Body::Seal(seal(9, &all))).await;
    within("sealed", 10, scene.incoming.sealed()).await.expect("whole");
    assert!(scene.decode.holds(1, &BLOCKS_LENT));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_not_fit_to_be_read_is_not_mapped() {
    let scene = scene().await;
    let (fit, loose) = (memory(SealFlags::SHRINK), memory(SealFlags::GROW));
    let pass = &scene.sender.pass;
    let mut stranger = pass.clone();
    stranger.key[0] ^= 1;
    let tcp = 0;
    for mut stream in [
        scene.connect(pass, SHM, REGION, Some(&loose)), // could shrink under a copy
        scene.connect(pass, SHM, REGION + 1, Some(&fit)),
        scene.connect(pass, SHM, 0, Some(&fit)),
        scene.connect(pass, SHM, u64::MAX, Some(&fit)),
        scene.connect(pass, SHM, REGION, None),
        scene.connect(pass, tcp, REGION, Some(&fit)),
        scene.connect(&stranger, SHM, REGION, Some(&fit)),
    ] {
        assert!(closed(&mut stream));
    }
    assert!(scene.untouched());
    assert_eq!(scene.incoming.close().await, BLOCKS_LENT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_outside_of_what_is_lent_are_not_fetched() {
    for offset in [REGION - SLICE as u64 + 1, REGION, u64::MAX - 10] {
        let mut scene = scene().await;
        let mut stream = scene.welcome();
        let mut notice = scene.notice(0, 0, 3);
        notice.entries[2].0 = offset;
        stream.write_all(&notice.bytes()).expect("open");
        assert!(closed(&mut stream), "offset {offset}");
        let error = scene.fails().await;
        assert!(error.to_string().contains("outside its region"), "{error}");
        assert!(scene.untouched());
        assert_eq!(scene.incoming.close().await, BLOCKS_LENT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_announcement_without_the_key_closes_the_connection_and_one_of_another_content_aborts() {
    let mut scene = scene().await;
    let mut stream = scene.welcome();
    let mut forged = scene.notice(0, 0, 3);
    forged.key = vec![0; 16];
    stream.write_all(&forged.bytes()).expect("open");
    assert!(closed(&mut stream));
    assert!(scene.untouched());
    // Outside of the transfer, then other bytes than were announced; the connection serves on.
    let mut stream = scene.welcome();
    let mut wrong = scene.notice(1, 0, 3);
    wrong.entries[1].1 ^= 1;
    stream.write_all(&wrong.bytes()).expect("open");
    stream.read_exact(&mut [0]).expect("open");
    assert_eq!(scene.fails().await, TransferError::Damaged { layer: 1, block: 1 });
    stream.write_all(&scene.notice(2, 0, 3).bytes()).expect("open"); // of a transfer that is over
    stream.read_exact(&mut [0]).expect("open");
    assert_eq!(scene.decode.pool.read(2, BLOCKS_LENT[0]), vec![0; SLICE]);
    assert_eq!(scene.incoming.close().await, BLOCKS_LENT);
}
