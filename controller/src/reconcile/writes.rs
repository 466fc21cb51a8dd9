//! What is to be written to the store: records that may differ from it are marked, and looked up when they are written.

use baton_proto::{GroupName, InstanceId, RoleEpoch};
use baton_registry::{
    DesiredRole, LeaseId, Operation, keys,
    records::{encode_intent, encode_spec, encode_targets},
};
use bytes::Bytes;

use super::Reconciler;

/// A key of the store, and whose. What operators want and what is held of health come first: they are stored no later
/// than what follows from them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Record {
    Intent(InstanceId),
    Targets(GroupName),
    Health(InstanceId),
    Instance(InstanceId),
    Role(InstanceId),
    Status(InstanceId),
}

impl Record {
    pub fn key(&self) -> String {
        match self {
            Self::Intent(id) => keys::intent(id),
            Self::Targets(group) => keys::targets(group),
            Self::Health(id) => keys::health(id),
            Self::Instance(id) => keys::instance(id),
            Self::Role(id) => keys::role(id),
            Self::Status(id) => keys::status(id),
        }
    }

    /// Whether it ends with the leader's lease. What was decided or asked for outlives the leader and the instance.
    fn is_leased(&self) -> bool {
        matches!(self, Self::Instance(_) | Self::Status(_))
    }
}

/// A record and what the store should have there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub record: Record,
    /// None = no such key.
    pub value: Option<Bytes>,
    /// Of a role record.
    pub epoch: Option<RoleEpoch>,
}

impl Write {
    pub fn key(&self) -> String {
        self.record.key()
    }

    /// As a change of the store; what is leased ends with `lease`.
    pub fn operation(&self, lease: LeaseId) -> Operation {
        let lease = self.record.is_leased().then_some(lease);
        match &self.value {
            Some(value) => Operation::Put { key: self.key(), value: value.clone(), lease },
            None => Operation::Delete { key: self.key() },
        }
    }
}

impl Reconciler {
    pub(super) fn mark(&mut self, record: Record) {
        self.unwritten.insert(record);
    }

    pub fn has_writes(&self) -> bool {
        !self.unwritten.is_empty()
    }

    /// What to write next, at most `limit` keys.
    pub fn take_writes(&mut self, limit: usize) -> Vec<Write> {
        let mut writes = Vec::new();
        while writes.len() < limit
            && let Some(record) = self.unwritten.pop_first()
        {
            writes.push(self.write(record));
        }
        writes
    }

    fn write(&self, record: Record) -> Write {
        let registered = |id| self.members.get(id).filter(|member| member.is_registered());
        let desired = |id| match self.members.get(id) {
            Some(member) => member.desired.as_ref(),
            None => self.remembered.get(id).map(|remembered| &remembered.desired),
        };
        let mut epoch = None;
        let value = match &record {
            Record::Intent(id) => self.intents.get(id).map(encode_intent),
            Record::Targets(group) => self.targets.get(group).map(encode_targets),
            Record::Health(id) => {
                self.health.record(id, self.awake, self.unix_millis()).map(|it| it.encode())
            }
            Record::Instance(id) => registered(id).map(|member| encode_spec(&member.spec)),
            Record::Status(id) => registered(id).map(|member| member.status().encode()),
            Record::Role(id) => desired(id).map(|desired| {
                epoch = Some(desired.epoch);
                DesiredRole::encode(desired)
            }),
        };
        Write { record, value, epoch }
    }

    /// The time of the last conclusion, by the wall clock.
    fn unix_millis(&self) -> u64 {
        let since = self.awake.saturating_duration_since(self.began).as_millis();
        self.began_unix_millis.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }

    /// Marks what could not be written, to be looked up and written again.
    pub fn give_back(&mut self, writes: impl IntoIterator<Item = Write>) {
        self.unwritten.extend(writes.into_iter().map(|write| write.record));
    }

    /// Everything that stands under the leader's lease has to be written again: the lease has ended.
    pub fn lease_ended(&mut self) {
        let ids: Vec<_> = self.members.keys().cloned().collect();
        for id in ids {
            self.mark_registration(&id);
        }
    }

    /// What the store says of an instance that is registered, or no longer.
    pub(super) fn mark_registration(&mut self, id: &InstanceId) {
        self.mark(Record::Instance(id.clone()));
        self.mark(Record::Status(id.clone()));
    }
}
