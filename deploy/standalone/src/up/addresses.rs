//! The sockets that outlive any one process: bound here, once, and handed to whichever process serves them now. While
//! that process is being started again, connections wait in the socket's queue instead of being refused.

use std::{
    net::{SocketAddr, TcpListener},
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
    pub(super) listeners: Listeners,
}

#[derive(Debug, Clone)]
pub(super) struct Listeners {
    pub(super) http: Arc<OwnedFd>,
    pub(super) controller: Arc<OwnedFd>,
    pub(super) coordinator_admin: Arc<OwnedFd>,
}

impl Addresses {
    /// The public address as asked for, the others on free ports of the loopback.
    pub(super) fn bind(http: &Listen) -> Result<Self, ListenError> {
        let (http_at, http) = bound(http)?;
        let (controller_at, controller) = bound(&Listen::loopback())?;
        let (admin_at, coordinator_admin) = bound(&Listen::loopback())?;
        let listeners = Listeners { http, controller, coordinator_admin };
        Ok(Self { http: http_at, controller: controller_at, coordinator_admin: admin_at, listeners })
    }
}

fn bound(listen: &Listen) -> Result<(SocketAddr, Arc<OwnedFd>), ListenError> {
    let listener: TcpListener = listen.bind()?;
    let at = listener.local_addr();
    let at = at.map_err(|source| ListenError::Bind { address: listen.to_string(), source })?;
    Ok((at, Arc::new(listener.into())))
}
