//! Who a node is to its peers, and what it shares with those of its fleet.

use baton_proto::{Incarnation, InstanceId};

use super::secret::FleetSecret;
use crate::transport::DataKey;

#[derive(Debug)]
pub(super) struct Identity {
    pub(super) instance_id: InstanceId,
    pub(super) incarnation: Incarnation,
    /// `None` = whoever can reach the node is believed.
    pub(super) secret: Option<FleetSecret>,
}

impl Identity {
    /// As proofs name an end of a control stream.
    pub(super) fn end(&self) -> (InstanceId, Incarnation) {
        (self.instance_id.clone(), self.incarnation)
    }

    /// The key that 16 bytes of the wire stand for: themselves, or what only members of a fleet with a secret make of them.
    pub(super) fn key(&self, told: &DataKey) -> DataKey {
        self.secret.as_ref().map_or_else(|| told.clone(), |secret| secret.key(told))
    }
}
