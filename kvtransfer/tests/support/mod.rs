//! What the tests of this crate stand on: memory with known bytes, and nodes with a real gRPC server on loopback.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

pub mod caches;
pub mod scripted;

use std::{
    fs::File,
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    ops::Range,
    ptr::NonNull,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use baton_kvtransfer::{
    DataPortConfig, DeviceMemory, Dial, ExpectSpec, FleetSecrets, KvLayout, KvNode, Limits, NodeConfig,
    OfferSpec, Plaintext, Reclaimed, Region, TransportConfig, TransportKind,
};
use baton_proto::{Incarnation, InstanceId, PromptDigest, TransferId};
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio_util::sync::CancellationToken;

pub const LAYERS: u32 = 4;
pub const BLOCKS: u32 = 64;
pub const SLICE: usize = 3000;
pub const BLOCK_TOKENS: u32 = 16;

/// A pool's memory, `[layer][block]`, reached by raw pointers as a device's would be.
pub struct Pool {
    base: NonNull<u8>,
    bytes: usize,
    slice: usize,
    blocks: u32,
    memory: Memory,
}

/// What a pool is made of.
enum Memory {
    /// A file's, so that it can be shared.
    File { file: Arc<File>, _map: MmapMut },
    /// An emulated device's, which the tests can reach all the same.
    Device(Arc<dyn DeviceMemory>),
}

// SAFETY: plain memory that goes with the pool; the tests touch only blocks that no node has.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    pub fn new(layers: u32, blocks: u32, slice: usize) -> Arc<Self> {
        let bytes = layers as usize * blocks as usize * slice;
        let file = File::from(memfd_create("kv", MemfdFlags::ALLOW_SEALING).expect("a file"));
        file.set_len(bytes as u64).expect("room");
        // SAFETY: nobody but the pool and what it is lent to has the file.
        let mut map = unsafe { MmapMut::map_mut(&file).expect("mapped") };
        let base = NonNull::new(map.as_mut_ptr()).expect("a mapping has an address");
        Arc::new(Self {
            base,
            bytes,
            slice,
            blocks,
            memory: Memory::File { file: Arc::new(file), _map: map },
        })
    }

    /// One of an emulated device's memory, zeroed, which is never freed.
    pub fn on_device(
        layout: &KvLayout,
        blocks: u32,
        device: Arc<dyn DeviceMemory>,
        allocate: impl FnOnce(usize) -> NonNull<u8>,
    ) -> Arc<Self> {
        let slice = layout.slice_bytes as usize;
        let bytes = layout.layers as usize * blocks as usize * slice;
        let base = allocate(bytes);
        Arc::new(Self { base, bytes, slice, blocks, memory: Memory::Device(device) })
    }

    pub fn region(self: &Arc<Self>) -> Region {
        // SAFETY: the memory lives in the owner; blocks lent to a node are left alone by the tests.
        let region = unsafe { Region::new(self.clone(), self.base, self.bytes) };
        match &self.memory {
            Memory::File { file, .. } => region.backed_by(file.clone()),
            Memory::Device(device) => region.on_device(device.clone()),
        }
    }

    fn slice_ptr(&self, layer: u32, block: u32) -> *mut u8 {
        let at = (layer as usize * self.blocks as usize + block as usize) * self.slice;
        assert!(at + self.slice <= self.bytes);
        // SAFETY: just checked to be inside.
        unsafe { self.base.as_ptr().add(at) }
    }

    pub fn write(&self, layer: u32, block: u32, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.slice);
        // SAFETY: a whole slice inside the pool, of a block that is the test's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.slice_ptr(layer, block), self.slice) }
    }

    pub fn read(&self, layer: u32, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.slice];
        // SAFETY: a whole slice inside the pool, of a block that is the test's.
        unsafe { std::ptr::copy_nonoverlapping(self.slice_ptr(layer, block), bytes.as_mut_ptr(), self.slice) }
        bytes
    }
}

/// Bytes that tell seed, layer and block index apart.
pub fn pattern(seed: u64, layer: u32, index: u32, len: usize) -> Vec<u8> {
    let mut state =
        seed ^ (u64::from(layer) << 32 | u64::from(index)).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn layout() -> KvLayout {
    KvLayout {
        model_revision: "r1".into(),
        format: "test".into(),
        dtype: "f32".into(),
        block_tokens: BLOCK_TOKENS,
        layers: LAYERS,
        kv_heads: 1,
        head_dim: 1,
        rope_dim: 0,
        tensor_parallel: 1,
        slice_bytes: SLICE as u64,
    }
}

pub fn instance(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a valid name")
}

/// How a test's node differs from the usual one.
pub struct Setup {
    pub layout: KvLayout,
    pub blocks: u32,
    pub lease: Duration,
    pub limits: Limits,
    pub incarnation: u64,
    /// Where it listens.
    pub host: IpAddr,
    /// The best first.
    pub transports: Vec<TransportConfig>,
    /// Data connections, in all.
    pub connections: usize,
    /// Data connections that have shown nothing yet.
    pub unproven: usize,
    pub dial: Arc<dyn Dial>,
    pub secret: Option<FleetSecrets>,
    /// Whether caches of another type are taken in.
    pub convert: bool,
    /// `None` = a file's memory.
    pub pool: Option<Arc<Pool>>,
}

/// Long, so that no transfer ends for want of processor time.
const LEASE: Duration = Duration::from_secs(20);

/// Those of a lease of 3 s, so that waits other than for a peer are short.
pub fn limits() -> Limits {
    Limits { seal_grace: LEASE, data_stall: LEASE, keep_alive_timeout: LEASE, ..Limits::default() }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            layout: layout(),
            blocks: BLOCKS,
            lease: LEASE,
            limits: Limits { handshake: Duration::from_secs(2), ..limits() },
            incarnation: 1,
            host: Ipv4Addr::LOCALHOST.into(),
            transports: vec![TransportConfig::Tcp { connections: 2 }],
            connections: 1024,
            unproven: 256,
            dial: Arc::new(Plaintext),
            secret: None,
            convert: false,
            pool: None,
        }
    }
}

