//! Every bound refuses what is over it, by name, and has room again afterwards.

use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::support::{scripted::*, *};
use baton_kvtransfer::{
    DataPortConfig, KvNode, Limits, NodeConfig, Plaintext, TransferError, TransportConfig,
};
use baton_proto::{Incarnation, TransferId, v1};
use tokio::{io::AsyncReadExt, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

fn limited(change: fn(&mut Limits)) -> Setup {
    let mut setup = Setup::default();
    change(&mut setup.limits);
    setup
}

#[tokio::test]
async fn transfers_are_bounded_each_way() {
    let decode = Peer::start_with("decode-0", limited(|limits| limits.incoming_transfers = 2));
    let prefill = Peer::start_with("prefill-0", limited(|limits| limits.outgoing_transfers = 2));
    let expect = |block| decode.node.expect(expect_spec(TransferId::generate(), &prefill.name, &[block]));
    let offer = |block| prefill.node.offer(offer_spec(TransferId::generate(), &decode, &[block]));
    let (incoming, outgoing) = ([expect(1), expect(2)], [offer(1), offer(2)]);
    let over = expect(3).expect_err("over the limit");
    assert_eq!(over, TransferError::Limit { what: "incoming transfers", limit: 2 });
    let over = offer(3).expect_err("over the limit");
    assert_eq!(over, TransferError::Limit { what: "outgoing transfers", limit: 2 });
    for (incoming, outgoing) in incoming.into_iter().zip(outgoing) {
        incoming.expect("room").close().await;
        outgoing.expect("room").close().await;
    }
    // The refused ones left no claim on their blocks.
    expect(3).expect("room again").close().await;
    offer(3).expect("room again").close().await;
}

#[tokio::test]
async fn peers_are_bounded_each_way() {
    let decode = Peer::start_with("decode-0", limited(|limits| limits.peers = 1));
    let first = ScriptedSender::open(&decode, "prefill-1", 1).await.expect("welcome");
    let refusal = ScriptedSender::open(&decode, "prefill-2", 1).await.err().expect("over the limit");
    assert!(refusal.message().contains("no more than 1 peers that send"), "{refusal}");
    ScriptedSender::open(&decode, "prefill-1", 1).await.expect("the same peer again is no second one");
    drop(first);
    let offer = |to: &Peer| decode.node.offer(offer_spec(TransferId::generate(), to, &[1]));
    let (one, two) = (Peer::start("one"), Peer::start("two"));
    let _outgoing = offer(&one).expect("room");
    assert!(matches!(offer(&two), Err(TransferError::Limit { what: "peers to send to", .. })));
}

#[tokio::test]
async fn over_the_limit_a_peer_that_is_idle_gives_way() {
    let quick = |limits: &mut Limits| (limits.peers, limits.seal_grace) = (1, Duration::from_millis(200));
    let lease = Duration::from_millis(100);
    let prefill = Peer::start_with("prefill-0", Setup { lease, ..limited(quick) });
    let targets = [Peer::start("decode-1"), Peer::start("decode-2")];
    for (round, decode) in targets.iter().cycle().take(4).enumerate() {
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &[2])).expect("room");
        let mut outgoing = prefill.node.offer(offer_spec(id, decode, &[2])).expect("the idle one gives way");
        let other = &targets[(round + 1) % 2];
        let refused = prefill.node.offer(offer_spec(TransferId::generate(), other, &[1]));
        assert!(matches!(refused, Err(TransferError::Limit { what: "peers to send to", limit: 1 })));
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
        outgoing.seal(1);
        within("sealed", 10, incoming.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        drop((incoming, outgoing));
        prefill.idle().await;
    }
    // And one that sends nothing any more, on the receiving side.
    let decode = Peer::start_with("decode-0", Setup { lease, ..limited(quick) });
    let first = ScriptedSender::open(&decode, "prefill-1", 1).await.expect("welcome");
    ScriptedSender::open(&decode, "prefill-2", 1).await.err().expect("the first has just come");
    tokio::time::sleep(Duration::from_millis(200)).await;
    ScriptedSender::open(&decode, "prefill-2", 1).await.expect("the first is quiet");
    drop(first);
}

/// A control stream that says hello and proves nothing.
struct Unproven {
    _to_peer: mpsc::Sender<v1::SenderMessage>,
    from_peer: Streaming<v1::ReceiverMessage>,
}

