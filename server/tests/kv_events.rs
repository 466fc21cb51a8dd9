//! The events of the KV cache over a real stream: whoever reads them knows what is cached, however slowly they read.

mod support;

use std::collections::HashSet;

use baton_proto::{BlockHash, v1};
use baton_server::{handoff::kv_layout, inference::streams::STREAMS_MOST, role::Role};
use support::{Attached, Instance, PATIENCE, Request, Shape, model, whole};
use tonic::{Code, Streaming, transport::Endpoint};
use v1::{kv_cache_client::KvCacheClient, kv_events::Events};

/// A coordinator that reads events, and what it knows from them.
struct Listener {
    stream: Streaming<v1::KvEvents>,
    incarnation: u64,
    sequence: u64,
    stored: HashSet<BlockHash>,
    snapshots: u32,
    /// Keeps what the other side may send ahead small.
    _client: KvCacheClient<tonic::transport::Channel>,
}

async fn client(instance: &Instance) -> KvCacheClient<tonic::transport::Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", instance.endpoint)).expect("an address");
    let channel = endpoint.initial_stream_window_size(1024).connect().await.expect("it listens");
    KvCacheClient::new(channel)
}

fn hashes(wire: &[u8]) -> Vec<BlockHash> {
    BlockHash::from_wire(wire).expect("whole hashes").collect()
}

impl Listener {
    async fn to(instance: &Instance) -> Self {
        Self::that_wants(instance, 0).await
    }

    /// One block for so many tokens.
    async fn that_wants(instance: &Instance, every_tokens: u32) -> Self {
        let mut client = client(instance).await;
        let request = v1::KvEventsRequest { coordinator_id: "c".into(), every_tokens, ..Default::default() };
        let stream = client.events(request).await.expect("a stream").into_inner();
        let (stored, _client) = (HashSet::new(), client);
        let mut this = Self { stream, incarnation: 0, sequence: 0, stored, snapshots: 0, _client };
        this.next().await;
        this
    }

    /// On another stream, which goes on from what is known of this process.
    async fn again(self, instance: &Instance, incarnation: u64) -> Self {
        let mut client = client(instance).await;
        let request = v1::KvEventsRequest {
            coordinator_id: "c".into(),
            every_tokens: 0,
            incarnation,
            after_sequence: self.sequence,
        };
        let stream = client.events(request).await.expect("a stream").into_inner();
        Self { stream, _client: client, ..self }
    }

    async fn next(&mut self) {
        let message = tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("an event in time");
        let message = message.expect("a healthy stream").expect("an open stream");
        match message.events {
            None => assert_eq!(message.sequence, self.sequence, "it goes on"),
            Some(Events::Snapshot(snapshot)) => {
                assert_eq!((snapshot.part, snapshot.last), (0, true));
                assert_eq!(
                    (snapshot.layout_fingerprint, snapshot.block_tokens),
                    (fingerprint(), model::BLOCK_TOKENS)
                );
                self.incarnation = snapshot.incarnation;
                self.stored = hashes(&snapshot.stored).into_iter().collect();
                self.snapshots += 1;
            }
            Some(Events::Change(change)) => {
                assert_eq!(message.sequence, self.sequence + 1, "something is missing");
                assert!(hashes(&change.stored).into_iter().all(|hash| self.stored.insert(hash)));
                assert!(hashes(&change.evicted).iter().all(|hash| self.stored.remove(hash)));
            }
        }
        self.sequence = message.sequence;
    }

    async fn until(&mut self, sequence: u64) {
        while self.sequence < sequence {
            self.next().await;
        }
    }
}

fn fingerprint() -> String {
    kv_layout(&model::layout(1), "r1").fingerprint()
}

