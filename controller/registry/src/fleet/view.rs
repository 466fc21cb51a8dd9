//! The fold of the store's keys into a fleet snapshot. Pure: listings, batches and the time in, snapshots out.
//!
//! Keys of instances end with leases that the leader keeps, so that they may vanish because an instance is gone or
//! because the leader is; an embedded store vanishes with its controller. The two are told apart so: what was written
//! under the present leader is removed when its key is; anything else is kept, unconfirmed, until a leader has led for
//! the `reconfirm` time, and for as long as there is none.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use baton_proto::{InstanceId, LeaderEpoch};
use tokio::time::Instant;
use tracing::warn;

use super::{FleetInstance, FleetSnapshot, Leader};
use crate::{
    DesiredRole, Event, InstanceSpec, KeyValue, LeaderRecord, Listing, ObservedStatus, RecordError, Revision,
    WatchBatch, keys::Key,
};

/// One key's value, and whether the store still has it.
struct Slot<T> {
    value: Option<T>,
    present: bool,
    written: Revision,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { value: None, present: false, written: Revision::default() }
    }
}

impl<T> Slot<T> {
    fn put(&mut self, value: T, written: Revision) {
        *self = Self { value: Some(value), present: true, written };
    }

    fn is_lingering(&self) -> bool {
        self.value.is_some() && !self.present
    }

    fn drop_lingering(&mut self) {
        if !self.present {
            self.value = None;
        }
    }
}

#[derive(Default)]
struct Entry {
    spec: Slot<InstanceSpec>,
    role: Slot<DesiredRole>,
    status: Slot<ObservedStatus>,
}

struct CurrentLeader {
    leader: Leader,
    since: Instant,
}

pub(super) struct View {
    reconfirm: Duration,
    /// How far the store has been followed; none = to be listed.
    revision: Option<Revision>,
    last_revision: Revision,
    leader: Option<CurrentLeader>,
    entries: BTreeMap<InstanceId, Entry>,
}

impl View {
    pub(super) fn new(reconfirm: Duration) -> Self {
        Self {
            reconfirm,
            revision: None,
            last_revision: Revision::default(),
            leader: None,
            entries: BTreeMap::new(),
        }
    }

    pub(super) fn revision(&self) -> Option<Revision> {
        self.revision
    }

    /// The store cannot say what happened since: it has to be listed again.
    pub(super) fn forget_revision(&mut self) {
        self.revision = None;
    }

    /// Takes everything the store has. What it no longer has is removed or kept like a deleted key.
    pub(super) fn relist(&mut self, listing: Listing, now: Instant) {
        let first = self.last_revision == Revision::default();
        let mut missing: Vec<String> = Vec::new();
        for (id, entry) in &self.entries {
            let slots = [
                (entry.spec.present, crate::keys::instance(id)),
                (entry.role.present, crate::keys::role(id)),
                (entry.status.present, crate::keys::status(id)),
            ];
            missing.extend(slots.into_iter().filter(|(present, _)| *present).map(|(_, key)| key));
        }
        missing.retain(|key| !listing.items.iter().any(|item| item.key == *key));
        // The leader first: it decides how the rest is read.
        match listing.items.iter().find(|item| Key::parse(&item.key) == Key::Leader) {
            Some(item) => self.put(item.clone(), now),
            None => self.leader = None,
        }
        if let (true, Some(leader)) = (first, self.leader.as_mut()) {
            // Nothing is kept from before, so there is nothing to wait for.
            leader.since = now.checked_sub(self.reconfirm).unwrap_or(now);
        }
        for key in missing {
            self.delete(&key, now);
        }
        for item in listing.items {
            self.put(item, now);
        }
        self.advance(listing.revision);
    }

    pub(super) fn apply(&mut self, batch: WatchBatch, now: Instant) {
        for event in batch.events {
            match event {
                Event::Put(item) => self.put(item, now),
                Event::Delete { key, .. } => self.delete(&key, now),
            }
        }
        self.advance(batch.revision);
    }

    fn advance(&mut self, revision: Revision) {
        self.revision = Some(revision);
        self.last_revision = revision;
    }

