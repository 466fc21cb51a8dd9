//! HCCL as a medium of fetched slices. Both sides take part in each exchange, so the reader says what it is about to fetch,
//! and a thread of the owner's sends it.

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{Hccl, HcclPair, Rank, RootInfo};
use crate::{
    Region,
    transport::{
        TransportKind,
        ascend::acl::Device,
        fetch::{Asking, Lent, Medium, Piece, RemoteRegion},
    },
};

/// A node's region on a device, exchanged with each peer by a pair of its own.
pub(crate) struct HcclMedium {
    hccl: Arc<Hccl>,
    device: Arc<Device>,
    region: Region,
    /// For sending what a peer wants.
    stall: Duration,
}

impl HcclMedium {
    pub(crate) fn new(hccl: &Arc<Hccl>, device: &Arc<Device>, region: &Region, stall: Duration) -> Self {
        Self { hccl: hccl.clone(), device: device.clone(), region: region.clone(), stall }
    }
}

impl Medium for HcclMedium {
    fn kind(&self) -> TransportKind {
        TransportKind::Hccl
    }

    fn ask(&self) -> io::Result<(Box<dyn Asking>, Vec<u8>)> {
        self.device.enter()?;
        let root = self.hccl.root_info(&self.device)?;
        let request = root.as_bytes().to_vec();
        let (hccl, device, region) = (self.hccl.clone(), self.device.clone(), self.region.clone());
        Ok((Box::new(Joining { hccl, device, region, root }), request))
    }

    fn lend(&self, request: &[u8]) -> io::Result<(Box<dyn Lent>, Vec<u8>)> {
        let root = RootInfo::from_bytes(request)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not the root info of an HCCL pair"))?;
        let (hccl, device, region, stall) =
            (self.hccl.clone(), self.device.clone(), self.region.clone(), self.stall);
        // One run is wanted at a time.
        let (wanted, runs) = sync_channel(1);
        let work = move || match HcclPair::join(&hccl, &device, &root, Rank::Other, &region) {
            Ok(pair) => send(pair, &region, &runs, stall),
            Err(error) => tracing::info!(%error, "no HCCL pair with a peer"),
        };
        let thread = std::thread::Builder::new().name("kv-hccl-send".into()).spawn(work)?;
        let lent = Sending { wanted: Some(wanted), thread: Some(thread) };
        Ok((Box::new(lent), (self.region.len() as u64).to_le_bytes().to_vec()))
    }
}

type Run = Vec<(u64, usize)>;

/// Sends what is wanted until the lent thing is dropped or the pair fails.
fn send(mut pair: HcclPair, region: &Region, runs: &Receiver<Run>, stall: Duration) {
    while let Ok(run) = runs.recv() {
        let piece = |&(offset, len): &(u64, usize)| Some((region.at(offset, len)?, len));
        let Some(pieces) = run.iter().map(piece).collect::<Option<Vec<(NonNull<u8>, usize)>>>() else {
            tracing::error!(?run, "slices outside this node's region are not sent");
            return;
        };
        if let Err(error) = pair.send(&pieces, Instant::now() + stall) {
            tracing::info!(%error, "an HCCL pair failed");
            return;
        }
    }
}

/// The thread that sends, and how it is told.
struct Sending {
    wanted: Option<SyncSender<Run>>,
    thread: Option<JoinHandle<()>>,
}

impl Lent for Sending {
    fn hears(&self) -> bool {
        true
    }

    fn wanted(&mut self, slices: &[(u64, usize)]) -> io::Result<()> {
        let told = self.wanted.as_ref().is_some_and(|wanted| wanted.try_send(slices.to_vec()).is_ok());
        if told {
            Ok(())
        } else {
            Err(io::Error::other("the HCCL pair has failed, or the peer wants too much at once"))
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        drop(self.wanted.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A pair to be.
struct Joining {
    hccl: Arc<Hccl>,
    device: Arc<Device>,
    region: Region,
    root: RootInfo,
}

impl Asking for Joining {
    fn connect(self: Box<Self>, grant: &[u8], _: Instant) -> io::Result<Box<dyn RemoteRegion>> {
        let Self { hccl, device, region, root } = *self;
        let len = grant.try_into().map(u64::from_le_bytes).map_err(io::Error::other)?;
        Ok(Box::new(Received { pair: HcclPair::join(&hccl, &device, &root, Rank::Root, &region)?, len }))
    }
}

/// A peer's region, received piece by piece.
struct Received {
    pair: HcclPair,
    len: u64,
}

impl RemoteRegion for Received {
    fn len(&self) -> u64 {
        self.len
    }

    fn asks(&self) -> bool {
        true
    }

    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()> {
        let pieces: Vec<_> = pieces.iter().map(|piece| (piece.local, piece.len)).collect();
        self.pair.recv(&pieces, deadline)
    }
}
