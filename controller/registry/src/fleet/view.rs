//! The fold of the store's keys into a fleet snapshot. Pure: listings, batches and the time in, snapshots out.
//!
//! Keys of instances end with leases that the leader keeps, so that they may vanish because an instance is gone or
//! because the leader is; an embedded store vanishes with its controller. The two are told apart so: what was written
//! under the present leader is removed when its key is; anything else is kept, unconfirmed, until a leader has led for
//! the `reconfirm` time, and for as long as there is none.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use baton_proto::{InstanceId, InstanceSpec, LeaderEpoch, WireError};
use tokio::time::Instant;
use tracing::warn;

use super::{FleetInstance, FleetSnapshot, Leader};
use crate::{
    DesiredRole, Event, KeyValue, LeaderRecord, Listing, ObservedStatus, RecordError, Revision, WatchBatch,
    keys::Key, records::decode_spec,
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
    /// Whether that changes anything for readers.
    fn put(&mut self, value: T, written: Revision) -> bool
    where
        T: PartialEq,
    {
        let changed = !self.present || self.value.as_ref() != Some(&value);
        *self = Self { value: Some(value), present: true, written };
        changed
    }

    fn remove(&mut self, gone_for_good: impl Fn(Revision) -> bool) {
        self.present = false;
        if gone_for_good(self.written) {
            self.value = None;
        }
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
    /// What readers were last given; none = it has changed since.
    shown: Option<Arc<FleetInstance>>,
}

impl Entry {
    fn changed(&mut self, changed: bool) {
        if changed {
            self.shown = None;
        }
    }

    fn is_lingering(&self) -> bool {
        self.spec.is_lingering() || self.role.is_lingering() || self.status.is_lingering()
    }

    /// As readers see it, if there is a spec; made anew only after a change.
    fn show(&mut self) -> Option<Arc<FleetInstance>> {
        if self.shown.is_none() {
            let spec = self.spec.value.clone()?;
            let status = self.status.value.filter(|status| status.incarnation == spec.incarnation);
            let desired = self.role.value.clone();
            let instance = FleetInstance { spec, desired, status, confirmed: self.spec.present };
            self.shown = Some(Arc::new(instance));
        }
        self.shown.clone()
    }
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
        let listed: HashSet<&str> = listing.items.iter().map(|item| item.key.as_str()).collect();
        missing.retain(|key| !listed.contains(key.as_str()));
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
            Key::Instance(id) => decode_spec(&item.value).and_then(|spec| {
                if spec.id != id {
                    return Err(WireError::Missing("the instance id of the key").into());
                }
                let entry = self.entries.entry(id).or_default();
                let changed = entry.spec.put(spec, written);
                entry.changed(changed);
                Ok(())
            }),
            Key::Role(id) => DesiredRole::decode(&item.value).map(|role| {
                let entry = self.entries.entry(id).or_default();
                let changed = entry.role.put(role, written);
                entry.changed(changed);
            }),
            Key::Status(id) => ObservedStatus::decode(&item.value).map(|status| {
                let entry = self.entries.entry(id).or_default();
                let changed = entry.status.put(status, written);
                entry.changed(changed);
            }),
            // Readers go by roles, which say what follows from these; of API keys others keep track.
            Key::Format | Key::Health(_) | Key::Intent(_) | Key::Targets(_) | Key::ApiKey(_) | Key::Other => {
                Ok(())
            }
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
        let led_since = self.leader.as_ref().map(|current| Revision(current.leader.epoch.0));
        let gone_for_good = |written: Revision| settled || led_since.is_some_and(|since| written > since);
        let key = Key::parse(key);
        let (Key::Instance(id) | Key::Role(id) | Key::Status(id)) = &key else {
            if key == Key::Leader {
                self.leader = None;
            }
            return;
        };
        let Some(entry) = self.entries.get_mut(id) else { return };
        match &key {
            Key::Instance(_) => entry.spec.remove(gone_for_good),
            Key::Role(_) => entry.role.remove(gone_for_good),
            _ => entry.status.remove(gone_for_good),
        }
        entry.changed(true);
    }

    /// Whether the present leader has led long enough to have heard from every instance there is.
    fn settled(&self, now: Instant) -> bool {
        self.leader.as_ref().is_some_and(|current| now.duration_since(current.since) >= self.reconfirm)
    }

    /// When [`Self::sweep`] will next have something to do.
    pub(super) fn next_sweep(&self) -> Option<Instant> {
        let leader = self.leader.as_ref()?;
        self.entries.values().any(Entry::is_lingering).then_some(leader.since + self.reconfirm)
    }

    /// Drops what the present leader has had time to confirm and did not.
    pub(super) fn sweep(&mut self, now: Instant) {
        if !self.settled(now) {
            return;
        }
        self.entries.retain(|_, entry| {
            let lingered = entry.is_lingering();
            entry.changed(lingered);
            entry.spec.drop_lingering();
            entry.role.drop_lingering();
            entry.status.drop_lingering();
            entry.spec.present || entry.role.present || entry.status.present
        });
    }

    /// Instances that have not changed are shared with the snapshots before.
    pub(super) fn snapshot(&mut self, stale_since: Option<Instant>) -> FleetSnapshot {
        let instances = self.entries.iter_mut().filter_map(|(id, entry)| Some((id.clone(), entry.show()?)));
        let instances = instances.collect();
        FleetSnapshot {
            revision: self.last_revision,
            leader: self.leader.as_ref().map(|current| current.leader.clone()),
            instances,
            stale_since,
        }
    }
}