    fn put(&mut self, item: KeyValue, now: Instant) {
        let written = item.mod_revision;
        let taken = match Key::parse(&item.key) {
            Key::Leader => self.put_leader(&item, now),
            Key::Instance(id) => InstanceSpec::decode(&item.value).and_then(|spec| {
                if spec.id != id {
                    return Err(RecordError::Missing("the instance id of the key"));
                }
                self.entries.entry(id).or_default().spec.put(spec, written);
                Ok(())
            }),
            Key::Role(id) => DesiredRole::decode(&item.value)
                .map(|role| self.entries.entry(id).or_default().role.put(role, written)),
            Key::Status(id) => ObservedStatus::decode(&item.value)
                .map(|status| self.entries.entry(id).or_default().status.put(status, written)),
            Key::Other => Ok(()),
        };
        if let Err(error) = taken {
            warn!(key = item.key, %error, "a record in the state store is not readable: the last good one stays");
        }
    }

    fn put_leader(&mut self, item: &KeyValue, now: Instant) -> Result<(), RecordError> {
        let record = LeaderRecord::decode(&item.value)?;
        let epoch = LeaderEpoch(item.create_revision.0);
        let since =
            self.leader.as_ref().filter(|current| current.leader.epoch == epoch).map_or(now, |c| c.since);
        let leader = Leader { controller_id: record.controller_id, endpoint: record.endpoint, epoch };
        self.leader = Some(CurrentLeader { leader, since });
        Ok(())
    }

    fn delete(&mut self, key: &str, now: Instant) {
        let settled = self.settled(now);
        let reign = self.leader.as_ref().map(|current| Revision(current.leader.epoch.0));
        let gone_for_good = |written: Revision| settled || reign.is_some_and(|since| written > since);
        match Key::parse(key) {
            Key::Leader => self.leader = None,
            Key::Instance(id) => {
                remove(self.entries.get_mut(&id).map(|entry| &mut entry.spec), gone_for_good)
            }
            Key::Role(id) => remove(self.entries.get_mut(&id).map(|entry| &mut entry.role), gone_for_good),
            Key::Status(id) => {
                remove(self.entries.get_mut(&id).map(|entry| &mut entry.status), gone_for_good)
            }
            Key::Other => {}
        }
    }

    /// Whether the present leader has led long enough to have heard from every instance there is.
    fn settled(&self, now: Instant) -> bool {
        self.leader.as_ref().is_some_and(|current| now.duration_since(current.since) >= self.reconfirm)
    }

    /// When [`Self::sweep`] will next have something to do.
    pub(super) fn next_sweep(&self) -> Option<Instant> {
        let lingering = |entry: &Entry| {
            entry.spec.is_lingering() || entry.role.is_lingering() || entry.status.is_lingering()
        };
        let leader = self.leader.as_ref()?;
        self.entries.values().any(lingering).then_some(leader.since + self.reconfirm)
    }

    /// Drops what the present leader has had time to confirm and did not.
    pub(super) fn sweep(&mut self, now: Instant) {
        if !self.settled(now) {
            return;
        }
        self.entries.retain(|_, entry| {
            entry.spec.drop_lingering();
            entry.role.drop_lingering();
            entry.status.drop_lingering();
            entry.spec.present || entry.role.present || entry.status.present
        });
    }

    pub(super) fn snapshot(&self, stale_since: Option<Instant>) -> FleetSnapshot {
        let instances = self.entries.iter().filter_map(|(id, entry)| {
            let spec = entry.spec.value.clone()?;
            let status = entry.status.value.filter(|status| status.incarnation == spec.incarnation);
            let desired = entry.role.value.clone();
            Some((
                id.clone(),
                Arc::new(FleetInstance { spec, desired, status, confirmed: entry.spec.present }),
            ))
        });
        FleetSnapshot {
            revision: self.last_revision,
            leader: self.leader.as_ref().map(|current| current.leader.clone()),
            instances: instances.collect(),
            stale_since,
        }
    }
}

fn remove<T>(slot: Option<&mut Slot<T>>, gone_for_good: impl Fn(Revision) -> bool) {
    if let Some(slot) = slot {
        slot.present = false;
        if gone_for_good(slot.written) {
            slot.value = None;
        }
    }
}
