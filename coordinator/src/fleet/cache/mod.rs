//! Reads what one instance has cached, for as long as the stream to it stands.
//!
//! Started by the instance's attachment ([`super::attachment`]) once it is welcome there, over the attachment's own connection, and
//! stopped with it: the next connection may be to another process. If it is not, what is [`Remembered`] of its cache is read on
//! from. [`follow`] says what messages mean; what they bring goes to [`baton_schedule::caches`]. Reading is never in the way
//! of tokens: it has a task of its own, and an instance that sends snapshots without end is read once in
//! [`SNAPSHOT_PAUSE`].
//!
//! When a stream ends or something is missing on it, another is opened, after a growing pause, and brings what was missed,
//! or a snapshot if the instance does not keep that any more. Until then what was known still counts, for [`STALE`] at most
//! from when the connection stands. An instance that says what cannot be is forgotten at once and asked again after
//! [`NONSENSE_PAUSE`]; one that does not have the service is not asked again.

mod follow;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;

use std::{sync::Arc, time::Duration};

use baton_process::one_line;
use baton_proto::{CoordinatorId, Incarnation, InstanceId, v1};
use baton_schedule::caches::{Feed, Subject, TooManyDialects};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status, Streaming, transport::Channel};
use v1::kv_cache_client::KvCacheClient;

use crate::{
    config::FleetConfig,
    metrics::{Metrics, kind, reason},
};
use follow::{Fault, Follower, News, Position};

/// Between the messages of a snapshot.
const PATIENCE: Duration = Duration::from_secs(10);
/// From one snapshot to the next.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(1);
/// How long what was known counts without news.
const STALE: Duration = Duration::from_secs(10);
const NONSENSE_PAUSE: Duration = Duration::from_secs(60);

/// Why a stream was not read on.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("no stream: {}", one_line(.0.as_ref()))]
    Failed(Box<Status>),
    #[error("it says nothing")]
    Silent,
    #[error("the instance ended the stream")]
    Ended,
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    Dialects(#[from] TooManyDialects),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Failed(Box::new(status))
    }
}

impl End {
    /// For the label of a metric.
    fn reason(&self) -> &'static str {
        match self {
            Self::Failed(_) | Self::Silent | Self::Ended => "stream",
            Self::Fault(fault) => fault.reason(),
            Self::Dialects(_) => "dialects",
        }
    }

    /// Another stream would bring no better.
    fn is_nonsense(&self) -> bool {
        matches!(self.reason(), "nonsense" | "dialects")
    }
}

/// What one process has said of its cache, from one stream to the next.
#[derive(Clone)]
pub struct Memory {
    /// Its instance and model, as the board has them.
    subject: Subject,
    incarnation: Incarnation,
    /// Whoever reads holds it, and gives it up when stopped.
    known: Arc<Mutex<Remembered>>,
}

struct Remembered {
    feed: Feed,
    /// Of what the feed was told as a whole; none: nothing.
    position: Option<Position>,
    /// Since when there has been no news that can be counted on; none: there is.
    lost: Option<Instant>,
}

impl Memory {
    pub fn new(incarnation: Incarnation, feed: Feed) -> Self {
        let subject = feed.subject().clone();
        let known = Remembered { feed, position: None, lost: None };
        Self { subject, incarnation, known: Arc::new(Mutex::new(known)) }
    }

    /// Whether it is of this process, with this model.
    pub fn is_of(&self, subject: &Subject, incarnation: Incarnation) -> bool {
        self.subject == *subject && self.incarnation == incarnation
    }
}

impl Remembered {
    fn forget(&mut self) {
        self.feed.forget();
        self.position = None;
    }
}

/// See the module.
pub struct CacheReader {
    pub instance: InstanceId,
    /// Of the process that the connection is to.
    pub memory: Memory,
    pub coordinator: CoordinatorId,
    pub channel: Channel,
    pub config: FleetConfig,
    pub metrics: Arc<Metrics>,
}

