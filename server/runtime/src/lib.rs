//! Runs models: families written once over the `Device` trait, the CPU device with its kernels, the paged KV pool.
//!
//! The server's engine sees an [`Executor`]; nothing else of a device leaks out of here.

mod executor;
mod kv_pool;

pub use executor::{BlockId, Executor, Logits, ModelShape, SequenceChunk};
pub use kv_pool::{KvDtype, KvPool, KvPoolLayout};

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("cannot allocate {bytes} bytes for the KV cache: lower the number of KV blocks")]
    KvPool { bytes: usize },
}
