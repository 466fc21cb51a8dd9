//! One model with blocks handed out in order: what the integration tests drive instead of the server's engine.

use std::path::{Path, PathBuf};

use baton_checkpoint::Checkpoint;
use baton_runtime::{BlockId, Executor, LoadOptions, SequenceChunk, load};

pub(crate) struct Session {
    pub(crate) executor: Box<dyn Executor>,
}

impl Session {
    pub(crate) fn open(model: &Path, options: &LoadOptions) -> Self {
        let checkpoint =
            Checkpoint::open(model).unwrap_or_else(|error| panic!("{}: {error}", model.display()));
        let executor = load(&checkpoint, options, &mut |_, _| {});
        Self { executor: executor.unwrap_or_else(|error| panic!("{}: {error}", model.display())) }
    }

    /// Computes one chunk alone; gives the logits after its last token.
    pub(crate) fn step(&mut self, tokens: &[u32], start: usize, blocks: &[BlockId]) -> Vec<f32> {
        let chunk = SequenceChunk { tokens, start: start as u32, blocks, logits: true };
        let logits = self.executor.forward(&[chunk], &mut |_| {}).unwrap();
        logits.rows().next().unwrap().to_vec()
    }

    /// The most likely continuation of a prompt that `blocks` hold already, `logits` being those after it.
    pub(crate) fn greedy(
        &mut self,
        mut logits: Vec<f32>,
        start: usize,
        tokens: usize,
        blocks: &[BlockId],
    ) -> Vec<u32> {
        let mut output = Vec::new();
        for position in start..start + tokens {
            output.push(argmax(&logits));
            if output.len() < tokens {
                logits = self.step(&output[output.len() - 1..], position, blocks);
            }
        }
        output
    }
}

/// Bytes of one slice of a pool.
pub(crate) fn slice(executor: &dyn Executor, layer: u32, block: BlockId) -> &[u8] {
    let pool = executor.kv_pool();
    // SAFETY: the offset is that of a whole slice inside the pool, and no forward pass is running.
    unsafe {
        let start = pool.base().as_ptr().add(pool.slice_offset(layer, block));
        std::slice::from_raw_parts(start, pool.layout().slice_bytes())
    }
}

/// Overwrites one slice of a pool.
pub(crate) fn write_slice(executor: &mut dyn Executor, layer: u32, block: BlockId, bytes: &[u8]) {
    let pool = executor.kv_pool();
    assert_eq!(bytes.len(), pool.layout().slice_bytes());
    // SAFETY: as in `slice`, and `&mut` keeps forward passes away.
    unsafe {
        let start = pool.base().as_ptr().add(pool.slice_offset(layer, block));
        start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
}

/// The blocks `from..to`.
pub(crate) fn blocks(range: std::ops::Range<u32>) -> Vec<BlockId> {
    range.map(BlockId).collect()
}

pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index as u32)
}

/// The file or directory of one of the tiny reference models.
#[allow(dead_code, reason = "not every test uses it")]
pub(crate) fn tiny(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny").join(name);
    if name.starts_with("hf-") { directory } else { directory.join("model.gguf") }
}

/// The real model, wherever the caller of the tests has put it.
#[allow(dead_code, reason = "not every test uses it")]
pub(crate) fn smollm2() -> PathBuf {
    let path = std::env::var_os("BATON_TEST_MODEL");
    path.expect("set BATON_TEST_MODEL to the path of SmolLM2-135M-Instruct.Q4_1.gguf").into()
}

/// The process's largest memory so far, mapped files included.
#[cfg(target_os = "linux")]
#[allow(dead_code, reason = "not every test uses it")]
pub(crate) fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}
