//! Who a node is to its peers, and what it shares with those of its fleet.

use baton_proto::{Incarnation, InstanceId};

use super::secret::{FleetSecret, FleetSecrets, Party};

#[derive(Debug)]
pub(super) struct Identity {
    pub(super) instance_id: InstanceId,
    pub(super) incarnation: Incarnation,
    /// `None` = whoever can reach the node is believed.
    pub(super) secrets: Option<FleetSecrets>,
}

impl Identity {
    /// As proofs name it.
    pub(super) fn party(&self) -> Party {
        Party { id: self.instance_id.clone(), incarnation: self.incarnation }
    }

    /// The secrets that streams may be of now, the newest first; none: nobody has to show any.
    pub(super) fn secrets(&self) -> Vec<FleetSecret> {
        self.secrets.as_ref().map_or_else(Vec::new, FleetSecrets::taken)
    }
}
