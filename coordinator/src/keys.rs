//! Who may send requests, by their API keys, and how much each key may ask for.
//!
//! [`crate::http`] asks for a [`Caller`] before anything else of a request is looked at; without a source of keys everybody
//! is let in. What one request takes of its key's limits is a [`Call`], which travels with the request's report; whose the
//! request is, a [`Tenant`], goes with it to [`crate::serve`].
//!
//! Keys come from a file ([`file`]) or from etcd ([`store`]); either way the set in effect, a ring, is replaced as a whole
//! while requests run, and what a key has used goes over to the new ring by the key's name. Who is let in already goes on.
//!
//! A key is looked up by its SHA-256, in a hash map. How long that takes depends on the hash alone, which nobody can steer
//! to a known one's beginning, so that time says nothing of the keys that there are. Keys are random, 256 bits: one fast
//! hash is enough. The key itself is in no log, metric or error: its header is taken off the request here.

mod call;
mod caller;
mod expiry;
pub mod file;
pub mod rate;
mod store;
mod tenant;

use std::{
    collections::{BTreeSet, HashMap},
    num::NonZeroU32,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use axum::http::{HeaderMap, header};
use baton_process::Essential;
use baton_proto::{API_KEYS_MOST, ApiError, ApiKey, ApiKeyName, ErrorCode, KeyHash};
use baton_registry::Store;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::ApiKeysConfig,
    metrics::{KeyRefusalLabels, Metrics, TenantMetrics},
};
use file::{KeyFile, KeyFileError};
use rate::{Bucket, Promised, Rate};

pub use call::Call;
pub use caller::Caller;
pub use tenant::Tenant;

/// Where keys come from.
#[derive(Debug, Default)]
pub enum Source {
    /// Nobody needs one.
    #[default]
    Open,
    File(KeyFile),
    Store(Arc<dyn Store>),
}

impl Source {
    /// As it is configured. Errors name the file's line and field.
    pub fn open(config: &ApiKeysConfig, store: &Arc<dyn Store>) -> Result<Self, KeyFileError> {
        Ok(match (config.file.as_str(), config.store) {
            ("", false) => Self::Open,
            ("", true) => Self::Store(store.clone()),
            (file, _) => Self::File(KeyFile::open(Path::new(file))?),
        })
    }
}

/// Why a request is refused for its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Missing,
    Unknown,
    Expired,
    Requests,
    Tokens,
    Concurrent,
}

impl Refusal {
    const fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Concurrent => "concurrent",
        }
    }
}

/// Those that a known key may be refused for.
const OF_TENANTS: [&str; 4] =
    [Refusal::Expired.name(), Refusal::Requests.name(), Refusal::Tokens.name(), Refusal::Concurrent.name()];

/// Where refusals are counted.
#[derive(Debug, Clone)]
struct Refusals(Arc<Metrics>);

impl Refusals {
    fn count(&self, tenant: &Arc<str>, why: Refusal) {
        let labels = KeyRefusalLabels { tenant: tenant.clone(), reason: why.name() };
        self.0.keys.refusals.get_or_create(&labels).inc();
    }
}

/// What a key has used. Outlives changes of the key.
#[derive(Debug, Default)]
struct Meter {
    requests: Mutex<Bucket>,
    tokens: Mutex<Promised>,
    /// Requests that have not ended.
    running: AtomicU32,
}

/// How many coordinators share what keys may, this one among them, and never 0: each grants its part, and one at least. Cheap to
/// clone.
#[derive(Debug, Clone)]
struct Sharers(Arc<AtomicU32>);

impl Sharers {
    fn new(coordinators: NonZeroU32) -> Self {
        Self(Arc::new(coordinators.get().into()))
    }

    fn part(&self, whole: NonZeroU32) -> NonZeroU32 {
        let sharers = self.0.load(Ordering::Relaxed);
        NonZeroU32::new(whole.get() / sharers).unwrap_or(NonZeroU32::MIN)
    }
}

/// A key in effect.
#[derive(Debug)]
struct Holder {
    key: ApiKey,
    name: Arc<str>,
    tenant: Tenant,
    sharers: Sharers,
    meter: Arc<Meter>,
    counts: TenantMetrics,
    refusals: Refusals,
}

/// This coordinator's part of what the key may, as it is now.
impl Holder {
    fn requests(&self) -> Option<Rate> {
        self.key.limits.requests_per_minute.map(|whole| Rate(self.sharers.part(whole)))
    }

    fn tokens(&self) -> Option<Rate> {
        self.key.limits.tokens_per_minute.map(|whole| Rate(self.sharers.part(whole)))
    }

    fn concurrent(&self) -> Option<NonZeroU32> {
        self.key.limits.concurrent.map(|whole| self.sharers.part(whole))
    }
}

/// All keys in effect.
type Ring = HashMap<KeyHash, Arc<Holder>>;

/// See the module.
#[derive(Debug)]
pub struct Keys {
    /// Whether keys are asked for.
    closed: bool,
    /// None until the keys have been read.
    ring: watch::Sender<Option<Ring>>,
    /// Tenants that are counted.
    counted: Mutex<BTreeSet<Arc<str>>>,
    sharers: Sharers,
    metrics: Arc<Metrics>,
}

