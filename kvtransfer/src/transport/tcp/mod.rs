//! Slices over TCP: frames written from and read into the KV pool itself, vectored, with no staging copy.
//!
//! The sender opens a few connections per peer (`lane`), the receiver accepts them (`port`); each frame stands for
//! itself, so slices of many transfers share a connection and any slice may take any connection.

mod lane;
mod port;

use std::{io, net::TcpListener, sync::Arc, time::Duration};

use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Destination, Inbox, Opening, Outbox, Path, Terms, Transport, TransportKind,
    hello::{ANSWER_BYTES, Hello},
};
use crate::TransferError;

/// How often a quiet connection is asked for a sign of life.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Where a node takes slices in over TCP, and with how many connections.
#[derive(Debug)]
pub struct TcpConfig {
    pub listener: TcpListener,
    /// `host:port` at which peers reach `listener`; `None` = its local address.
    pub advertise: Option<String>,
    /// Connections opened to one peer.
    pub connections_per_peer: usize,
    /// Connections accepted in all.
    pub connections: usize,
}

impl TcpConfig {
    /// Over this listener, with the usual numbers of connections.
    pub fn new(listener: TcpListener) -> Self {
        Self { listener, advertise: None, connections_per_peer: 2, connections: 1024 }
    }
}

/// The transport of kind `tcp`.
pub(crate) struct Tcp {
    terms: Terms,
    connections_per_peer: usize,
    connections: usize,
    listener: Mutex<Option<tokio::net::TcpListener>>,
    address: String,
}

impl Tcp {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(config: TcpConfig, terms: Terms) -> Result<Self, TransferError> {
        let TcpConfig { listener, advertise, connections_per_peer, connections } = config;
        if connections_per_peer == 0 || connections == 0 {
            let message = "connections over TCP, in all and per peer, must be at least 1";
            return Err(TransferError::Invalid(message.into()));
        }
        let failed = |what| move |error: io::Error| TransferError::Io { what, reason: error.to_string() };
        let local = listener.local_addr().map_err(failed("read the data listener's address"))?;
        listener.set_nonblocking(true).map_err(failed("make the data listener non-blocking"))?;
        let listener =
            tokio::net::TcpListener::from_std(listener).map_err(failed("register the data listener"))?;
        Ok(Self {
            terms,
            connections_per_peer,
            connections,
            listener: Mutex::new(Some(listener)),
            address: advertise.unwrap_or_else(|| local.to_string()),
        })
    }
}

impl Transport for Tcp {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken) {
        if let Some(listener) = self.listener.lock().take() {
            tasks.spawn(port::serve(listener, self.connections, self.terms, inbox, tasks.clone(), stop));
        }
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let (terms, tasks, path) = (self.terms, tasks.clone(), Path::new(stop));
        let connections = self.connections_per_peer;
        Box::pin(async move {
            let mut streams = Vec::with_capacity(connections);
            for _ in 0..connections {
                streams.push(connect(&to, &terms).await?);
            }
            for stream in streams {
                let lane = lane::Lane::new(to.address.clone(), terms, outbox.clone());
                tasks.spawn(lane.run(stream, path.end()));
            }
            Ok(path)
        })
    }
}

/// Connects and exchanges hellos.
async fn connect(to: &Destination, terms: &Terms) -> io::Result<TcpStream> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "connecting took too long");
    let mut stream = timeout(terms.handshake, TcpStream::connect(&to.address)).await.map_err(late)??;
    prepare(&stream, terms)?;
    timeout(terms.handshake, greet(&mut stream, to)).await.map_err(late)??;
    Ok(stream)
}

async fn greet(stream: &mut TcpStream, to: &Destination) -> io::Result<()> {
    let (bytes, hello) = Hello::encode(TransportKind::Tcp, &to.pass, &[]);
    stream.write_all(&bytes).await?;
    let mut head = [0; ANSWER_BYTES];
    stream.read_exact(&mut head).await?;
    let mut terms = vec![0; Hello::answer_terms_bytes(&head).map_err(io::Error::other)?];
    stream.read_exact(&mut terms).await?;
    match hello.answered(&to.pass.key, &head, &terms) {
        true => Ok(()),
        false => Err(io::Error::other("what listens there is not the peer")),
    }
}

/// Sets a connection up so that a peer that has vanished is noticed, whether anything is on its way or not.
fn prepare(stream: &TcpStream, terms: &Terms) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(terms.stall))?;
    let _ = terms;
    Ok(())
}
