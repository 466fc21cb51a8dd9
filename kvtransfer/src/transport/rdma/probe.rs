//! Whether this machine can do RDMA, and if not why.

use super::{device::Device, library::Library, unavailable::Unavailable};

/// A port that RDMA can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    /// Its device, e.g. `mlx5_0`.
    pub(crate) device: String,
    /// Counted from 1.
    pub(crate) number: u8,
    /// Its RoCEv2 address.
    pub(crate) gid: std::net::Ipv6Addr,
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} ({})", self.device, self.number, self.gid)
    }
}

/// The RDMA ports that can be used now.
pub(crate) fn probe() -> Result<Vec<Port>, Unavailable> {
    let mut ports = Vec::new();
    let mut reasons = Vec::new();
    for device in Device::open_all(Library::get()?, &mut reasons)? {
        for number in device.port_numbers() {
            match device.port(number) {
                Ok(port) => {
                    ports.push(Port { device: device.name().to_owned(), number, gid: port.gid.into() })
                }
                Err(reason) => reasons.push(reason),
            }
        }
    }
    if ports.is_empty() { Err(Unavailable::NoPort(reasons)) } else { Ok(ports) }
}
