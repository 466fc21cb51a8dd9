//! How fast KV caches cross loopback, next to plain TCP carrying the same frames in the same run.
//!
//! `cargo run --release -p baton-kvtransfer --example loopback [rounds]`. For each slice size, rounds of both are
//! interleaved and medians printed: whole transfers from offer to release, and the same number of bytes written by a
//! blocking socket pair from and into equally large memory. Then the time from seal to sealed of small transfers whose
//! last layer becomes ready just before, as at the end of a prefill.

use std::{
    io::{IoSlice, Read, Write},
    net::{TcpListener, TcpStream},
    ptr::NonNull,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_kvtransfer::{
    DataPortConfig, ExpectSpec, KvLayout, KvNode, Limits, NodeConfig, OfferSpec, Region, TransportConfig,
};
use baton_proto::{Incarnation, InstanceId, TransferId};
use tokio_util::sync::CancellationToken;

const LAYERS: u32 = 16;
/// Payload of one round.
const ROUND_BYTES: u64 = 512 << 20;
/// Memory of each pool; a round crosses it as often as needed.
const POOL_BYTES: u64 = 256 << 20;
/// What plain TCP writes and reads at a time: a frame of the node's default size.
const FRAME_BYTES: usize = 1 << 20;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let rounds = match std::env::args().nth(1) {
        Some(rounds) => rounds.parse()?,
        None => 5,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    println!("{:>10} {:>12} {:>12} {:>7}", "slice", "kvtransfer", "plain TCP", "ratio");
    for slice_bytes in [16 << 10, 64 << 10, 1 << 20, 16 << 20] {
        let (mut ours, mut plain) = (Vec::new(), Vec::new());
        let pair = runtime.block_on(Pair::start(slice_bytes))?;
        for _ in 0..rounds {
            ours.push(gigabytes_per_second(runtime.block_on(pair.move_bytes(ROUND_BYTES))?));
            plain.push(gigabytes_per_second(plain_tcp(ROUND_BYTES)?));
        }
        let (ours, plain) = (median(&mut ours), median(&mut plain));
        println!("{slice_bytes:>10} {ours:>7.2} GB/s {plain:>7.2} GB/s {:>7.2}", ours / plain);
        runtime.block_on(pair.stop());
    }
    let pair = runtime.block_on(Pair::start(24 << 10))?;
    let mut waits = runtime.block_on(pair.seal_to_sealed(200))?;
    let p50 = median(&mut waits);
    println!(
        "seal to sealed, last layer of 4 slices of 24 KiB: median {p50:.3} ms, p99 {:.3} ms",
        waits[waits.len() * 99 / 100]
    );
    runtime.block_on(pair.stop());
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn gigabytes_per_second(took: Duration) -> f64 {
    ROUND_BYTES as f64 / took.as_secs_f64() / 1e9
}

struct Pair {
    sender: KvNode,
    receiver: KvNode,
    receiver_address: String,
    blocks: u32,
    stop: CancellationToken,
}

impl Pair {
    async fn start(slice_bytes: u64) -> Result<Self, Failure> {
        let blocks = (POOL_BYTES / slice_bytes / u64::from(LAYERS)).max(1) as u32;
        let stop = CancellationToken::new();
        let sender = node("sender", slice_bytes, blocks, &stop)?;
        let receiver = node("receiver", slice_bytes, blocks, &stop)?;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let receiver_address = listener.local_addr()?.to_string();
        let service = receiver.handoff_service();
        let stopped = stop.clone();
        tokio::spawn(async move {
            let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
            let server = tonic::transport::Server::builder().add_service(service);
            stopped.run_until_cancelled(server.serve_with_incoming(incoming)).await
        });
        Ok(Self { sender, receiver, receiver_address, blocks, stop })
    }

    fn specs(&self, blocks: u32) -> Result<(ExpectSpec, OfferSpec), Failure> {
        let (id, deadline) = (TransferId::generate(), Instant::now() + Duration::from_secs(60));
        let blocks: Vec<u32> = (0..blocks).collect();
        let expect = ExpectSpec {
            id,
            sender: InstanceId::new("sender")?,
            sender_incarnation: None,
            prompt_tokens: blocks.len() as u32,
            blocks: blocks.clone(),
            held: Vec::new(),
            deadline,
        };
        let offer = OfferSpec {
            id,
            peer: self.receiver_address.clone(),
            receiver: InstanceId::new("receiver")?,
            receiver_incarnation: None,
            prompt_tokens: blocks.len() as u32,
            blocks,
            priority: 0,
            deadline,
        };
        Ok((expect, offer))
    }

    /// Moves at least `bytes`, transfer after transfer, each as large as the pool.
    async fn move_bytes(&self, bytes: u64) -> Result<Duration, Failure> {
        let started = Instant::now();
        let mut moved = 0;
        while moved < bytes {
            let (expect, offer) = self.specs(self.blocks)?;
            let mut incoming = self.receiver.expect(expect)?;
            let mut outgoing = self.sender.offer(offer)?;
            let progress = outgoing.progress();
            (0..LAYERS).for_each(|layer| progress.ready(layer, 0..self.blocks));
            outgoing.seal(0);
            incoming.sealed().await?;
            moved += outgoing.finished().await?.bytes;
        }
        Ok(started.elapsed().mul_f64(bytes as f64 / moved as f64))
    }

    /// Milliseconds from the last layer's readiness and the seal to the receiver's `sealed`.
    async fn seal_to_sealed(&self, count: usize) -> Result<Vec<f64>, Failure> {
        let mut waits = Vec::with_capacity(count);
        for _ in 0..count {
            let (expect, offer) = self.specs(4)?;
            let mut incoming = self.receiver.expect(expect)?;
            let mut outgoing = self.sender.offer(offer)?;
            let sent = self.receiver.stats().slices_received + 4 * u64::from(LAYERS - 1);
            (0..LAYERS - 1).for_each(|layer| outgoing.progress().ready(layer, 0..4));
            while self.receiver.stats().slices_received < sent {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let started = Instant::now();
            outgoing.progress().ready(LAYERS - 1, 0..4);
            outgoing.seal(0);
            incoming.sealed().await?;
            waits.push(started.elapsed().as_secs_f64() * 1e3);
            outgoing.finished().await?;
        }
        Ok(waits)
    }

    async fn stop(self) {
        self.stop.cancel();
        self.sender.stopped().await;
        self.receiver.stopped().await;
    }
}

fn node(name: &str, slice_bytes: u64, blocks: u32, stop: &CancellationToken) -> Result<KvNode, Failure> {
    let layout = KvLayout {
        model_revision: "bench".into(),
        format: "bench".into(),
        dtype: "f32".into(),
        block_tokens: 1,
        layers: LAYERS,
        kv_heads: 1,
        head_dim: 1,
        tensor_parallel: 1,
        slice_bytes,
    };
    let mut memory = vec![1u8; (slice_bytes * u64::from(LAYERS) * u64::from(blocks)) as usize];
    let base = NonNull::new(memory.as_mut_ptr()).ok_or("no memory")?;
    let len = memory.len();
    // SAFETY: the vector lives in the owner, and this program touches it through the nodes only.
    let region = unsafe { Region::new(Arc::new(memory), base, len) };
    let config = NodeConfig {
        instance_id: InstanceId::new(name)?,
        incarnation: Incarnation(1),
        layout,
        region,
        blocks,
        data_port: DataPortConfig::new(TcpListener::bind("127.0.0.1:0")?),
        transports: vec![TransportConfig::Tcp { connections: 2 }],
        secret: None,
        lease: Duration::from_secs(10),
        limits: Limits::default(),
        reclaim: Arc::new(|_| {}),
    };
    Ok(KvNode::start(config, stop.clone())?)
}

/// The yardstick: two threads and a socket, memory as large as the pools, nothing checked.
fn plain_tcp(bytes: u64) -> Result<Duration, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let receiver = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut memory = vec![1u8; POOL_BYTES as usize];
        stream.write_all(&[1])?; // ready: the memory is paged in
        let mut left = bytes as usize;
        while left > 0 {
            for frame in memory.chunks_mut(FRAME_BYTES) {
                let take = left.min(frame.len());
                stream.read_exact(&mut frame[..take])?;
                left -= take;
            }
        }
        stream.write_all(&[1])
    });
    let mut stream = TcpStream::connect(address)?;
    let memory = vec![1u8; POOL_BYTES as usize];
    stream.read_exact(&mut [0])?;
    let started = Instant::now();
    let mut left = bytes as usize;
    while left > 0 {
        for frame in memory.chunks(FRAME_BYTES) {
            let mut rest = &frame[..left.min(frame.len())];
            left -= rest.len();
            while !rest.is_empty() {
                rest = &rest[stream.write_vectored(&[IoSlice::new(rest)])?..];
            }
        }
    }
    stream.read_exact(&mut [0])?;
    let took = started.elapsed();
    receiver.join().map_err(|_| "the receiving thread panicked")??;
    Ok(took)
}