impl CacheReader {
    /// Reads until the handle is dropped.
    pub fn start(self) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(self.run()))
    }

    /// Ends by itself if the instance turns out to have no such service.
    async fn run(self) {
        let memory = self.memory.known.clone();
        let known = &mut *memory.lock().await;
        let mut pause = self.config.reconnect_min;
        known.lost.get_or_insert_with(Instant::now);
        loop {
            let (began, mut read) = (Instant::now(), false);
            let end = self.follow(known, &mut read).await;
            tracing::debug!(instance = %self.instance, %end, "reads no events of the KV cache");
            if matches!(&end, End::Failed(status) if status.code() == Code::Unimplemented) {
                known.forget();
                return;
            }
            if read {
                pause = self.config.reconnect_min;
            }
            if read || end.is_nonsense() {
                self.metrics.cache_gaps.get_or_create(&reason(end.reason())).inc();
            }
            let since = *known.lost.get_or_insert_with(Instant::now);
            if end.is_nonsense() || since.elapsed() > STALE {
                known.forget();
            }
            let wait =
                if end.is_nonsense() { NONSENSE_PAUSE } else { pause.mul_f64(rand::random_range(0.5..1.0)) };
            let next_snapshot = if read { began + SNAPSHOT_PAUSE } else { began };
            sleep_until(next_snapshot.max(Instant::now() + wait)).await;
            pause = (pause * 2).min(self.config.reconnect_max);
        }
    }

    /// Opens a stream and reads it; `read` = until all was known, at least.
    async fn follow(&self, known: &mut Remembered, read: &mut bool) -> End {
        match self.open(known).await {
            Ok(stream) => match self.read(known, stream, read).await {
                Ok(()) => End::Ended,
                Err(end) => end,
            },
            Err(end) => end,
        }
    }

    async fn open(&self, known: &Remembered) -> Result<Streaming<v1::KvEvents>, End> {
        let mut client = KvCacheClient::new(self.channel.clone());
        let request = v1::KvEventsRequest {
            coordinator_id: self.coordinator.to_string(),
            every_tokens: known.feed.every_tokens(),
            incarnation: self.memory.incarnation.0,
            after_sequence: known.position.map_or(0, |position| position.sequence),
        };
        let opened = timeout(self.config.connect_timeout, client.events(request)).await;
        Ok(opened.map_err(|_| End::Silent)??.into_inner())
    }

    async fn read(
        &self,
        known: &mut Remembered,
        mut stream: Streaming<v1::KvEvents>,
        read: &mut bool,
    ) -> Result<(), End> {
        let mut follower = Follower::new(self.memory.incarnation, known.position);
        let mut next_snapshot = Instant::now();
        loop {
            let message = if follower.follows() {
                stream.message().await
            } else {
                timeout(PATIENCE, stream.message()).await.map_err(|_| End::Silent)?
            };
            let Some(message) = message? else { return Ok(()) };
            match follower.take(message)? {
                News::Part { first, stored, whole } => {
                    if first {
                        // Unread, its further messages wait at the instance, which forgets what is overtaken.
                        sleep_until(next_snapshot).await;
                        known.feed.begin();
                    }
                    known.feed.store(&stored);
                    if let Some(dialect) = whole {
                        known.feed.publish(dialect)?;
                        if std::mem::replace(read, true) {
                            self.metrics.cache_gaps.get_or_create(&reason("lagged")).inc();
                        }
                        self.count(known, "snapshot");
                        next_snapshot = Instant::now() + SNAPSHOT_PAUSE;
                    }
                }
                News::Change { stored, evicted } => {
                    known.feed.change(&stored, &evicted);
                    self.count(known, "change");
                }
                News::Nothing => {}
                News::GoesOn => {
                    *read = true;
                    self.count(known, "resumed");
                }
            }
            // While a snapshot is not whole, what was known before it is.
            if let Some(position) = follower.position() {
                (known.position, known.lost) = (Some(position), None);
            }
        }
    }

    fn count(&self, known: &Remembered, of: &'static str) {
        self.metrics.cache_events.get_or_create(&kind(of)).inc();
        self.metrics.show_cached_blocks(known.feed.blocks_of_all());
    }
}
