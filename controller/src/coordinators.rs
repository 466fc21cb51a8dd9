//! The coordinators that report to this controller while it leads: who they are, how they are, which links they use.
//!
//! Filled by [`crate::session`], which tells each how many they are, and read by [`crate::admin`] for people. Nothing of it is
//! stored: it stands beside the leading task, behind a lock of its own, and belongs to one term. Whoever names a later term
//! finds it empty, and so does whoever asks for a term that is over. What it says of links since the last beat goes on to the
//! leading task, which judges them ([`crate::fleet::health`]).
//!
//! A coordinator is listed from its hello for as long as its beats come, and for a lease after the last one. Of the
//! processes of one id the one that was started last is listed; streams of the others are refused. Pure but for the lock:
//! time is an argument.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use baton_proto::{
    ApiError, CoordinatorBeat, CoordinatorId, CoordinatorSpec, ErrorCode, InstanceId, LINKS_MOST,
    LeaderEpoch, LinkUse,
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::fleet::SessionId;

/// Coordinators at a time; more are refused.
pub const COORDINATORS_MOST: usize = 1024;

/// How a coordinator presents itself.
#[derive(Debug, Clone)]
pub struct Hello {
    pub session: SessionId,
    pub spec: CoordinatorSpec,
    pub beat: CoordinatorBeat,
    /// When it came, for people.
    pub unix_millis: u64,
}

/// A coordinator that is listed.
#[derive(Debug, Clone)]
pub struct Registered {
    pub spec: CoordinatorSpec,
    /// Without its links.
    pub beat: CoordinatorBeat,
    /// That it has used of late, the last one first; shared, as they may be many.
    pub links: Arc<Vec<LinkUse>>,
    /// When it said hello to this controller.
    pub registered_unix_millis: u64,
    pub last_beat: Instant,
    /// Listed until then unless it beats again.
    until: Instant,
    /// Whose beats are taken.
    session: SessionId,
}

/// Handle to the one registry of a controller; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Coordinators {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    epoch: LeaderEpoch,
    /// When the term's first coordinator said hello.
    since: Option<Instant>,
    registry: Registry,
}

impl Coordinators {
    /// Takes a coordinator in, or says why not.
    pub fn hello(
        &self,
        epoch: LeaderEpoch,
        hello: Hello,
        lease: Duration,
        now: Instant,
    ) -> Result<(), ApiError> {
        let held = &mut *self.held.lock();
        if held.epoch > epoch {
            return Err(ApiError::new(ErrorCode::Unavailable, "this controller leads no more: ask another"));
        }
        if held.epoch < epoch {
            *held = Held { epoch, since: Some(now), registry: Registry::default() };
        }
        held.registry.hello(hello, lease, now)
    }

    /// Takes a beat, unless the stream that brings it is not its coordinator's any more. What is more of each link than when
    /// it was last told of; nothing of one that is told of for the first time.
    pub fn beat(
        &self,
        epoch: LeaderEpoch,
        session: SessionId,
        id: &CoordinatorId,
        beat: CoordinatorBeat,
        lease: Duration,
        now: Instant,
    ) -> Result<Vec<LinkUse>, ApiError> {
        let taken = self.of(epoch, |registry| registry.beat(session, id, beat, lease, now));
        taken.unwrap_or_else(|| Err(not_here(id)))
    }

    /// A coordinator has ended its stream in order: it is gone.
    pub fn left(&self, epoch: LeaderEpoch, session: SessionId, id: &CoordinatorId) {
        self.of(epoch, |registry| registry.left(session, id));
    }

    /// The term is over, and so is what was heard in it.
    pub fn over(&self, epoch: LeaderEpoch) {
        let held = &mut *self.held.lock();
        if held.epoch == epoch {
            // Nor is anything known of who may still say hello in it.
            (held.since, held.registry) = (None, Registry::default());
        }
    }

    /// By id.
    pub fn list(&self, epoch: LeaderEpoch, now: Instant) -> Vec<Registered> {
        self.of(epoch, |registry| registry.list(now)).unwrap_or_default()
    }

    /// How many do not drain. 0 until whoever was there when the term began has had a lease to say hello, as who is told
    /// too few takes too much for itself.
    pub fn serving(&self, epoch: LeaderEpoch, lease: Duration, now: Instant) -> u32 {
        let held = &mut *self.held.lock();
        let heard_all = held.since.is_some_and(|since| now >= since + lease);
        if held.epoch != epoch || !heard_all {
            return 0;
        }
        held.registry.sweep(now);
        let serving = held.registry.entries.values().filter(|entry| !entry.beat.draining);
        u32::try_from(serving.count()).unwrap_or(u32::MAX)
    }

    fn of<T>(&self, epoch: LeaderEpoch, what: impl FnOnce(&mut Registry) -> T) -> Option<T> {
        let held = &mut *self.held.lock();
        (held.epoch == epoch).then(|| what(&mut held.registry))
    }
}

/// Of one term.
#[derive(Debug, Default)]
struct Registry {
    entries: BTreeMap<CoordinatorId, Registered>,
}

