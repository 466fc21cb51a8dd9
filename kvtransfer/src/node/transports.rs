//! Which of the transports that a node is given can be had on this host.

use std::{io, sync::Arc};

use tokio_util::task::TaskTracker;

use super::config::TransportConfig;
use crate::{
    Region, TransferError,
    transport::{DataPort, Faulty, Fetched, Medium, Observed, Shm, Tcp, Terms, Transport, Waits},
};

/// What a node's transports are made of.
pub(super) struct Means<'a> {
    pub(super) region: &'a Region,
    pub(super) port: &'a Arc<DataPort>,
    pub(super) terms: Terms,
    /// What threads of transports are counted by.
    pub(super) threads: &'a TaskTracker,
}

impl Means<'_> {
    /// Those that can be had, in their order; the others are logged with the reason. None at all is an error.
    pub(super) fn open(&self, configs: Vec<TransportConfig>) -> Result<Vec<Observed>, TransferError> {
        let mut transports: Vec<Observed> = Vec::new();
        let mut reasons = Vec::new();
        for config in configs {
            let kind = config.kind();
            if transports.iter().any(|other| other.kind() == kind) {
                return Err(TransferError::Invalid(format!("transport {kind} is named twice")));
            }
            match self.open_one(config) {
                Ok(transport) => transports.push(Observed::new(transport, self.terms.slice_bytes.into())),
                Err(reason) => {
                    tracing::info!(%reason, "KV caches will not travel over {kind}");
                    reasons.push(format!("{kind}: {reason}"));
                }
            }
        }
        if transports.is_empty() {
            return Err(TransferError::Invalid(format!("no transport can be had ({})", reasons.join("; "))));
        }
        Ok(transports)
    }

    fn open_one(&self, config: TransportConfig) -> io::Result<Box<dyn Transport>> {
        let Self { region, port, terms, threads } = *self;
        let fetched = |medium: Arc<dyn Medium>| -> Box<dyn Transport> {
            Box::new(Fetched::new(medium, port.clone(), terms, threads.clone()))
        };
        let in_place = || match region.is_on_device() {
            true => {
                Err(io::Error::other("the KV pool is a device's memory, which the CPU cannot read in place"))
            }
            false => Ok(()),
        };
        match config {
            TransportConfig::Tcp { connections } => {
                in_place()?;
                Ok(Box::new(Tcp::new(port.clone(), connections, terms)))
            }
            TransportConfig::Shm => {
                in_place()?;
                Ok(Box::new(Shm::new(region, terms, threads.clone())?))
            }
            TransportConfig::Rdma => {
                in_place()?;
                Ok(fetched(rdma(region, terms.waits)?))
            }
            TransportConfig::Faulty(config, faults) => {
                Ok(Box::new(Faulty::new(self.open_one(*config)?, faults)))
            }
            TransportConfig::Hixl(config) => Ok(fetched(config.hixl(region)?)),
            TransportConfig::Hccl(config) => Ok(fetched(config.hccl(region, terms.waits.stall, threads)?)),
        }
    }
}

#[cfg(all(feature = "rdma", target_os = "linux", target_pointer_width = "64"))]
fn rdma(region: &Region, waits: Waits) -> io::Result<Arc<dyn Medium>> {
    Ok(Arc::new(crate::transport::RdmaMedium::open(region, waits)?))
}

#[cfg(not(all(feature = "rdma", target_os = "linux", target_pointer_width = "64")))]
fn rdma(_: &Region, _: Waits) -> io::Result<Arc<dyn Medium>> {
    Err(io::Error::other("this build has no RDMA (feature `rdma`, 64-bit Linux)"))
}
