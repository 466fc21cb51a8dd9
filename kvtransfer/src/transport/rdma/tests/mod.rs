//! Reads over real verbs. Those that need a machine with two RoCE ports to themselves are ignored elsewhere:
//! `deploy/emulated/roce` makes such a machine (`deploy/run test-emulated`).

mod faults;
mod reads;

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use super::{Dial, PeerRegion, Rails, Serving, library::Library, probe, unavailable::Unavailable};
use crate::{
    Region,
    transport::{
        Waits,
        fetch::{Piece, RemoteRegion},
    },
};

/// A node: memory of which devices and threads may write different bytes at the same time.
struct Node {
    bytes: Arc<Vec<AtomicU8>>,
    rails: Rails,
}

impl Node {
    fn new(len: usize, content: impl Fn(usize) -> u8) -> Self {
        let bytes: Arc<Vec<AtomicU8>> = Arc::new((0..len).map(|at| AtomicU8::new(content(at))).collect());
        let base = NonNull::from(&bytes[0]).cast();
        // SAFETY: the bytes live in `bytes` and are atomic; the tests look only at those that nothing writes just then.
        let region = unsafe { Region::new(bytes.clone(), base, len) };
        let rails = Rails::open(&region, waits()).expect("rails");
        Self { bytes, rails }
    }

    /// Memory to send, with the bytes of [`content`].
    fn owner(len: usize) -> Self {
        Self::new(len, content)
    }

    /// Memory to receive into.
    fn reader(len: usize) -> Self {
        Self::new(len, |_| BLANK)
    }

    fn piece(&self, remote: usize, local: usize, len: usize) -> Piece {
        let local = NonNull::from(&self.bytes[local]).cast();
        Piece { remote: remote as u64, local, len }
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes[at].load(Ordering::Relaxed)
    }

    fn holds(&self, mut expected: impl FnMut(usize) -> u8) -> bool {
        (0..self.bytes.len()).all(|at| self.byte(at) == expected(at))
    }

    fn fill(&self, with: u8) {
        self.bytes.iter().for_each(|byte| byte.store(with, Ordering::Relaxed));
    }

    /// Connects to `owner` on all rails.
    fn dial(&self, owner: &Node) -> (Serving, PeerRegion) {
        self.try_dial(owner).expect("connected")
    }

    fn try_dial(&self, owner: &Node) -> io::Result<(Serving, PeerRegion)> {
        let (dial, request) = Dial::new(&self.rails)?;
        let (serving, answer) = Serving::new(&owner.rails, &request)?;
        Ok((serving, dial.connect(&answer)?))
    }
}

/// Those of a lease of 3 s.
fn waits() -> Waits {
    let (handshake, grace) = (Duration::from_secs(5), Duration::from_millis(100));
    Waits::new(handshake, grace, Duration::from_secs(10), Duration::from_secs(1))
}

/// What is in memory that nothing has been read into.
const BLANK: u8 = 0xee;

/// Does not repeat within any power of two.
fn content(at: usize) -> u8 {
    (at % 251) as u8
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[test]
fn a_missing_library_is_a_reason() {
    let error = Library::open("libibverbs.so.0").err();
    assert!(
        matches!(&error, Some(Unavailable::Library(why)) if why.contains("libibverbs.so.0")),
        "{error:?}"
    );
    // One that is there and is not verbs.
    let error = Library::open("libc.so.6").err();
    assert!(matches!(&error, Some(Unavailable::Library(why)) if why.contains("ibv_")), "{error:?}");
}

#[test]
fn the_probe_has_ports_or_a_reason() {
    match probe() {
        Ok(ports) => assert!(!ports.is_empty()),
        Err(why) => assert!(!why.to_string().is_empty()),
    }
}
