//! Slices over TCP: frames written from and read into the KV pool itself, vectored, with no staging copy.
//!
//! The sender opens a few connections per peer (`lane`), the receiver reads them (`reader`); each frame stands for
//! itself, so slices of many transfers share a connection and any slice may take any connection. A connection's credit is
//! one frame at either end: a lane takes the next run when the one before is written, a reader claims the next when the one
//! before is in place.

mod lane;
mod reader;

use std::{net::SocketAddr, sync::Arc};

use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Destination, Inbox, Opening, Outbox, Path, Terms, Transport, TransportKind,
    port::{DataPort, Greeted, connect},
};
use reader::Reader;

/// Bytes that wait in a connection to a peer of the same host for its acknowledgement. Few enough that the receiver finds
/// them in the processors' shared cache: with what the kernel takes by itself, a quarter slower. On a network it would be
/// what may be on its way at a time, and the more so the longer the way: there the kernel is left to find what is right.
const SAME_HOST_SEND_BUFFER: usize = 512 << 10;

/// What the kernel is to be asked for between these ends; `None` = it finds by itself.
fn send_buffer(asked: Option<usize>, local: SocketAddr, peer: SocketAddr) -> Option<usize> {
    let (local, peer) = (local.ip().to_canonical(), peer.ip().to_canonical());
    asked.or((peer.is_loopback() || peer == local).then_some(SAME_HOST_SEND_BUFFER))
}

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
                let asked = send_buffer(terms.send_buffer, stream.local_addr()?, stream.peer_addr()?);
                if let Some(bytes) = asked {
                    SockRef::from(&stream).set_send_buffer_size(bytes)?;
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_left_alone_on_a_network_unless_a_number_is_asked_for() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let fixed = Some(SAME_HOST_SEND_BUFFER);
        for (local, peer, expected) in [
            ("127.0.0.1:1", "127.0.0.1:2", fixed),
            ("127.0.0.1:1", "127.9.0.1:2", fixed),
            ("[::1]:1", "[::1]:2", fixed),
            ("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:2", fixed),
            ("10.0.0.7:1", "10.0.0.7:2", fixed),
            ("10.0.0.7:1", "10.0.0.8:2", None),
            ("[fd00::1]:1", "[fd00::2]:2", None),
        ] {
            assert_eq!(send_buffer(None, at(local), at(peer)), expected, "{local} {peer}");
            assert_eq!(send_buffer(Some(9), at(local), at(peer)), Some(9));
        }
    }
}
