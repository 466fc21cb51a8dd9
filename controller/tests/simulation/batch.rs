//! What a mind wants written, for the simulation: the one place that knows how the reconciler names its records.

use baton_controller::reconcile::{Event, Reconciler, Record, Write};
use baton_registry::{LeaseId, Operation};

pub(crate) struct Batch(Vec<Write>);

impl Batch {
    pub(crate) fn take(mind: &mut Reconciler, limit: usize) -> Self {
        Self(mind.take_writes(limit))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn operations(&self, lease: LeaseId) -> Vec<Operation> {
        self.0.iter().map(|write| write.operation(lease)).collect()
    }

    /// It was written.
    pub(crate) fn stored(self) -> Vec<Event> {
        let stored = |write: Write| match write.record {
            Record::Role(id) => Some(Event::RoleStored { id, epoch: write.epoch? }),
            _ => None,
        };
        self.0.into_iter().filter_map(stored).collect()
    }

    /// It was not written.
    pub(crate) fn give_back(self, mind: &mut Reconciler) {
        mind.give_back(self.0);
    }

    /// The store refuses it: what to say of one record, or more than one to be tried one by one.
    pub(crate) fn refusal(mut self, reason: String) -> Result<Event, Self> {
        if self.0.len() != 1 {
            return Err(self);
        }
        let Write { record, .. } = self.0.remove(0);
        Ok(Event::Refused { record, reason })
    }
}
