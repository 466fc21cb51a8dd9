//! Where a process listens: an address of its own, or a socket that whoever started it had already bound (`fd://3`),
//! so that the address and the waiting connections outlive any one process behind it.

use std::{
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs},
    os::fd::{FromRawFd, RawFd},
    str::FromStr,
};

use parking_lot::Mutex;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The host that means every address of this machine.
const EVERYWHERE: &str = "*";
/// Connections that may wait to be accepted: as many as the kernel lets wait. The standard library's 128 are fewer than come at
/// once to whoever takes over from another, and one that finds no room tries again after a second.
const BACKLOG: i32 = i32::MAX;

/// Why a listener cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "`{0}` is not an address to listen on; expected HOST:PORT, as in 127.0.0.1:8000 or *:8000, or fd://N"
    )]
    Syntax(String),
    #[error(
        "port {port} of {host} is in use: stop the program that holds it or choose another port (port 0 picks a free one)"
    )]
    InUse { host: String, port: u16 },
    #[error("port {port} of {host} needs privileges: choose one above 1023")]
    Forbidden { host: String, port: u16 },
    #[error("{host} is not an address of this machine: choose one that is, or * for all of them")]
    NotHere { host: String },
    #[error("cannot listen on {address}: {source}")]
    Bind { address: String, source: io::Error },
    #[error("it listens on every address, which is none that others can reach: set `{key}`")]
    Everywhere { key: &'static str },
    #[error("fd://{fd} is not a listening socket handed to this process{detail}")]
    Inherited { fd: RawFd, detail: &'static str },
}

/// `HOST:PORT` (port 0 = any free one) or `fd://N`. The host `*` is every address of this machine, of IPv6 and of IPv4,
/// whichever it has. In configuration: a string.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum Listen {
    Address { host: String, port: u16 },
    Inherited(RawFd),
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let syntax = || ListenError::Syntax(text.to_owned());
        if let Some(fd) = text.strip_prefix("fd://") {
            return fd.parse().ok().filter(|fd| *fd > 2).map(Self::Inherited).ok_or_else(syntax);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(syntax)?;
        let port = port.parse().map_err(|_| syntax())?;
        let bare = bare(host);
        if bare.is_empty() || (bare == host && host.contains(':')) {
            return Err(syntax());
        }
        Ok(Self::Address { host: bare.to_owned(), port })
    }
}

impl TryFrom<String> for Listen {
    type Error = ListenError;

    fn try_from(text: String) -> Result<Self, ListenError> {
        text.parse()
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        listen.to_string()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Address { host, port } => write!(f, "{host}:{port}"),
            Self::Inherited(fd) => write!(f, "fd://{fd}"),
        }
    }
}

impl Listen {
    pub fn address(host: impl Into<String>, port: u16) -> Self {
        Self::Address { host: host.into(), port }
    }

    /// Any free port of the loopback address.
    pub fn loopback() -> Self {
        Self::address("127.0.0.1", 0)
    }

    /// Whether it is every address of this machine, of both families: `*`.
    pub fn is_everywhere(&self) -> bool {
        matches!(self, Self::Address { host, .. } if host == EVERYWHERE)
    }

    /// Binds, or takes over the inherited socket (once). The listener is non-blocking, ready for tokio's `from_std`.
    pub fn bind(&self) -> Result<TcpListener, ListenError> {
        let listener = match self {
            Self::Address { host, port } => bind_address(host, *port)?,
            Self::Inherited(fd) => inherit(*fd)?,
        };
        let nonblocking = listener.set_nonblocking(true);
        nonblocking.map_err(|source| ListenError::Bind { address: self.to_string(), source })?;
        Ok(listener)
    }
}

/// `host:port` at which others reach a listener: its own address, unless `host`, the value of `key`, says otherwise.
pub fn reached_at(listener: &TcpListener, host: &str, key: &'static str) -> Result<String, ListenError> {
    let local =
        listener.local_addr().map_err(|source| ListenError::Bind { address: key.to_owned(), source })?;
    let host = bare(host);
    match (host, local.ip().is_unspecified()) {
        ("", true) => Err(ListenError::Everywhere { key }),
        ("", false) => Ok(local.to_string()),
        (host, _) if host.contains(':') => Ok(format!("[{host}]:{}", local.port())),
        (host, _) => Ok(format!("{host}:{}", local.port())),
    }
}

/// A host without the brackets that an address of IPv6 has beside a port.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn bind_address(host: &str, port: u16) -> Result<TcpListener, ListenError> {
    let failed = |source| ListenError::Bind { address: Listen::address(host, port).to_string(), source };
    let bound = if host == EVERYWHERE {
        bind_everywhere(port)
    } else {
        let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(failed)?.collect();
        TcpListener::bind(&*addresses)
    };
    let listened = bound.and_then(|socket| {
        listen(&socket, BACKLOG)?;
        Ok(socket)
    });
    listened.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { host: host.to_owned(), port },
        io::ErrorKind::PermissionDenied => ListenError::Forbidden { host: host.to_owned(), port },
        io::ErrorKind::AddrNotAvailable => ListenError::NotHere { host: host.to_owned() },
        _ => failed(source),
    })
}

/// One socket of IPv6 that takes connections of IPv4, too; of IPv4 alone where the kernel has no other.
fn bind_everywhere(port: u16) -> io::Result<TcpListener> {
    let socket = match socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None) {
        Ok(socket) => socket,
        Err(Errno::AFNOSUPPORT) => return TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        Err(error) => return Err(error.into()),
    };
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_ipv6_v6only(&socket, false)?;
    bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    Ok(socket.into())
}

/// Where to listen, if at all: `""` = `None`. Use as `#[serde(with = "baton_process::listen::option")]`.
pub mod option {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::Listen;

