//! A wire that damages what goes over it, on demand: it lies before an instance's data port.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use super::model::Faults;

/// How far into what goes over a connection next the byte lies that is damaged: beyond header and checksums of a frame
/// of eight slices, within its payload.
const DAMAGED_BYTE: usize = 600;

/// Opens the wire to `target`; where to connect.
pub async fn open(target: SocketAddr, faults: Arc<Faults>, stop: CancellationToken) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
        while let Ok((from, _)) = listener.accept().await {
            let carried = carry(from, target, faults.clone());
            tokio::spawn(stop.clone().run_until_cancelled_owned(carried));
        }
    }));
    address
}

/// One connection; an end of either side ends it.
async fn carry(from: TcpStream, target: SocketAddr, faults: Arc<Faults>) {
    let Ok(to) = TcpStream::connect(target).await else { return };
    let ((mut from, mut back_to), (mut back_from, mut to)) = (from.into_split(), to.into_split());
    let there = async {
        let (mut buffer, mut armed, mut passed) = ([0; 16 << 10], 0, 0);
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let now = faults.wire.load(Ordering::Relaxed);
            if now != armed {
                (armed, passed) = (now, 0);
            }
            let at = passed..passed + length;
            passed = at.end;
            let disarm =
                || faults.wire.compare_exchange(armed, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            if armed != 0 && at.contains(&DAMAGED_BYTE) && disarm() {
                buffer[DAMAGED_BYTE - at.start] ^= 0x40;
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    };
    let back = tokio::io::copy(&mut back_from, &mut back_to);
    tokio::select! {
        () = there => {}
        _ = back => {}
    }
}
