//! The sockets that outlive any one process: bound here, once, and handed to whichever process serves them now. While
//! that process is being started again, connections wait in the socket's queue instead of being refused.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs},
    os::fd::OwnedFd,
    sync::Arc,
};

use baton_process::{Listen, ListenError};

/// Bound listeners and where they are.
#[derive(Debug)]
pub(super) struct Addresses {
    /// The OpenAI API.
    pub(super) http: SocketAddr,
    /// The controller's gRPC.
    pub(super) controller: SocketAddr,
    /// The coordinator's gRPC for operators.
    pub(super) coordinator_admin: SocketAddr,
    /// The coordinator's metrics and probes, where they are apart from the API.
    pub(super) coordinator_metrics: Option<SocketAddr>,
    pub(super) listeners: Listeners,
}

#[derive(Debug, Clone)]
pub(super) struct Listeners {
    pub(super) http: Arc<OwnedFd>,
    pub(super) controller: Arc<OwnedFd>,
    pub(super) coordinator_admin: Arc<OwnedFd>,
    pub(super) coordinator_metrics: Option<Arc<OwnedFd>>,
}

impl Addresses {
    /// The public addresses as asked for, the others on free ports of the loopback.
    pub(super) fn bind(http: &Listen, metrics: Option<&Listen>) -> Result<Self, ListenError> {
        let (http_at, http) = bound(http)?;
        let (controller_at, controller) = bound(&Listen::loopback())?;
        let (admin_at, coordinator_admin) = bound(&Listen::loopback())?;
        let (metrics_at, coordinator_metrics) = metrics.map(bound).transpose()?.unzip();
        let listeners = Listeners { http, controller, coordinator_admin, coordinator_metrics };
        Ok(Self {
            http: http_at,
            controller: controller_at,
            coordinator_admin: admin_at,
            coordinator_metrics: metrics_at,
            listeners,
        })
    }
}

impl Addresses {
    /// Where it is asked whether the coordinator is ready, by its `metrics_listen`.
    pub(super) fn probed(&self, metrics_listen: &str) -> Result<SocketAddr, ListenError> {
        if metrics_listen.is_empty() {
            return Ok(reachable(self.http));
        }
        let listen: Listen = metrics_listen.parse()?;
        let Listen::Address { host, port } = &listen else {
            return Ok(reachable(self.coordinator_metrics.unwrap_or(self.http)));
        };
        if listen.is_everywhere() {
            return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, *port)));
        }
        let bad = |source| ListenError::Bind { address: listen.to_string(), source };
        let found = (host.as_str(), *port).to_socket_addrs().map_err(bad)?.next();
        let found = found.ok_or_else(|| bad(std::io::ErrorKind::AddrNotAvailable.into()))?;
        Ok(reachable(found))
    }
}

/// Where this machine reaches an address: one that means "all addresses" is reached at the loopback.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    let loopback: IpAddr =
        if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let ip = if address.ip().is_unspecified() { loopback } else { address.ip() };
    SocketAddr::new(ip, address.port())
}

fn bound(listen: &Listen) -> Result<(SocketAddr, Arc<OwnedFd>), ListenError> {
    let listener: TcpListener = listen.bind()?;
    let at = listener.local_addr();
    let mut at = at.map_err(|source| ListenError::Bind { address: listen.to_string(), source })?;
    if listen.is_everywhere() {
        // The loopback of IPv6 is missing where that of IPv4 is there: in many containers.
        at.set_ip(Ipv4Addr::UNSPECIFIED.into());
    }
    Ok((at, Arc::new(listener.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_reached_at_the_loopback() {
        let at = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(at("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(at("[::]:80"), "[::1]:80");
        assert_eq!(at("192.0.2.1:80"), "192.0.2.1:80");
    }

    #[test]
    fn readiness_is_asked_where_metrics_are() {
        let at: Listen = "0.0.0.0:0".parse().unwrap();
        let addresses = Addresses::bind(&Listen::loopback(), Some(&at)).unwrap();
        let metrics = addresses.coordinator_metrics.unwrap();
        assert_eq!(addresses.probed("").unwrap(), addresses.http);
        assert_eq!(addresses.probed("fd://5").unwrap(), reachable(metrics));
        for everywhere in ["0.0.0.0:8002", "*:8002"] {
            assert_eq!(addresses.probed(everywhere).unwrap().to_string(), "127.0.0.1:8002");
        }
        let both = Addresses::bind(&"*:0".parse().unwrap(), None).unwrap();
        std::net::TcpStream::connect(reachable(both.http)).expect("it listens there");
    }

    #[test]
    fn a_port_in_use_is_told() {
        let first = Addresses::bind(&Listen::loopback(), None).unwrap();
        let again = Listen::address("127.0.0.1", first.http.port());
        assert!(matches!(Addresses::bind(&again, None), Err(ListenError::InUse { .. })));
    }
}