impl Registry {
    fn hello(&mut self, hello: Hello, lease: Duration, now: Instant) -> Result<(), ApiError> {
        self.sweep(now);
        let Hello { session, spec, beat, unix_millis } = hello;
        match self.entries.get(&spec.id) {
            Some(held) if held.spec.incarnation > spec.incarnation => {
                return Err(replaced(&held.spec));
            }
            None if self.entries.len() >= COORDINATORS_MOST => {
                let message = format!("{COORDINATORS_MOST} coordinators are registered, which is the limit");
                return Err(ApiError::new(ErrorCode::QueueFull, message));
            }
            Some(_) | None => {}
        }
        let (links, beat) = apart(beat);
        let registered = Registered {
            beat,
            links: Arc::new(links),
            registered_unix_millis: unix_millis,
            last_beat: now,
            until: now + lease,
            session,
            spec,
        };
        self.entries.insert(registered.spec.id.clone(), registered);
        Ok(())
    }

    fn beat(
        &mut self,
        session: SessionId,
        id: &CoordinatorId,
        beat: CoordinatorBeat,
        lease: Duration,
        now: Instant,
    ) -> Result<Vec<LinkUse>, ApiError> {
        self.sweep(now);
        let entry = self.entries.get_mut(id).ok_or_else(|| not_here(id))?;
        if entry.session != session {
            return Err(replaced(&entry.spec));
        }
        let all = beat.all_links;
        let (told, beat) = apart(beat);
        (entry.beat, entry.last_beat, entry.until) = (beat, now, now + lease);
        if told.is_empty() && !all {
            return Ok(Vec::new());
        }
        let (links, more) = merge(&entry.links, told, all);
        entry.links = Arc::new(links);
        Ok(more)
    }

    fn left(&mut self, session: SessionId, id: &CoordinatorId) {
        if self.entries.get(id).is_some_and(|entry| entry.session == session) {
            self.entries.remove(id);
        }
    }

    fn list(&mut self, now: Instant) -> Vec<Registered> {
        self.sweep(now);
        self.entries.values().cloned().collect()
    }

    /// Whose lease has ended is gone.
    fn sweep(&mut self, now: Instant) {
        self.entries.retain(|_, entry| now < entry.until);
    }
}

/// A beat's links, and the rest of it.
fn apart(beat: CoordinatorBeat) -> (Vec<LinkUse>, CoordinatorBeat) {
    let links = beat.links;
    (links, CoordinatorBeat { links: Vec::new(), ..beat })
}

/// The links after a beat, those it told of first, and what is more of each that was known.
fn merge(known: &[LinkUse], told: Vec<LinkUse>, all: bool) -> (Vec<LinkUse>, Vec<LinkUse>) {
    let now: HashMap<_, _> = told.iter().map(|link| ((&link.prefill, &link.decode), link)).collect();
    let (mut more, mut others) = (Vec::new(), Vec::new());
    for before in known {
        match now.get(&(&before.prefill, &before.decode)) {
            Some(link) => {
                let handoffs = link.handoffs.saturating_sub(before.handoffs);
                let failures = link.failures.saturating_sub(before.failures);
                if handoffs > 0 || failures > 0 {
                    more.push(LinkUse { handoffs, failures, ..(*link).clone() });
                }
            }
            None if all => {}
            None => others.push(before.clone()),
        }
    }
    let mut links = told;
    links.append(&mut others);
    // What was used longest ago is forgotten, as the coordinator itself does.
    links.truncate(LINKS_MOST);
    (links, more)
}

fn replaced(by: &CoordinatorSpec) -> ApiError {
    let message = format!(
        "coordinator {} is listed as incarnation {}, at {}: give each coordinator an id of its own",
        by.id, by.incarnation, by.http_endpoint
    );
    ApiError::new(ErrorCode::AlreadyExists, message)
}

/// After a silence that outlasted its lease, or in a term that is over.
fn not_here(id: &CoordinatorId) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("coordinator {id} is not registered: say hello again"))
}

/// What all coordinators together say of each link, those used most first, and how many more than `most` there are.
/// Counts add up; means count for as much as the handoffs they were measured over.
pub fn links(of: &[Registered], most: usize) -> (Vec<LinkUse>, usize) {
    #[derive(Default)]
    struct Sum {
        handoffs: u64,
        failures: u64,
        measured: u128,
        micros: u128,
    }
    let mut sums: HashMap<(&InstanceId, &InstanceId), Sum> = HashMap::new();
    for link in of.iter().flat_map(|registered| registered.links.iter()) {
        let sum = sums.entry((&link.prefill, &link.decode)).or_default();
        sum.handoffs = sum.handoffs.saturating_add(link.handoffs);
        sum.failures = sum.failures.saturating_add(link.failures);
        if link.mean_micros > 0 {
            let weight = u128::from(link.handoffs.max(1));
            sum.measured += weight;
            sum.micros = sum.micros.saturating_add(weight * u128::from(link.mean_micros));
        }
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_unstable_by(|(a, more), (b, than)| than.handoffs.cmp(&more.handoffs).then_with(|| a.cmp(b)));
    let left_out = sums.len().saturating_sub(most);
    sums.truncate(most);
    let link = |((prefill, decode), sum): ((&InstanceId, &InstanceId), Sum)| LinkUse {
        prefill: prefill.clone(),
        decode: decode.clone(),
        handoffs: sum.handoffs,
        failures: sum.failures,
        mean_micros: u64::try_from(sum.micros / sum.measured.max(1)).unwrap_or(u64::MAX),
    };
    (sums.into_iter().map(link).collect(), left_out)
}

#[cfg(test)]
mod tests;
