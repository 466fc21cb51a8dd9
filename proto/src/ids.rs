//! Newtypes of the ids that cross process boundaries. Each is checked once, where it comes in.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An id on the wire that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error(
        "{what} must be 1 to 63 characters of a-z, 0-9, '-' and '.', starting and ending with a letter or digit; got {got:?}"
    )]
    Name { what: &'static str, got: String },
    #[error("a transfer id is 16 bytes, got {0}")]
    TransferLength(usize),
    #[error("a block hash is 16 bytes, got {0}")]
    BlockHashLength(usize),
    #[error("block hashes are 16 bytes each, got {0} bytes")]
    BlockHashesLength(usize),
    #[error("token ids are 4 bytes each, got {0} bytes")]
    TokensLength(usize),
    #[error("a role epoch is at most 2^62, got {0}")]
    RoleEpoch(u64),
    #[error("a prompt digest is 32 bytes, got {0}")]
    PromptDigestLength(usize),
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a name.
            pub fn new(name: impl Into<String>) -> Result<Self, IdError> {
                let name = name.into();
                if is_name(&name) { Ok(Self(name)) } else { Err(IdError::Name { what: $what, got: name }) }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(name: &str) -> Result<Self, IdError> {
                Self::new(name)
            }
        }

        /// By name, in maps of what has one.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(name: String) -> Result<Self, IdError> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

name_id!(
    /// A server, for as long as its place in the fleet exists: restarts keep it.
    InstanceId, "an instance id");
name_id!(
    /// Instances among which prefill and decode are paired.
    GroupName, "a group's name");

impl Default for GroupName {
    /// Of instances that are told no other.
    fn default() -> Self {
        Self("default".to_owned())
    }
}

name_id!(
    /// A coordinator process.
    CoordinatorId, "a coordinator id");

name_id!(
    /// An API key, as people call it; not the key itself.
    ApiKeyName, "an API key's name");
name_id!(
    /// Who sends requests: one or more API keys are theirs.
    TenantName, "a tenant's name");

/// A key that is nobody else's is its own tenant.
impl From<&ApiKeyName> for TenantName {
    fn from(key: &ApiKeyName) -> Self {
        Self(key.0.clone())
    }
}

/// DNS-label-like, so that ids are safe as key segments, metric labels and host names.
fn is_name(name: &str) -> bool {
    let edge = |c: Option<u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let bytes = name.as_bytes();
    name.len() <= 63
        && edge(bytes.first().copied())
        && edge(bytes.last().copied())
        && bytes.iter().all(|&c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || c == b'.')
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// Which start of an instance's process: grows with every start, so that a late message to or from an earlier one
    /// is told apart.
    Incarnation);
number_id!(
    /// Which assignment of a role to an instance: grows with every assignment, over controller restarts too.
    RoleEpoch);
impl RoleEpoch {
    /// No controller gives later ones: they begin at revisions of its store. So counting on from any never overflows.
    pub const MOST: Self = Self(1 << 62);

    /// A controller counts on from no later one that an instance reports unless it gave that itself: what it then writes is to
    /// be read by all, for as long as it counts.
    pub const COUNTED_FROM_MOST: Self = Self(1 << 61);

    /// Checks a peer's number.
    pub fn from_wire(epoch: u64) -> Result<Self, IdError> {
        if epoch <= Self::MOST.0 { Ok(Self(epoch)) } else { Err(IdError::RoleEpoch(epoch)) }
    }
}

number_id!(
    /// Which term of which controller: grows with every election. Fences writes.
    LeaderEpoch);
number_id!(
    /// One leg of a request on one Attach stream, chosen by the coordinator.
    LegId);

/// A client's request, for logs, traces and `ctl`. Shown as the `x-request-id` header.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestId(String);

impl RequestId {
    /// A fresh id that sorts by time.
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().simple().to_string())
    }

    /// Takes over an id that a client or peer chose, cut to 128 characters of printable ASCII.
    pub fn adopt(id: &str) -> Self {
        Self(id.chars().filter(char::is_ascii_graphic).take(128).collect())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One attempt to hand one request's KV cache over: 128 random bits, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId([u8; 16]);

impl TransferId {
    pub const LEN: usize = 16;

    pub fn generate() -> Self {
        Self(*uuid::Uuid::new_v4().as_bytes())
    }

    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl TryFrom<&[u8]> for TransferId {
    type Error = IdError;
    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        Ok(Self(bytes.try_into().map_err(|_| IdError::TransferLength(bytes.len()))?))
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransferId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_like() {
        for good in ["a", "server-0", "10.0.0.1", &"a".repeat(63)] {
            assert_eq!(InstanceId::new(good).expect(good).as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a/b", "a b", "é", &"a".repeat(64)] {
            assert!(InstanceId::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn transfer_ids_are_sixteen_bytes() {
        let id = TransferId::generate();
        assert_eq!(TransferId::try_from(id.as_bytes().as_slice()), Ok(id));
        assert_eq!(TransferId::try_from([0u8; 15].as_slice()), Err(IdError::TransferLength(15)));
        assert_eq!(id.to_string().len(), 32);
    }

    #[test]
    fn adopted_request_ids_are_printable_and_bounded() {
        assert_eq!(RequestId::adopt("a\nb c\u{7f}").as_str(), "abc");
        assert_eq!(RequestId::adopt(&"x".repeat(1000)).as_str().len(), 128);
    }
}
