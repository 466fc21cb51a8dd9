//! Moves KV caches between instances: whole, checked, and never into memory that is not the transfer's.
//!
//! A process has one [`KvNode`] over its KV pool (a [`Region`] laid out `[layer][block]`). A *slice*, one block of one
//! layer, is the unit that moves. The receiver [`expect`](KvNode::expect)s a transfer into blocks it has reserved; the
//! sender [`offer`](KvNode::offer)s it, says which slices are [`ready`](Progress::ready) while it still computes the
//! rest, and seals it. The receiver has it once every slice is accounted for and matches the seal; the sender may then
//! free its blocks. Either side can end it at any time, and then both are told why.
//!
//! # Who does what
//! - `session`: what a transfer may do, as two pure state machines; leases, deadlines, counts, fences.
//! - `node`: the shell around them: handles, control streams (`Handoff.Exchange`), routes, the clock.
//! - `transport`: how slices travel, behind one trait: `tcp`, `shm`, `rdma`, `hixl`, `hccl`. The libraries of the last
//!   three are opened at run time.
//! - [`plan`]: which bytes go where between instances that keep the same cache in different ways; pure. A receiver
//!   carries it out (`node::translate`) on what comes from a sender of another layout, one rank from one rank.
//! - `memory`: bounds-checked access to the region. `unsafe` code is here, where another process's memory is mapped
//!   (`transport::shm`), and in the bindings (`transport::rdma`, `transport::ascend`), alone.
//!
//! # Promises
//! - A receiver completes only with every expected slice in place, each matching its sum (CRC32C over TCP, a digest of
//!   samples where memory or a fabric carries it), all matching the seal.
//! - Blocks come back exactly once, and only when no transport can touch them any more.
//! - What comes in another layout is checked before it is mapped, and mapped before it counts; blocks that are held
//!   already are neither sent, as far as they cover the sender's, nor written.
//! - A peer names slices of a transfer that it was given the key of, never addresses; it can write nowhere else.
//! - Silence is bounded by the lease, waiting by deadlines, memory by [`Limits`].
//!
//! What it leaves to others: which blocks, which peer, when; and HTTP/2 keep-alive on the server that mounts
//! [`KvNode::handoff_service`], without which a sender that has vanished keeps its control stream. Peers show each other
//! that they know the [`FleetSecret`], if there is one, before either tells the other anything; without it, and without
//! mutual TLS (whoever dials and serves the `Handoff` service brings that: [`Dial`], [`KnownPeer`]), whoever can reach the
//! port is believed. The data plane is authenticated by keys given over the control stream. Slices are not encrypted;
//! without TLS messages of the control stream are not either, and carry no proof but those of its hellos: who can change
//! them on their way can change what they say.
//!
//! # Example
//! Two nodes in one process; `pool` stands for a device's memory.
//! ```
//! use std::{net::TcpListener, ptr::NonNull, sync::Arc, time::{Duration, Instant}};
//! use baton_kvtransfer::{
//!     DataPortConfig, ExpectSpec, Incarnation, InstanceId, KvLayout, KvNode, Limits, NodeConfig, OfferSpec, Plaintext,
//!     PromptDigest, Region, TransferId, TransportConfig,
//! };
//! use tokio_util::sync::CancellationToken;
//!
//! # fn node(name: &str, shutdown: &CancellationToken) -> Result<KvNode, Box<dyn std::error::Error>> {
//! let layout = KvLayout {
//!     model_revision: "0123abcd".into(),
//!     format: "cpu-panel".into(),
//!     dtype: "f32".into(),
//!     block_tokens: 16,
//!     layers: 2,
//!     kv_heads: 1,
//!     head_dim: 8,
//!     rope_dim: 0,
//!     tensor_parallel: 1,
//!     slice_bytes: 2 * 16 * 8 * 4,
//! };
//! let mut pool = vec![0u8; 2 * 10 * layout.slice_bytes as usize]; // 2 layers of 10 blocks
//! let base = NonNull::new(pool.as_mut_ptr()).ok_or("no memory")?;
//! let len = pool.len();
//! // SAFETY: the pool lives in the owner; blocks lent to the node are left alone until they come back.
//! let region = unsafe { Region::new(Arc::new(pool), base, len) };
//! let lease = Duration::from_secs(5);
//! let config = NodeConfig {
//!     instance_id: InstanceId::new(name)?,
//!     incarnation: Incarnation(1),
//!     layout,
//!     region,
//!     blocks: 10,
//!     data_port: DataPortConfig::new(TcpListener::bind("127.0.0.1:0")?),
//!     transports: vec![TransportConfig::Tcp { connections: 2 }],
//!     dial: Arc::new(Plaintext),
//!     secret: None,
//!     convert: false,
//!     lease,
//!     limits: Limits::for_lease(lease),
//!     reclaim: Arc::new(|back| println!("blocks {:?} are free again", back.blocks)),
//! };
//! let node = KvNode::start(config, shutdown.clone())?;
//! # Ok(node) }
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let shutdown = CancellationToken::new();
//! # let (prefill, decode) = (node("prefill-0", &shutdown)?, node("decode-0", &shutdown)?);
//!
//! // The receiver's server mounts the node's gRPC service.
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let peer = listener.local_addr()?.to_string();
//! let server = tonic::transport::Server::builder().add_service(decode.handoff_service());
//! tokio::spawn(server.serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener)));
//!
//! // Both sides learn of the transfer, in whichever order.
//! let prompt: Vec<u32> = (0..40).collect();
//! let (id, deadline) = (TransferId::generate(), Instant::now() + Duration::from_secs(30));
//! let mut incoming = decode.expect(ExpectSpec {
//!     id,
//!     sender: InstanceId::new("prefill-0")?,
//!     sender_incarnation: None,
//!     prompt_tokens: 40,
//!     prompt_digest: PromptDigest::of(&prompt),
//!     blocks: vec![7, 2, 4],
//!     held: vec![],
//!     deadline,
//! })?;
//! let mut outgoing = prefill.offer(OfferSpec {
//!     id,
//!     peer,
//!     receiver: InstanceId::new("decode-0")?,
//!     receiver_incarnation: None,
//!     prompt_tokens: 40,
//!     prompt_digest: PromptDigest::of(&prompt),
//!     blocks: vec![0, 1, 9],
//!     priority: 0,
//!     deadline,
//! })?;
//!
//! // The engine reports each layer as it is computed, from its own thread, and seals with the first token.
//! let progress = outgoing.progress();
//! for layer in 0..2 {
//!     progress.ready(layer, 0..3);
//! }
//! outgoing.seal(42);
//!
//! let sealed = incoming.sealed().await?;
//! assert_eq!((sealed.first_tokens.as_slice(), sealed.slices), (&[42][..], 6));
//! outgoing.finished().await?;
//! assert_eq!(outgoing.close().await, [0, 1, 9]);
//! assert_eq!(incoming.close().await, [7, 2, 4]);
//! # shutdown.cancel();
//! # Ok(()) }
//! ```

mod error;
mod first_tokens;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
mod layout;
mod mac;
mod memory;
mod node;
mod peak;
pub mod plan;
mod session;
mod sync;
mod transport;

// What the public signatures name of the wire's crate, so that nobody else needs that.
#[doc(inline)]
pub use baton_proto::{
    ApiError, ErrorCode, Incarnation, InstanceId, PromptDigest, Protocols, TransferId,
    v1::handoff_server::HandoffServer,
};

pub use error::TransferError;
pub use first_tokens::FirstTokens;
pub use layout::KvLayout;
pub use memory::{DeviceMemory, Region, Slices};
pub use node::{
    Dial, Dialling, Direction, ExpectSpec, FleetSecret, FleetSecrets, HANDOFF_PROTOCOLS, HandoffService,
    Incoming, KnownPeer, KvNode, Limits, NodeConfig, NodeStats, OfferSpec, Outgoing, Plaintext, Progress,
    Reclaimed, Sealed, TransferStats, TransportConfig,
};
pub use transport::{
    AscendConfig, DataPortConfig, Faults, TransportKind, TransportProbe, TransportStats, probe,
};
