//! Receivers that break the protocol of announced runs: whatever they say, however often, the sender gets its blocks back
//! within the limits.

use std::{
    io::{self, IoSlice},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use baton_proto::TransferId;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Asking, DONE, Fetched, JOINED, Lane, Lent, Medium, RemoteRegion, WANTED};
use crate::{
    TransferError,
    session::SliceRun,
    sync::AtomicBool,
    transport::{
        Admission, DataKey, DataPort, DataPortConfig, Departure, Destination, Found, Inbox, LinkId, LinkPass,
        Outbox, Path, Terms, Transport, TransportKind, Waits,
    },
};

const SLICE: usize = 64;
const STALL: Duration = Duration::from_millis(400);
const FENCE_GRACE: Duration = Duration::from_millis(20);

/// A transfer of `runs` runs of `slices` slices.
struct Source {
    slices: u32,
    key: DataKey,
    runs: Mutex<u32>,
    /// How each run that was taken ended, with the moment.
    reports: Mutex<Vec<(Result<(), String>, Instant)>>,
    revoked: CancellationToken,
    queued: AtomicBool,
    span: tracing::Span,
    on_device: bool,
}

fn terms(handshake: Duration, keep_alive: Duration) -> Terms {
    Terms {
        slice_bytes: SLICE as u32,
        frame_slices: Terms::frame_slices(1 << 20, SLICE as u32),
        waits: Waits::new(handshake, FENCE_GRACE, STALL, keep_alive),
        send_buffer: None,
    }
}

impl Departure for Source {
    fn id(&self) -> TransferId {
        TransferId::from_bytes([7; 16])
    }

    fn is_on_device(&self) -> bool {
        self.on_device
    }

    fn span(&self) -> &tracing::Span {
        &self.span
    }

    fn priority(&self) -> i32 {
        0
    }

    fn data_key(&self) -> Option<DataKey> {
        Some(self.key.clone())
    }

    fn take(&self, _: u32) -> Option<SliceRun> {
        let mut runs = self.runs.lock();
        *runs = runs.checked_sub(1)?;
        Some(SliceRun { layer: 0, first: *runs * self.slices, count: self.slices })
    }

    fn has_runs(&self) -> bool {
        *self.runs.lock() > 0
    }

    fn sent(&self, _: SliceRun, _: &[u32]) {
        self.reports.lock().push((Ok(()), Instant::now()));
    }

    fn failed(&self, _: SliceRun, why: &str) {
        self.reports.lock().push((Err(why.into()), Instant::now()));
    }

    fn path_lost(&self, _: &str) {}

    fn live(&self) -> bool {
        !self.revoked.is_cancelled()
    }

    fn queued(&self) -> &AtomicBool {
        &self.queued
    }

    fn source(&self, _: u32, _: u32, _: usize) -> Result<IoSlice<'_>, TransferError> {
        Err(TransferError::Invalid("announced slices are not written".into()))
    }

    fn copy_out(&self, _: u32, _: u32, _: usize, into: &mut [u8]) -> Result<(), TransferError> {
        into.fill(3);
        Ok(())
    }

    fn offset(&self, _: u32, block: u32) -> Result<u64, TransferError> {
        Ok(u64::from(block) * SLICE as u64)
    }

    fn revoked(&self) -> &CancellationToken {
        &self.revoked
    }
}

/// Memory whose readers say beforehand what they fetch.
struct Heard;

impl Lent for Heard {
    fn hears(&self) -> bool {
        true
    }
}

/// Memory whose readers just read.
struct Silent;

impl Lent for Silent {}

/// As `Heard`, and keeps what they said.
struct Listening(Arc<Mutex<Vec<(u64, usize)>>>);

impl Lent for Listening {
    fn hears(&self) -> bool {
        true
    }

    fn wanted(&mut self, pieces: &[(u64, usize)]) -> io::Result<()> {
        self.0.lock().extend(pieces);
        Ok(())
    }
}

struct Scene {
    source: Arc<Source>,
    receiver: DuplexStream,
    path: Path,
    since: Instant,
}

/// A lane that has announced the first of `runs` runs.
async fn announced(runs: u32, lent: Option<Box<dyn Lent>>) -> Scene {
    announced_of(runs, 1, lent).await
}

async fn announced_of(runs: u32, slices: u32, lent: Option<Box<dyn Lent>>) -> Scene {
    let terms = terms(STALL, STALL);
    let source = Arc::new(Source {
        slices,
        key: DataKey::generate(),
        runs: Mutex::new(runs),
        reports: Mutex::default(),
        revoked: CancellationToken::new(),
        queued: AtomicBool::new(false),
        span: tracing::Span::none(),
        on_device: false,
    });
    let (outbox, path) = (Outbox::default(), Path::new(&CancellationToken::new()));
    let (sender, mut receiver) = duplex(1 << 20);
    tokio::spawn(Lane::new(terms, outbox.clone(), lent).run(sender, path.end()));
    outbox.wake(source.clone());
    receiver.read_exact(&mut [0; 64]).await.expect("an announcement");
    Scene { source, receiver, path, since: Instant::now() }
}

impl Scene {
    /// Waits until all of `runs` have been reported failed; after how long, and why.
    async fn failed(&self, runs: usize) -> (Duration, String) {
        let all = async {
            while self.source.reports.lock().len() < runs {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), all).await.expect("the blocks come back");
        let reports = self.source.reports.lock();
        let (result, at) = reports.last().expect("a report");
        assert!(reports.iter().all(|(result, _)| result.is_err()), "{reports:?}");
        assert!(self.path.end().ended().is_cancelled());
        (*at - self.since, result.clone().expect_err("it failed"))
    }
}

