//! Control streams on which nothing comes any more, and that nobody ends: they are given up in time for the next offer.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use baton_kvtransfer::{Limits, TransferError};
use baton_proto::TransferId;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::support::*;

/// Passes connections on. Those that it is told to swallow stay open, and what comes on them goes nowhere.
#[derive(Default)]
struct Hole {
    opened: AtomicUsize,
    /// So many of the first connections are swallowed.
    swallowed: AtomicUsize,
    /// Given up by whoever opened them.
    ended: AtomicUsize,
}

impl Hole {
    async fn before(to: SocketAddr) -> (Arc<Self>, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let hole = Arc::new(Self::default());
        let passing = hole.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = passing.opened.fetch_add(1, SeqCst);
                let (read, write) = stream.into_split();
                let (answers, on) = TcpStream::connect(to).await.expect("listening").into_split();
                let back = passing.clone();
                tokio::spawn(async move { back.pass(number, answers, write).await });
                let there = passing.clone();
                tokio::spawn(async move {
                    there.pass(number, read, on).await;
                    there.ended.fetch_add(1, SeqCst);
                });
            }
        });
        (hole, address)
    }

    async fn pass(&self, number: usize, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            if number >= self.swallowed.load(SeqCst) && to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    }

    fn swallow(&self) {
        self.swallowed.store(self.opened.load(SeqCst), SeqCst);
    }
}

struct Pair {
    prefill: Peer,
    decode: Peer,
    hole: Arc<Hole>,
    address: SocketAddr,
}

impl Pair {
    async fn new(lease: Duration) -> Self {
        let setup = || Setup { lease, limits: Limits::for_lease(lease), ..Setup::default() };
        let (prefill, decode) =
            (Peer::start_with("prefill-0", setup()), Peer::start_with("decode-0", setup()));
        let (hole, address) = Hole::before(decode.address).await;
        Self { prefill, decode, hole, address }
    }

    /// A whole transfer, as its sender sees it end.
    async fn transfer(&self) -> Result<(), TransferError> {
        let id = TransferId::generate();
        let _incoming = self.decode.node.expect(expect_spec(id, &self.prefill.name, &[1])).expect("room");
        let mut spec = offer_spec(id, &self.decode, &[2]);
        spec.peer = self.address.to_string();
        let mut outgoing = self.prefill.node.offer(spec).expect("room");
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
        outgoing.seal(1);
        let finished = within("its end", 10, outgoing.finished()).await;
        assert_eq!(outgoing.close().await, [2]);
        finished.map(|_| ())
    }
}

#[tokio::test]
async fn after_a_silent_lease_the_next_offer_takes_a_new_control_stream() {
    let pair = Pair::new(Duration::from_millis(500)).await;
    pair.transfer().await.expect("nothing is wrong yet");
    pair.hole.swallow();
    let error = pair.transfer().await.expect_err("nobody answers");
    assert!(matches!(error, TransferError::LeaseExpired { .. }), "{error}");
    pair.decode.idle().await; // the block that was expected into is free again
    pair.transfer().await.expect("over a new stream");
    assert_eq!(pair.hole.opened.load(SeqCst), 2);
}

#[tokio::test]
async fn an_idle_control_stream_that_leads_nowhere_is_found_before_the_next_offer() {
    let pair = Pair::new(Duration::from_secs(1)).await;
    pair.transfer().await.expect("nothing is wrong yet");
    pair.hole.swallow();
    until("the stream is given up", || pair.hole.ended.load(SeqCst) == 1).await;
    pair.transfer().await.expect("over a new stream");
    assert_eq!(pair.hole.opened.load(SeqCst), 2);
}
