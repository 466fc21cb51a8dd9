//! The values in the store, and their way to and from the wire.
//!
//! Records are protobuf, so that writers and readers may differ in version: fields are only ever added. What they say
//! of instances are [`baton_proto`]'s types, as an instance's hello carries the same.

use std::time::Duration;

use baton_proto::{
    ApiKey, GroupName, Incarnation, InstanceSpec, Intent, LeaderEpoch, Phase, Role, RoleEpoch, Targets,
    WireError, v1,
};
use bytes::Bytes;
use prost::Message;

/// A record that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("not a protobuf record: {0}")]
    Decode(String),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// What the leader wants an instance to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredRole {
    pub role: Role,
    pub epoch: RoleEpoch,
    /// For people: why.
    pub reason: String,
    /// Of the leader that decided.
    pub leader_epoch: LeaderEpoch,
    /// How long running requests may take before the change; none = as the controller is configured.
    pub drain: Option<Duration>,
    /// It has no role because it was taken out of service.
    pub cordoned: bool,
}

/// What an instance last said it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObservedStatus {
    pub incarnation: Incarnation,
    pub role: Role,
    pub role_epoch: RoleEpoch,
    pub phase: Phase,
    /// Of the weights, while the phase is loading.
    pub load_permille: u32,
}

/// What the leader holds of an instance that has done badly, for the leaders after it.
#[derive(Debug, Clone, PartialEq)]
pub struct HealthRecord {
    pub group: GroupName,
    /// Quarantines that are not forgotten.
    pub times: u32,
    pub standing: Standing,
    /// How long the standing lasted yet when this was written; zero where it has no end.
    pub left: Duration,
    /// When it ends, by the writer's clock.
    pub until_unix_millis: u64,
}

/// How an instance stands that has done badly.
#[derive(Debug, Clone, PartialEq)]
pub enum Standing {
    /// Out of service. The reason's name is for programs; what was measured is in its unit.
    Quarantined {
        reason: String,
        measure: f64,
    },
    Probation,
    Well,
}

/// The controller that leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderRecord {
    pub controller_id: String,
    /// host:port of its gRPC services.
    pub endpoint: String,
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, RecordError> {
    M::decode(bytes).map_err(|error| RecordError::Decode(error.to_string()))
}

/// As it lies under `instances/`.
pub fn encode_spec(spec: &InstanceSpec) -> Bytes {
    v1::InstanceRecord { spec: Some(spec.clone().into()) }.encode_to_vec().into()
}

pub fn decode_spec(value: &[u8]) -> Result<InstanceSpec, RecordError> {
    let spec = decode::<v1::InstanceRecord>(value)?.spec.ok_or(WireError::Missing("spec"))?;
    Ok(spec.try_into()?)
}

/// As it lies under `config/instances/`.
pub fn encode_intent(intent: &Intent) -> Bytes {
    v1::Intent::from(intent.clone()).encode_to_vec().into()
}

pub fn decode_intent(value: &[u8]) -> Result<Intent, RecordError> {
    Ok(decode::<v1::Intent>(value)?.try_into()?)
}

/// As they lie under `config/groups/`.
pub fn encode_targets(targets: &Targets) -> Bytes {
    v1::Targets::from(targets.clone()).encode_to_vec().into()
}

pub fn decode_targets(value: &[u8]) -> Result<Targets, RecordError> {
    Ok(decode::<v1::Targets>(value)?.try_into()?)
}

/// As it lies under `config/api-keys/`.
pub fn encode_api_key(key: &ApiKey) -> Bytes {
    v1::ApiKey::from(key.clone()).encode_to_vec().into()
}

pub fn decode_api_key(value: &[u8]) -> Result<ApiKey, RecordError> {
    Ok(decode::<v1::ApiKey>(value)?.try_into()?)
}

impl DesiredRole {
    /// As it lies under `roles/`.
    pub fn encode(&self) -> Bytes {
        v1::RoleRecord {
            role: self.role.to_wire().into(),
            epoch: self.epoch.0,
            reason: self.reason.clone(),
            leader_epoch: self.leader_epoch.0,
            drain_millis: self.drain.map_or(0, |drain| u32::try_from(drain.as_millis()).unwrap_or(u32::MAX)),
            cordoned: self.cordoned,
        }
        .encode_to_vec()
        .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::RoleRecord>(value)?;
        Ok(Self {
            role: Role::from_wire(wire.role)?,
            epoch: RoleEpoch::from_wire(wire.epoch).map_err(WireError::from)?,
            reason: wire.reason,
            leader_epoch: LeaderEpoch(wire.leader_epoch),
            drain: (wire.drain_millis > 0).then(|| Duration::from_millis(wire.drain_millis.into())),
            cordoned: wire.cordoned,
        })
    }
}

