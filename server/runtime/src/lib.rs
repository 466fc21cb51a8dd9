//! Runs models: families written once over a small `Device` trait, the CPU device with its kernels, the paged KV pool.
//!
//! The server's engine sees an [`Executor`]; nothing else of a device leaks out of here. [`load`] makes one from a
//! checkpoint. Modules in the order a forward pass meets them: `executor` (the engine's side), `batch` (checks),
//! `models` over `device`, `devices/cpu`; the K and V it leaves are in `kv_pool`.

mod batch;
mod device;
mod devices;
mod error;
mod executor;
mod kv_pool;
mod load;
mod models;

pub use devices::cpu::product_rate;
pub use error::{BatchFault, RuntimeError};
pub use executor::{BlockId, Executor, Logits, ModelShape, SequenceChunk};
pub use kv_pool::{KvContent, KvDtype, KvPool, KvPoolLayout};
pub use load::{DeviceKind, LoadOptions, kv_layout, load};
