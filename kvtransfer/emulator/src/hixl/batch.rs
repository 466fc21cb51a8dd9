//! What a client's thread does with a batch.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
};

use super::wire;
use crate::fault::{self, Fault};

pub(super) const WAITING: i32 = 0;
pub(super) const COMPLETED: i32 = 1;
const TIMED_OUT: i32 = 2;
const FAILED: i32 = 3;

/// Addresses here and there, as the caller gave them; found to be registered.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) remote: u64,
    pub(super) local: u64,
    pub(super) len: u64,
}

/// Does one batch, with the fault of the hour.
pub(super) fn run(stream: &mut TcpStream, pieces: &[Piece], poisoned: &AtomicBool, stop: &AtomicBool) -> i32 {
    if poisoned.load(Ordering::Acquire) {
        return FAILED;
    }
    let half = &pieces[..pieces.len().div_ceil(2)];
    if fault::is(Fault::BatchFails) {
        let _ = copy(stream, half, stop);
        FAILED
    } else if fault::is(Fault::BatchTimesOut) {
        let _ = copy(stream, half, stop);
        TIMED_OUT
    } else if fault::is(Fault::BatchNeverCompletes) || fault::is(Fault::Unfenced) {
        let mut turn = 0u8;
        while !stop.load(Ordering::Acquire) {
            turn = turn.wrapping_add(1);
            for piece in pieces {
                // The first byte is enough to see that it still writes, and quick.
                store(piece.local, &[turn]);
            }
            std::thread::yield_now();
        }
        WAITING
    } else {
        copy(stream, pieces, stop).map_or(FAILED, |()| COMPLETED)
    }
}

fn copy(stream: &mut TcpStream, pieces: &[Piece], stop: &AtomicBool) -> io::Result<()> {
    let mut ask = vec![wire::READ];
    ask.extend((pieces.len() as u32).to_le_bytes());
    for piece in pieces {
        ask.extend(piece.remote.to_le_bytes());
        ask.extend(piece.len.to_le_bytes());
    }
    stream.write_all(&ask)?;
    let mut stream = io::BufReader::with_capacity(1 << 16, stream);
    let mut buffer = vec![0u8; 1 << 16];
    for piece in pieces {
        if wire::u8(&mut stream)? != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut at = 0;
        while at < piece.len {
            let chunk = &mut buffer[..(piece.len - at).min(1 << 16) as usize];
            stream.read_exact(chunk)?;
            if stop.load(Ordering::Acquire) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            store(piece.local + at, chunk);
            at += chunk.len() as u64;
        }
    }
    Ok(())
}

/// Writes to the client's memory, as a network card would.
fn store(local: u64, bytes: &[u8]) {
    let to = std::ptr::with_exposed_provenance_mut::<u8>(local as usize);
    // SAFETY: within memory that the client registered and whose owner keeps it until the client is destroyed, which
    // waits for this thread.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}
