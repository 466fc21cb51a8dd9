//! How links do, each from one prefill to one decode instance, by the handoffs that coordinators tell of.
//!
//! A link is *degraded* once more than `health.error_share` of its handoffs have failed for [`DEGRADED_AFTER`], and has
//! *recovered* once less than half of that does, or too few fail to say: old failures fade. A bad link says nothing against
//! either of its ends. An instance is to blame for the handoffs it loses if it loses them with most of its peers, and most
//! of those do well with others; who is known to have only one peer is judged without this, by [`super::compare`].
//!
//! Bounded: at most [`LINKS_KEPT`], of instances that are here. Pure.

use std::{collections::BTreeMap, fmt, time::Duration};

use baton_proto::{InstanceId, LinkUse};
use tokio::time::Instant;

use super::signals::Share;

/// How long a link has to do badly.
const DEGRADED_AFTER: Duration = Duration::from_secs(10);
/// One that was not used for this long is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);
/// More are not kept: the one used longest ago makes room.
const LINKS_KEPT: usize = 16_384;
/// Handoffs, faded ones in part, before a link tells anything of its ends.
const FEWEST_HANDOFFS: f64 = 1.0;

/// Prefill and decode.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ends {
    pub prefill: InstanceId,
    pub decode: InstanceId,
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.prefill, self.decode)
    }
}

/// A link that has become degraded, or has recovered.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkChange {
    pub ends: Ends,
    pub degraded: bool,
    /// Of its handoffs, 0 to 1; none = too few to say.
    pub failing: Option<f64>,
}

#[derive(Debug, Clone)]
struct Link {
    share: Share,
    /// Of the last handoff.
    used: Instant,
    bad_since: Option<Instant>,
    degraded: bool,
}

/// Whether the handoffs that an instance loses are its own fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Blame {
    /// It loses them with few of its peers, or they lose as much with others.
    Peers,
    /// The share of its handoffs that it loses, 0 to 1.
    Own(f64),
}

/// The links of one instance that tell something.
#[derive(Debug, Default)]
struct Known<'a> {
    peers: Vec<&'a InstanceId>,
    bad: Vec<&'a InstanceId>,
    share: f64,
}

impl Known<'_> {
    fn is_bad_with_most(&self) -> bool {
        self.peers.len() >= 2 && self.bad.len() * 2 > self.peers.len()
    }
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct LinkBook(BTreeMap<Ends, Link>);

impl LinkBook {
    /// What a coordinator has seen of a link since it last told: handoffs that went well, and failures.
    pub(super) fn observe(&mut self, now: Instant, link: &LinkUse) {
        let ends = Ends { prefill: link.prefill.clone(), decode: link.decode.clone() };
        if self.0.len() >= LINKS_KEPT
            && !self.0.contains_key(&ends)
            && let Some((oldest, _)) = self.0.iter().min_by_key(|(_, link)| link.used)
        {
            let oldest = oldest.clone();
            self.0.remove(&oldest);
        }
        let new = Link { share: Share::default(), used: now, bad_since: None, degraded: false };
        let known = self.0.entry(ends).or_insert(new);
        known.share.fade_since(known.used, now);
        known.share.add(link.failures, link.handoffs);
        known.used = now;
    }

    /// Judges every link; what has changed. Only those among `is_here` are kept.
    pub(super) fn look(
        &mut self,
        now: Instant,
        error_share: f64,
        is_here: impl Fn(&InstanceId) -> bool,
    ) -> Vec<LinkChange> {
        self.0.retain(|ends, link| {
            let unused = now.saturating_duration_since(link.used) >= FORGOTTEN_AFTER;
            (!unused || link.degraded) && is_here(&ends.prefill) && is_here(&ends.decode)
        });
        let mut changes = Vec::new();
        for (ends, link) in &mut self.0 {
            let failing = link.share.known(link.used, now);
            let bad = failing.is_some_and(|share| share > error_share);
            link.bad_since = link.bad_since.or(Some(now)).filter(|_| bad);
            let long = |since: Instant| now.saturating_duration_since(since) >= DEGRADED_AFTER;
            let degraded = if link.degraded {
                failing.is_some_and(|share| share > error_share / 2.0)
            } else {
                link.bad_since.is_some_and(long)
            };
            if degraded != link.degraded {
                link.degraded = degraded;
                changes.push(LinkChange { ends: ends.clone(), degraded, failing });
            }
        }
        changes
    }

    /// Those that are degraded, and the share of their handoffs that fail.
    pub(super) fn degraded(&self, now: Instant) -> impl Iterator<Item = (&Ends, f64)> {
        let degraded = self.0.iter().filter(|(_, link)| link.degraded);
        degraded.map(move |(ends, link)| (ends, link.share.compared(link.used, now)))
    }

    /// Of whoever has two peers or more that something is known of.
    pub(super) fn blame(&self, now: Instant, error_share: f64) -> BTreeMap<InstanceId, Blame> {
        let mut all: BTreeMap<&InstanceId, Known<'_>> = BTreeMap::new();
        for (ends, link) in &self.0 {
            if link.share.weight(link.used, now) < FEWEST_HANDOFFS {
                continue;
            }
            let share = link.share.compared(link.used, now);
            for (id, peer) in [(&ends.prefill, &ends.decode), (&ends.decode, &ends.prefill)] {
                let known = all.entry(id).or_default();
                known.peers.push(peer);
                known.share += share;
                known.bad.extend((share > error_share).then_some(peer));
            }
        }
        let blame = |known: &Known<'_>| {
            let guilty = |peer: &&&InstanceId| all.get(**peer).is_some_and(Known::is_bad_with_most);
            let by_peers = known.bad.iter().filter(guilty).count() * 2 > known.bad.len();
            match known.is_bad_with_most() && !by_peers {
                true => Blame::Own(known.share / known.peers.len() as f64),
                false => Blame::Peers,
            }
        };
        let several = all.iter().filter(|(_, known)| known.peers.len() >= 2);
        several.map(|(id, known)| ((*id).clone(), blame(known))).collect()
    }
}
