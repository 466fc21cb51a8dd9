//! A node's rails: every RoCE port that can be used, with the node's region registered.
//!
//! Rails of two nodes are matched in the order of their devices' names and ports, so nodes of a cluster should have
//! their networks in the same order.

use std::{io, sync::Arc};

use super::{
    device::{ActivePort, Device},
    library::Library,
    memory::{MemoryRegion, ProtectionDomain},
    parameters::{Endpoint, MAX_RAILS},
    probe::Unavailable,
    queue_pair::QueuePair,
    rail::Rail,
};
use crate::Region;

/// Most requests of a reader in a queue.
const DEPTH: u32 = 128;
/// Most reads at a time on the way between two queue pairs.
const READS: u8 = 16;

/// The rails of one node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Rails {
    rails: Arc<[LocalRail]>,
    region: Region,
}

pub(super) struct LocalRail {
    pub(super) name: String,
    port: ActivePort,
    memory: Arc<MemoryRegion>,
}

impl Rails {
    /// Registers `region` with every device that has a port to use.
    ///
    /// # Errors
    /// If there is none, or the region can be registered with none of them.
    pub(crate) fn open(region: &Region) -> io::Result<Self> {
        let unavailable = |why: Unavailable| io::Error::new(io::ErrorKind::Unsupported, why);
        let mut reasons = Vec::new();
        let library = Library::get().map_err(unavailable)?;
        let mut devices = Device::open_all(library, &mut reasons).map_err(unavailable)?;
        devices.sort_by(|one, other| one.name().cmp(other.name()));
        let mut rails = Vec::new();
        for device in devices {
            let ports = device.ports(&mut reasons);
            if ports.is_empty() {
                continue;
            }
            match ProtectionDomain::new(device.clone())
                .and_then(|domain| MemoryRegion::register(Arc::new(domain), region))
            {
                Ok(memory) => {
                    let memory = Arc::new(memory);
                    rails.extend(ports.into_iter().map(|port| LocalRail {
                        name: format!("{}/{}", device.name(), port.number),
                        port,
                        memory: memory.clone(),
                    }));
                }
                Err(error) => reasons.push(format!("{}: {error}", device.name())),
            }
        }
        rails.truncate(MAX_RAILS);
        if rails.is_empty() {
            return Err(unavailable(Unavailable::NoPort(reasons)));
        }
        if !reasons.is_empty() {
            tracing::warn!(rails = rails.len(), ?reasons, "some RDMA ports are not used");
        }
        Ok(Self { rails: rails.into(), region: region.clone() })
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &LocalRail> {
        self.rails.iter()
    }
}

impl LocalRail {
    pub(super) fn port(&self) -> &ActivePort {
        &self.port
    }

    pub(super) fn memory(&self) -> &Arc<MemoryRegion> {
        &self.memory
    }

    fn device(&self) -> &Device {
        self.memory.domain().device()
    }

    /// A new queue pair to read with, and what the owner has to know of it.
    pub(super) fn reading_end(&self) -> io::Result<(QueuePair, Endpoint)> {
        let pair = QueuePair::new(self.memory.clone(), &self.port, self.depth(), false)?;
        let end = self.endpoint(&pair, self.device().reads_out());
        Ok((pair, end))
    }

    /// A new queue pair for a peer to read through, and what the peer has to know of it.
    pub(super) fn serving_end(&self) -> io::Result<(QueuePair, Endpoint)> {
        let pair = QueuePair::new(self.memory.clone(), &self.port, 1, true)?;
        let end = self.endpoint(&pair, self.device().reads_in());
        Ok((pair, end))
    }

    /// Room in a reader's queue.
    pub(super) fn depth(&self) -> u32 {
        DEPTH.min(self.device().max_requests()).max(Rail::MIN_DEPTH)
    }

    fn endpoint(&self, pair: &QueuePair, reads: u8) -> Endpoint {
        Endpoint {
            number: pair.number(),
            psn: rand::random::<u32>() >> 8,
            gid: self.port.gid,
            mtu: self.port.mtu,
            reads: reads.clamp(1, READS),
        }
    }
}
