//! What is known of an API key: whose it is, what it may, and the SHA-256 by which it is recognised. The same in a file of
//! keys, in the state store and in the admin service; the key itself is in none of them.

use std::{fmt, num::NonZeroU32};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{ApiKeyName, TenantName, WireError, v1};

/// Keys that a coordinator knows at most. Metrics are kept by tenant: this bounds them.
pub const API_KEYS_MOST: usize = 4096;

/// SHA-256 of an API key. Keys are 256 random bits, so that no slow hash is needed: nobody finds one by trying.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    pub const BYTES: usize = 32;

    /// Of a key as clients show it.
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// As `sha256sum` prints it: 64 digits.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
        let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        (digits.len() == Self::BYTES * 2).then(|| bytes.try_into().ok().map(Self))?
    }

    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The beginning is enough to tell keys apart, and says nothing of them.
impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({}..)", &self.to_hex()[..8])
    }
}

/// Whose requests come first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Band {
    Interactive,
    #[default]
    Standard,
    Batch,
}

impl Band {
    pub fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Standard => "standard",
            Self::Batch => "batch",
        }
    }

    pub fn to_wire(self) -> v1::Band {
        match self {
            Self::Interactive => v1::Band::Interactive,
            Self::Standard => v1::Band::Standard,
            Self::Batch => v1::Band::Batch,
        }
    }

    fn from_wire(value: i32) -> Result<Self, WireError> {
        match v1::Band::try_from(value) {
            Ok(v1::Band::Unspecified | v1::Band::Standard) => Ok(Self::Standard),
            Ok(v1::Band::Interactive) => Ok(Self::Interactive),
            Ok(v1::Band::Batch) => Ok(Self::Batch),
            Err(_) => Err(WireError::UnknownValue { field: "band", value }),
        }
    }
}

/// What may be asked for with a key, at all coordinators together; none = as much as they like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub requests_per_minute: Option<NonZeroU32>,
    /// Of prompts and completions together.
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Requests at a time.
    pub concurrent: Option<NonZeroU32>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    pub name: ApiKeyName,
    pub tenant: TenantName,
    pub hash: KeyHash,
    pub limits: KeyLimits,
    pub band: Band,
    /// Of the tenant among those of its band.
    pub weight: NonZeroU32,
    /// None = never.
    pub expires_unix_seconds: Option<u64>,
    /// Who made it; empty if nobody has written that down.
    pub created_by: String,
    /// 0 if nobody has written that down.
    pub created_unix_millis: u64,
}

impl ApiKey {
    /// Tenants of equal weight.
    pub const WEIGHT: NonZeroU32 = NonZeroU32::MIN;

    /// Whether it lets nobody in any more.
    pub fn has_expired(&self, unix_seconds: u64) -> bool {
        self.expires_unix_seconds.is_some_and(|end| end <= unix_seconds)
    }
}

impl TryFrom<v1::ApiKey> for ApiKey {
    type Error = WireError;
    fn try_from(wire: v1::ApiKey) -> Result<Self, WireError> {
        let band = Band::from_wire(wire.band)?;
        let hash = <[u8; KeyHash::BYTES]>::try_from(&wire.sha256[..]);
        let limits = KeyLimits {
            requests_per_minute: NonZeroU32::new(wire.requests_per_minute),
            tokens_per_minute: NonZeroU32::new(wire.tokens_per_minute),
            concurrent: NonZeroU32::new(wire.concurrent),
        };
        Ok(Self {
            name: ApiKeyName::new(wire.name)?,
            tenant: TenantName::new(wire.tenant)?,
            hash: hash.map(KeyHash).map_err(|_| WireError::Missing("the 32 bytes of sha256"))?,
            limits,
            band,
            weight: NonZeroU32::new(wire.weight).unwrap_or(Self::WEIGHT),
            expires_unix_seconds: (wire.expires_unix_seconds > 0).then_some(wire.expires_unix_seconds),
            created_by: wire.created_by,
            created_unix_millis: wire.created_unix_millis,
        })
    }
}

impl From<ApiKey> for v1::ApiKey {
    fn from(key: ApiKey) -> Self {
        let number = |limit: Option<NonZeroU32>| limit.map_or(0, NonZeroU32::get);
        Self {
            name: key.name.into(),
            tenant: key.tenant.into(),
            sha256: key.hash.0.to_vec().into(),
            requests_per_minute: number(key.limits.requests_per_minute),
            tokens_per_minute: number(key.limits.tokens_per_minute),
            concurrent: number(key.limits.concurrent),
            band: key.band.to_wire().into(),
            weight: key.weight.get(),
            expires_unix_seconds: key.expires_unix_seconds.unwrap_or(0),
            created_by: key.created_by,
            created_unix_millis: key.created_unix_millis,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ApiKey {
        let limits = KeyLimits { tokens_per_minute: NonZeroU32::new(5), ..KeyLimits::default() };
        ApiKey {
            name: ApiKeyName::new("alice-1").expect("a good name"),
            tenant: TenantName::new("alice").expect("a good name"),
            hash: KeyHash::of("sk"),
            limits,
            band: Band::Batch,
            weight: ApiKey::WEIGHT,
            expires_unix_seconds: Some(9),
            created_by: "bob".into(),
            created_unix_millis: 7,
        }
    }

    #[test]
    fn keys_cross_the_wire_and_bad_ones_are_refused_by_field() {
        let wire = v1::ApiKey::from(key());
        assert_eq!(ApiKey::try_from(wire.clone()), Ok(key()));
        type Spoil = fn(&mut v1::ApiKey);
        let cases: [(Spoil, &str); 4] = [
            (|key| key.name = "Alice".into(), "an API key's name"),
            (|key| key.tenant.clear(), "a tenant's name"),
            (|key| key.sha256 = vec![0; 31].into(), "sha256"),
            (|key| key.band = 99, "band"),
        ];
        for (spoil, said) in cases {
            let mut bad = wire.clone();
            spoil(&mut bad);
            let error = ApiKey::try_from(bad).expect_err("is bad").to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn hashes_are_those_of_sha256sum_and_debugging_shows_a_part() {
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyHash::of("abc").to_hex(), hex);
        assert_eq!(KeyHash::from_hex(hex), Some(KeyHash::of("abc")));
        assert_eq!(format!("{:?}", KeyHash::of("abc")), "KeyHash(ba7816bf..)");
        for bad in [&hex[1..], "", &"x".repeat(64), "ä"] {
            assert_eq!(KeyHash::from_hex(bad), None);
        }
    }

    #[test]
    fn a_key_is_good_up_to_its_end() {
        assert!(!key().has_expired(8) && key().has_expired(9));
        assert!(!ApiKey { expires_unix_seconds: None, ..key() }.has_expired(u64::MAX));
    }
}