    pub fn serialize<S: Serializer>(listen: &Option<Listen>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&listen.as_ref().map(Listen::to_string).unwrap_or_default())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Listen>, D::Error> {
        match String::deserialize(deserializer)?.trim() {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(D::Error::custom),
        }
    }
}

/// Descriptors already taken over: two owners would close one another's socket.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

fn inherit(fd: RawFd) -> Result<TcpListener, ListenError> {
    let refuse = |detail| ListenError::Inherited { fd, detail };
    let mut taken = TAKEN.lock();
    if taken.contains(&fd) {
        return Err(refuse(": two settings name it"));
    }
    // Looked up by name first, so that a number nobody handed over is refused without being touched.
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| refuse(": it is not open"))?;
    if !target.to_string_lossy().starts_with("socket:") {
        return Err(refuse(": it is open, but not a socket"));
    }
    taken.push(fd);
    // SAFETY: the descriptor is open (checked above), a parent handed it over by its number in the configuration, and
    // `TAKEN` ensures that this is the only place and time that takes ownership of it.
    let listener = unsafe { TcpListener::from_raw_fd(fd) };
    let flags = rustix::io::FdFlags::CLOEXEC;
    let ready = rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false)
        && rustix::io::fcntl_setfd(&listener, flags).is_ok();
    if ready { Ok(listener) } else { Err(refuse(": it is a socket, but not one that listens")) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpStream,
        os::fd::{AsRawFd, IntoRawFd},
    };

    use super::*;

    /// A copy under a number that no other test's files get.
    fn numbered(file: &impl std::os::fd::AsFd, least: RawFd) -> std::os::fd::OwnedFd {
        rustix::io::fcntl_dupfd_cloexec(file, least).unwrap()
    }

    #[test]
    fn reads_and_writes_addresses() {
        for text in ["127.0.0.1:8000", "localhost:0", "[::1]:80", "*:80", "fd://3"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in
            ["8000", "127.0.0.1", ":80", "127.0.0.1:port", "127.0.0.1:70000", "fd://x", "fd://0", "::1:80"]
        {
            let error = text.parse::<Listen>().unwrap_err().to_string();
            assert!(error.contains("expected HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn a_port_in_use_is_named_with_what_to_do() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let error = Listen::address("127.0.0.1", port).bind().unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port} of 127.0.0.1 is in use: stop")), "{error}");
    }

    #[test]
    fn what_others_are_told_can_be_reached() {
        let here = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = here.local_addr().expect("an address").port();
        let told = |host| reached_at(&here, host, "advertise_host").expect("fine");
        assert_eq!(told(""), format!("127.0.0.1:{port}"));
        assert_eq!(told("a.b"), format!("a.b:{port}"));
        assert_eq!(told("::1"), format!("[::1]:{port}"));
        assert_eq!(told("[::1]"), format!("[::1]:{port}"));
        let everywhere = TcpListener::bind("0.0.0.0:0").expect("a port");
        let error = reached_at(&everywhere, "", "advertise_host").expect_err("refused").to_string();
        assert!(error.contains("set `advertise_host`"), "{error}");
        assert!(reached_at(&everywhere, "a.b", "advertise_host").is_ok());
    }

    #[test]
    fn everywhere_is_reached_by_both_families() {
        let listener = Listen::from_str("*:0").unwrap().bind().unwrap();
        listener.set_nonblocking(false).unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "::1"] {
            let to = TcpStream::connect((host, port)).unwrap();
            let (_, from) = listener.accept().unwrap();
            assert_eq!(from.ip().to_canonical(), to.local_addr().unwrap().ip());
        }
        let error = Listen::address("*", port).bind().unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port} of * is in use")), "{error}");
        assert!(reached_at(&listener, "", "advertise_host").is_err(), "as 0.0.0.0");
    }

    #[test]
    fn hundreds_may_come_before_the_first_is_accepted() {
        const MANY: usize = 512;
        let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        assert!(most.trim().parse::<usize>().unwrap() > MANY, "this kernel lets {most} wait");
        for host in ["127.0.0.1", "*"] {
            let listener = Listen::address(host, 0).bind().unwrap();
            let at = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port()));
            let within = std::time::Duration::from_millis(900);
            let come =
                (0..MANY).map(|_| TcpStream::connect_timeout(&at, within)).collect::<io::Result<Vec<_>>>();
            assert_eq!(come.unwrap().len(), MANY, "{host}");
        }
    }

    #[test]
    fn an_inherited_listener_keeps_its_address_and_its_waiting_connections() {
        let parent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = parent.local_addr().unwrap();
        let mut waiting = TcpStream::connect(address).unwrap();
        waiting.write_all(b"hello").unwrap();
        waiting.shutdown(std::net::Shutdown::Write).unwrap();

        let fd = numbered(&parent, 700).into_raw_fd();
        drop(parent);
        let listener = Listen::Inherited(fd).bind().unwrap();
        assert_eq!(listener.local_addr().unwrap(), address);
        listener.set_nonblocking(false).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        let mut text = String::new();
        accepted.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        let again = Listen::Inherited(fd).bind().unwrap_err().to_string();
        assert!(again.contains("two settings name it"), "{again}");
    }

    #[test]
    fn what_is_no_listening_socket_is_refused() {
        let text = Listen::Inherited(9_999).bind().unwrap_err().to_string();
        assert!(text.contains("it is not open"), "{text}");
        let file = numbered(&tempfile::tempfile().unwrap(), 800);
        let text = Listen::Inherited(file.as_raw_fd()).bind().unwrap_err().to_string();
        assert!(text.contains("not a socket"), "{text}");
    }
}
