//! The KV events of a scripted instance: tests say what it has.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use baton_proto::{BlockHash, Sieve, v1};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use v1::kv_events::Events;

use super::until;

const LAYOUT: &str = "scripted";
pub(crate) const BLOCK_TOKENS: u32 = 4;

/// The names of a prompt's full blocks.
pub(crate) fn chain(prompt: &[u32]) -> Vec<BlockHash> {
    let mut last = BlockHash::root(LAYOUT, "");
    let block = |tokens: &[u32]| {
        last = last.child(tokens);
        last
    };
    prompt.chunks_exact(BLOCK_TOKENS as usize).map(block).collect()
}

type Sender = mpsc::Sender<Result<v1::KvEvents, Status>>;

/// What the coordinator reads of it; streams are counted as they are opened, and the last one is spoken on.
#[derive(Clone, Default)]
pub(crate) struct Cache {
    streams: Arc<Mutex<Vec<Sender>>>,
    /// One block for so many tokens.
    wanted: Arc<AtomicU32>,
    /// What the coordinator said that it has, as it opened them: of which incarnation, up to which change.
    known: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Cache {
    /// Waits until so many streams have been opened.
    pub(crate) async fn opened(&self, streams: usize) {
        until("the coordinator reads the cache", || self.streams.lock().len() >= streams).await;
    }

    /// Of these blocks those that the coordinator has asked to be told of.
    pub(crate) fn wanted(&self, chain: &[BlockHash]) -> Vec<BlockHash> {
        Sieve::new(self.wanted.load(Relaxed), BLOCK_TOKENS).of(chain).copied().collect()
    }

    /// What the coordinator said that it has, as it opened the last stream: of which incarnation, up to which change.
    pub(crate) fn known(&self) -> (u64, u64) {
        *self.known.lock().last().expect("somebody reads")
    }

    /// What the coordinator has is not told again.
    pub(crate) fn goes_on(&self, sequence: u64) {
        self.say(sequence, None);
    }

    fn say(&self, sequence: u64, events: impl Into<Option<Events>>) {
        let message = v1::KvEvents { sequence, events: events.into() };
        let streams = self.streams.lock();
        let stream = streams.last().expect("somebody reads");
        stream.try_send(Ok(message)).expect("room for a message");
    }

    /// A part of a snapshot, of this incarnation.
    pub(crate) fn part(
        &self,
        sequence: u64,
        incarnation: u64,
        (part, last): (u32, bool),
        stored: &[BlockHash],
    ) {
        let snapshot = v1::KvSnapshot {
            incarnation,
            layout_fingerprint: LAYOUT.to_owned(),
            block_tokens: BLOCK_TOKENS,
            stored: BlockHash::to_wire(stored),
            part,
            last,
        };
        self.say(sequence, Events::Snapshot(snapshot));
    }

    pub(crate) fn snapshot(&self, sequence: u64, stored: &[BlockHash]) {
        self.part(sequence, 1, (0, true), stored);
    }

    pub(crate) fn change(&self, sequence: u64, stored: &[BlockHash], evicted: &[BlockHash]) {
        let (stored, evicted) = (BlockHash::to_wire(stored), BlockHash::to_wire(evicted));
        self.say(sequence, Events::Change(v1::KvChange { stored, evicted }));
    }

    /// A block whose name is none.
    pub(crate) fn nonsense(&self, sequence: u64) {
        let stored = Bytes::from_static(b"short");
        self.say(sequence, Events::Change(v1::KvChange { stored, evicted: Bytes::new() }));
    }
}

#[tonic::async_trait]
impl v1::kv_cache_server::KvCache for Cache {
    type EventsStream = ReceiverStream<Result<v1::KvEvents, Status>>;

    async fn events(
        &self,
        request: Request<v1::KvEventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let request = request.into_inner();
        assert_eq!(request.coordinator_id, "coordinator-0");
        self.wanted.store(request.every_tokens, Relaxed);
        self.known.lock().push((request.incarnation, request.after_sequence));
        let (sender, receiver) = mpsc::channel(64);
        self.streams.lock().push(sender);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
