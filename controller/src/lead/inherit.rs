//! What a new leader finds: everything that earlier ones left in the store.

use std::collections::BTreeMap;

use baton_proto::{GroupName, InstanceId, InstanceLoad, InstanceSpec, Intent, Targets};
use baton_registry::{
    DesiredRole, HealthRecord, KeyRange, ObservedStatus,
    keys::{self, Key},
    records,
};
use tracing::warn;

use super::{LeaderTask, RETRY};
use crate::fleet::Beat;

/// What earlier leaders left in the store.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    pub(super) instances: Vec<(InstanceSpec, Option<Beat>)>,
    pub(super) roles: BTreeMap<InstanceId, DesiredRole>,
    pub(super) health: BTreeMap<InstanceId, HealthRecord>,
    pub(super) intents: BTreeMap<InstanceId, Intent>,
    pub(super) targets: BTreeMap<GroupName, Targets>,
}

impl LeaderTask {
    /// What earlier leaders left, read until it can be.
    pub(super) async fn load(&self) -> Inherited {
        let listing = loop {
            match self.store.range(KeyRange::prefix(keys::ROOT)).await {
                Ok(listing) => break listing,
                Err(error) => {
                    self.metrics.store_errors.inc();
                    warn!(%error, "cannot read what is known of the fleet; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        let mut inherited = Inherited::default();
        let (mut specs, mut statuses) = (Vec::new(), BTreeMap::<InstanceId, ObservedStatus>::new());
        for item in listing.items {
            let taken =
                match Key::parse(&item.key) {
                    Key::Instance(_) => records::decode_spec(&item.value).map(|spec| specs.push(spec)),
                    Key::Role(id) => {
                        DesiredRole::decode(&item.value).map(|role| inherited.roles.extend([(id, role)]))
                    }
                    Key::Status(id) => {
                        ObservedStatus::decode(&item.value).map(|status| statuses.extend([(id, status)]))
                    }
                    Key::Health(id) => HealthRecord::decode(&item.value)
                        .map(|health| inherited.health.extend([(id, health)])),
                    Key::Intent(id) => records::decode_intent(&item.value)
                        .map(|intent| inherited.intents.extend([(id, intent)])),
                    Key::Targets(group) => records::decode_targets(&item.value)
                        .map(|targets| inherited.targets.extend([(group, targets)])),
                    Key::Leader | Key::Format | Key::ApiKey(_) | Key::Other => Ok(()),
                };
            if let Err(error) = taken {
                warn!(key = item.key, %error, "a record in the state store is not readable and is left out");
            }
        }
        let with_beat = |spec: InstanceSpec| {
            let status = statuses.get(&spec.id).filter(|status| status.incarnation == spec.incarnation);
            let beat = status.map(beat_of);
            (spec, beat)
        };
        inherited.instances = specs.into_iter().map(with_beat).collect();
        inherited
    }
}

fn beat_of(status: &ObservedStatus) -> Beat {
    Beat {
        role: status.role,
        role_epoch: status.role_epoch,
        phase: status.phase,
        load_permille: status.load_permille,
        load: InstanceLoad::default(),
    }
}
