//! What has happened to the fleet, for people and for alarms: the latest entries, numbered, to be read and followed.
//!
//! The [`crate::reconcile`] core says what is new ([`News`]), the leading task enters it with the time, and
//! [`crate::admin`] reads. What operators asked for is entered with who asked, and logged under the target `audit`, which
//! is the record that outlives this process.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use baton_proto::{GroupName, InstanceId, LeaderEpoch};
use tokio::sync::watch;
use tracing::info;

use crate::clock::unix_millis;

/// Entries that are kept. One more, and of the kind that has the most the oldest is dropped: no flood of one kind, as of
/// instances that come by ever new names, takes with it what is rare.
pub const CAPACITY: usize = 4096;
/// Sequence numbers of a term begin at its epoch times this, so that they grow over terms.
const PER_TERM: u64 = 1 << 20;

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NewsKind {
    LeaderChanged,
    InstanceJoined,
    InstanceRefused,
    InstanceLeft,
    InstanceLost,
    InstanceStuck,
    InstanceQuarantined,
    InstanceReleased,
    LinkDegraded,
    LinkRecovered,
    RoleDecided,
    RoleTaken,
    /// A group that cannot serve requests any more.
    GroupDegraded,
    GroupServing,
    /// A group whose prompts wait too long.
    CongestionRaised,
    CongestionCleared,
    /// A group's Deployment is to have more replicas, or fewer.
    ScaledOut,
    ScaledIn,
    ScalingFailed,
    ScalingRecovered,
    Cordoned,
    Uncordoned,
    Pinned,
    TargetsSet,
    Rebalanced,
    ApiKeyAdded,
    ApiKeyRevoked,
}

impl NewsKind {
    /// As in "instance_lost", for programs too.
    pub fn name(self) -> &'static str {
        match self {
            Self::LeaderChanged => "leader_changed",
            Self::InstanceJoined => "instance_joined",
            Self::InstanceRefused => "instance_refused",
            Self::InstanceLeft => "instance_left",
            Self::InstanceLost => "instance_lost",
            Self::InstanceStuck => "instance_stuck",
            Self::InstanceQuarantined => "instance_quarantined",
            Self::InstanceReleased => "instance_released",
            Self::LinkDegraded => "link_degraded",
            Self::LinkRecovered => "link_recovered",
            Self::RoleDecided => "role_decided",
            Self::RoleTaken => "role_taken",
            Self::GroupDegraded => "group_degraded",
            Self::GroupServing => "group_serving",
            Self::CongestionRaised => "congestion_raised",
            Self::CongestionCleared => "congestion_cleared",
            Self::ScaledOut => "scaled_out",
            Self::ScaledIn => "scaled_in",
            Self::ScalingFailed => "scaling_failed",
            Self::ScalingRecovered => "scaling_recovered",
            Self::Cordoned => "cordoned",
            Self::Uncordoned => "uncordoned",
            Self::Pinned => "pinned",
            Self::TargetsSet => "targets_set",
            Self::Rebalanced => "rebalanced",
            Self::ApiKeyAdded => "api_key_added",
            Self::ApiKeyRevoked => "api_key_revoked",
        }
    }
}

/// Something new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    pub kind: NewsKind,
    pub group: Option<GroupName>,
    pub instance: Option<InstanceId>,
    /// For people.
    pub message: String,
    /// Who asked for it; none = the controller itself.
    pub actor: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub sequence: u64,
    pub unix_millis: u64,
    pub news: News,
}

/// The latest entries. Clones share them.
#[derive(Debug, Clone)]
pub struct Journal {
    entries: Arc<Mutex<VecDeque<Entry>>>,
    /// The highest sequence number given.
    last: watch::Sender<u64>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { entries: Arc::default(), last: watch::Sender::new(0) }
    }
}

impl Journal {
    /// A term begins: numbers go on above every earlier one's.
    pub fn begin(&self, epoch: LeaderEpoch, news: News) {
        let first = epoch.0.saturating_mul(PER_TERM);
        self.last.send_modify(|last| *last = first.max(*last));
        self.enter(news);
    }

    /// Something has happened just now.
    pub fn enter(&self, news: News) {
        let unix_millis = unix_millis();
        if let Some(actor) = &news.actor {
            let instance = news.instance.as_ref().map(InstanceId::as_str).unwrap_or_default();
            let group = news.group.as_ref().map(GroupName::as_str).unwrap_or_default();
            info!(target: "audit", actor, change = news.kind.name(), group, instance, message = news.message);
        }
        let mut entries = self.entries();
        let sequence = self.last.borrow().saturating_add(1);
        if entries.len() >= CAPACITY {
            make_room(&mut entries);
        }
        entries.push_back(Entry { sequence, unix_millis, news });
        // While the entries are locked, so that numbers are entered in their order.
        self.last.send_replace(sequence);
    }

    /// At most `limit` entries with numbers above `after`, oldest first.
    pub fn after(&self, after: u64, limit: usize) -> Vec<Entry> {
        let entries = self.entries();
        let from = entries.partition_point(|entry| entry.sequence <= after);
        entries.range(from..).take(limit).cloned().collect()
    }

    /// The highest number given, as it grows.
    pub fn last(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // Entries are whole whatever panicked.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_room(entries: &mut VecDeque<Entry>) {
    let mut counts: BTreeMap<NewsKind, usize> = BTreeMap::new();
    entries.iter().for_each(|entry| *counts.entry(entry.news.kind).or_default() += 1);
    let most = counts.into_iter().max_by_key(|(_, count)| *count).map(|(kind, _)| kind);
    if let Some(oldest) = entries.iter().position(|entry| Some(entry.news.kind) == most) {
        entries.remove(oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(message: &str) -> News {
        let (kind, message) = (NewsKind::InstanceLost, message.to_owned());
        News { kind, group: None, instance: None, message, actor: None }
    }

    #[test]
    fn entries_are_numbered_over_terms_and_the_oldest_go() {
        let journal = Journal::default();
        journal.begin(LeaderEpoch(3), news("first"));
        let first = journal.after(0, 10)[0].sequence;
        assert_eq!(first, 3 * PER_TERM + 1);
        for count in 0..CAPACITY {
            journal.enter(news(&count.to_string()));
        }
        let all = journal.after(0, usize::MAX);
        assert_eq!((all.len(), all[0].sequence), (CAPACITY, first + 1), "the first is gone");
        assert_eq!(journal.after(all[9].sequence, 5), all[10..15]);
        assert_eq!(journal.after(*journal.last().borrow(), 5), []);
        journal.begin(LeaderEpoch(4), news("another term"));
        assert_eq!(journal.after(*journal.last().borrow() - 1, 5)[0].sequence, 4 * PER_TERM + 1);
    }

    #[test]
    fn a_flood_of_one_kind_takes_nothing_of_another_with_it() {
        let journal = Journal::default();
        let of = |kind| News { kind, ..news("") };
        journal.begin(LeaderEpoch(1), of(NewsKind::LeaderChanged));
        (0..100).for_each(|_| journal.enter(of(NewsKind::Cordoned)));
        for _ in 0..2 * CAPACITY {
            journal.enter(of(NewsKind::InstanceJoined));
            journal.enter(of(NewsKind::InstanceLost));
        }
        let all = journal.after(0, usize::MAX);
        let count = |kind| all.iter().filter(|entry| entry.news.kind == kind).count();
        assert_eq!((count(NewsKind::LeaderChanged), count(NewsKind::Cordoned)), (1, 100));
        assert_eq!(all.len(), CAPACITY);
        assert!(all.is_sorted_by_key(|entry| entry.sequence));
    }
}
