//! Slices between processes of one host: the receiver maps the sender's KV pool and copies out of it.
//!
//! A node listens on a socket in the abstract namespace, which goes with the process and is seen within one network
//! namespace only: a peer elsewhere cannot connect, and its slices take another transport. The sender's hello brings the
//! file that its pool is made of. The receiver takes it only from a process of its own user, maps it for reading, and
//! only if it can never shrink, so that no copy runs into the end of a file.

mod mapping;
mod socket;
mod stream;

use std::{
    fs::File,
    io,
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::oneshot, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Admission, Destination, Inbox, Opening, Outbox, Path, Terms, Transport, TransportKind,
    accept::accept,
    fetch::{self, Lane, on_thread},
    guests::{Bound, Guest, NoRoom},
    hello::{Hello, HelloError},
};
use crate::Region;
use mapping::Mapping;

/// Connections, and so threads that copy, in all; and those, apart, that have not shown yet what they belong to.
const CONNECTIONS: usize = 256;
const UNPROVEN: usize = 64;
/// Opened to one peer. One thread alone does not fill a memory channel while it claims, looks and reports.
const CONNECTIONS_PER_PEER: usize = 2;

/// The transport of kind `shm`.
pub(crate) struct Shm {
    terms: Terms,
    /// What this node's pool is made of.
    file: Arc<File>,
    region_bytes: u64,
    listener: Mutex<Option<tokio::net::UnixListener>>,
    name: String,
    /// Counts the threads that copy.
    threads: TaskTracker,
}

impl Shm {
    /// Refused for a region that is no file's. Must be called within a tokio runtime.
    pub(crate) fn new(region: &Region, terms: Terms, threads: TaskTracker) -> io::Result<Self> {
        let file = region.file().ok_or_else(|| io::Error::other("the KV pool is not a file's memory"))?;
        let name = format!("baton-kv-{:032x}", rand::random::<u128>());
        mapping::seal(&file)?;
        let listener = UnixListener::bind_addr(&socket::address(&name)?)?;
        listener.set_nonblocking(true)?;
        let listener = Mutex::new(Some(tokio::net::UnixListener::from_std(listener)?));
        let region_bytes = region.len() as u64;
        Ok(Self { terms, file, region_bytes, listener, name, threads })
    }
}

/// Whether this host has what it takes.
pub(super) fn probe() -> io::Result<()> {
    mapping::probe()?;
    socket::address("baton-kv").map(|_| ())
}

impl Transport for Shm {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn address(&self) -> String {
        self.name.clone()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken) {
        let Some(listener) = self.listener.lock().take() else { return };
        let bound = Bound { what: "shared memory", connections: CONNECTIONS, unproven: UNPROVEN };
        let (terms, ends, threads) = (self.terms, stop.clone(), self.threads.clone());
        let converse =
            move |stream, guest| serve((stream, guest), terms, inbox.clone(), ends.clone(), threads.clone());
        tasks.spawn(accept(listener, bound, tasks.clone(), stop, converse, |_| false));
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let (terms, tasks, path) = (self.terms, tasks.clone(), Path::new(stop));
        let (file, region_bytes) = (self.file.clone(), self.region_bytes);
        Box::pin(async move {
            let mut streams = Vec::with_capacity(CONNECTIONS_PER_PEER);
            for _ in 0..CONNECTIONS_PER_PEER {
                streams.push(connect(&to, &file, region_bytes, terms.waits.handshake).await?);
            }
            for stream in streams {
                tasks.spawn(Lane::new(terms, outbox.clone(), None).run(stream, path.end()));
            }
            Ok(path)
        })
    }
}

/// Connects to a peer and shows it this node's pool.
async fn connect(
    to: &Destination,
    file: &File,
    region_bytes: u64,
    handshake: Duration,
) -> io::Result<tokio::net::UnixStream> {
    let stream = socket::connect(&to.address)?;
    socket::check_user(&stream)?;
    let (bytes, hello) = Hello::encode(TransportKind::Shm, &to.pass, &region_bytes.to_le_bytes());
    socket::send_with_file(&stream, &bytes, file)?;
    let mut stream = tokio::net::UnixStream::from_std(stream)?;
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer to the hello");
    let answer = hello.read_answer(&to.pass.key, &mut stream);
    timeout(handshake, answer).await.map_err(late)??;
    Ok(stream)
}

/// Why a connection is closed from this side.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error(transparent)]
    Full(#[from] NoRoom),
    #[error("the hello does not say how large the region is, or brings no file")]
    Terms,
    #[error(transparent)]
    Fetch(#[from] fetch::Closed),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One connection: its hello and what it announces, on a thread of its own, until the peer closes it, its control stream
/// ends, or `stop`.
async fn serve(
    (stream, guest): (tokio::net::UnixStream, Guest),
    terms: Terms,
    inbox: Arc<dyn Inbox>,
    stop: CancellationToken,
    threads: TaskTracker,
) -> Result<(), Closed> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let handle = stream.try_clone()?;
    let over = stop.child_token(); // or sooner: with its control stream
    let (admit, admitted) = oneshot::channel::<CancellationToken>();
    let ends = over.clone();
    let link = async move {
        if let Ok(link_ended) = admitted.await {
            link_ended.cancelled().await;
            ends.cancel();
        }
        std::future::pending::<()>().await
    };
    let work = move || copy(stream, guest, terms, &*inbox, admit);
    tokio::select! {
        result = on_thread("kv-shm", handle, &over, &threads, work) => result?,
        () = link => Ok(()),
    }
}

/// The thread's work.
fn copy(
    mut stream: UnixStream,
    mut guest: Guest,
    terms: Terms,
    inbox: &dyn Inbox,
    admit: oneshot::Sender<CancellationToken>,
) -> Result<(), Closed> {
    stream.set_read_timeout(Some(terms.waits.handshake))?;
    stream.set_write_timeout(Some(terms.waits.stall))?;
    socket::check_user(&stream)?;
    let (hello, file) = socket::receive_with_file(&mut stream)?;
    let hello = Hello::decode(hello)?;
    let mut said = [0; 8];
    if hello.terms_bytes() != said.len() {
        return Err(Closed::Terms);
    }
    io::Read::read_exact(&mut stream, &mut said)?;
    let Admission { key, slice_bytes, ended, .. } = inbox.link(&hello.link()).ok_or(HelloError::Link)?;
    if !hello.proven(&key, &said) {
        return Err(HelloError::Unproven.into());
    }
    if hello.kind() != Some(TransportKind::Shm) {
        return Err(HelloError::Kind.into());
    }
    guest.prove(hello.link())?;
    let mut region = Mapping::new(&file.ok_or(Closed::Terms)?, u64::from_le_bytes(said))?;
    let _ = admit.send(ended);
    io::Write::write_all(&mut stream, &hello.answer(&key, &[]))?;
    Ok(fetch::serve(&mut stream, &mut region, Terms { slice_bytes, ..terms }, inbox)?)
}

impl fetch::Wire for UnixStream {
    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(patience)
    }

    fn ended(&self) -> bool {
        fetch::hung_up(self)
    }
}
