//! KV caches on Ascend NPUs, moved by the vendor's libraries: HIXL-CS where it is installed ([`hixl`], one-sided reads),
//! else HCCL communicators ([`hccl`], both sides take part). Both stand on the ACL runtime ([`acl`]).
//!
//! The declarations are our own, written from the public documents. The libraries are opened when asked for
//! ([`library`]); without them everything else works, and [`probe`] says what is missing. All calls block: they belong
//! on threads of their own. A deadline bounds how long is waited here, not a call from which a library does not return.
//!
//! Tested against `baton-ascend-emulator`, which has the same C symbols; not yet on an NPU.

mod acl;
mod fence;
mod hccl;
mod hixl;
mod library;

#[cfg(test)]
mod tests;

use std::{fmt, path::Path, sync::Arc};

pub(crate) use self::{
    acl::Device,
    hccl::{Hccl, HcclPair, Rank, RootInfo},
    hixl::{Endpoint, Hixl, HixlAddress, HixlClient, HixlServer, Memory},
    library::{Search, Unavailable},
};

/// What of Ascend's interfaces can be used in this process. Prints as one line for a log.
pub(crate) struct Ascend {
    pub(crate) hixl: Result<Arc<Hixl>, Unavailable>,
    pub(crate) hccl: Result<Arc<Hccl>, Unavailable>,
}

/// Looks for the libraries. Never fails: what is missing says so.
pub(crate) fn probe(search: &Search) -> Ascend {
    match acl::Acl::open(search) {
        Ok(acl) => Ascend { hixl: Hixl::open(search, acl.clone()), hccl: Hccl::open(search, acl) },
        Err(why) => Ascend { hixl: Err(why.clone()), hccl: Err(why) },
    }
}

impl fmt::Display for Ascend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hixl = self.hixl.as_ref().map(|hixl| hixl.file.as_path());
        let hccl = self.hccl.as_ref().map(|hccl| hccl.file.as_path());
        show(f, "hixl", hixl)?;
        f.write_str("; ")?;
        show(f, "hccl", hccl)
    }
}

fn show(f: &mut fmt::Formatter<'_>, name: &str, found: Result<&Path, &Unavailable>) -> fmt::Result {
    match found {
        Ok(file) => write!(f, "{name} available ({})", file.display()),
        Err(why) => write!(f, "{name} {why}"),
    }
}
