//! HCCL as a medium of fetched slices. Both sides take part in each exchange, so the reader says what it is about to fetch,
//! and a thread of the owner's sends it.

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use super::{Hccl, HcclPair, Rank, RootInfo};
use crate::{
    Region,
    transport::{
        TransportKind,
        ascend::acl::Device,
        fetch::{Asking, Lent, Medium, Piece, RemoteRegion},
    },
};

/// Slices side by side at both ends are exchanged as one piece up to this size.
const JOINED_BYTES: usize = 1 << 20;

/// Pairs that may be waiting for their other side at a time. Each takes a thread for as long as the library likes, two
/// minutes by default, whether the peer has given up or not.
pub(crate) const MOST_JOINING: usize = 64;

/// A node's region on a device, exchanged with each peer by a pair of its own.
pub(crate) struct HcclMedium {
    hccl: Arc<Hccl>,
    device: Arc<Device>,
    region: Region,
    /// For sending what a peer wants.
    stall: Duration,
    /// Counts the threads that the library may hold.
    threads: TaskTracker,
    /// Has a permit for each pair that may be joined.
    joining: Arc<Semaphore>,
}

impl HcclMedium {
    pub(crate) fn new(
        hccl: &Arc<Hccl>,
        device: &Arc<Device>,
        region: &Region,
        stall: Duration,
        threads: TaskTracker,
    ) -> Self {
        let (hccl, device, region) = (hccl.clone(), device.clone(), region.clone());
        Self { hccl, device, region, stall, threads, joining: Arc::new(Semaphore::new(MOST_JOINING)) }
    }

    /// A place among the pairs that wait for their other side, until it is dropped. Not waited for: another transport is
    /// tried meanwhile, where there is one.
    fn joins(&self) -> io::Result<OwnedSemaphorePermit> {
        let full = |_| {
            let why = "HCCL pairs wait for their other side already, and no more may";
            io::Error::new(io::ErrorKind::ResourceBusy, format!("{MOST_JOINING} {why}"))
        };
        self.joining.clone().try_acquire_owned().map_err(full)
    }
}

impl Medium for HcclMedium {
    fn kind(&self) -> TransportKind {
        TransportKind::Hccl
    }

    fn ask(&self) -> io::Result<(Box<dyn Asking>, Vec<u8>)> {
        let place = self.joins()?;
        self.device.enter()?;
        let root = self.hccl.root_info(&self.device)?;
        let request = root.as_bytes().to_vec();
        let (hccl, device, region) = (self.hccl.clone(), self.device.clone(), self.region.clone());
        let threads = self.threads.clone();
        Ok((Box::new(Joining { hccl, device, region, root, threads, place }), request))
    }

    fn lend(&self, request: &[u8]) -> io::Result<(Box<dyn Lent>, Vec<u8>)> {
        let root = RootInfo::from_bytes(request)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not the root info of an HCCL pair"))?;
        let place = self.joins()?;
        let (hccl, device, region, stall) =
            (self.hccl.clone(), self.device.clone(), self.region.clone(), self.stall);
        // One run is wanted at a time.
        let (wanted, runs) = sync_channel(1);
        let (how_far, counted) = (Arc::new(HowFar::default()), self.threads.token());
        let seen = how_far.clone();
        let work = move || {
            let _counted = counted;
            let joined = HcclPair::join(&hccl, &device, &root, Rank::Other, &region);
            drop(place);
            match joined {
                Ok(pair) if seen.joins() => send(pair, &region, &runs, stall),
                Ok(_) => {}
                Err(error) => tracing::info!(%error, "no HCCL pair with a peer"),
            }
        };
        let thread = std::thread::Builder::new().name("kv-hccl-send".into()).spawn(work)?;
        let lent = Sending { wanted: Some(wanted), thread: Some(thread), how_far };
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

/// How far a thread that sends has come, and whether it is wanted still. Each side says its own before it looks at the
/// other's, so that one of them sees both.
#[derive(Default)]
struct HowFar {
    joined: AtomicBool,
    over: AtomicBool,
}

impl HowFar {
    /// It has joined its pair; whether to go on.
    fn joins(&self) -> bool {
        self.joined.store(true, SeqCst);
        !self.over.load(SeqCst)
    }

    /// It is wanted no longer; whether it may be sending.
    fn ends(&self) -> bool {
        self.over.store(true, SeqCst);
        self.joined.load(SeqCst)
    }
}

/// The thread that sends, and how it is told.
struct Sending {
    wanted: Option<SyncSender<Run>>,
    thread: Option<JoinHandle<()>>,
    how_far: Arc<HowFar>,
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
        // One that still waits for the other side, as long as the library likes, will touch nothing any more.
        if let (true, Some(thread)) = (self.how_far.ends(), self.thread.take()) {
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
    threads: TaskTracker,
    place: OwnedSemaphorePermit,
}

impl Asking for Joining {
    /// The library takes no deadline, so a thread of its own waits for it: one that is late destroys its pair and ends.
    fn connect(self: Box<Self>, grant: &[u8], deadline: Instant) -> io::Result<Box<dyn RemoteRegion>> {
        let Self { hccl, device, region, root, threads, place } = *self;
        let len = grant.try_into().map(u64::from_le_bytes).map_err(io::Error::other)?;
        let ((joined, pair), counted) = (sync_channel(1), threads.token());
        let work = move || {
            let _counted = counted;
            let pair = HcclPair::join(&hccl, &device, &root, Rank::Root, &region);
            drop(place); // before it is told
            let _ = joined.send(pair);
        };
        std::thread::Builder::new().name("kv-hccl-join".into()).spawn(work)?;
        let pair = pair.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let late = |_| {
            let why = "the other side of an HCCL pair did not join by the deadline";
            io::Error::new(io::ErrorKind::TimedOut, why)
        };
        Ok(Box::new(Received { pair: pair.map_err(late)??, len }))
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

    fn joins(&self) -> usize {
        JOINED_BYTES
    }

    fn read(&mut self, pieces: &[Piece], deadline: Instant) -> io::Result<()> {
        let pieces: Vec<_> = pieces.iter().map(|piece| (piece.local, piece.len)).collect();
        self.pair.recv(&pieces, deadline)
    }
}
