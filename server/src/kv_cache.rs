//! The `KvCache` service: what is cached here, and what changes of it, to whoever asks. A thin adapter over
//! [`crate::engine::cache_events`].

use std::{collections::VecDeque, pin::Pin, sync::Arc};

use baton_process::tls;
use baton_proto::{BlockHash, CoordinatorId, Incarnation, Sieve, v1};
use futures::{Stream, StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use v1::kv_events::Events;

use crate::{
    engine::cache_events::{CacheEvent, CacheEvents, Reader},
    inference::streams::STREAMS_MOST,
};

/// Readers at a time; more are refused. Whoever may dispatch may know what is cached.
const READERS_MOST: usize = STREAMS_MOST;
/// Hashes in one part of a snapshot: 16 bytes each on the wire, well below the 4 MiB that gRPC clients take.
const PART: usize = 32 << 10;

/// What of a snapshot is the same each time.
#[derive(Debug, Clone)]
pub struct CacheFacts {
    pub incarnation: Incarnation,
    pub layout_fingerprint: String,
    pub block_tokens: u32,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct KvCacheService {
    facts: Arc<CacheFacts>,
    events: Arc<CacheEvents>,
    readers: Arc<Semaphore>,
    /// Ends every stream.
    shutdown: CancellationToken,
}

impl KvCacheService {
    pub fn new(facts: CacheFacts, events: Arc<CacheEvents>, shutdown: CancellationToken) -> Self {
        let readers = Arc::new(Semaphore::new(READERS_MOST));
        Self { facts: Arc::new(facts), events, readers, shutdown }
    }
}

/// Everything a stream needs from one message to the next.
struct Messages {
    facts: Arc<CacheFacts>,
    /// What the reader wants.
    sieve: Sieve,
    reader: Reader,
    /// Of a snapshot, parts not sent yet.
    parts: VecDeque<v1::KvEvents>,
    shutdown: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Messages {
    async fn next(&mut self) -> Option<v1::KvEvents> {
        while self.parts.is_empty() {
            let event = self.shutdown.run_until_cancelled(self.reader.next()).await?;
            self.parts = match event {
                CacheEvent::Change(change) => {
                    let wanted = |hashes: &[BlockHash]| BlockHash::to_wire(self.sieve.of(hashes));
                    let (stored, evicted) = (wanted(&change.stored), wanted(&change.evicted));
                    let events = Some(Events::Change(v1::KvChange { stored, evicted }));
                    VecDeque::from([v1::KvEvents { sequence: change.sequence, events }])
                }
                CacheEvent::Snapshot { sequence, stored } if self.sieve.keeps_all() => {
                    parts(&self.facts, sequence, &stored)
                }
                CacheEvent::Snapshot { sequence, stored } => {
                    let wanted: Vec<_> = self.sieve.of(&stored).copied().collect();
                    parts(&self.facts, sequence, &wanted)
                }
            };
        }
        self.parts.pop_front()
    }
}

/// A snapshot in messages of bounded size; one at least.
fn parts(facts: &CacheFacts, sequence: u64, stored: &[BlockHash]) -> VecDeque<v1::KvEvents> {
    let count = stored.len().div_ceil(PART).max(1);
    let part = |index: usize| {
        let stored = &stored[index * PART..stored.len().min((index + 1) * PART)];
        let snapshot = v1::KvSnapshot {
            incarnation: facts.incarnation.0,
            layout_fingerprint: facts.layout_fingerprint.clone(),
            block_tokens: facts.block_tokens,
            stored: BlockHash::to_wire(stored),
            part: index as u32,
            last: index + 1 == count,
        };
        v1::KvEvents { sequence, events: Some(Events::Snapshot(snapshot)) }
    };
    (0..count).map(part).collect()
}

#[tonic::async_trait]
impl v1::kv_cache_server::KvCache for KvCacheService {
    type EventsStream = Pin<Box<dyn Stream<Item = Result<v1::KvEvents, Status>> + Send>>;

    async fn events(
        &self,
        request: Request<v1::KvEventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let peer = tls::Peer::of(&request);
        let asked = request.into_inner();
        let v1::KvEventsRequest { coordinator_id, every_tokens, incarnation, after_sequence } = asked;
        let coordinator = CoordinatorId::new(coordinator_id)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        peer.speaks_as(coordinator.as_str())?;
        let place = self.readers.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("{READERS_MOST} coordinators read the events already"))
        })?;
        let has_some = incarnation == self.facts.incarnation.0 && after_sequence > 0;
        let resumed = has_some.then(|| self.events.resume(after_sequence)).flatten();
        tracing::debug!(%coordinator, resumed = resumed.is_some(), "coordinator reads the events of the KV cache");
        // That it need not wait for a snapshot is told at once, however long the next change is in coming.
        let goes_on = v1::KvEvents { sequence: after_sequence, events: None };
        let messages = Messages {
            facts: self.facts.clone(),
            sieve: Sieve::new(every_tokens, self.facts.block_tokens),
            parts: resumed.is_some().then_some(goes_on).into_iter().collect(),
            reader: resumed.unwrap_or_else(|| self.events.subscribe()),
            shutdown: self.shutdown.clone(),
            _place: place,
        };
        let messages = stream::unfold(messages, |mut messages| async {
            let message = messages.next().await?;
            Some((Ok(message), messages))
        });
        Ok(Response::new(messages.boxed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_comes_in_parts_that_a_client_takes() {
        let facts =
            CacheFacts { incarnation: Incarnation(1), layout_fingerprint: "f".repeat(64), block_tokens: 16 };
        for (stored, expected) in [(0, 1), (1, 1), (PART, 1), (PART + 1, 2), (3 * PART, 3)] {
            let hashes = vec![BlockHash::root("x", ""); stored];
            let parts = parts(&facts, 5, &hashes);
            assert_eq!(parts.len(), expected, "{stored}");
            let mut sum = 0;
            for (index, part) in parts.iter().enumerate() {
                let Some(Events::Snapshot(snapshot)) = &part.events else { panic!("no snapshot") };
                assert_eq!((snapshot.part as usize, snapshot.last), (index, index + 1 == expected));
                assert!(prost::Message::encoded_len(part) < 1 << 20);
                sum += snapshot.stored.len() / BlockHash::BYTES;
            }
            assert_eq!(sum, stored);
        }
    }
}
