//! Sockets of the abstract namespace, with a file in the first message.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt,
};

use crate::transport::hello::HELLO_BYTES;

/// The address of this name.
pub(super) fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
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
