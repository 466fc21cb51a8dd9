//! What the machine could do at best, measured before the engine is: reading memory, which decode waits for, and products
//! of matrices, which prefill waits for.

use std::{thread, time::Instant};

use baton_checkpoint::{Checkpoint, CheckpointError, Weight};
use baton_runtime::{LoadOptions, RuntimeError, product_rate};
use serde::Serialize;

/// Memory that each pass reads: far more than any cache holds.
const BYTES: usize = 512 << 20;
/// Passes; the fastest counts.
const PASSES: usize = 7;

/// Of this machine, with the threads that the engine is given.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Limits {
    /// Bytes a second.
    pub(super) read: f64,
    /// Operations a second of products with weights in bf16, a multiplication and an addition each.
    pub(super) products: f64,
}

impl Limits {
    pub(super) fn measure(threads: u16) -> Result<Self, RuntimeError> {
        let options = LoadOptions { threads: threads.into(), ..LoadOptions::default() };
        Ok(Self { read: read_rate(threads.into()), products: product_rate(&options)? })
    }
}

/// Bytes a second that all threads read together, each its own part.
fn read_rate(threads: usize) -> f64 {
    let words: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let pass = || {
        let begin = Instant::now();
        thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| {
                    std::hint::black_box(part.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word)))
                });
            }
        });
        begin.elapsed().as_secs_f64()
    };
    let fastest = (0..PASSES).map(|_| pass()).fold(f64::INFINITY, f64::min);
    BYTES as f64 / fastest
}

/// What a model asks of the machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Demand {
    /// Bytes of the file's weights that every token of a decode alone reads.
    pub(super) bytes: f64,
    /// Operations of matrix products for every token of a prompt: all layers, not the output projection.
    pub(super) operations: f64,
}

impl Demand {
    /// `None` for mixtures of experts, whose tokens read some of the weights.
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Option<Self>, CheckpointError> {
        if checkpoint.config().mixture.is_some() {
            return Ok(None);
        }
        let mut bytes = checkpoint.weight_bytes();
        if !checkpoint.config().tied_embeddings {
            bytes -= checkpoint.tensor(Weight::Embedding)?.bytes.len() as u64;
        }
        let in_layer = |(weight, _): &(Weight, _)| matches!(weight, Weight::Layer(..));
        let matrices = checkpoint.tensors().filter(in_layer).map(|(_, tensor)| tensor);
        let weights: usize = matrices
            .filter(|tensor| tensor.shape.len() > 1)
            .map(|tensor| tensor.rows() * tensor.columns())
            .sum();
        Ok(Some(Self { bytes: bytes as f64, operations: 2.0 * weights as f64 }))
    }
}