impl Keys {
    /// Lets in whom the source says, and follows it until requests have drained.
    pub fn start(
        source: Source,
        config: &ApiKeysConfig,
        metrics: Arc<Metrics>,
        drained: CancellationToken,
        essential: &Essential,
    ) -> Arc<Self> {
        metrics.keys.sharers.set(config.coordinators.get().into());
        let keys = Arc::new(Self {
            closed: !matches!(source, Source::Open),
            ring: watch::Sender::new(None),
            counted: Mutex::default(),
            sharers: Sharers::new(config.coordinators),
            metrics,
        });
        let follower = keys.clone();
        match source {
            Source::Open => {}
            Source::File(mut file) => {
                keys.replace(std::mem::take(&mut file.keys));
                let following = async move { file.follow(follower).await };
                essential.keep("keys", async move { _ = drained.run_until_cancelled(following).await });
            }
            Source::Store(store) => {
                let following = store::follow(store, follower);
                essential.keep("keys", async move { _ = drained.run_until_cancelled(following).await });
            }
        }
        keys
    }

    /// Whether it can be said who may come in.
    pub fn are_known(&self) -> bool {
        !self.closed || self.ring.borrow().is_some()
    }

    /// Waits until that can be said, where keys are asked for.
    pub async fn known(&self) {
        // The sender is held here: it does not close.
        let _ = self.ring.subscribe().wait_for(Option::is_some).await;
    }

    /// Who sends a request with these headers, from which the key is taken off. Errors: 401 without a key that is good, 503
    /// while nobody knows the keys.
    pub fn caller(&self, headers: &mut HeaderMap) -> Result<Caller, ApiError> {
        if !self.closed {
            return Ok(Caller::default());
        }
        let shown = headers.remove(header::AUTHORIZATION);
        let ring = self.ring.borrow();
        let Some(ring) = &*ring else {
            let message = "the API keys have not been read from the state store yet; try again in a moment";
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        };
        let key = shown.as_ref().and_then(|value| bearer(value.as_bytes()));
        let Some(key) = key else {
            let message = "an API key is needed, in the header `Authorization: Bearer KEY`";
            return Err(self.refuse(&Arc::default(), Refusal::Missing, message.to_owned()));
        };
        match ring.get(&KeyHash::of(key)) {
            Some(holder) if holder.key.has_expired(unix_seconds()) => {
                let message = format!("API key {} has expired", holder.name);
                Err(self.refuse(&holder.tenant.name, Refusal::Expired, message))
            }
            Some(holder) => Ok(Caller(Some(holder.clone()))),
            None => {
                let message = "this API key is not known: it is misspelt, or was revoked";
                Err(self.refuse(&Arc::default(), Refusal::Unknown, message.to_owned()))
            }
        }
    }

    fn refuse(&self, tenant: &Arc<str>, why: Refusal, message: String) -> ApiError {
        Refusals(self.metrics.clone()).count(tenant, why);
        ApiError::new(ErrorCode::InvalidApiKey, message)
    }

    /// These are in effect from now on, and no others.
    fn replace(&self, keys: Vec<ApiKey>) {
        let before: HashMap<ApiKeyName, Arc<Meter>> = self
            .ring
            .borrow()
            .iter()
            .flat_map(|ring| ring.values())
            .map(|holder| (holder.key.name.clone(), holder.meter.clone()))
            .collect();
        let holder = |key: ApiKey| {
            let tenant = Tenant::of(&key);
            let holder = Holder {
                name: key.name.as_str().into(),
                sharers: self.sharers.clone(),
                meter: before.get(&key.name).cloned().unwrap_or_default(),
                counts: self.metrics.keys.of_tenant(tenant.name.clone()),
                refusals: Refusals(self.metrics.clone()),
                tenant,
                key,
            };
            (holder.key.hash, Arc::new(holder))
        };
        let new: Ring = keys.into_iter().map(holder).collect();
        self.metrics.keys.known.set(i64::try_from(new.len()).unwrap_or(i64::MAX));
        self.count_tenants(&new);
        // Whoever follows the source is the only one who writes: nothing has changed in between.
        self.ring.send_replace(Some(new));
    }

    /// So many coordinators let clients in. 0 = it is not known: as before.
    pub fn share_among(&self, coordinators: u32) {
        if coordinators == 0 {
            return;
        }
        let before = self.sharers.0.swap(coordinators, Ordering::Relaxed);
        self.metrics.keys.sharers.set(coordinators.into());
        if self.closed && before != coordinators {
            tracing::info!(coordinators, before, "what API keys may is shared among so many coordinators");
        }
    }

    /// Keys were to be read anew and could not be.
    fn not_renewed(&self) {
        self.metrics.keys.not_renewed.inc();
    }

    /// Tenants who have no key any more are counted for as long as there is room.
    fn count_tenants(&self, ring: &Ring) {
        let mut counted = self.counted.lock();
        counted.extend(ring.values().map(|holder| holder.tenant.name.clone()));
        if counted.len() > API_KEYS_MOST {
            let present: BTreeSet<_> = ring.values().map(|holder| holder.tenant.name.clone()).collect();
            counted.difference(&present).for_each(|gone| self.metrics.keys.forget(gone, &OF_TENANTS));
            *counted = present;
        }
    }
}

/// The key that a header shows. Schemes have no case.
fn bearer(value: &[u8]) -> Option<&str> {
    let (scheme, key) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
