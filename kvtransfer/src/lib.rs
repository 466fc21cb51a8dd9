//! Moves KV caches between instances: layouts, sessions, leases, transports.

mod error;
mod layout;
mod memory;
mod node;
mod session;
mod transport;

pub use error::TransferError;
pub use layout::KvLayout;
pub use memory::{Region, Slices};
pub use node::{
    Direction, ExpectSpec, HandoffService, Incoming, KvNode, Limits, NodeConfig, NodeStats, OfferSpec,
    Outgoing, Progress, Reclaimed, SEAL_BUCKETS_MICROS, SealLatency, Sealed, TransferStats,
};
