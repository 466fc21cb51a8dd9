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
/// read until this node ends. Nor can it ask for a credential: once the server listens, whoever reaches it can read. So
/// it starts with the first peer that is entitled to ask.
pub(crate) struct HixlMedium {
    hixl: Arc<Hixl>,
    device: Arc<Device>,
    host: SocketAddr,
    endpoint: Endpoint,
    region: Region,
    memory: Memory,
    /// `None` until a peer has asked.
    server: Mutex<Option<Arc<Mutex<HixlServer>>>>,
}

impl HixlMedium {
    /// To lend `region`; the library's own control connection will be accepted at `host`.
    pub(crate) fn new(
        hixl: &Arc<Hixl>,
        device: &Arc<Device>,
        host: SocketAddr,
        endpoint: Endpoint,
        region: &Region,
    ) -> Self {
        let memory = if region.is_on_device() { Memory::Device } else { Memory::Host };
        let (hixl, device, region) = (hixl.clone(), device.clone(), region.clone());
        Self { hixl, device, host, endpoint, region, memory, server: Mutex::default() }
    }

    /// The server, which listens from now on.
    fn listening(&self) -> io::Result<Arc<Mutex<HixlServer>>> {
        let Self { hixl, device, host, endpoint, region, memory, server } = self;
        let mut server = server.lock();
        if let Some(server) = &*server {
            return Ok(server.clone());
        }
        let started = HixlServer::start(hixl, device, *host, *endpoint, region, *memory)?;
        tracing::info!(%host, "whoever reaches this address can read the KV pool through HIXL from now on");
        Ok(server.insert(Arc::new(Mutex::new(started))).clone())
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
        let server = self.listening()?;
        let address = server.lock().address();
        Ok((Box::new(Server(server)), address.to_string().into_bytes()))
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
