//! Slices over TCP: frames written from and read into the KV pool itself, vectored, with no staging copy.
//!
//! The sender opens a few connections per peer (`lane`), the receiver accepts them (`port`); each frame stands for
//! itself, so slices of many transfers share a connection and any slice may take any connection.

mod frame;
mod lane;
mod port;

use std::{net::TcpListener, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Inbox, Outbox, Transport};
use crate::{Limits, TransferError};

use frame::MAX_FRAME_SLICES;

/// What lanes and ports are run with.
#[derive(Debug, Clone)]
struct Terms {
    slice_bytes: u32,
    frame_slices: u32,
    connections_per_peer: usize,
    connections: usize,
    connect: Duration,
    fence_grace: Duration,
    stall: Duration,
}

/// The transport of kind `tcp`.
pub(crate) struct Tcp {
    terms: Terms,
    listener: Mutex<Option<tokio::net::TcpListener>>,
    address: String,
}

impl Tcp {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(
        listener: TcpListener,
        advertise: Option<String>,
        slice_bytes: u64,
        limits: &Limits,
    ) -> Result<Self, TransferError> {
        let failed =
            |what| move |error: std::io::Error| TransferError::Io { what, reason: error.to_string() };
        let slice_bytes = u32::try_from(slice_bytes)
            .map_err(|_| TransferError::Invalid("slices over TCP must be smaller than 4 GiB".into()))?;
        let local = listener.local_addr().map_err(failed("read the data listener's address"))?;
        listener.set_nonblocking(true).map_err(failed("make the data listener non-blocking"))?;
        let listener =
            tokio::net::TcpListener::from_std(listener).map_err(failed("register the data listener"))?;
        let frame_slices = u32::try_from(limits.frame_bytes / slice_bytes as usize).unwrap_or(u32::MAX);
        Ok(Self {
            terms: Terms {
                slice_bytes,
                frame_slices: frame_slices.clamp(1, MAX_FRAME_SLICES),
                connections_per_peer: limits.data_connections_per_peer,
                connections: limits.data_connections,
                connect: limits.handshake,
                fence_grace: limits.fence_grace,
                stall: limits.data_stall,
            },
            listener: Mutex::new(Some(listener)),
            address: advertise.unwrap_or_else(|| local.to_string()),
        })
    }
}

impl Transport for Tcp {
    fn kind(&self) -> &'static str {
        "tcp"
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken) {
        if let Some(listener) = self.listener.lock().take() {
            tasks.spawn(port::serve(listener, self.terms.clone(), inbox, tasks.clone(), stop));
        }
    }

    fn send(&self, address: String, outbox: Arc<Outbox>, tasks: &TaskTracker, stop: CancellationToken) {
        for _ in 0..self.terms.connections_per_peer {
            let lane = lane::Lane::new(address.clone(), self.terms.clone(), outbox.clone());
            tasks.spawn(lane.run(stop.clone()));
        }
    }
}
