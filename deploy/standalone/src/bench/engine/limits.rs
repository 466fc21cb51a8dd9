//! What the machine could do at best, measured in every round before the engines are: reading memory, which decode
//! waits for, and products of matrices, which prefill waits for.

use std::{thread, time::Instant};

use baton_checkpoint::{Attention, Checkpoint, CheckpointError, Weight};
use serde::Serialize;
use tokio::process::Command;

use super::{super::server::program, EngineError};

/// Memory that each pass reads: far more than any cache holds.
const BYTES: usize = 512 << 20;
/// Passes. The one in the middle counts: what the machine gives just then, which is what the engine gets.
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
    /// `set` is what the engine's configuration is given.
    pub(super) async fn measure(threads: u16, set: &[String]) -> Result<Self, EngineError> {
        Ok(Self { read: read_rate(threads.into()), products: product_rate(threads, set).await? })
    }
}

/// Operations a second as the server measures them, which has the kernels.
async fn product_rate(threads: u16, set: &[String]) -> Result<f64, EngineError> {
    let program = program();
    let threads = format!("runtime.threads={threads}");
    let settings = [&threads].into_iter().chain(set).flat_map(|setting| ["--set", setting.as_str()]);
    let output = Command::new(&program).arg("--measure-products").args(settings).output().await;
    let output = output.map_err(|source| EngineError::Spawn { program, source })?;
    let said = String::from_utf8_lossy(&output.stdout);
    let rate = said.trim().parse().ok().filter(|_| output.status.success());
    rate.ok_or_else(|| {
        let words = String::from_utf8_lossy(&output.stderr);
        EngineError::Products(words.trim().lines().last().unwrap_or("it said nothing").to_owned())
    })
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
    let mut times: Vec<f64> = (0..PASSES).map(|_| pass()).collect();
    times.sort_by(f64::total_cmp);
    BYTES as f64 / times[PASSES / 2]
}

/// What a model asks of the machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Demand {
    /// Bytes of the file's weights that every token of a decode alone reads.
    pub(super) bytes: f64,
    /// Operations of products with weights for every token of a prompt: all layers, not the output projection.
    pub(super) weights: f64,
    /// Operations of attention for every token that a token of a prompt sees, itself included.
    pub(super) attention: f64,
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
        let config = checkpoint.config();
        // Scores and sums of values, of every head; latent attention as it is computed, on latents.
        let products = match &config.attention {
            Attention::GroupedQuery(shape) => shape.heads * 2 * shape.head_dim,
            Attention::Latent(shape) => shape.heads * (2 * shape.kv_rank + shape.rope_dim),
        };
        let attention = 2.0 * f64::from(products) * f64::from(config.layers);
        Ok(Some(Self { bytes: bytes as f64, weights: 2.0 * weights as f64, attention }))
    }

    /// Operations of the prefill of a prompt, for each of its tokens.
    pub(super) fn operations(&self, prompt_tokens: u32) -> f64 {
        self.weights + self.attention * (f64::from(prompt_tokens) + 1.0) / 2.0
    }
}
