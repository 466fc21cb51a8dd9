//! Which version the format of the state has, so that builds that follow each other can share a store.
//!
//! Records gain fields without a new version: readers ignore what they do not know. There is a new one where an earlier build
//! would misread or lose something. It is first read and, a build later, written: so builds that follow each other always
//! understand what is there. Whoever leads writes; so whoever cannot read what is there does not lead.

use baton_proto::{Protocols, v1};
use bytes::Bytes;
use prost::Message as _;

use crate::{Compare, KeyRange, Revision, Store, StoreError, Txn, keys};

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

/// What the store says of its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    /// `None`: nothing, as builds leave it that know the first only.
    version: Option<(u32, Revision)>,
}

impl Found {
    pub(crate) async fn read(store: &dyn Store) -> Result<Self, StoreError> {
        let mut listing = store.range(KeyRange::exact(keys::FORMAT)).await?;
        let version = listing.items.pop().map(|item| {
            // A record that is none: whoever wrote it is of another build than any that this one knows.
            let version = v1::FormatRecord::decode(&*item.value).map_or(u32::MAX, |record| record.version);
            (version, item.mod_revision)
        });
        Ok(Self { version })
    }

    /// Why a build that knows these formats cannot lead.
    pub(crate) fn refusal(self, ours: StateFormats) -> Option<String> {
        let (version, _) = self.version.filter(|(version, _)| !ours.reads.contains(*version))?;
        Some(format!(
            "the state in the store is of version {version}, and this build reads {}: it was written by another build, which has to go on",
            ours.reads
        ))
    }

    /// Only if the format is still this one, and raised to what this build writes.
    pub(crate) fn take_over(self, txn: Txn, ours: StateFormats) -> Txn {
        let txn = txn.when(match self.version {
            Some((_, revision)) => Compare::mod_revision(keys::FORMAT, revision),
            None => Compare::absent(keys::FORMAT),
        });
        if self.version.is_some_and(|(version, _)| version >= ours.writes) {
            return txn;
        }
        let record = v1::FormatRecord { version: ours.writes };
        txn.put(keys::FORMAT, Bytes::from(record.encode_to_vec()), None)
    }
}
