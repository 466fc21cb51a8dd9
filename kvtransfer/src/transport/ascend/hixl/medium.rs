//! HIXL-CS as a medium of fetched slices.

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use parking_lot::Mutex;

use super::{Endpoint, Hixl, HixlAddress, HixlClient, HixlServer, Memory};
use crate::{
    Region,
    transport::{
        TransportKind,
        ascend::acl::Device,
        fetch::{Asking, Lent, Medium, RemoteRegion},
    },
};

/// A node's region, lent by one server to all peers: the library cannot shut a single one out, so one that was let in can
/// read until this node ends.
pub(crate) struct HixlMedium {
    hixl: Arc<Hixl>,
    device: Arc<Device>,
    endpoint: Endpoint,
    region: Region,
    memory: Memory,
    server: Arc<Mutex<HixlServer>>,
}

impl HixlMedium {
    /// Lends `region`; the library's own control connection is accepted at `host`.
    pub(crate) fn open(
        hixl: &Arc<Hixl>,
        device: &Arc<Device>,
        host: SocketAddr,
        endpoint: Endpoint,
        region: &Region,
    ) -> io::Result<Self> {
        let memory = if region.is_on_device() { Memory::Device } else { Memory::Host };
        let server = HixlServer::start(hixl, device, host, endpoint, region, memory)?;
        Ok(Self {
            hixl: hixl.clone(),
            device: device.clone(),
            endpoint,
            region: region.clone(),
            memory,
            server: Arc::new(Mutex::new(server)),
        })
    }
}

impl Medium for HixlMedium {
    fn kind(&self) -> TransportKind {
        TransportKind::Hixl
    }

    fn ask(&self) -> io::Result<(Box<dyn Asking>, Vec<u8>)> {
        let asking = Connecting {
            hixl: self.hixl.clone(),
            device: self.device.clone(),
            endpoint: self.endpoint,
            region: self.region.clone(),
            memory: self.memory,
        };
        Ok((Box::new(asking), Vec::new()))
    }

    fn lend(&self, _: &[u8]) -> io::Result<(Box<dyn Lent>, Vec<u8>)> {
        let address = self.server.lock().address();
        Ok((Box::new(Server(self.server.clone())), address.to_string().into_bytes()))
    }
}

/// Keeps the server for as long as a peer reads.
struct Server(#[expect(dead_code, reason = "kept, not used")] Arc<Mutex<HixlServer>>);

impl Lent for Server {}

/// A client to be.
struct Connecting {
    hixl: Arc<Hixl>,
    device: Arc<Device>,
    endpoint: Endpoint,
    region: Region,
    memory: Memory,
}

impl Asking for Connecting {
    fn connect(self: Box<Self>, grant: &[u8], deadline: Instant) -> io::Result<Box<dyn RemoteRegion>> {
        let Self { hixl, device, endpoint, region, memory } = *self;
        let address: HixlAddress = std::str::from_utf8(grant).map_err(io::Error::other)?.parse()?;
        Ok(Box::new(HixlClient::connect(&hixl, &device, endpoint, address, &region, memory, deadline)?))
    }
}
