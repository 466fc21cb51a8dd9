//! Builders that tests share.

use baton_proto::{GroupName, Incarnation, InstanceId, Protocols, RoleEpoch};

use super::{Duty, Role, Spec};

/// An instance that runs `tiny` at revision `r1`, in blocks of 16 tokens.
pub fn spec(id: &str) -> Spec {
    Spec {
        id: InstanceId::new(id).expect("a good id"),
        incarnation: Incarnation(1),
        group: GroupName::default(),
        model: "tiny".into(),
        revision: "r1".into(),
        context_tokens: 1024,
        layout: "l1".into(),
        hardware: "cpu".into(),
        handoff_protocols: Protocols::FIRST,
        block_tokens: 16,
        token_bytes: 0,
        inference_endpoint: format!("{id}:1"),
        handoff_endpoint: format!("{id}:2"),
    }
}

/// It takes requests.
pub fn ready(role: Role) -> Duty {
    Duty { role, epoch: RoleEpoch(1), ready: true }
}
