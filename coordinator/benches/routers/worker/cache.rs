//! What an instance says of its prefix cache: every prompt's full blocks, the oldest of which make room.
//!
//! Of them only those are kept that the coordinator wants to be told of: a worker has to be so quick that what is measured is the
//! router.

use std::{
    collections::{HashSet, VecDeque},
    pin::Pin,
    sync::Arc,
};

use baton_proto::{BlockHash, Sieve, v1};
use foldhash::fast::RandomState;
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};
use v1::kv_events::Events;

const LAYOUT: &str = "bench";
const BLOCK_TOKENS: u32 = 16;
/// Blocks that are kept, of those that are told of: of a million tokens, with one for 128 tokens.
const BLOCKS_MOST: usize = 1 << 13;
/// Changes that a reader may be behind.
const CHANGES_MOST: usize = 4096;

#[derive(Default)]
struct Kept {
    /// Which blocks are told of; none before somebody asks.
    sieve: Option<Sieve>,
    in_order: VecDeque<BlockHash>,
    /// By their keys, which are as good as they are for a bench.
    all: HashSet<u64, RandomState>,
    sequence: u64,
}

/// See the module.
pub(super) struct Cache {
    kept: Mutex<Kept>,
    changes: broadcast::Sender<Arc<Change>>,
}

struct Change {
    sequence: u64,
    stored: Vec<BlockHash>,
    evicted: Vec<BlockHash>,
}

impl Change {
    fn message(&self) -> v1::KvEvents {
        let stored = BlockHash::to_wire(&self.stored);
        let change = v1::KvChange { stored, evicted: BlockHash::to_wire(&self.evicted) };
        v1::KvEvents { sequence: self.sequence, events: Some(Events::Change(change)) }
    }
}

/// What the full blocks of a prompt are called.
pub(super) fn names(prompt: &[u32]) -> Vec<BlockHash> {
    let mut last = BlockHash::root(LAYOUT, "");
    let named = prompt.chunks_exact(BLOCK_TOKENS as usize).map(|tokens| {
        last = last.child(tokens);
        last
    });
    named.collect()
}

impl Default for Cache {
    fn default() -> Self {
        Self { kept: Mutex::default(), changes: broadcast::channel(CHANGES_MOST).0 }
    }
}

impl Cache {
    /// A prompt was computed, or taken up, whose blocks are called so.
    pub(super) fn store(&self, names: &[BlockHash]) {
        let kept = &mut *self.kept.lock();
        let Some(sieve) = kept.sieve else { return };
        let fresh: Vec<_> = sieve.of(names).copied().filter(|hash| kept.all.insert(hash.key())).collect();
        if fresh.is_empty() {
            return;
        }
        kept.in_order.extend(&fresh);
        let over = kept.in_order.len().saturating_sub(BLOCKS_MOST);
        let evicted: Vec<_> = kept.in_order.drain(..over).collect();
        for hash in &evicted {
            kept.all.remove(&hash.key());
        }
        kept.sequence += 1;
        // Nobody may be reading.
        let _ = self.changes.send(Arc::new(Change { sequence: kept.sequence, stored: fresh, evicted }));
    }
}

#[tonic::async_trait]
impl v1::kv_cache_server::KvCache for Cache {
    type EventsStream = Pin<Box<dyn Stream<Item = Result<v1::KvEvents, Status>> + Send>>;

    async fn events(
        &self,
        request: Request<v1::KvEventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let sieve = Sieve::new(request.into_inner().every_tokens, BLOCK_TOKENS);
        let mut kept = self.kept.lock();
        if kept.sieve.replace(sieve).is_some_and(|before| before != sieve) {
            return Err(Status::unimplemented("all who read are to want the same"));
        }
        let snapshot = v1::KvSnapshot {
            incarnation: 1,
            layout_fingerprint: LAYOUT.to_owned(),
            block_tokens: BLOCK_TOKENS,
            stored: BlockHash::to_wire(&kept.in_order),
            part: 0,
            last: true,
        };
        let first = v1::KvEvents { sequence: kept.sequence, events: Some(Events::Snapshot(snapshot)) };
        let changes = BroadcastStream::new(self.changes.subscribe());
        drop(kept);
        let changes = changes.map(move |change| match change {
            Ok(change) => Ok(change.message()),
            Err(_) => Err(Status::data_loss("the reader is too far behind: read again")),
        });
        Ok(Response::new(Box::pin(stream::iter([Ok(first)]).chain(changes))))
    }
}
