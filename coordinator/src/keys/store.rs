//! API keys in etcd: listed, then watched.
//!
//! While the store cannot be reached the last keys stay in effect: losing it stops no traffic. A record that cannot be
//! read lets nobody in, and the log names it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use baton_proto::{API_KEYS_MOST, ApiKey, ApiKeyName};
use baton_registry::{
    Event, KeyRange, Store, StoreError, WatchError, foreign,
    keys::{self as layout, Key},
    records,
};

use super::Keys;

/// Before the store is asked again; the pause doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why the store is not followed at the moment.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Watch(#[from] WatchError),
    #[error("{0}")]
    Foreign(String),
}

/// Keeps up with the store, for as long as this is polled.
pub(super) async fn follow(store: Arc<dyn Store>, keys: Arc<Keys>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut current = false;
        let Err(lost) = follow_once(&*store, &keys, &mut current).await;
        if current {
            pause = FIRST_PAUSE;
            keys.not_renewed();
            tracing::warn!(%lost, "the API keys that are in effect stay until the state store answers again");
        } else {
            tracing::debug!(%lost, ?pause, "asking the state store for API keys again");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Lists, then watches until that breaks. `current` once the keys are those in the store.
async fn follow_once(
    store: &dyn Store,
    keys: &Keys,
    current: &mut bool,
) -> Result<std::convert::Infallible, Lost> {
    understood(store).await?;
    let range = KeyRange::prefix(layout::API_KEYS);
    let listing = store.range(range.clone()).await?;
    let mut watch = store.watch(range, Some(listing.revision.next())).await?;
    let mut known = BTreeMap::new();
    listing.items.iter().for_each(|item| put(&mut known, &item.key, &item.value));
    loop {
        keys.replace(in_effect(&known));
        *current = true;
        // Batches may say no more than how far the watch has come.
        let mut events = watch.next().await?.events;
        while events.is_empty() {
            events = watch.next().await?.events;
        }
        understood(store).await?;
        for event in events {
            match event {
                Event::Put(item) => put(&mut known, &item.key, &item.value),
                Event::Delete { key, .. } => {
                    if let Key::ApiKey(name) = Key::parse(&key) {
                        known.remove(&name);
                    }
                }
            }
        }
    }
}

/// Records in a format that this build does not know change nothing.
async fn understood(store: &dyn Store) -> Result<(), Lost> {
    foreign(store).await?.map_or(Ok(()), |why| Err(Lost::Foreign(why)))
}

fn put(known: &mut BTreeMap<ApiKeyName, ApiKey>, key: &str, value: &[u8]) {
    let Key::ApiKey(name) = Key::parse(key) else { return };
    match records::decode_api_key(value) {
        Ok(found) if found.name == name => drop(known.insert(name, found)),
        Ok(found) => {
            known.remove(&name);
            tracing::error!(key, name = %found.name, "an API key in the state store has another's name: it is not in effect");
        }
        Err(error) => {
            known.remove(&name);
            tracing::error!(key, %error, "an API key in the state store cannot be read: it is not in effect");
        }
    }
}

fn in_effect(known: &BTreeMap<ApiKeyName, ApiKey>) -> Vec<ApiKey> {
    if known.len() > API_KEYS_MOST {
        tracing::error!(
            keys = known.len(),
            most = API_KEYS_MOST,
            "not all API keys in the state store are in effect"
        );
    }
    known.values().take(API_KEYS_MOST).cloned().collect()
}
