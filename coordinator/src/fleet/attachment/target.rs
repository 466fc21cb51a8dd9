//! Whom an attachment is to reach.

use baton_proto::Incarnation;
use baton_registry::ObservedStatus;

/// Where the instance is now. A change ends any pause before the next attempt to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `host:port` of its Inference service.
    pub endpoint: String,
    pub incarnation: Incarnation,
    /// Of its model, as the store's list has it: which may be behind what is found there.
    pub revision: String,
    /// What it last told the controller: an instance that has just become ready is called at once.
    pub status: Option<ObservedStatus>,
}

impl Target {
    pub(super) fn same_process(&self, other: &Self) -> bool {
        self.endpoint == other.endpoint && self.incarnation == other.incarnation
    }
}
