//! What is known of the instances: the observed side, and the roles they were given.
//!
//! A member is `Connected` (a session reports), `Silent` (no session, but its lease runs: it may be on its way back)
//! or `Lost` (its registration has ended, its place is kept for a while). Pure data; [`crate::reconcile`] moves it.
//! Whether one that is there does well enough to be used is [`health`]'s to say.

pub mod congestion;
pub mod health;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use baton_proto::{InstanceId, InstanceLoad, InstanceSpec, Phase, Role, RoleEpoch, WireError, v1};
use baton_registry::{DesiredRole, ObservedStatus};
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
    pub load: InstanceLoad,
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
    /// As it said, with the count of NPUs that the ranktable says, if it is in it.
    /// Shared with those who read the fleet.
    pub spec: Arc<InstanceSpec>,
    /// As it said itself.
    pub reported_devices: u32,
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
    /// Since when it has been on its way to its role, loaded and told; for the deadline of that.
    pub late_since: Option<Instant>,
    /// Others are planned without it.
    pub stuck: Option<Stuck>,
}

/// Why an instance does not become what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stuck {
    #[error("has not taken on its role within {0:?}")]
    Overdue(Duration),
    #[error("the state store refuses its role record: {0}")]
    Unwritable(String),
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

    /// Whether it has been given a role that it has yet to take on.
    pub fn is_on_its_way(&self) -> bool {
        self.is_registered() && self.serving_role().is_some() && !self.has_converged()
    }

    /// Whether it has been told what it should be.
    pub fn knows_its_role(&self) -> bool {
        let known = self.told.max(Some(self.beat.role_epoch));
        self.desired.as_ref().is_some_and(|desired| known >= Some(desired.epoch))
    }

    pub fn is_loading(&self) -> bool {
        self.beat.phase == Phase::Loading
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
    type Error = WireError;
    fn try_from(wire: v1::InstanceBeat) -> Result<Self, WireError> {
        Ok(Self {
            role: Role::from_wire(wire.role)?,
            role_epoch: RoleEpoch::from_wire(wire.role_epoch)?,
            phase: Phase::from_wire(wire.phase)?,
            load_permille: wire.load_permille.min(1000),
            load: wire.load.map(InstanceLoad::from).unwrap_or_default(),
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
