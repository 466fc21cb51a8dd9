//! The shells under many orders of their threads, with shuttle (`crate::sync`).
//!
//! `cargo test -p baton-kvtransfer --features explore --lib explore`; `EXPLORE_RUNS` sets how many orders each test
//! goes through with either scheduler. A failure prints the schedule that led to it, for `shuttle::replay`. A thread
//! that waits for what never comes is found as a deadlock: so is a lost wake.

mod claims;
mod receive;
mod send;
mod table;

use std::sync::{
    OnceLock,
    atomic::{AtomicU32, Ordering::SeqCst},
};

use baton_proto::{Incarnation, InstanceId};
use shuttle::rand::{RngCore, thread_rng};
use tokio::runtime::Runtime;

use super::{peer_link::PeerLink, *};
use crate::session::{SliceRun, Tally};

const LAYERS: u32 = 2;
const BLOCKS: u32 = 4;
const SLICE_BYTES: u64 = 4;

/// Goes through many orders: random ones, and ones that differ from a fixed order at a few places (PCT).
fn explore(test: fn()) {
    let runs = std::env::var("EXPLORE_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(1500);
    shuttle::check_random(test, runs);
    shuttle::check_pct(test, runs, 3);
}

/// One of `0..of`, chosen anew for each order.
fn pick(of: u64) -> u64 {
    thread_rng().next_u64() % of
}

fn id(of: u8) -> TransferId {
    TransferId::from_bytes([of; 16])
}

fn name(of: &str) -> InstanceId {
    InstanceId::new(of).expect("a valid name")
}

/// What the sender says of a slice; also what it is filled with.
fn sum(layer: u32, block: u32) -> u32 {
    layer * 100 + block + 1
}

/// The slices of a transfer of two blocks.
fn slices() -> impl Iterator<Item = SliceRun> {
    (0..LAYERS).flat_map(|layer| (0..2).map(move |first| SliceRun { layer, first, count: 1 }))
}

fn whole() -> Tally {
    let mut tally = Tally::default();
    slices().for_each(|run| tally.add(run.layer, run.first, sum(run.layer, run.first), SLICE_BYTES));
    tally
}

/// A node without tasks and transports: the test's threads stand for those. And what watches its blocks.
struct Stage {
    node: Arc<Node>,
    watch: Arc<Watch>,
}

/// Who touches blocks, and which have come back to their owners.
struct Watch {
    claims: Claims,
    /// By block of the pool: transports that touch it now.
    touched: [AtomicU32; BLOCKS as usize],
    returned: std::sync::Mutex<Vec<TransferId>>,
}

impl Watch {
    /// For as long as a transport uses these blocks.
    fn touch<T>(&self, block: u32, touch: impl FnOnce() -> T) -> T {
        self.touched[block as usize].fetch_add(1, SeqCst);
        shuttle::thread::yield_now();
        let result = touch();
        shuttle::thread::yield_now();
        self.touched[block as usize].fetch_sub(1, SeqCst);
        result
    }

    /// An owner has its blocks again: nobody may touch them any more, and they can be lent on.
    fn returned(&self, id: TransferId, blocks: &[u32]) {
        for &block in blocks {
            assert_eq!(self.touched[block as usize].load(SeqCst), 0, "block {block} came back while in use");
        }
        drop(self.claims.claim(blocks, &[]).expect("blocks that came back can be lent"));
        let mut returned = self.returned.lock().expect("not poisoned");
        assert!(!returned.contains(&id), "blocks came back twice");
        returned.push(id);
    }

    fn has_returned(&self, id: TransferId) -> bool {
        self.returned.lock().expect("not poisoned").contains(&id)
    }
}

impl Stage {
    fn new() -> Self {
        static RUNTIME: OnceLock<Runtime> = OnceLock::new();
        // Nothing runs on it: links are put in place by hand.
        let build = || tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let layout = crate::memory::tests::layout(LAYERS, SLICE_BYTES);
        let region = crate::Region::zeroed((u64::from(LAYERS * BLOCKS) * SLICE_BYTES) as usize);
        let claims = Claims::new(BLOCKS);
        let watch = Arc::new(Watch {
            claims: claims.clone(),
            touched: Default::default(),
            returned: Default::default(),
        });
        let seen = watch.clone();
        let limits = Limits { held_offers: 1, ..Limits::default() };
        let identity = Identity { instance_id: name("here"), incarnation: Incarnation(1), secrets: None };
        let slices = region.slices(&layout, BLOCKS).expect("fits");
        let reclaim = Arc::new(move |back: Reclaimed| seen.returned(back.id, &back.blocks));
        let runtime = RUNTIME.get_or_init(build).handle().clone();
        let node = Arc::new(Node {
            identity,
            layout,
            lease: Duration::from_secs(60),
            pool: Pool::new(slices, claims, reclaim),
            transports: Vec::new(),
            translator: Translator::new(false, limits.staging_bytes),
            peers: Peers::new(&limits),
            incoming: Table::new(Bounds { remember: 8, hold: limits.held_offers }),
            dial: Arc::new(crate::Plaintext),
            links: Links::new(limits.peers),
            outgoing: Table::new(Bounds { remember: 8, hold: 0 }),
            counters: Counters::default(),
            activity: Notify::new(),
            lifetime: Lifetime::new(runtime, CancellationToken::new()),
            limits,
        });
        Self { node, watch }
    }

    /// How many transfers of a direction have been told success, and how many failure.
    fn told(&self, direction: Direction) -> (u64, u64) {
        let stats = self.node.counters.snapshot(Active::default(), 0, Vec::new());
        let failed = stats.aborted.iter().filter(|(of, ..)| *of == direction).map(|&(.., count)| count).sum();
        match direction {
            Direction::Incoming => (stats.incoming_completed, failed),
            Direction::Outgoing => (stats.outgoing_completed, failed),
        }
    }
}
