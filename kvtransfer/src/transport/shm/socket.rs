//! Sockets of the abstract namespace, with a file in the first message.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt,
};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::transport::hello::HELLO_BYTES;

/// The address of this name.
pub(super) fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
}

/// Connects at once or not at all: a process that takes no connections any more must not hold this one up. What comes out
/// does not block.
pub(super) fn connect(name: &str) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(format!("\0{name}"))?)?;
    Ok(OwnedFd::from(socket).into())
}

/// Refuses a process of another user.
pub(super) fn check_user(stream: &UnixStream) -> io::Result<()> {
    let peer = sockopt::socket_peercred(stream)?;
    if peer.uid == rustix::process::geteuid() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "the process there is another user's"))
}

/// Writes bytes, and a file with the first of them.
pub(super) fn send_with_file(stream: &UnixStream, bytes: &[u8], file: &File) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    if !with.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a file in a message"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut with, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&bytes[sent..])
}

/// Reads the head of a hello, and the file that came with it.
pub(super) fn receive_with_file(stream: &mut UnixStream) -> io::Result<([u8; HELLO_BYTES], Option<File>)> {
    let mut head = [0; HELLO_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut head)];
    let have = recvmsg(&*stream, into, &mut with, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let mut file = None;
    for message in with.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            file = fds.last().map(File::from).or(file);
        }
    }
    stream.read_exact(&mut head[have..])?;
    Ok((head, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_takes_no_connections_holds_nobody_up() {
        let name = format!("baton-kv-test-{:032x}", rand::random::<u128>());
        assert!(connect(&name).is_err(), "nobody is there");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        listener.bind(&SockAddr::unix(format!("\0{name}")).expect("a name")).expect("free");
        listener.listen(1).expect("bound");
        // It accepts none: after a few the system takes no more for it.
        let mut open = Vec::new();
        let full = loop {
            match connect(&name) {
                Ok(stream) => open.push(stream),
                Err(error) => break error,
            }
            assert!(open.len() < 100, "the system takes any number");
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "after {}", open.len());
    }
}
