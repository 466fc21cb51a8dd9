//! Fetching where the two sides talk over the data port and slices travel by other means (a [`Medium`]).

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    task::spawn_blocking,
    time::timeout,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use super::{Lane, Lent, Medium, RemoteRegion, Wire, hung_up, on_thread, serve};
use crate::transport::{
    Destination, Inbox, Opening, Outbox, Path, Terms, Transport, TransportKind,
    hello::{ANSWER_BYTES, Hello},
    key::DataKey,
    port::{Closed, DataPort, Greeted, connect},
};

/// Said by the receiver once it is connected to what the sender lends.
const READY: u8 = 1;

/// A transport over a medium.
pub(crate) struct Fetched {
    medium: Arc<dyn Medium>,
    port: Arc<DataPort>,
    terms: Terms,
    /// Counts the threads that a medium may hold.
    threads: TaskTracker,
}

impl Fetched {
    pub(crate) fn new(
        medium: Arc<dyn Medium>,
        port: Arc<DataPort>,
        terms: Terms,
        threads: TaskTracker,
    ) -> Self {
        Self { medium, port, terms, threads }
    }
}

impl Transport for Fetched {
    fn kind(&self) -> TransportKind {
        self.medium.kind()
    }

    fn address(&self) -> String {
        self.port.address().to_owned()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, _: &TaskTracker, stop: CancellationToken) {
        let (medium, terms, threads) = (self.medium.clone(), self.terms, self.threads.clone());
        self.port.handle(self.kind(), move |greeted| {
            let (medium, inbox, stop) = (medium.clone(), inbox.clone(), stop.clone());
            Box::pin(receive(greeted, medium, inbox, terms, stop, threads.clone()))
        });
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let (terms, tasks, path, medium) = (self.terms, tasks.clone(), Path::new(stop), self.medium.clone());
        let counted = self.threads.token();
        Box::pin(async move {
            let (mut stream, hello, request) = connect(medium.kind(), &to, &terms).await?;
            let lend = move || {
                let (lent, grant) = medium.lend(&request)?;
                Ok::<_, io::Error>((Returned(Some((lent, counted))), grant))
            };
            let (lent, grant) = spawn_blocking(lend).await.map_err(io::Error::other)??;
            let late = |_| {
                io::Error::new(io::ErrorKind::TimedOut, "the peer does not connect to this node's memory")
            };
            let ready = async {
                stream.write_all(&hello.grant(&to.pass.key, &grant)).await?;
                stream.read_u8().await
            };
            if timeout(terms.waits.handshake, ready).await.map_err(late)?? != READY {
                return Err(io::Error::other("the peer does not say that it is ready"));
            }
            tasks.spawn(Lane::new(terms, outbox, lent.keep()).run(stream, path.end()));
            Ok(path)
        })
    }
}

/// What is lent to a peer that may not be let in after all. Taking it back blocks, so it is done elsewhere.
struct Returned(Option<(Box<dyn Lent>, TaskTrackerToken)>);

impl Returned {
    /// The peer is in.
    fn keep(mut self) -> Option<Box<dyn Lent>> {
        self.0.take().map(|(lent, _)| lent)
    }
}

impl Drop for Returned {
    fn drop(&mut self) {
        let lent = self.0.take();
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(lent))),
            Err(_) => drop(lent),
        }
    }
}

/// One connection, on a thread of its own.
async fn receive(
    greeted: Greeted,
    medium: Arc<dyn Medium>,
    inbox: Arc<dyn Inbox>,
    terms: Terms,
    stop: CancellationToken,
    threads: TaskTracker,
) -> Result<(), Closed> {
    let Greeted { stream, hello, key, .. } = greeted;
    let mut stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let (handle, name) = (stream.try_clone()?, format!("kv-{}", medium.kind()));
    let work = move || {
        let mut region = let_in(&mut stream, &hello, &key, &*medium, terms)?;
        serve(&mut stream, &mut *region, terms, &*inbox).map_err(|closed| match closed {
            super::Closed::Io(error) => Closed::Io(error),
            other => Closed::Misbehaved(other.to_string()),
        })
    };
    on_thread(&name, handle, &stop, &threads, work).await?
}

/// Asks the sender for its memory and connects to it.
fn let_in(
    stream: &mut TcpStream,
    hello: &Hello,
    key: &DataKey,
    medium: &dyn Medium,
    terms: Terms,
) -> Result<Box<dyn RemoteRegion>, Closed> {
    let deadline = Instant::now() + terms.waits.handshake;
    stream.set_read_timeout(Some(terms.waits.handshake))?;
    stream.set_write_timeout(Some(terms.waits.stall))?;
    let (asking, request) = medium.ask()?;
    stream.write_all(&hello.answer(key, &request))?;
    let mut head = [0; ANSWER_BYTES];
    stream.read_exact(&mut head)?;
    let mut grant = vec![0; Hello::grant_terms_bytes(&head)?];
    stream.read_exact(&mut grant)?;
    if !hello.answered(key, &head, &grant) {
        return Err(Closed::Misbehaved("a grant without the link's proof".into()));
    }
    let region = asking.connect(&grant, deadline)?;
    stream.write_all(&[READY])?;
    Ok(region)
}

impl Wire for TcpStream {
    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(patience)
    }

    fn ended(&self) -> bool {
        hung_up(self)
    }
}
