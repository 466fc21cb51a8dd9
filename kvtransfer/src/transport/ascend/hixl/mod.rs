//! HIXL-CS, the first choice on Ascend: one side lends a region ([`HixlServer`]), the other reads from it with the
//! device's own RDMA ([`HixlClient`], a [`RemoteRegion`](crate::transport::fetch::RemoteRegion)).
//!
//! Its rules, kept here so that no caller needs to know them: a thread sets its context before it calls; all memory is
//! registered before connecting, and unregistered once nobody is connected; at most [`client::MOST_BATCHES`] batches are
//! under way; a batch that failed or timed out cannot be cancelled, so its client is destroyed, which is the fence.
//!
//! Server and client of one pair live in different processes; a trial with both in one process could not listen.

mod abi;
mod client;
mod medium;
mod server;

use std::{
    ffi::CString,
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
};

use self::abi::{CommMem, EndpointDesc, HixlFunctions};
use super::{
    acl::{Acl, Device},
    library::{Search, Unavailable},
};
use crate::Region;

pub(crate) use client::HixlClient;
pub(crate) use medium::HixlMedium;
pub(crate) use server::HixlServer;

/// The name under which a server's region is registered; the library adds regions of its own.
const TAG: &std::ffi::CStr = c"baton-kv";

/// The library and the runtime it stands on.
pub(crate) struct Hixl {
    functions: HixlFunctions,
    acl: Arc<Acl>,
    pub(crate) file: PathBuf,
}

impl Hixl {
    pub(crate) fn open(search: &Search, acl: Arc<Acl>) -> Result<Arc<Self>, Unavailable> {
        let library = search.open(&["libcann_hixl.so"])?;
        let functions = HixlFunctions::open(&library)?;
        Ok(Arc::new(Self { functions, acl, file: library.keep() }))
    }

    pub(crate) fn device(&self, id: u32) -> io::Result<Arc<Device>> {
        self.acl.device(id)
    }
}

/// Where a region's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Allocated by the runtime (`aclrtMalloc`).
    Device,
    /// Ordinary memory. Not `aclrtMallocHost`'s, which cannot be registered.
    Host,
}

fn described(region: &Region, memory: Memory) -> CommMem {
    let kind = match memory {
        Memory::Device => 0,
        Memory::Host => 1,
    };
    CommMem { kind, address: region.base().as_ptr().cast(), size: region.len() as u64 }
}

/// A device's port on the network of the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) physical_device: u32,
}

impl Endpoint {
    /// Of a device of this host, by the host's network configuration (the text of `/etc/hccn.conf`).
    pub(crate) fn configured(device: &Device, hccn_conf: &str) -> io::Result<Self> {
        let physical = device.physical.ok_or_else(|| {
            io::Error::other("the ACL runtime is too old to say which physical device this is")
        })?;
        let key = format!("address_{physical}");
        let lines = hccn_conf.lines().filter_map(|line| line.split_once('='));
        let Some((_, value)) = lines.into_iter().find(|(name, _)| name.trim() == key) else {
            return Err(io::Error::other(format!(
                "/etc/hccn.conf has no {key}: give the device a RoCE address"
            )));
        };
        let address = value.trim().parse();
        let address =
            address.map_err(|_| io::Error::other(format!("/etc/hccn.conf: {key} is no address: {value}")))?;
        Ok(Self { address, physical_device: physical })
    }

    fn described(self) -> EndpointDesc {
        EndpointDesc::device(self.address, self.physical_device)
    }
}

/// What a peer must know to read from a server, as it is told on the control stream: `host:port/address/device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HixlAddress {
    /// Where the library's own control connection is accepted, on the network of the hosts.
    pub(crate) host: SocketAddr,
    pub(crate) endpoint: Endpoint,
}

impl fmt::Display for HixlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.host, self.endpoint.address, self.endpoint.physical_device)
    }
}

impl FromStr for HixlAddress {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let mut parts = text.split('/');
        let parsed = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(host), Some(address), Some(device), None) => {
                host.parse().ok().zip(address.parse().ok()).zip(device.parse().ok()).map(
                    |((host, address), physical_device)| Self {
                        host,
                        endpoint: Endpoint { address, physical_device },
                    },
                )
            }
            _ => None,
        };
        parsed.ok_or_else(|| io::Error::other(format!("not the address of a HIXL server: {text:?}")))
    }
}

/// The library takes a host's address as text and its port apart.
fn host_text(host: SocketAddr) -> io::Result<CString> {
    CString::new(host.ip().to_string()).map_err(io::Error::other)
}
