//! RDMA as a medium of fetched slices.

use std::{io, time::Instant};

use super::{Dial, Rails, Serving};
use crate::{
    Region,
    transport::{
        TransportKind, Waits,
        fetch::{Asking, Lent, Medium, RemoteRegion},
    },
};

/// A node's region, registered with the RDMA devices of the machine.
pub(crate) struct RdmaMedium {
    rails: Rails,
}

impl RdmaMedium {
    /// Registers `region`, which takes all of its memory from the system. The error says why there is no RDMA.
    pub(crate) fn open(region: &Region, waits: Waits) -> io::Result<Self> {
        Ok(Self { rails: Rails::open(region, waits)? })
    }
}

impl Medium for RdmaMedium {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn ask(&self) -> io::Result<(Box<dyn Asking>, Vec<u8>)> {
        let (dial, request) = Dial::new(&self.rails)?;
        Ok((Box::new(dial), request))
    }

    fn lend(&self, request: &[u8]) -> io::Result<(Box<dyn Lent>, Vec<u8>)> {
        let (serving, answer) = Serving::new(&self.rails, request)?;
        tracing::debug!(rails = serving.rails(), "a peer may read this node's region over RDMA");
        Ok((Box::new(serving), answer))
    }
}

impl Asking for Dial {
    fn connect(self: Box<Self>, grant: &[u8], _: Instant) -> io::Result<Box<dyn RemoteRegion>> {
        let region = Dial::connect(*self, grant)?;
        tracing::debug!(rails = region.rails(), "reading a peer's region over RDMA");
        Ok(Box::new(region))
    }
}

impl Lent for Serving {}
