//! Slices over TCP: frames written from and read into the KV pool itself, vectored, with no staging copy.
//!
//! The sender opens a few connections per peer (`lane`), the receiver reads them (`reader`); each frame stands for
//! itself, so slices of many transfers share a connection and any slice may take any connection.

mod lane;
mod reader;

use std::sync::Arc;

use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Destination, Inbox, Opening, Outbox, Path, Terms, Transport, TransportKind,
    port::{DataPort, Greeted, connect},
};
use reader::Reader;

/// Bytes that wait in a connection for the peer's acknowledgement. Few enough that the receiver finds them in the
/// processors' shared cache where both are on one machine: with what the kernel takes by itself, a quarter slower there.
/// On a network it is what may be on its way at a time: 4 connections of it are 100 Gbit/s at 160 us there and back.
const SEND_BUFFER: usize = 512 << 10;

/// The transport of kind `tcp`.
pub(crate) struct Tcp {
    terms: Terms,
    /// Opened to one peer.
    connections: usize,
    port: Arc<DataPort>,
}

impl Tcp {
    pub(crate) fn new(port: Arc<DataPort>, connections: usize, terms: Terms) -> Self {
        Self { terms, connections: connections.max(1), port }
    }
}

impl Transport for Tcp {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn address(&self) -> String {
        self.port.address().to_owned()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, _: &TaskTracker, _: CancellationToken) {
        let terms = self.terms;
        self.port.handle(TransportKind::Tcp, move |greeted| {
            let inbox = inbox.clone();
            Box::pin(async move {
                let Greeted { mut stream, hello, key, slice_bytes } = greeted;
                stream.write_all(&hello.answer(&key, &[])).await?;
                Reader::new(stream, Terms { slice_bytes, ..terms }, inbox).run().await
            })
        });
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let (terms, tasks, path) = (self.terms, tasks.clone(), Path::new(stop));
        let connections = self.connections;
        Box::pin(async move {
            let mut streams = Vec::with_capacity(connections);
            for _ in 0..connections {
                let (stream, ..) = connect(TransportKind::Tcp, &to, &terms).await?;
                SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER)?;
                streams.push(stream);
            }
            for stream in streams {
                let lane = lane::Lane::new(to.address.clone(), terms, outbox.clone());
                tasks.spawn(lane.run(stream, path.end()));
            }
            Ok(path)
        })
    }
}