/// One connection to each peer.
pub fn one_lane() -> Setup {
    Setup { transports: vec![TransportConfig::Tcp { connections: 1 }], ..Setup::default() }
}

/// A node with its memory, its gRPC server, and the blocks it gave back on its own.
pub struct Peer {
    pub name: InstanceId,
    pub node: KvNode,
    pub pool: Arc<Pool>,
    pub address: SocketAddr,
    pub stop: CancellationToken,
    pub reclaimed: Arc<Mutex<Vec<Reclaimed>>>,
}

impl Peer {
    pub fn start(name: &str) -> Self {
        Self::start_with(name, Setup::default())
    }

    pub fn start_with(name: &str, setup: Setup) -> Self {
        let new_pool = || Pool::new(setup.layout.layers, setup.blocks, setup.layout.slice_bytes as usize);
        let pool = setup.pool.unwrap_or_else(new_pool);
        let reclaimed = Arc::new(Mutex::new(Vec::new()));
        let (stop, sink) = (CancellationToken::new(), reclaimed.clone());
        let listener = TcpListener::bind((setup.host, 0)).expect("a free port");
        let Setup { connections, unproven, .. } = setup;
        let data_port = DataPortConfig { connections, unproven, ..DataPortConfig::new(listener) };
        let config = NodeConfig {
            instance_id: instance(name),
            incarnation: Incarnation(setup.incarnation),
            layout: setup.layout,
            region: pool.region(),
            blocks: setup.blocks,
            data_port,
            transports: setup.transports,
            dial: setup.dial,
            secret: setup.secret,
            convert: setup.convert,
            lease: setup.lease,
            limits: setup.limits,
            reclaim: Arc::new(move |blocks| sink.lock().expect("not poisoned").push(blocks)),
        };
        let node = KvNode::start(config, stop.clone()).expect("a valid configuration");
        let listener = TcpListener::bind((setup.host, 0)).expect("a free port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("a socket");
        let listener = tokio::net::TcpListener::from_std(listener).expect("within a runtime");
        let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
        let (service, stopped) = (node.handoff_service(), stop.clone());
        tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            stopped.run_until_cancelled(server.serve_with_incoming(incoming)).await
        });
        Self { name: instance(name), node, pool, address, stop, reclaimed }
    }

    /// Where it takes slices in over TCP.
    pub fn data_address(&self) -> SocketAddr {
        let tcp = self.node.transports().into_iter().find(|(kind, _)| *kind == TransportKind::Tcp);
        tcp.expect("tcp").1.parse().expect("an address")
    }

    /// Fills the blocks of a transfer with its pattern, all layers.
    pub fn fill(&self, seed: u64, blocks: &[u32]) {
        for layer in 0..LAYERS {
            self.fill_layer(seed, layer, blocks, 0..blocks.len() as u32);
        }
    }

    pub fn fill_layer(&self, seed: u64, layer: u32, blocks: &[u32], indices: Range<u32>) {
        for index in indices {
            self.pool.write(layer, blocks[index as usize], &pattern(seed, layer, index, self.pool.slice));
        }
    }

    /// Whether a transfer's pattern lies in these blocks, all layers.
    pub fn holds(&self, seed: u64, blocks: &[u32]) -> bool {
        (0..LAYERS).all(|layer| {
            blocks.iter().enumerate().all(|(index, &block)| {
                self.pool.read(layer, block) == pattern(seed, layer, index as u32, self.pool.slice)
            })
        })
    }

    /// Waits until no transfer is left in the node.
    pub async fn idle(&self) {
        until("no transfer is left", || {
            let stats = self.node.stats();
            stats.incoming_active + stats.outgoing_active + stats.held_offers == 0
        })
        .await;
    }

    pub fn reclaimed_blocks(&self) -> Vec<u32> {
        let mut blocks: Vec<u32> =
            self.reclaimed.lock().expect("not poisoned").iter().flat_map(|r| r.blocks.clone()).collect();
        blocks.sort_unstable();
        blocks
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub fn in_secs(secs: u64) -> Instant {
    Instant::now() + Duration::from_secs(secs)
}

/// That of every test's transfer.
pub fn prompt() -> PromptDigest {
    PromptDigest::of(&[1, 2, 3])
}

pub fn expect_spec(id: TransferId, sender: &InstanceId, blocks: &[u32]) -> ExpectSpec {
    ExpectSpec {
        id,
        sender: sender.clone(),
        sender_incarnation: None,
        prompt_tokens: blocks.len() as u32 * BLOCK_TOKENS,
        prompt_digest: prompt(),
        blocks: blocks.to_vec(),
        held: Vec::new(),
        deadline: in_secs(30),
    }
}

pub fn offer_spec(id: TransferId, to: &Peer, blocks: &[u32]) -> OfferSpec {
    OfferSpec {
        id,
        peer: to.address.to_string(),
        receiver: to.name.clone(),
        receiver_incarnation: None,
        prompt_tokens: blocks.len() as u32 * BLOCK_TOKENS,
        prompt_digest: prompt(),
        blocks: blocks.to_vec(),
        priority: 0,
        deadline: in_secs(30),
    }
}

/// Waits for a condition that other tasks bring about; fails after ten seconds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let by = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < by, "still waiting until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Fails the test instead of hanging it.
pub async fn within<T>(what: &str, secs: u64, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(secs), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {secs} s"),
    }
}