impl ObservedStatus {
    /// As it lies under `status/`.
    pub fn encode(&self) -> Bytes {
        v1::StatusRecord {
            incarnation: self.incarnation.0,
            role: self.role.to_wire().into(),
            role_epoch: self.role_epoch.0,
            phase: self.phase.to_wire().into(),
            load_permille: self.load_permille,
        }
        .encode_to_vec()
        .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::StatusRecord>(value)?;
        Ok(Self {
            incarnation: Incarnation(wire.incarnation),
            role: Role::from_wire(wire.role)?,
            role_epoch: RoleEpoch::from_wire(wire.role_epoch).map_err(WireError::from)?,
            phase: Phase::from_wire(wire.phase)?,
            load_permille: wire.load_permille,
        })
    }
}

impl HealthRecord {
    /// As it lies under `health/`.
    pub fn encode(&self) -> Bytes {
        let (standing, reason, measure) = match &self.standing {
            Standing::Quarantined { reason, measure } => {
                (v1::Standing::Quarantined, reason.clone(), *measure)
            }
            Standing::Probation => (v1::Standing::Probation, String::new(), 0.0),
            Standing::Well => (v1::Standing::Well, String::new(), 0.0),
        };
        v1::HealthRecord {
            group: self.group.to_string(),
            times: self.times,
            standing: standing.into(),
            reason,
            measure,
            left_millis: u64::try_from(self.left.as_millis()).unwrap_or(u64::MAX),
            until_unix_millis: self.until_unix_millis,
        }
        .encode_to_vec()
        .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::HealthRecord>(value)?;
        let standing = match v1::Standing::try_from(wire.standing) {
            Ok(v1::Standing::Quarantined) => {
                Standing::Quarantined { reason: wire.reason, measure: wire.measure }
            }
            Ok(v1::Standing::Probation) => Standing::Probation,
            Ok(v1::Standing::Well) => Standing::Well,
            Ok(v1::Standing::Unspecified) | Err(_) => {
                return Err(WireError::UnknownValue { field: "standing", value: wire.standing }.into());
            }
        };
        Ok(Self {
            group: GroupName::new(wire.group).map_err(WireError::from)?,
            times: wire.times,
            standing,
            left: Duration::from_millis(wire.left_millis),
            until_unix_millis: wire.until_unix_millis,
        })
    }

    /// How long the standing lasts yet, by a clock that may be another than the writer's: never longer than when it
    /// was written.
    pub fn left(&self, unix_millis: u64) -> Duration {
        self.left.min(Duration::from_millis(self.until_unix_millis.saturating_sub(unix_millis)))
    }
}

impl LeaderRecord {
    /// As it lies under `leader`.
    pub fn encode(&self) -> Bytes {
        v1::LeaderRecord { controller_id: self.controller_id.clone(), endpoint: self.endpoint.clone() }
            .encode_to_vec()
            .into()
    }

    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let wire = decode::<v1::LeaderRecord>(value)?;
        if wire.controller_id.is_empty() {
            return Err(WireError::Missing("controller_id").into());
        }
        Ok(Self { controller_id: wire.controller_id, endpoint: wire.endpoint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_of_health_comes_back_and_no_clock_makes_it_longer() {
        let quarantined = Standing::Quarantined { reason: "slow".into(), measure: 4.5 };
        for standing in [quarantined, Standing::Probation, Standing::Well] {
            let (group, left) = (GroupName::default(), Duration::from_secs(30));
            let record = HealthRecord { group, times: 3, standing, left, until_unix_millis: 100_000 };
            assert_eq!(HealthRecord::decode(&record.encode()), Ok(record.clone()));
            // Of clocks: as the writer's, behind, and ahead.
            for (unix_millis, left) in [(70_000, 30), (95_000, 5), (0, 30), (100_001, 0), (u64::MAX, 0)] {
                assert_eq!(record.left(unix_millis), Duration::from_secs(left), "at {unix_millis}");
            }
        }
        assert!(HealthRecord::decode(&[]).is_err());
        assert!(HealthRecord::decode(b"no record").is_err());
    }

    #[test]
    fn no_record_has_an_epoch_that_nobody_could_count_on_from() {
        let record = |epoch| v1::RoleRecord { epoch, ..Default::default() }.encode_to_vec();
        let epoch = |epoch| DesiredRole::decode(&record(epoch)).map(|desired| desired.epoch);
        assert_eq!(epoch(RoleEpoch::MOST.0), Ok(RoleEpoch::MOST));
        for beyond in [RoleEpoch::MOST.0 + 1, u64::MAX] {
            assert!(epoch(beyond).is_err());
            let status = v1::StatusRecord { role_epoch: beyond, phase: 1, ..Default::default() };
            assert!(ObservedStatus::decode(&status.encode_to_vec()).is_err());
        }
    }
}