impl Unproven {
    async fn open(to: &Peer) -> Self {
        let hello = v1::SenderHello {
            oldest_protocol: 1,
            newest_protocol: 1,
            instance_id: "prefill-1".into(),
            incarnation: 1,
            layout: Some((&layout()).into()),
            nonce: vec![1; 16].into(),
        };
        let (to_peer, queue) = mpsc::channel(1);
        let body = Some(v1::sender_message::Body::Hello(hello));
        to_peer.send(v1::SenderMessage { transfer_id: Default::default(), body }).await.expect("open");
        let client = v1::handoff_client::HandoffClient::connect(format!("http://{}", to.address));
        let answers = client.await.expect("reachable").exchange(ReceiverStream::new(queue)).await;
        Self { _to_peer: to_peer, from_peer: answers.expect("its hello is answered").into_inner() }
    }

    /// Why the peer ends it.
    async fn cut(mut self) -> tonic::Status {
        self.from_peer.message().await.expect("a hello comes first");
        within("the end", 10, self.from_peer.message()).await.expect_err("it is cut")
    }
}

#[tokio::test]
async fn over_the_bound_the_oldest_control_stream_without_a_proof_gives_way() {
    let decode = Peer::start_with("decode-0", limited(|limits| limits.unproven_streams = 1));
    let unproven = Unproven::open(&decode).await;
    let first = ScriptedSender::open(&decode, "prefill-2", 1).await.expect("the oldest gives way");
    assert_eq!(unproven.cut().await.code(), tonic::Code::Aborted);
    // What has been proven takes no room of it.
    let second = ScriptedSender::open(&decode, "prefill-3", 1).await.expect("the first is proven");
    let unproven = Unproven::open(&decode).await;
    drop((first, second, unproven));
}

#[tokio::test]
async fn strangers_that_open_control_streams_and_prove_nothing_keep_no_peer_out() {
    let long = |limits: &mut Limits| {
        (limits.unproven_streams, limits.handshake) = (2, Duration::from_secs(20));
    };
    let decode = Peer::start_with("decode-0", limited(long));
    let prefill = Peer::start_with("prefill-0", limited(|limits| limits.connect_attempts = 1));
    let mut strangers = Vec::new();
    for _ in 0..8 {
        strangers.push(Unproven::open(&decode).await);
    }
    let id = TransferId::generate();
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &[2])).expect("room");
    for _ in 0..8 {
        strangers.push(Unproven::open(&decode).await);
    }
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &[2])).expect("room");
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
}

#[tokio::test]
async fn data_connections_are_bounded() {
    let decode = Peer::start_with("decode-0", Setup { connections: 2, ..Setup::default() });
    let sender = ScriptedSender::open(&decode, "prefill-9", 1).await.expect("welcome");
    let (first, _second) = (sender.connect_data().await, sender.connect_data().await);
    let mut third = connect_data(decode.data_address()).await;
    write(&mut third, &data_hello(&sender.pass, 0)).await;
    closed_by_peer(&mut third).await;
    drop(first);
    // Room again, as soon as the end of the first has been seen.
    let by = in_secs(10);
    loop {
        assert!(Instant::now() < by, "no connection was let in again");
        let mut data = connect_data(decode.data_address()).await;
        write(&mut data, &data_hello(&sender.pass, 0)).await;
        if data.read_exact(&mut [0; 32]).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn strangers_that_connect_and_say_nothing_keep_no_peer_out() {
    let long = Limits { handshake: Duration::from_secs(20), ..limits() };
    let setup = Setup { connections: 4, unproven: 3, limits: long, ..Setup::default() };
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start_with("decode-0", setup));
    let mut strangers = Vec::new();
    for _ in 0..12 {
        strangers.push(connect_data(decode.data_address()).await);
    }
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &[2])).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &[2])).expect("room");
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
    // The oldest gave way to newer ones.
    for stranger in &mut strangers[..9] {
        closed_by_peer(stranger).await;
    }
}

