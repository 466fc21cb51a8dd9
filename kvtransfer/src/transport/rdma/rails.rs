//! A node's rails: the RoCE ports of the machine, with the node's region registered.
//!
//! A rail is known by its place among all ports in the order of their devices' names, up or down. Rails of two nodes
//! belong to the same network if they have the same place, so nodes of a cluster should have their networks in the same
//! order. Which ports are up is asked each time a peer is connected: one that went down is left out until it is back.

use std::{io, sync::Arc};

use super::{
    device::{ActivePort, Device},
    library::Library,
    memory::{MemoryRegion, ProtectionDomain},
    parameters::{Endpoint, MAX_RAILS},
    queue_pair::QueuePair,
    rail::Rail,
    unavailable::Unavailable,
};
use crate::{Region, transport::Waits};

/// Most requests of a reader in a queue.
const DEPTH: u32 = 128;
/// Most reads at a time on the way between two queue pairs.
const READS: u8 = 16;

/// The rails of one node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Rails {
    rails: Arc<[LocalRail]>,
    region: Region,
    waits: Waits,
}

/// One port, up or down.
struct LocalRail {
    place: u8,
    number: u8,
    memory: Arc<MemoryRegion>,
}

/// A port that is up.
pub(super) struct ActiveRail {
    pub(super) place: u8,
    pub(super) port: ActivePort,
    memory: Arc<MemoryRegion>,
    waits: Waits,
}

impl Rails {
    /// Registers `region` with every device that has RoCE ports.
    ///
    /// # Errors
    /// If none of them is up, or the region can be registered with none.
    pub(crate) fn open(region: &Region, waits: Waits) -> io::Result<Self> {
        let mut reasons = Vec::new();
        let library = Library::get().map_err(unavailable)?;
        let mut devices = Device::open_all(library, &mut reasons).map_err(unavailable)?;
        devices.sort_by(|one, other| one.name().cmp(other.name()));
        let mut rails = Vec::new();
        let mut places = 0..=u8::MAX;
        for device in devices {
            let ports: Vec<_> = device.port_numbers().zip(places.by_ref()).collect();
            if !ports.iter().any(|(number, _)| device.is_ethernet(*number)) {
                reasons.push(format!("{}: only RoCE is supported so far", device.name()));
                continue;
            }
            match ProtectionDomain::new(device.clone())
                .and_then(|domain| MemoryRegion::register(Arc::new(domain), region))
            {
                Ok(memory) => {
                    let memory = Arc::new(memory);
                    rails.extend(ports.into_iter().map(|(number, place)| LocalRail {
                        place,
                        number,
                        memory: memory.clone(),
                    }));
                }
                Err(error) => reasons.push(format!("{}: {error}", device.name())),
            }
        }
        if !reasons.is_empty() {
            tracing::warn!(ports = rails.len(), ?reasons, "some RDMA devices are not used");
        }
        let rails = Self { rails: rails.into(), region: region.clone(), waits };
        rails.active_or(reasons)?;
        Ok(rails)
    }

    pub(super) fn waits(&self) -> Waits {
        self.waits
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    /// Those that are up now.
    ///
    /// # Errors
    /// If there are none.
    pub(super) fn active(&self) -> io::Result<Vec<ActiveRail>> {
        self.active_or(Vec::new())
    }

    fn active_or(&self, mut reasons: Vec<String>) -> io::Result<Vec<ActiveRail>> {
        let mut active = Vec::new();
        for LocalRail { place, number, memory } in &*self.rails {
            match memory.domain().device().port(*number) {
                Ok(port) => {
                    active.push(ActiveRail { place: *place, port, memory: memory.clone(), waits: self.waits })
                }
                Err(reason) => reasons.push(reason),
            }
        }
        active.truncate(MAX_RAILS);
        if active.is_empty() { Err(unavailable(Unavailable::NoPort(reasons))) } else { Ok(active) }
    }
}

impl ActiveRail {
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.device().name(), self.port.number)
    }

    pub(super) fn memory(&self) -> &Arc<MemoryRegion> {
        &self.memory
    }

    fn device(&self) -> &Device {
        self.memory.domain().device()
    }

    /// A new queue pair to read with, and what the owner has to know of it.
    pub(super) fn reading_end(&self) -> io::Result<(QueuePair, Endpoint)> {
        let pair = QueuePair::new(self.memory.clone(), &self.port, self.depth(), false, self.waits)?;
        let end = self.endpoint(&pair, self.place, self.device().reads_out());
        Ok((pair, end))
    }

    /// A new queue pair for a peer to read through, on the peer's rail `place`, and what the peer has to know of it.
    pub(super) fn serving_end(&self, place: u8) -> io::Result<(QueuePair, Endpoint)> {
        let pair = QueuePair::new(self.memory.clone(), &self.port, 1, true, self.waits)?;
        let end = self.endpoint(&pair, place, self.device().reads_in());
        Ok((pair, end))
    }

    /// Room in a reader's queue.
    pub(super) fn depth(&self) -> u32 {
        DEPTH.min(self.device().max_requests()).max(Rail::MIN_DEPTH)
    }

    fn endpoint(&self, pair: &QueuePair, place: u8, reads: u8) -> Endpoint {
        Endpoint {
            place,
            number: pair.number(),
            psn: rand::random::<u32>() >> 8,
            gid: self.port.gid,
            mtu: self.port.mtu,
            reads: reads.clamp(1, READS),
        }
    }
}

fn unavailable(why: Unavailable) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}
