//! KV caches on Ascend NPUs, moved by the vendor's libraries: HIXL-CS where it is installed ([`hixl`], one-sided reads),
//! else HCCL communicators ([`hccl`], both sides take part). Both stand on the ACL runtime ([`acl`]).
//!
//! The declarations are our own, written from the public documents. The libraries are opened when asked for
//! ([`library`]); without them everything else works, and [`probe`] says what is missing. All calls block: they belong
//! on threads of their own. A deadline bounds how long is waited here, not a call from which a library does not return.
//!
//! Tested against `baton-ascend-emulator`, which has the same C symbols; not yet on an NPU.

mod acl;
mod hccl;
mod hixl;
mod library;

#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio_util::task::TaskTracker;

pub(crate) use self::library::{Search, Unavailable};
use self::{
    acl::Device,
    hccl::Hccl,
    hixl::{Endpoint, Hixl},
};
use self::{hccl::HcclMedium, hixl::HixlMedium};
use super::fetch::Medium;
use crate::Region;

/// Where the network configuration of the devices stands.
const HCCN_CONF: &str = "/etc/hccn.conf";

/// Which NPU a node's region belongs to, and how peers reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AscendConfig {
    /// As this process numbers its devices.
    pub device: u32,
    /// Where HIXL's own control connection is accepted, on the network of the hosts; a port that nobody else has.
    pub host: SocketAddr,
    /// The device's RoCE address; `None` = what `/etc/hccn.conf` says.
    pub address: Option<IpAddr>,
    /// Whether only those reach `host`, and the devices on their network, who may read the whole KV pool. HIXL takes no
    /// credential: once a peer that belongs to the fleet has asked for it, it listens to everybody. A node therefore leaves
    /// HIXL out unless this is true. HCCL is not concerned: each of its pairs is joined with what is told
    /// over a data connection that has shown its key.
    pub trusted_network: bool,
    /// Where the libraries are; `None` = the loader's path, `$ASCEND_HOME_PATH/lib64`, `/usr/local/Ascend/cann/lib64`.
    pub libraries: Option<PathBuf>,
}

impl AscendConfig {
    fn found(&self) -> Ascend {
        probe(&self.libraries.as_ref().map_or_else(Search::system, Search::only))
    }

    fn endpoint(&self, device: &Device) -> io::Result<Endpoint> {
        match (self.address, device.physical) {
            (Some(address), physical) => {
                Ok(Endpoint { address, physical_device: physical.unwrap_or(self.device) })
            }
            (None, _) => {
                Endpoint::configured(device, &std::fs::read_to_string(HCCN_CONF).unwrap_or_default())
            }
        }
    }

    /// The region lent through HIXL. The error says why it cannot be.
    pub(crate) fn hixl(&self, region: &Region) -> io::Result<Arc<dyn Medium>> {
        if !self.trusted_network {
            return Err(io::Error::other(
                "whoever reaches its port could read the KV pool and is asked for nothing; set `trusted_network` if all of them may",
            ));
        }
        let hixl = self.found().hixl.map_err(io::Error::other)?;
        let device = hixl.device(self.device)?;
        if region.is_empty() {
            return Err(io::Error::other("an empty region cannot be lent"));
        }
        Ok(Arc::new(HixlMedium::new(&hixl, &device, self.host, self.endpoint(&device)?, region)))
    }

    /// The region exchanged through HCCL, each exchange within `stall`. The error says why it cannot be.
    /// `threads` counts those that the library may hold.
    pub(crate) fn hccl(
        &self,
        region: &Region,
        stall: Duration,
        threads: &TaskTracker,
    ) -> io::Result<Arc<dyn Medium>> {
        let hccl = self.found().hccl.map_err(io::Error::other)?;
        let device = hccl.device(self.device)?;
        Ok(Arc::new(HcclMedium::new(&hccl, &device, region, stall, threads.clone())))
    }
}

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

/// Reads bytes as what peers say of themselves: what is read is written the same again.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let address = std::str::from_utf8(bytes).ok().and_then(|text| text.parse::<hixl::HixlAddress>().ok());
    if let Some(address) = address {
        assert_eq!(address.to_string().parse::<hixl::HixlAddress>().ok(), Some(address));
    }
    if let Some(info) = hccl::RootInfo::from_bytes(bytes) {
        assert_eq!(info.as_bytes(), bytes);
    }
}

fn show(f: &mut fmt::Formatter<'_>, name: &str, found: Result<&Path, &Unavailable>) -> fmt::Result {
    match found {
        Ok(file) => write!(f, "{name} available ({})", file.display()),
        Err(why) => write!(f, "{name} {why}"),
    }
}