#[tokio::test]
async fn a_transfer_offered_before_the_idle_limit_outlives_it() {
    let idle = Duration::from_millis(200);
    let prefill =
        Peer::start_with("prefill-0", limited(|limits| limits.idle_link = Duration::from_millis(200)));
    let decode = Peer::start("decode-0");
    // The control stream stands and has nothing to do.
    let first = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(first, &prefill.name, &[1])).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(first, &decode, &[1])).expect("room");
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
    prefill.idle().await;
    // Nobody expects the next one for longer than that: no message comes back until then.
    let second = TransferId::generate();
    let mut outgoing = prefill.node.offer(offer_spec(second, &decode, &[2])).expect("room");
    let lasts = tokio::time::timeout(idle * 3, outgoing.finished()).await;
    assert!(lasts.is_err(), "it ended of itself: {lasts:?}");
    let mut incoming = decode.node.expect(expect_spec(second, &prefill.name, &[2])).expect("room");
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");
    // A stream closed for want of transfers is opened again for the next one.
    drop(outgoing);
    tokio::time::sleep(idle + idle / 2).await;
    let third = TransferId::generate();
    let _outgoing = prefill.node.offer(offer_spec(third, &decode, &[3])).expect("room");
    within("the offer", 10, decode.node.offered(third)).await;
}

#[tokio::test]
async fn specs_that_make_no_sense_are_refused() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let mut too_few = expect_spec(TransferId::generate(), &prefill.name, &[1, 2]);
    too_few.prompt_tokens += 1;
    let mut none = expect_spec(TransferId::generate(), &prefill.name, &[]);
    none.prompt_tokens = 0;
    let mut held = expect_spec(TransferId::generate(), &prefill.name, &[1, 2]);
    held.held = vec![2];
    for spec in [too_few, none, held] {
        assert!(matches!(decode.node.expect(spec), Err(TransferError::Invalid(_))));
    }
    let mut offer = offer_spec(TransferId::generate(), &decode, &[1]);
    offer.prompt_tokens += 16;
    assert!(matches!(prefill.node.offer(offer), Err(TransferError::Invalid(_))));
    // What the two sides mean differs: told apart when the offer meets the expectation.
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &[1, 2])).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &[1])).expect("room");
    for error in [incoming.sealed().await.map(|_| ()), outgoing.finished().await.map(|_| ())] {
        assert!(error.expect_err("they differ").to_string().contains("blocks differ: 2 expected, 1 offered"));
    }
}

#[tokio::test]
async fn a_node_that_is_stopping_takes_nothing() {
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    decode.stop.cancel();
    within("its end", 10, decode.node.stopped()).await;
    let expected = decode.node.expect(expect_spec(TransferId::generate(), &prefill.name, &[1]));
    assert_eq!(expected.map(|_| ()), Err(TransferError::ShuttingDown));
    let offered = decode.node.offer(offer_spec(TransferId::generate(), &prefill, &[1]));
    assert_eq!(offered.map(|_| ()), Err(TransferError::ShuttingDown));
}

#[tokio::test]
async fn limits_that_wait_less_than_a_lease_are_refused_by_name() {
    let lease = Duration::from_secs(4);
    let less = Duration::from_millis(3999);
    let (fine, pool) = (Limits::for_lease(lease), Pool::new(LAYERS, BLOCKS, SLICE));
    let starts = |limits| {
        let config = NodeConfig {
            instance_id: instance("decode-0"),
            incarnation: Incarnation(1),
            layout: layout(),
            region: pool.region(),
            blocks: BLOCKS,
            data_port: DataPortConfig::new(TcpListener::bind("127.0.0.1:0").expect("a port")),
            transports: vec![TransportConfig::Tcp { connections: 1 }],
            dial: Arc::new(Plaintext),
            secret: None,
            convert: false,
            lease,
            limits,
            reclaim: Arc::new(|_| {}),
        };
        let stop = CancellationToken::new();
        let started = KvNode::start(config, stop.clone()).map(|_| ());
        stop.cancel();
        started.map_err(|error| error.to_string())
    };
    assert_eq!(starts(fine.clone()), Ok(()));
    for (name, limits) in [
        ("keep_alive_timeout", Limits { keep_alive_timeout: less, ..fine.clone() }),
        ("data_stall", Limits { data_stall: less, ..fine.clone() }),
        ("seal_grace", Limits { seal_grace: less, ..fine.clone() }),
    ] {
        let error = starts(limits).expect_err(name);
        assert!(error.contains(&format!("{name} (3.999s)")) && error.contains("lease (4s)"), "{error}");
    }
}
