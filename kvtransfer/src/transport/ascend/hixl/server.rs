//! The side that lends its region. It learns of nobody who reads from it: the engine above knows its peers, tells them
//! this server's address and drops the server once they are gone.

use std::{io, net::SocketAddr, ptr::null_mut, sync::Arc};

use super::{
    Endpoint, Hixl, HixlAddress, Memory, TAG,
    abi::{Config, OK, ServerDesc},
    described, host_text,
};
use crate::{Region, transport::ascend::acl::Device};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// A region that peers can read from, until this is dropped. All clients must have been destroyed by then.
pub(crate) struct HixlServer {
    hixl: Arc<Hixl>,
    device: Arc<Device>,
    address: HixlAddress,
    handle: *mut std::ffi::c_void,
    registration: Option<*mut std::ffi::c_void>,
    /// Alive for as long as it is registered.
    region: Region,
}

// SAFETY: the handles may be used from any thread that has set its context, by one at a time (`&mut self` or by value).
unsafe impl Send for HixlServer {}

impl HixlServer {
    /// Listens at `host` and lends `region`. Peers may be told the address once this has returned.
    pub(crate) fn start(
        hixl: &Arc<Hixl>,
        device: &Arc<Device>,
        host: SocketAddr,
        endpoint: Endpoint,
        region: &Region,
        memory: Memory,
    ) -> io::Result<Self> {
        if region.is_empty() {
            return Err(io::Error::other("an empty region cannot be lent"));
        }
        device.enter()?;
        let (text, endpoints) = (host_text(host)?, [endpoint.described()]);
        let desc = ServerDesc {
            endpoints: endpoints.as_ptr(),
            host: text.as_ptr(),
            port: host.port().into(),
            endpoint_count: 1,
            reserved: [0; 104],
        };
        let mut handle = null_mut();
        // SAFETY: the description, what it points to and the configuration live through the call; `handle` may be
        // written.
        let status = unsafe { (hixl.functions.server_create)(&desc, &Config::DEFAULT, &mut handle) };
        if status != OK {
            return Err(device.failed("HixlCSServerCreate", status.into()));
        }
        // From here on dropping it destroys the server.
        let mut server = Self {
            hixl: hixl.clone(),
            device: device.clone(),
            address: HixlAddress { host, endpoint },
            handle,
            registration: None,
            region: region.clone(),
        };
        // Listening comes first: CANN 9.0 refuses to listen once something is registered. Nobody knows the address yet,
        // so nobody connects in between.
        // SAFETY: a live server.
        let status = unsafe { (hixl.functions.server_listen)(handle, BACKLOG) };
        if status != OK {
            return Err(device.failed("HixlCSServerListen", status.into()));
        }
        server.register(memory)?;
        Ok(server)
    }

    fn register(&mut self, memory: Memory) -> io::Result<()> {
        let mut registration = null_mut();
        let mem = described(&self.region, memory);
        // SAFETY: a live server, and a region that `self` keeps alive until it is unregistered; the tag and the
        // description live through the call; `registration` may be written.
        let status = unsafe {
            (self.hixl.functions.server_register)(self.handle, TAG.as_ptr(), &mem, &mut registration)
        };
        if status != OK {
            return Err(self.device.failed("HixlCSServerRegMem", status.into()));
        }
        self.registration = Some(registration);
        Ok(())
    }

    /// What peers are told.
    pub(crate) fn address(&self) -> HixlAddress {
        self.address
    }

    fn stop(&mut self) -> io::Result<()> {
        self.device.enter()?;
        if let Some(registration) = self.registration {
            // SAFETY: a live server's registration, not unregistered before.
            let status = unsafe { (self.hixl.functions.server_unregister)(self.handle, registration) };
            if status != OK {
                return Err(self.device.failed("HixlCSServerUnregMem", status.into()));
            }
            self.registration = None;
        }
        // SAFETY: a live server, not used again.
        let status = unsafe { (self.hixl.functions.server_destroy)(self.handle) };
        if status != OK { Err(self.device.failed("HixlCSServerDestroy", status.into())) } else { Ok(()) }
    }
}

impl Drop for HixlServer {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(
                address = %self.address, %error,
                "a HIXL server could not be taken down; its region stays in memory, as peers may still read it"
            );
            std::mem::forget(self.region.clone());
        }
    }
}
