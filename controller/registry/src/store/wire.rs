//! The contract's types to and from `store.proto`, for the service and the remote client.

use baton_proto::v1::{self, compare::Target, operation, watch_response};

use super::{
    Compare, Event, KeyRange, KeyValue, LeaseId, Listing, Operation, Revision, StoreError, Txn, WatchBatch,
};

pub(super) fn lease_from(wire: u64) -> Option<LeaseId> {
    (wire != 0).then_some(LeaseId(wire))
}

fn lease_to(lease: Option<LeaseId>) -> u64 {
    lease.map_or(0, |lease| lease.0)
}

impl From<KeyValue> for v1::KeyValue {
    fn from(item: KeyValue) -> Self {
        Self {
            key: item.key,
            value: item.value,
            create_revision: item.create_revision.0,
            mod_revision: item.mod_revision.0,
            version: item.version,
            lease: lease_to(item.lease),
        }
    }
}

impl From<v1::KeyValue> for KeyValue {
    fn from(wire: v1::KeyValue) -> Self {
        Self {
            key: wire.key,
            value: wire.value,
            create_revision: Revision(wire.create_revision),
            mod_revision: Revision(wire.mod_revision),
            version: wire.version,
            lease: lease_from(wire.lease),
        }
    }
}

impl From<KeyRange> for v1::RangeRequest {
    fn from(range: KeyRange) -> Self {
        match range {
            KeyRange::Exact(key) => Self { prefix: key, exact: true },
            KeyRange::Prefix(prefix) => Self { prefix, exact: false },
        }
    }
}

impl From<v1::RangeRequest> for KeyRange {
    fn from(wire: v1::RangeRequest) -> Self {
        if wire.exact { Self::Exact(wire.prefix) } else { Self::Prefix(wire.prefix) }
    }
}

impl From<Listing> for v1::RangeResponse {
    fn from(listing: Listing) -> Self {
        Self { revision: listing.revision.0, items: listing.items.into_iter().map(Into::into).collect() }
    }
}

impl From<v1::RangeResponse> for Listing {
    fn from(wire: v1::RangeResponse) -> Self {
        Self { revision: Revision(wire.revision), items: wire.items.into_iter().map(Into::into).collect() }
    }
}

impl From<Compare> for v1::Compare {
    fn from(condition: Compare) -> Self {
        let (key, target) = match condition {
            Compare::Absent { key } => (key, Target::CreateRevisionEquals(0)),
            Compare::CreateRevision { key, equals } => (key, Target::CreateRevisionEquals(equals.0)),
            Compare::ModRevision { key, equals } => (key, Target::ModRevisionEquals(equals.0)),
            Compare::Value { key, equals } => (key, Target::ValueEquals(equals)),
        };
        Self { key, target: Some(target) }
    }
}

impl TryFrom<v1::Compare> for Compare {
    type Error = StoreError;
    fn try_from(wire: v1::Compare) -> Result<Self, StoreError> {
        let key = wire.key;
        match wire.target {
            Some(Target::CreateRevisionEquals(0) | Target::ModRevisionEquals(0)) => Ok(Self::Absent { key }),
            Some(Target::CreateRevisionEquals(equals)) => {
                Ok(Self::CreateRevision { key, equals: Revision(equals) })
            }
            Some(Target::ModRevisionEquals(equals)) => {
                Ok(Self::ModRevision { key, equals: Revision(equals) })
            }
            Some(Target::ValueEquals(equals)) => Ok(Self::Value { key, equals }),
            None => Err(StoreError::Invalid(format!("the condition on {key} names nothing to compare"))),
        }
    }
}

impl From<Operation> for v1::Operation {
    fn from(operation: Operation) -> Self {
        let operation = match operation {
            Operation::Put { key, value, lease } => {
                operation::Operation::Put(operation::Put { key, value, lease: lease_to(lease) })
            }
            Operation::Delete { key } => operation::Operation::Delete(key),
            Operation::DeletePrefix { prefix } => operation::Operation::DeletePrefix(prefix),
        };
        Self { operation: Some(operation) }
    }
}

impl TryFrom<v1::Operation> for Operation {
    type Error = StoreError;
    fn try_from(wire: v1::Operation) -> Result<Self, StoreError> {
        match wire.operation {
            Some(operation::Operation::Put(put)) => {
                Ok(Self::Put { key: put.key, value: put.value, lease: lease_from(put.lease) })
            }
            Some(operation::Operation::Delete(key)) => Ok(Self::Delete { key }),
            Some(operation::Operation::DeletePrefix(prefix)) => Ok(Self::DeletePrefix { prefix }),
            None => Err(StoreError::Invalid("an operation of the transaction is of an unknown kind".into())),
        }
    }
}

impl From<Txn> for v1::TxnRequest {
    fn from(txn: Txn) -> Self {
        Self {
            all_of: txn.conditions.into_iter().map(Into::into).collect(),
            then: txn.operations.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::TxnRequest> for Txn {
    type Error = StoreError;
    fn try_from(wire: v1::TxnRequest) -> Result<Self, StoreError> {
        Ok(Self {
            conditions: wire.all_of.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            operations: wire.then.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<WatchBatch> for v1::WatchResponse {
    fn from(batch: WatchBatch) -> Self {
        let events = batch.events.into_iter().map(|event| watch_response::Event {
            event: Some(match event {
                Event::Put(item) => watch_response::event::Event::Put(item.into()),
                Event::Delete { key, .. } => watch_response::event::Event::Delete(key),
            }),
        });
        Self { revision: batch.revision.0, events: events.collect(), compacted_to: 0, created: false }
    }
}

impl From<v1::WatchResponse> for WatchBatch {
    /// Events of kinds this build does not know are left out.
    fn from(wire: v1::WatchResponse) -> Self {
        let revision = Revision(wire.revision);
        let events = wire.events.into_iter().filter_map(|event| match event.event? {
            watch_response::event::Event::Put(item) => Some(Event::Put(item.into())),
            watch_response::event::Event::Delete(key) => Some(Event::Delete { key, revision }),
        });
        Self { revision, events: events.collect() }
    }
}
