//! The key layout. Everything of Baton lies under `/baton/v1/`; a change of layout is a new version beside it.

use baton_proto::{ApiKeyName, GroupName, InstanceId};

/// Before every key.
pub const ROOT: &str = "/baton/v1/";
/// Which controller leads: a [`crate::LeaderRecord`], leased. Its create revision is the leader epoch.
pub const LEADER: &str = "/baton/v1/leader";
/// How the rest is to be read: see [`crate::format`].
pub const FORMAT: &str = "/baton/v1/format";
/// What instances are: a [`crate::InstanceSpec`] each, leased.
pub const INSTANCES: &str = "/baton/v1/instances/";
/// What instances should be: a [`crate::DesiredRole`] each. Survives the instance.
pub const ROLES: &str = "/baton/v1/roles/";
/// What instances last said they are: a [`crate::ObservedStatus`] each, leased.
pub const STATUS: &str = "/baton/v1/status/";

/// What is held of instances that have done badly: a [`crate::HealthRecord`] each. Survives the instance.
pub const HEALTH: &str = "/baton/v1/health/";

/// What operators want of instances: a [`baton_proto::Intent`] each. Survives the instance.
pub const INTENTS: &str = "/baton/v1/config/instances/";
/// By what operators want groups divided: [`baton_proto::Targets`].
pub const TARGETS: &str = "/baton/v1/config/groups/";
/// Who may send requests to the coordinators: a [`baton_proto::ApiKey`] each.
pub const API_KEYS: &str = "/baton/v1/config/api-keys/";

pub fn instance(id: &InstanceId) -> String {
    format!("{INSTANCES}{id}")
}

pub fn role(id: &InstanceId) -> String {
    format!("{ROLES}{id}")
}

pub fn status(id: &InstanceId) -> String {
    format!("{STATUS}{id}")
}

pub fn health(id: &InstanceId) -> String {
    format!("{HEALTH}{id}")
}

pub fn intent(id: &InstanceId) -> String {
    format!("{INTENTS}{id}")
}

pub fn targets(group: &GroupName) -> String {
    format!("{TARGETS}{group}")
}

pub fn api_key(name: &ApiKeyName) -> String {
    format!("{API_KEYS}{name}")
}

/// A key taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    Leader,
    Format,
    Instance(InstanceId),
    Role(InstanceId),
    Status(InstanceId),
    Health(InstanceId),
    Intent(InstanceId),
    Targets(GroupName),
    ApiKey(ApiKeyName),
    /// Under the root, but of a kind this build does not know: to be ignored.
    Other,
}

impl Key {
    pub fn parse(key: &str) -> Self {
        type Kind = (&'static str, fn(InstanceId) -> Key);
        const KINDS: [Kind; 5] = [
            (INSTANCES, Key::Instance),
            (ROLES, Key::Role),
            (STATUS, Key::Status),
            (HEALTH, Key::Health),
            (INTENTS, Key::Intent),
        ];
        if key == LEADER {
            return Self::Leader;
        }
        if key == FORMAT {
            return Self::Format;
        }
        if let Some(group) = key.strip_prefix(TARGETS) {
            return GroupName::new(group).map_or(Self::Other, Self::Targets);
        }
        if let Some(name) = key.strip_prefix(API_KEYS) {
            return ApiKeyName::new(name).map_or(Self::Other, Self::ApiKey);
        }
        KINDS
            .iter()
            .find_map(|(prefix, kind)| Some(kind(InstanceId::new(key.strip_prefix(prefix)?).ok()?)))
            .unwrap_or(Self::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_parse_back() {
        let id = InstanceId::new("server-0").expect("a good id");
        assert_eq!(Key::parse(&instance(&id)), Key::Instance(id.clone()));
        assert_eq!(Key::parse(&role(&id)), Key::Role(id.clone()));
        assert_eq!(Key::parse(&status(&id)), Key::Status(id.clone()));
        assert_eq!(Key::parse(&health(&id)), Key::Health(id.clone()));
        assert_eq!(Key::parse(&intent(&id)), Key::Intent(id));
        let group = GroupName::default();
        assert_eq!(Key::parse(&targets(&group)), Key::Targets(group));
        let name = ApiKeyName::new("alice-1").expect("a good name");
        assert_eq!(Key::parse(&api_key(&name)), Key::ApiKey(name));
        assert_eq!(Key::parse(LEADER), Key::Leader);
        assert_eq!(Key::parse(FORMAT), Key::Format);
        for other in ["/baton/v1/instances/", "/baton/v1/roles/a/b", "/baton/v1/config/x", "/other"] {
            assert_eq!(Key::parse(other), Key::Other, "{other}");
        }
    }
}