#[tokio::test]
async fn a_receiver_that_says_nothing_is_given_up_in_time() {
    let scene = announced(2, None).await;
    let (after, why) = scene.failed(2).await;
    assert!((STALL..STALL * 3).contains(&after), "{after:?}");
    assert!(why.contains("takes no more slices"), "{why}");
}

#[tokio::test]
async fn a_receiver_that_does_not_let_go_of_an_ended_transfer_is_given_up_sooner() {
    let scene = announced(1, None).await;
    scene.source.revoked.cancel();
    let (after, _) = scene.failed(1).await;
    assert!(after < STALL, "{after:?}");
}

#[tokio::test]
async fn a_receiver_that_keeps_saying_what_it_wants_is_cut_off() {
    for lent in [Some(Box::new(Heard) as Box<dyn Lent>), Some(Box::new(Silent)), None] {
        let mut scene = announced(1, lent).await;
        // Until the lane has had enough of it.
        while scene.receiver.write_all(&[WANTED]).await.is_ok() && scene.since.elapsed() < STALL * 5 {
            sleep(Duration::from_millis(5)).await;
        }
        let (after, why) = scene.failed(1).await;
        assert!(after < STALL, "{after:?}");
        assert!(why.contains("says what it cannot"), "{why}");
    }
}

#[tokio::test]
async fn a_sender_is_told_in_which_pieces_its_slices_are_fetched() {
    let wanted = Arc::default();
    let mut scene = announced_of(1, 4, Some(Box::new(Listening(Arc::clone(&wanted))))).await;
    scene.receiver.write_all(&[WANTED, JOINED, JOINED]).await.expect("open");
    scene.receiver.write_all(&[WANTED, DONE]).await.expect("open");
    while scene.source.reports.lock().is_empty() {
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(*wanted.lock(), [(0, 3 * SLICE), (3 * SLICE as u64, SLICE)]);

    // With none to go with, less than the run, more than the run.
    for nonsense in [&[JOINED][..], &[WANTED, WANTED, DONE], &[WANTED; 5]] {
        let mut scene = announced_of(1, 4, Some(Box::new(Heard))).await;
        scene.receiver.write_all(nonsense).await.expect("open");
        let (_, why) = scene.failed(1).await;
        assert!(why.contains("says what it cannot"), "{why}");
    }
}

#[tokio::test]
async fn a_receiver_that_is_done_with_more_than_was_announced_is_cut_off() {
    let mut scene = announced(1, None).await;
    scene.receiver.write_all(&[DONE, DONE]).await.expect("open");
    let end = async {
        while !scene.path.end().ended().is_cancelled() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(STALL, end).await.expect("the path ends");
    assert_eq!(scene.source.reports.lock().len(), 1, "the run that was announced is done");
}

/// A medium whose library does not return from connecting until it is let go.
struct Stuck {
    connects: mpsc::SyncSender<()>,
    release: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Medium for Stuck {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn ask(&self) -> io::Result<(Box<dyn Asking>, Vec<u8>)> {
        let release = self.release.lock().take().ok_or(io::ErrorKind::Other)?;
        Ok((Box::new(Connecting { connects: self.connects.clone(), release }), Vec::new()))
    }

    fn lend(&self, _: &[u8]) -> io::Result<(Box<dyn Lent>, Vec<u8>)> {
        Ok((Box::new(Silent), Vec::new()))
    }
}

struct Connecting {
    connects: mpsc::SyncSender<()>,
    release: mpsc::Receiver<()>,
}

impl Asking for Connecting {
    fn connect(self: Box<Self>, _: &[u8], _: Instant) -> io::Result<Box<dyn RemoteRegion>> {
        let _ = self.connects.send(());
        let _ = self.release.recv();
        Err(io::Error::other("let go"))
    }
}

/// One link, and no transfers.
struct OneLink(LinkPass);

impl Inbox for OneLink {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        let (key, ended) = (self.0.key.clone(), CancellationToken::new());
        (*id == self.0.id).then(|| Admission { key, slice_bytes: SLICE as u32, mapped: false, ended })
    }

    fn find(&self, _: &TransferId) -> Found {
        Found::Over
    }
}

#[tokio::test]
async fn a_thread_that_outlives_its_connection_is_counted_until_it_ends() {
    let keep_alive = Duration::from_secs(1);
    let terms = terms(STALL * 9, keep_alive);
    let (tasks, threads, stop) = (TaskTracker::new(), TaskTracker::new(), CancellationToken::new());
    let (pass, (connects, connecting), (release, released)) =
        (LinkPass::generate(), mpsc::sync_channel(2), mpsc::sync_channel(1));
    let medium = Arc::new(Stuck { connects, release: Mutex::new(Some(released)) });
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = DataPort::new(DataPortConfig::new(listener), terms).expect("listening");
    let fetched = Fetched::new(medium, port.clone(), terms, threads.clone());
    let inbox = Arc::new(OneLink(pass.clone()));
    fetched.receive(inbox.clone(), &tasks, stop.clone());
    tasks.spawn(port.clone().serve(inbox, tasks.clone(), stop.clone()));
    let to = Destination { address: port.address().to_owned(), pass };
    let opening = tokio::spawn(fetched.open(to, Outbox::default(), &tasks, &stop));
    while connecting.try_recv().is_err() {
        assert!(!opening.is_finished(), "it cannot be opened");
        sleep(Duration::from_millis(1)).await;
    }

    stop.cancel();
    tasks.close();
    threads.close();
    timeout(STALL * 9, tasks.wait()).await.expect("the tasks end");
    opening.abort();
    assert!(timeout(STALL, threads.wait()).await.is_err(), "its thread has not ended");
    release.send(()).expect("it waits");
    timeout(STALL * 9, threads.wait()).await.expect("the thread ends");
}
