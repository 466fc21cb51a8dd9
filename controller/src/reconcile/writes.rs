//! What is to be written to the store: keys that may differ from it are marked, and looked up when they are written.

use baton_proto::{InstanceId, RoleEpoch};
use baton_registry::{DesiredRole, Operation, keys, records::encode_spec};
use bytes::Bytes;

use super::Reconciler;

/// Which of an instance's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Instance,
    Role,
    Status,
}

/// A key and what the store should have there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub kind: Kind,
    pub id: InstanceId,
    /// None = no such key.
    pub value: Option<Bytes>,
    /// Of a role record.
    pub epoch: Option<RoleEpoch>,
}

impl Write {
    pub fn key(&self) -> String {
        match self.kind {
            Kind::Instance => keys::instance(&self.id),
            Kind::Role => keys::role(&self.id),
            Kind::Status => keys::status(&self.id),
        }
    }

    /// As a change of the store. Roles outlive the instance and the leader, the others end with `lease`.
    pub fn operation(&self, lease: baton_registry::LeaseId) -> Operation {
        let lease = (self.kind != Kind::Role).then_some(lease);
        match &self.value {
            Some(value) => Operation::Put { key: self.key(), value: value.clone(), lease },
            None => Operation::Delete { key: self.key() },
        }
    }
}

impl Reconciler {
    pub(super) fn mark(&mut self, kind: Kind, id: &InstanceId) {
        self.unwritten.insert((kind, id.clone()));
    }

    pub fn has_writes(&self) -> bool {
        !self.unwritten.is_empty()
    }

    /// What to write next, at most `limit` keys.
    pub fn take_writes(&mut self, limit: usize) -> Vec<Write> {
        let mut writes = Vec::new();
        while writes.len() < limit
            && let Some((kind, id)) = self.unwritten.pop_first()
        {
            let member = self.members.get(&id);
            let registered = member.filter(|member| member.is_registered());
            let desired = member.map_or_else(
                || self.remembered.get(&id).map(|r| &r.desired),
                |member| member.desired.as_ref(),
            );
            let value = match kind {
                Kind::Instance => registered.map(|member| encode_spec(&member.spec)),
                Kind::Status => registered.map(|member| member.status().encode()),
                Kind::Role => desired.map(DesiredRole::encode),
            };
            let epoch = desired.filter(|_| kind == Kind::Role).map(|desired| desired.epoch);
            writes.push(Write { kind, id, value, epoch });
        }
        writes
    }

    /// Marks what could not be written, to be looked up and written again.
    pub fn give_back(&mut self, writes: impl IntoIterator<Item = Write>) {
        self.unwritten.extend(writes.into_iter().map(|write| (write.kind, write.id)));
    }

    /// Everything that stands under the leader's lease has to be written again: the lease has ended.
    pub fn lease_ended(&mut self) {
        let ids: Vec<_> = self.members.keys().cloned().collect();
        for id in &ids {
            self.mark(Kind::Instance, id);
            self.mark(Kind::Status, id);
        }
    }
}
