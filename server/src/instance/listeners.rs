//! The addresses of a server: bound before anything else is done, so that every one is known and free.

use std::net::TcpListener;

use baton_process::Listen;

use crate::{config::ServerConfig, error::ServerError};

/// host:port of each listener, as peers reach it.
pub(super) struct Endpoints {
    pub(super) grpc: String,
    pub(super) metrics: String,
    pub(super) data: String,
}

pub(super) struct Listeners {
    pub(super) grpc: TcpListener,
    pub(super) metrics: TcpListener,
    pub(super) data: TcpListener,
    pub(super) endpoints: Endpoints,
}

impl Listeners {
    pub(super) fn bind(config: &ServerConfig) -> Result<Self, ServerError> {
        let bind = |what: &'static str, listen: &Listen| {
            let listener = listen.bind().map_err(|source| ServerError::Listen { what, source })?;
            let endpoint = advertised(&listener, &config.advertise_host, what)?;
            Ok::<_, ServerError>((listener, endpoint))
        };
        let (grpc, grpc_endpoint) = bind("listen", &config.listen)?;
        let (metrics, metrics_endpoint) = bind("metrics_listen", &config.metrics_listen)?;
        let (data, data_endpoint) = bind("kv_data_listen", &config.kv_data_listen)?;
        let endpoints = Endpoints { grpc: grpc_endpoint, metrics: metrics_endpoint, data: data_endpoint };
        Ok(Self { grpc, metrics, data, endpoints })
    }
}

pub(super) fn address(what: &'static str, source: std::io::Error) -> ServerError {
    ServerError::Address { what, source }
}

fn advertised(listener: &TcpListener, host: &str, what: &'static str) -> Result<String, ServerError> {
    let local = listener.local_addr().map_err(|source| address(what, source))?;
    match (host, local.ip().is_unspecified()) {
        ("", true) => Err(ServerError::Advertise { what }),
        ("", false) => Ok(local.to_string()),
        (host, _) if host.contains(':') => Ok(format!("[{host}]:{}", local.port())),
        (host, _) => Ok(format!("{host}:{}", local.port())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_advertised_can_be_reached() {
        let here = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = here.local_addr().expect("an address").port();
        assert_eq!(advertised(&here, "", "listen").expect("fine"), format!("127.0.0.1:{port}"));
        assert_eq!(advertised(&here, "a.b", "listen").expect("fine"), format!("a.b:{port}"));
        assert_eq!(advertised(&here, "::1", "listen").expect("fine"), format!("[::1]:{port}"));
        let everywhere = TcpListener::bind("0.0.0.0:0").expect("a port");
        assert!(matches!(
            advertised(&everywhere, "", "listen"),
            Err(ServerError::Advertise { what: "listen" })
        ));
    }
}
