//! The addresses of a server: bound before anything else is done, so that every one is known and free.

use std::net::TcpListener;

use baton_process::{Listen, listen::reached_at};

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
        let bind = |listen: &Listen| {
            let listener = listen.bind()?;
            let endpoint = reached_at(&listener, &config.advertise_host, "advertise_host")?;
            Ok((listener, endpoint))
        };
        let bind = |what, listen| bind(listen).map_err(|source| ServerError::Listen { what, source });
        let (grpc, grpc_endpoint) = bind("listen", &config.listen)?;
        let (metrics, metrics_endpoint) = bind("metrics_listen", &config.metrics_listen)?;
        let (data, data_endpoint) = bind("kv_data_listen", &config.kv_data_listen)?;
        let endpoints = Endpoints { grpc: grpc_endpoint, metrics: metrics_endpoint, data: data_endpoint };
        Ok(Self { grpc, metrics, data, endpoints })
    }
}
