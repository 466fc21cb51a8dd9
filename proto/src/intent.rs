//! What operators want: of an instance an [`Intent`], of a group its [`Targets`]. The same in the admin services and in
//! the state store. `v1` is the wire's form; every number of it that is 0 is absent here.

use std::{fmt, num::NonZeroU32, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Role, WireError, v1};

/// What operators want of an instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Intent {
    /// It is to take no requests.
    pub cordoned: Option<Cordoned>,
    /// The role it is to have; none = the planner chooses.
    pub pinned: Option<Pinned>,
}

/// The role that an instance is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    pub role: Role,
    /// Empty if it was written by a version that did not ask.
    pub by: String,
}

impl Intent {
    /// Whether nothing is wanted, as of any instance that nobody has asked anything of.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why an instance takes no requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cordoned {
    pub by: String,
    pub reason: String,
    /// Since when.
    pub unix_millis: u64,
    /// How long its running requests may take; none = as for any change of role.
    pub drain: Option<Duration>,
    /// Even if nobody is left to serve.
    pub force: bool,
}

/// By what a group is divided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RolePolicy {
    /// As `prefill` to `decode`.
    #[default]
    Ratio,
    /// By what its instances measure, so that as little as can be misses the targets of `auto`.
    Auto,
}

/// By what operators want a group divided. What is none stays as it was configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    pub policy: Option<RolePolicy>,
    /// Of the ratio.
    pub prefill: Option<NonZeroU32>,
    pub decode: Option<NonZeroU32>,
    /// Wanted mean time to first token.
    pub ttft: Option<Duration>,
    /// Wanted mean time per token.
    pub tpot: Option<Duration>,
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |count: &Option<NonZeroU32>| count.map(|count| count.to_string());
        let time = |time: &Option<Duration>| time.map(|time| format!("{time:?}"));
        let policy = self.policy.map(|policy| format!("{policy:?}").to_lowercase());
        let parts = [
            ("policy", policy),
            ("prefill", count(&self.prefill)),
            ("decode", count(&self.decode)),
            ("ttft", time(&self.ttft)),
            ("tpot", time(&self.tpot)),
        ];
        let said = parts.into_iter().filter_map(|(name, value)| Some(format!("{name} {}", value?)));
        f.write_str(&said.collect::<Vec<_>>().join(", "))
    }
}

fn duration(millis: u32) -> Option<Duration> {
    (millis > 0).then(|| Duration::from_millis(millis.into()))
}

fn millis(duration: Option<Duration>) -> u32 {
    duration.map_or(0, |duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX))
}

impl TryFrom<v1::Intent> for Intent {
    type Error = WireError;
    fn try_from(wire: v1::Intent) -> Result<Self, WireError> {
        let role = Some(Role::from_wire(wire.pinned)?).filter(|role| *role != Role::None);
        let pinned = role.map(|role| Pinned { role, by: wire.pinned_by });
        Ok(Self { cordoned: wire.cordoned.map(Cordoned::from), pinned })
    }
}

impl From<Intent> for v1::Intent {
    fn from(intent: Intent) -> Self {
        let (pinned, pinned_by) = intent.pinned.map_or_else(
            || (v1::Role::Unspecified, String::new()),
            |pinned| (pinned.role.to_wire(), pinned.by),
        );
        Self { cordoned: intent.cordoned.map(v1::Cordoned::from), pinned: pinned.into(), pinned_by }
    }
}

impl From<v1::Cordoned> for Cordoned {
    fn from(wire: v1::Cordoned) -> Self {
        let v1::Cordoned { by, reason, unix_millis, drain_millis, force } = wire;
        Self { by, reason, unix_millis, drain: duration(drain_millis), force }
    }
}

impl From<Cordoned> for v1::Cordoned {
    fn from(cordoned: Cordoned) -> Self {
        let Cordoned { by, reason, unix_millis, drain, force } = cordoned;
        Self { by, reason, unix_millis, drain_millis: millis(drain), force }
    }
}

impl RolePolicy {
    pub fn to_wire(self) -> v1::RolePolicy {
        match self {
            Self::Ratio => v1::RolePolicy::Ratio,
            Self::Auto => v1::RolePolicy::Auto,
        }
    }

    fn from_wire(value: i32) -> Result<Option<Self>, WireError> {
        match v1::RolePolicy::try_from(value) {
            Ok(v1::RolePolicy::Unspecified) => Ok(None),
            Ok(v1::RolePolicy::Ratio) => Ok(Some(Self::Ratio)),
            Ok(v1::RolePolicy::Auto) => Ok(Some(Self::Auto)),
            Err(_) => Err(WireError::UnknownValue { field: "policy", value }),
        }
    }
}

impl TryFrom<v1::Targets> for Targets {
    type Error = WireError;
    fn try_from(wire: v1::Targets) -> Result<Self, WireError> {
        Ok(Self {
            policy: RolePolicy::from_wire(wire.policy)?,
            prefill: NonZeroU32::new(wire.prefill),
            decode: NonZeroU32::new(wire.decode),
            ttft: duration(wire.ttft_millis),
            tpot: duration(wire.tpot_millis),
        })
    }
}

impl From<Targets> for v1::Targets {
    fn from(targets: Targets) -> Self {
        let count = |count: Option<NonZeroU32>| count.map_or(0, NonZeroU32::get);
        let policy = targets.policy.map_or(v1::RolePolicy::Unspecified, RolePolicy::to_wire);
        Self {
            policy: policy.into(),
            prefill: count(targets.prefill),
            decode: count(targets.decode),
            ttft_millis: millis(targets.ttft),
            tpot_millis: millis(targets.tpot),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_crosses_whole() {
        let cordoned = Cordoned {
            by: "alice".into(),
            reason: "disk".into(),
            unix_millis: 7,
            drain: Some(Duration::from_secs(9)),
            force: true,
        };
        let intent = Intent {
            cordoned: Some(cordoned),
            pinned: Some(Pinned { role: Role::Decode, by: "bob".into() }),
        };
        assert_eq!(Intent::try_from(v1::Intent::from(intent.clone())), Ok(intent));
        assert!(Intent::try_from(v1::Intent::default()).is_ok_and(|intent| intent.is_empty()));
        let targets = Targets {
            policy: Some(RolePolicy::Auto),
            prefill: NonZeroU32::new(2),
            decode: None,
            ttft: Some(Duration::from_millis(300)),
            tpot: None,
        };
        assert_eq!(targets.to_string(), "policy auto, prefill 2, ttft 300ms");
        assert_eq!(Targets::try_from(v1::Targets::from(targets.clone())), Ok(targets));
        assert_eq!(Targets::default().to_string(), "");
        assert!(Targets::try_from(v1::Targets { policy: 9, ..Default::default() }).is_err());
    }
}
