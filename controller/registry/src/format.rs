//! Which version the format of the state has, so that builds that follow each other can share a store.
//!
//! Records gain fields without a new version: readers ignore what they do not know. There is a new one where an earlier build
//! would misread or lose something. It is first read and, a build later, written: so builds that follow each other always
//! understand what is there. Whoever leads writes; so whoever cannot read what is there does not lead. Who only reads keeps
//! what it knew before.

use baton_proto::{Protocols, v1};
use bytes::Bytes;
use prost::Message as _;

use crate::{Compare, KeyRange, KeyValue, Revision, Store, StoreError, Txn, keys};

/// The versions of the format that a build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateFormats {
    pub reads: Protocols,
    /// One of those.
    pub writes: u32,
}

impl StateFormats {
    /// This build's.
    pub const OURS: Self = Self { reads: Protocols::FIRST, writes: 1 };
}

/// Why this build cannot go by what is in the store; `None`: it can.
///
/// # Errors
/// If the store cannot be read.
pub async fn foreign(store: &dyn Store) -> Result<Option<String>, StoreError> {
    Ok(Found::read(store).await?.refusal(StateFormats::OURS))
}

/// What the store says of its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing, as builds leave it that know the first only.
    Nothing,
    Version(u32, Revision),
    /// A record that is none: of another build than any that this one knows.
    Unreadable(Revision),
}

impl Found {
    pub(crate) async fn read(store: &dyn Store) -> Result<Self, StoreError> {
        let listing = store.range(KeyRange::exact(keys::FORMAT)).await?;
        Ok(Self::of(&listing.items))
    }

    /// What these items say, the last of which is the latest.
    pub(crate) fn of<'a>(items: impl IntoIterator<Item = &'a KeyValue>) -> Self {
        let Some(item) = items.into_iter().filter(|item| item.key == keys::FORMAT).last() else {
            return Self::Nothing;
        };
        match v1::FormatRecord::decode(&*item.value) {
            Ok(record) => Self::Version(record.version, item.mod_revision),
            Err(_) => Self::Unreadable(item.mod_revision),
        }
    }

    /// Why a build that knows these formats cannot go by the state.
    pub(crate) fn refusal(self, ours: StateFormats) -> Option<String> {
        let found = match self {
            Self::Nothing => return None,
            Self::Version(version, _) if ours.reads.contains(version) => return None,
            Self::Version(version, _) => format!("is of version {version}"),
            Self::Unreadable(_) => {
                format!("has a record of its version ({}) that cannot be read", keys::FORMAT)
            }
        };
        Some(format!(
            "the state in the store {found}, and this build reads {}: it was written by another build, which has to go on",
            ours.reads
        ))
    }

    /// Only if the format is still this one, and raised to what this build writes.
    pub(crate) fn take_over(self, txn: Txn, ours: StateFormats) -> Txn {
        let txn = txn.when(match self {
            Self::Version(_, revision) | Self::Unreadable(revision) => {
                Compare::mod_revision(keys::FORMAT, revision)
            }
            Self::Nothing => Compare::absent(keys::FORMAT),
        });
        if matches!(self, Self::Version(version, _) if version >= ours.writes) {
            return txn;
        }
        let record = v1::FormatRecord { version: ours.writes };
        txn.put(keys::FORMAT, Bytes::from(record.encode_to_vec()), None)
    }
}
