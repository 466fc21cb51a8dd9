//! etcd's messages to a watch, as batches of the [`Store`](crate::Store) contract.

use etcd_client::{EventType, WatchResponse, WatchStream};
use futures::{Stream, StreamExt, future, stream};

use super::{key_value, revision_of, unsigned};
use crate::{Event, Revision, WatchBatch, WatchError};

/// The revision to watch from so that nothing is missed from `from` on: the one before. Whoever watches from the very revision up
/// to which an etcd from before August 2024 was compacted is not told so, nor what was deleted at that revision
/// (etcd-io/etcd#18089; until January 2025 after a crash in the midst of that, #19179). One before, it either is told or has
/// everything that it asked for.
pub(super) fn start(from: Revision) -> Revision {
    Revision(from.0.saturating_sub(1).max(1))
}

/// What the store was told since the watch began, from its first message on, but for what happened before `from`.
pub(super) fn batches(
    first: &WatchResponse,
    stream: WatchStream,
    from: Option<Revision>,
) -> impl Stream<Item = Result<WatchBatch, WatchError>> + use<> {
    let rest = stream::unfold(stream, next_batches).flat_map(stream::iter);
    let wanted =
        move |batch: &WatchBatch| from.is_none_or(|from| batch.events.is_empty() || batch.revision >= from);
    stream::iter(batches_of(first))
        .chain(rest)
        .filter(move |batch| future::ready(batch.as_ref().map_or(true, wanted)))
}

type Batches = Vec<Result<WatchBatch, WatchError>>;

async fn next_batches(mut stream: WatchStream) -> Option<(Batches, WatchStream)> {
    let batches = match stream.message().await {
        Ok(Some(message)) => batches_of(&message),
        Ok(None) => return None,
        Err(error) => vec![Err(WatchError::Broken(error.to_string()))],
    };
    Some((batches, stream))
}

/// A message of etcd holds whole transactions, several perhaps; here a batch is one.
fn batches_of(message: &WatchResponse) -> Batches {
    if message.canceled() {
        let error = match unsigned(message.compact_revision()) {
            0 => WatchError::Broken(message.cancel_reason().to_owned()),
            compacted => WatchError::Compacted(Revision(compacted)),
        };
        return vec![Err(error)];
    }
    if message.created() {
        return Vec::new();
    }
    if message.events().is_empty() {
        // Sent to a watch that has been told everything up to here.
        return vec![Ok(WatchBatch { revision: revision_of(message.header()), events: Vec::new() })];
    }
    let mut batches: Vec<WatchBatch> = Vec::new();
    for event in message.events().iter().filter_map(event_of) {
        match batches.last_mut() {
            Some(batch) if batch.revision == event.revision() => batch.events.push(event),
            _ => batches.push(WatchBatch { revision: event.revision(), events: vec![event] }),
        }
    }
    batches.into_iter().map(Ok).collect()
}

fn event_of(event: &etcd_client::Event) -> Option<Event> {
    let item = event.kv()?;
    Some(match event.event_type() {
        EventType::Put => Event::Put(key_value(item)),
        EventType::Delete => {
            let item = key_value(item);
            Event::Delete { key: item.key, revision: item.mod_revision }
        }
    })
}
