//! RDMA devices: listing, opening, and asking for what they can do and where they can be reached.

use std::{
    ffi::{CStr, c_int},
    io,
    net::Ipv6Addr,
    ptr::NonNull,
    sync::Arc,
};

use super::{
    abi::{self, Zeroed},
    library::Library,
    unavailable::Unavailable,
};

/// Most addresses of one device that are looked at.
const GIDS: usize = 1024;

/// An opened device. Closed when the last object made on it has gone.
pub(super) struct Device {
    library: &'static Library,
    context: NonNull<abi::RawContext>,
    name: String,
    attributes: abi::DeviceAttributes,
}

// SAFETY: libibverbs may be called from any thread, and what is here does not change.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A port in use for RoCEv2.
#[derive(Debug, Clone, Copy)]
pub(super) struct ActivePort {
    pub(super) number: u8,
    pub(super) gid: [u8; 16],
    pub(super) gid_index: u8,
    /// As verbs count it: 1 is 256 bytes, and each next is twice as long.
    pub(super) mtu: u8,
    pub(super) max_message_bytes: u32,
}

impl Device {
    /// Opens all devices; those that cannot be are passed over, and `reasons` says why.
    pub(super) fn open_all(
        library: &'static Library,
        reasons: &mut Vec<String>,
    ) -> Result<Vec<Arc<Self>>, Unavailable> {
        let mut count: c_int = 0;
        // SAFETY: `count` is there for the library to write to.
        let list = unsafe { (library.get_device_list)(&mut count) };
        if list.is_null() {
            return Err(Unavailable::NoDevice); // a kernel without RDMA
        }
        let mut devices = Vec::new();
        for at in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` entries and lives until it is freed below.
            let device = unsafe { *list.add(at) };
            match Self::open(library, device) {
                Ok(device) => devices.push(Arc::new(device)),
                Err(reason) => reasons.push(reason),
            }
        }
        // SAFETY: freed once; devices that were opened outlive their list.
        unsafe { (library.free_device_list)(list) };
        if devices.is_empty() && reasons.is_empty() { Err(Unavailable::NoDevice) } else { Ok(devices) }
    }

    fn open(library: &'static Library, device: *mut abi::RawDevice) -> Result<Self, String> {
        // SAFETY: an entry of the device list; its name is text that ends with a zero and lives as long as the entry.
        let name =
            unsafe { CStr::from_ptr((library.get_device_name)(device)) }.to_string_lossy().into_owned();
        // SAFETY: an entry of the device list.
        let context = NonNull::new(unsafe { (library.open_device)(device) })
            .ok_or_else(|| format!("{name} cannot be opened: {}", io::Error::last_os_error()))?;
        let mut opened = Self { library, context, name, attributes: abi::DeviceAttributes::zeroed() };
        // SAFETY: an open device, and room for the answer.
        let code = unsafe { (library.query_device)(context.as_ptr(), &mut opened.attributes) };
        check(code, &format!("ask {} what it can do", opened.name)).map_err(|error| error.to_string())?;
        Ok(opened)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn library(&self) -> &'static Library {
        self.library
    }

    /// Valid as long as `self`.
    pub(super) fn context(&self) -> *mut abi::RawContext {
        self.context.as_ptr()
    }

    /// Most requests in a queue.
    pub(super) fn max_requests(&self) -> u32 {
        let most = self.attributes.max_qp_wr.min(self.attributes.max_cqe.saturating_sub(1));
        u32::try_from(most).unwrap_or(1).max(1)
    }

    pub(super) fn max_region_bytes(&self) -> u64 {
        self.attributes.max_mr_size
    }

    /// Most reads that one of its queue pairs can have on the way to a peer.
    pub(super) fn reads_out(&self) -> u8 {
        u8::try_from(self.attributes.max_qp_init_rd_atom.max(0)).unwrap_or(u8::MAX)
    }

    /// Most reads of a peer that one of its queue pairs can be answering.
    pub(super) fn reads_in(&self) -> u8 {
        u8::try_from(self.attributes.max_qp_rd_atom.max(0)).unwrap_or(u8::MAX)
    }

    pub(super) fn port_numbers(&self) -> impl Iterator<Item = u8> + use<> {
        1..=self.attributes.ports
    }

    pub(super) fn is_ethernet(&self, port: u8) -> bool {
        self.query_port(port).is_ok_and(|port| port.link_layer == abi::LINK_LAYER_ETHERNET)
    }

    /// A port as it is now, if it can be used.
    ///
    /// # Errors
    /// Why it cannot, in words.
    pub(super) fn port(&self, number: u8) -> Result<ActivePort, String> {
        self.active_port(number).map_err(|reason| format!("{} port {number} {reason}", self.name))
    }

    fn query_port(&self, number: u8) -> io::Result<abi::PortAttributes> {
        let mut port = abi::PortAttributes::zeroed();
        // SAFETY: an open device, and room for the answer.
        let code = unsafe { (self.library.query_port)(self.context(), number, &mut port) };
        check(code, "be asked for its state").map(|()| port)
    }

    fn active_port(&self, number: u8) -> Result<ActivePort, String> {
        let port = self.query_port(number).map_err(|error| error.to_string())?;
        if port.link_layer != abi::LINK_LAYER_ETHERNET {
            return Err("is InfiniBand: only RoCE is supported so far".into());
        }
        if port.state != abi::PORT_ACTIVE {
            return Err(format!("is down (state {})", port.state));
        }
        let (gid, index) = choose_gid(&self.gids(), number)
            .ok_or("has no RoCEv2 address: its network device needs an IP address")?;
        let mtu = u8::try_from(port.active_mtu).unwrap_or(0).clamp(1, 5);
        Ok(ActivePort { number, gid, gid_index: index, mtu, max_message_bytes: port.max_message_bytes })
    }

    fn gids(&self) -> Vec<abi::GidEntry> {
        let mut entries = vec![abi::GidEntry::zeroed(); GIDS];
        // SAFETY: an open device, room for `GIDS` entries, and their true size.
        let count = unsafe {
            (self.library.query_gid_table)(
                self.context(),
                entries.as_mut_ptr(),
                GIDS,
                0,
                size_of::<abi::GidEntry>(),
            )
        };
        entries.truncate(usize::try_from(count).unwrap_or(0));
        entries
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: closed once; everything made on it holds it and has gone before.
        let code = unsafe { (self.library.close_device)(self.context()) };
        if let Err(error) = check(code, "close it") {
            tracing::warn!(device = self.name, %error, "RDMA device not closed");
        }
    }
}

/// The RoCEv2 address of a port: IPv4 before routable IPv6 before link-local.
fn choose_gid(gids: &[abi::GidEntry], port: u8) -> Option<([u8; 16], u8)> {
    let rank = |gid: [u8; 16]| match Ipv6Addr::from(gid) {
        ip if ip.to_ipv4_mapped().is_some() => 0,
        ip if !ip.is_unicast_link_local() => 1,
        _ => 2,
    };
    gids.iter()
        .filter(|entry| {
            entry.port == u32::from(port) && entry.kind == abi::GID_ROCE_V2 && entry.gid != [0; 16]
        })
        .filter_map(|entry| Some((entry.gid, u8::try_from(entry.index).ok()?)))
        .min_by_key(|(gid, index)| (rank(*gid), *index))
}

/// The error number that a function of the library returned.
pub(super) fn check(code: c_int, what: &str) -> io::Result<()> {
    match code {
        0 => Ok(()),
        code => Err(failure(what, &io::Error::from_raw_os_error(code.abs()))),
    }
}

/// What a function of the library returned, if not null.
pub(super) fn made<T>(pointer: *mut T, what: &str) -> io::Result<NonNull<T>> {
    let error = io::Error::last_os_error();
    NonNull::new(pointer).ok_or_else(|| failure(what, &error))
}

fn failure(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_the_first_choice() {
        let entry = |address: &str, index, port, kind| {
            let gid = address.parse::<Ipv6Addr>().expect("an address").octets();
            abi::GidEntry { gid, index, port, kind, interface: 0 }
        };
        let gids = [
            entry("fe80::1", 0, 1, 1),
            entry("fe80::1", 1, 1, 2),
            entry("2001:db8::1", 2, 1, 2),
            entry("::ffff:10.0.0.1", 3, 1, 1),
            entry("::ffff:10.0.0.1", 4, 1, 2),
            entry("::ffff:10.0.0.2", 5, 2, 2),
            entry("fe80::3", 6, 3, 2),
            entry("fe80::4", 300, 4, 2),
        ];
        let chosen = |port| choose_gid(&gids, port).map(|(_, index)| index);
        assert_eq!((chosen(1), chosen(2), chosen(3)), (Some(4), Some(5), Some(6)));
        assert_eq!(chosen(4), None, "an index that a queue pair cannot name");
        assert_eq!(chosen(5), None);
        assert_eq!(choose_gid(&gids[..4], 1).map(|(_, index)| index), Some(2));
    }
}
