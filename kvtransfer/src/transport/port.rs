//! The data port: where peers' connections arrive over TCP, whatever they are for. A connection begins with a hello that
//! shows which control stream it belongs to, and ends with that.

use std::{collections::HashMap, io, net::TcpListener, pin::Pin, sync::Arc};

use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Admission, Destination, Inbox, Terms, TransportKind,
    accept::accept,
    guests::{Bound, Guest, NoRoom},
    hello::{HELLO_BYTES, Hello, HelloError},
    key::DataKey,
};
use crate::TransferError;

/// Where a node's peers bring data connections.
#[derive(Debug)]
pub struct DataPortConfig {
    pub listener: TcpListener,
    /// `host:port` at which peers reach `listener`; `None` = its local address.
    pub advertise: Option<String>,
    /// Connections that have shown which control stream they belong to, in all. More are refused, as are those of one
    /// stream beyond an eighth of them, or 32 if that is more.
    pub connections: usize,
    /// Connections that have not shown that yet, apart from the others. Over it, the oldest of them is cut for a new one:
    /// whoever connects and says nothing keeps nobody out. As many as peers that may connect at the same moment.
    pub unproven: usize,
}

impl DataPortConfig {
    /// Over this listener, with the usual numbers of connections.
    pub fn new(listener: TcpListener) -> Self {
        Self { listener, advertise: None, connections: 4096, unproven: 256 }
    }
}

/// A connection whose hello has been proven, and not yet answered.
pub(crate) struct Greeted {
    pub(crate) stream: TcpStream,
    pub(crate) hello: Hello,
    pub(crate) key: DataKey,
    /// Of the peer's slices.
    pub(crate) slice_bytes: u32,
}

pub(crate) type Handling = Pin<Box<dyn Future<Output = Result<(), Closed>> + Send>>;
type Handler = Arc<dyn Fn(Greeted) -> Handling + Send + Sync>;

/// Why a data connection is closed from this side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Closed {
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error("no hello within the handshake deadline")]
    Silent,
    #[error(transparent)]
    Full(#[from] NoRoom),
    #[error("{0}")]
    Misbehaved(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// See the module.
pub(crate) struct DataPort {
    listener: Mutex<Option<tokio::net::TcpListener>>,
    bound: Bound,
    address: String,
    handlers: Mutex<HashMap<TransportKind, Handler>>,
    terms: Terms,
}

impl DataPort {
    /// Must be called within a tokio runtime.
    pub(crate) fn new(config: DataPortConfig, terms: Terms) -> Result<Arc<Self>, TransferError> {
        let DataPortConfig { listener, advertise, connections, unproven } = config;
        if connections == 0 || unproven == 0 {
            let what = "data connections, and unproven ones, must be at least 1";
            return Err(TransferError::Invalid(what.into()));
        }
        let bound = Bound { what: "data", connections, unproven };
        let failed = |what| move |error: io::Error| TransferError::Io { what, reason: error.to_string() };
        let local = listener.local_addr().map_err(failed("read the data listener's address"))?;
        listener.set_nonblocking(true).map_err(failed("make the data listener non-blocking"))?;
        let listener =
            tokio::net::TcpListener::from_std(listener).map_err(failed("register the data listener"))?;
        let (listener, handlers) = (Mutex::new(Some(listener)), Mutex::default());
        let address = advertise.unwrap_or_else(|| local.to_string());
        Ok(Arc::new(Self { listener, bound, address, handlers, terms }))
    }

    /// `host:port`, as peers are told.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Connections of this kind go to `handler` from now on.
    pub(crate) fn handle(
        &self,
        kind: TransportKind,
        handler: impl Fn(Greeted) -> Handling + Send + Sync + 'static,
    ) {
        self.handlers.lock().insert(kind, Arc::new(handler));
    }

    /// Accepts connections until `stop`. To be called once, after every `handle`:
    /// at its end, or when it is dropped, the handlers are let go of, and with them the node that they hold, which
    /// holds this port.
    pub(crate) async fn serve(
        self: Arc<Self>,
        inbox: Arc<dyn Inbox>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) {
        let Some(listener) = self.listener.lock().take() else { return };
        let _handlers = Handlers(&self.handlers);
        let ends = stop.clone();
        let converse = |stream, guest| {
            let (port, inbox, stop) = (self.clone(), inbox.clone(), ends.clone());
            async move { stop.run_until_cancelled(port.converse(stream, guest, inbox)).await.unwrap_or(Ok(())) }
        };
        accept(listener, self.bound, tasks, stop, converse, |reason| matches!(reason, Closed::Io(_))).await;
    }

    /// One connection, until the peer closes it or its control stream ends.
    async fn converse(
        &self,
        mut stream: TcpStream,
        mut guest: Guest,
        inbox: Arc<dyn Inbox>,
    ) -> Result<(), Closed> {
        prepare(&stream, &self.terms)?;
        let hello = timeout(self.terms.waits.handshake, read_hello(&mut stream))
            .await
            .map_err(|_| Closed::Silent)??;
        let admission = inbox.link(&hello.link()).ok_or(HelloError::Link)?;
        if !hello.proven(&admission.key, &[]) {
            return Err(HelloError::Unproven.into());
        }
        guest.prove(hello.link())?;
        let kind = hello.kind().filter(|kind| kind.brings(admission.mapped));
        let handler = kind.and_then(|kind| self.handlers.lock().get(&kind).cloned());
        let Admission { key, slice_bytes, ended, .. } = admission;
        let handling = handler.ok_or(HelloError::Kind)?(Greeted { stream, hello, key, slice_bytes });
        ended.run_until_cancelled(handling).await.unwrap_or(Ok(()))
    }
}

/// Those of a port that accepts.
struct Handlers<'a>(&'a Mutex<HashMap<TransportKind, Handler>>);

impl Drop for Handlers<'_> {
    fn drop(&mut self) {
        let handlers = std::mem::take(&mut *self.0.lock());
        drop(handlers); // not under the lock: a node may go with them
    }
}

async fn read_hello(stream: &mut TcpStream) -> Result<Hello, Closed> {
    let mut head = [0; HELLO_BYTES];
    stream.read_exact(&mut head).await?;
    let hello = Hello::decode(head)?;
    match hello.terms_bytes() {
        0 => Ok(hello),
        bytes => Err(HelloError::Terms(bytes as u32).into()),
    }
}

/// Connects to a peer's data port and exchanges hellos; also what the peer said of itself.
pub(crate) async fn connect(
    kind: TransportKind,
    to: &Destination,
    terms: &Terms,
) -> io::Result<(TcpStream, Hello, Vec<u8>)> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "connecting took too long");
    let mut stream =
        timeout(terms.waits.handshake, TcpStream::connect(&to.address)).await.map_err(late)??;
    prepare(&stream, terms)?;
    let greet = async {
        let (bytes, hello) = Hello::encode(kind, &to.pass, &[]);
        stream.write_all(&bytes).await?;
        let said = hello.read_answer(&to.pass.key, &mut stream).await?;
        Ok::<_, io::Error>((hello, said))
    };
    let (hello, said) = timeout(terms.waits.handshake, greet).await.map_err(late)??;
    Ok((stream, hello, said))
}

/// Sets a connection up so that a peer that has vanished is noticed, whether anything is on its way or not.
fn prepare(stream: &TcpStream, terms: &Terms) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keep_alive =
        TcpKeepalive::new().with_time(terms.waits.keep_alive).with_interval(terms.waits.keep_alive);
    socket.set_tcp_keepalive(&keep_alive)?;
    socket.set_tcp_user_timeout(Some(terms.waits.stall))
}
