//! What is known of the instances: the observed side, and the roles they were given.
//!
//! A member is `Connected` (a session reports), `Silent` (no session, but its lease runs: it may be on its way back)
//! or `Lost` (its registration has ended, its place is kept for a while). Pure data; [`crate::reconcile`] moves it.

use std::{collections::BTreeMap, fmt};

use baton_proto::{InstanceId, RoleEpoch, v1};
use baton_registry::{DesiredRole, InstanceSpec, ObservedStatus, Phase, RecordError, Role};
use tokio::time::Instant;

/// One session of one instance, among all that this process has ever had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How an instance says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// The last one taken on.
    pub role: Role,
    pub role_epoch: RoleEpoch,
    pub phase: Phase,
    /// Of the weights, while loading; at most 1000.
    pub load_permille: u32,
    pub load: Load,
}

/// How busy it says it is; counts over all coordinators' requests. 0 for rates not yet measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub running_sequences: u32,
    pub waiting_sequences: u32,
    pub queued_prefill_tokens: u64,
    pub kv_blocks_total: u32,
    pub kv_blocks_free: u32,
    pub prefill_tokens_per_second: u64,
    pub decode_step_micros: u64,
    pub outgoing_transfers: u32,
    pub incoming_transfers: u32,
    /// Since the process started, as are the following: prompts computed to their end.
    pub prefilled_requests: u64,
    pub prefilled_tokens: u64,
    pub decoded_tokens: u64,
    pub decode_steps: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contact {
    Connected(SessionId),
    /// Since the session broke, or since this controller leads and has not heard of it.
    Silent {
        since: Instant,
    },
    /// Since contact was lost.
    Lost {
        since: Instant,
    },
}

/// An instance that is there, or whose place is kept.
#[derive(Debug, Clone)]
pub struct Member {
    pub spec: InstanceSpec,
    pub beat: Beat,
    pub last_beat: Instant,
    pub contact: Contact,
    /// When it said hello to this controller, for people.
    pub registered_unix_millis: u64,
    /// The same, for deadlines.
    pub joined: Instant,
    /// What it should be; none = it has never been given a role.
    pub desired: Option<DesiredRole>,
    /// The epoch of the role record that is known to be in the store.
    pub stored: Option<RoleEpoch>,
    /// The epoch that its session has been told of.
    pub told: Option<RoleEpoch>,
}

impl Member {
    pub fn session(&self) -> Option<SessionId> {
        match self.contact {
            Contact::Connected(session) => Some(session),
            _ => None,
        }
    }

    /// Whether it is registered: an entry under `instances/`.
    pub fn is_registered(&self) -> bool {
        !matches!(self.contact, Contact::Lost { .. })
    }

    /// The desired role, if it is one that serves.
    pub fn serving_role(&self) -> Option<Role> {
        self.desired.as_ref().map(|desired| desired.role).filter(|role| *role != Role::None)
    }

    /// Whether it has taken on what it was last given.
    pub fn has_converged(&self) -> bool {
        self.desired.as_ref().is_some_and(|desired| {
            self.beat.role_epoch == desired.epoch
                && (self.beat.phase == Phase::Ready || desired.role == Role::None)
        })
    }

    /// Whether requests can be served by it now, as far as is known.
    pub fn is_serving(&self) -> bool {
        self.is_registered() && self.beat.phase == Phase::Ready && self.beat.role != Role::None
    }

    /// What the store should say it said. Load comes in tenths, so that loading writes little.
    pub fn status(&self) -> ObservedStatus {
        ObservedStatus {
            incarnation: self.spec.incarnation,
            role: self.beat.role,
            role_epoch: self.beat.role_epoch,
            phase: self.beat.phase,
            load_permille: self.beat.load_permille / 100 * 100,
        }
    }
}

/// All of them, by id.
pub type Members = BTreeMap<InstanceId, Member>;

impl TryFrom<v1::InstanceBeat> for Beat {
    type Error = RecordError;
    fn try_from(wire: v1::InstanceBeat) -> Result<Self, RecordError> {
        Ok(Self {
            role: Role::from_wire(wire.role)?,
            role_epoch: RoleEpoch(wire.role_epoch),
            phase: Phase::from_wire(wire.phase)?,
            load_permille: wire.load_permille.min(1000),
            load: wire.load.map(Load::from).unwrap_or_default(),
        })
    }
}

impl From<Beat> for v1::InstanceBeat {
    fn from(beat: Beat) -> Self {
        Self {
            role: beat.role.to_wire().into(),
            role_epoch: beat.role_epoch.0,
            phase: beat.phase.to_wire().into(),
            load_permille: beat.load_permille,
            load: Some(beat.load.into()),
        }
    }
}

impl From<v1::InstanceLoad> for Load {
    fn from(wire: v1::InstanceLoad) -> Self {
        Self {
            running_sequences: wire.running_sequences,
            waiting_sequences: wire.waiting_sequences,
            queued_prefill_tokens: wire.queued_prefill_tokens,
            kv_blocks_total: wire.kv_blocks_total,
            kv_blocks_free: wire.kv_blocks_free,
            prefill_tokens_per_second: wire.prefill_tokens_per_second,
            decode_step_micros: wire.decode_step_micros,
            outgoing_transfers: wire.outgoing_transfers,
            incoming_transfers: wire.incoming_transfers,
            prefilled_requests: wire.prefilled_requests,
            prefilled_tokens: wire.prefilled_tokens,
            decoded_tokens: wire.decoded_tokens,
            decode_steps: wire.decode_steps,
        }
    }
}

impl From<Load> for v1::InstanceLoad {
    fn from(load: Load) -> Self {
        Self {
            running_sequences: load.running_sequences,
            waiting_sequences: load.waiting_sequences,
            queued_prefill_tokens: load.queued_prefill_tokens,
            kv_blocks_total: load.kv_blocks_total,
            kv_blocks_free: load.kv_blocks_free,
            prefill_tokens_per_second: load.prefill_tokens_per_second,
            decode_step_micros: load.decode_step_micros,
            outgoing_transfers: load.outgoing_transfers,
            incoming_transfers: load.incoming_transfers,
            prefilled_requests: load.prefilled_requests,
            prefilled_tokens: load.prefilled_tokens,
            decoded_tokens: load.decoded_tokens,
            decode_steps: load.decode_steps,
        }
    }
}
