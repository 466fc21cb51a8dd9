//! What is held of instances and links that do badly: taken over from earlier leaders, and shown.

use std::collections::BTreeMap;

use baton_proto::InstanceId;
use baton_registry::HealthRecord;
use tokio::time::Instant;

use super::{Reconciler, Record, silent};
use crate::fleet::health::{Ends, Verdict};

impl Reconciler {
    /// Takes over what earlier leaders held of instances that had done badly. `unix_millis` is the time of `now`.
    pub fn inherit_health(
        &mut self,
        records: BTreeMap<InstanceId, HealthRecord>,
        now: Instant,
        unix_millis: u64,
    ) {
        (self.began, self.began_unix_millis) = (now, unix_millis);
        let useless = self.health.inherit(records, &silent(), now, unix_millis);
        useless.into_iter().for_each(|id| self.mark(Record::Health(id)));
    }

    /// What is held of an instance.
    pub fn verdict(&self, id: &InstanceId) -> Verdict {
        self.health.verdict(id)
    }

    /// Links that are degraded, and the share of their handoffs that fail, 0 to 1.
    pub fn degraded_links(&self, now: Instant) -> impl Iterator<Item = (&Ends, f64)> {
        self.health.degraded_links(now)
    }
}