/// The hashes of the full blocks of `tokens`.
fn chain(tokens: &[u32]) -> Vec<BlockHash> {
    let mut parent = BlockHash::root(&fingerprint(), "");
    let link = |block: &[u32]| {
        parent = parent.child(block);
        parent
    };
    tokens.chunks_exact(model::BLOCK_TOKENS as usize).map(link).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_know_what_is_cached_from_their_first_message_on() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut early = Listener::to(&mixed).await;
    assert!(early.stored.is_empty());
    let mut coordinator = Attached::to(&mixed).await;
    let request = Request::greedy(30, 11);
    coordinator.dispatch(1, &request, whole()).await;
    coordinator.until_end(1).await;
    mixed.until_idle().await;
    let late = Listener::to(&mixed).await;
    early.until(late.sequence).await;
    // 40 of the 41 tokens have been computed.
    let expected = chain(&[&request.prompt[..], &request.expected()[..10]].concat());
    assert_eq!(expected.len(), 10);
    assert_eq!(early.stored, expected.into_iter().collect());
    assert_eq!((early.stored, early.snapshots), (late.stored, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_are_told_of_as_many_blocks_as_they_want_and_of_every_change() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut early = Listener::that_wants(&mixed, 4 * model::BLOCK_TOKENS).await;
    let mut coordinator = Attached::to(&mixed).await;
    for leg in 1..=3 {
        let request = Request::greedy(30 + leg as u32, 11);
        coordinator.dispatch(leg, &request, whole()).await;
        coordinator.until_end(leg).await;
    }
    mixed.until_idle().await;
    let all = Listener::to(&mixed).await;
    let late = Listener::that_wants(&mixed, 4 * model::BLOCK_TOKENS).await;
    // It panics where a change is missing.
    early.until(all.sequence).await;
    let wanted: HashSet<_> = all.stored.iter().filter(|hash| hash.key() % 4 == 0).copied().collect();
    assert!(!wanted.is_empty() && wanted.len() < all.stored.len());
    assert_eq!((early.stored, late.stored), (wanted.clone(), wanted));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_back_is_told_what_was_missed() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let mut coordinator = Attached::to(&mixed).await;
    let mut reader = Listener::to(&mixed).await;
    let incarnation = reader.incarnation;
    for leg in 1..=4 {
        let request = Request::greedy(30 + leg as u32, 11);
        coordinator.dispatch(leg, &request, whole()).await;
        coordinator.until_end(leg).await;
        mixed.until_idle().await;
        let fresh = Listener::to(&mixed).await;
        assert!(fresh.sequence > reader.sequence);
        // The first time there is nothing that it has.
        reader = reader.again(&mixed, incarnation).await;
        reader.until(fresh.sequence).await;
        assert_eq!((reader.stored.len(), reader.snapshots), (fresh.stored.len(), 2));
        assert_eq!(reader.stored, fresh.stored);
    }
    // It is told at once that nothing was missed, and what it has of another process is no help.
    reader = reader.again(&mixed, incarnation).await;
    reader.next().await;
    assert_eq!(reader.snapshots, 2);
    let mut reader = reader.again(&mixed, incarnation + 1).await;
    reader.next().await;
    assert_eq!(reader.snapshots, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_gets_a_new_snapshot_and_the_engine_does_not_wait_for_it() {
    let shape = Shape { blocks: 24, ..Shape::default() };
    let mut mixed = Instance::start("m", Role::Mixed, shape).await;
    let mut slow = Listener::to(&mixed).await;
    let mut coordinator = Attached::to(&mixed).await;
    for leg in 1..=1300 {
        // No two begin alike, so each stores seven blocks and soon evicts as many.
        let prompt =
            (0..29).map(|i| ((leg as u32).wrapping_mul(2_654_435_761) >> (i % 4 * 6)) % 64).collect();
        coordinator.dispatch(leg, &Request { prompt, ..Request::greedy(1, 1) }, whole()).await;
        coordinator.until_end(leg).await;
    }
    mixed.until_idle().await;
    let fresh = Listener::to(&mixed).await;
    assert!(fresh.sequence > 1200, "only {} changes", fresh.sequence);
    slow.until(fresh.sequence).await;
    assert!(slow.snapshots > 1, "it was never too slow");
    assert_eq!(slow.stored, fresh.stored);
    assert_eq!(mixed.metric("baton_server_kv_blocks_cached"), slow.stored.len() as f64);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_say_who_they_are_and_are_bounded() {
    let mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let nameless = v1::KvEventsRequest::default();
    let status = client(&mixed).await.events(nameless).await.expect_err("it has no name");
    assert_eq!(status.code(), Code::InvalidArgument);
    let mut readers = Vec::new();
    for _ in 0..STREAMS_MOST {
        readers.push(Listener::to(&mixed).await);
    }
    let request = v1::KvEventsRequest { coordinator_id: "c".into(), ..Default::default() };
    let status = client(&mixed).await.events(request).await.expect_err("there are too many");
    assert_eq!(status.code(), Code::ResourceExhausted);
}
