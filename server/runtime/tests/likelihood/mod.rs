//! How likely a model finds the text of `reference/perplexity`: shared by the test and the example `perplexity`.
//!
//! The definition is that of `reference/perplexity.py`, which asks llama.cpp: reference/README.md states it.

use std::{error::Error, fs, path::Path};

use baton_checkpoint::Checkpoint;
use baton_runtime::{BlockId, Executor, KvDtype, LoadOptions, RuntimeError, SequenceChunk, kv_layout, load};
use serde::Deserialize;

/// What llama.cpp says.
#[derive(Deserialize)]
pub(crate) struct Reference {
    /// The file it was asked with.
    pub(crate) model: String,
    /// With the file as it is.
    pub(crate) perplexity: f64,
    /// With the file's weights written out as F32: activations are not rounded then.
    pub(crate) exact: f64,
    /// The text's tokens, cut into windows.
    pub(crate) windows: Vec<Vec<u32>>,
}

impl Reference {
    pub(crate) fn read() -> Result<Self, Box<dyn Error>> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/perplexity/perplexity.json");
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    }
}

/// The perplexity of all windows together. `threads` is as in [`LoadOptions`].
pub(crate) fn perplexity(
    model: &Path,
    kv_dtype: KvDtype,
    threads: usize,
    windows: &[Vec<u32>],
) -> Result<f64, Box<dyn Error>> {
    let checkpoint = Checkpoint::open(model)?;
    let mut options = LoadOptions { threads, kv_dtype, ..LoadOptions::default() };
    let layout = kv_layout(checkpoint.config(), &options);
    let mut blocks = (0..).map(BlockId);
    let needed = |window: &Vec<u32>| layout.blocks_for(window.len() as u32) as usize;
    let places = windows.iter().map(|window| blocks.by_ref().take(needed(window)).collect());
    let places: Vec<Vec<BlockId>> = places.collect();
    options.kv_blocks = places.iter().map(Vec::len).sum::<usize>() as u32;
    let mut executor = load(&checkpoint, &options, &mut |_, _| {})?;
    let surprises = surprises(executor.as_mut(), windows, &places)?;
    Ok((surprises.iter().sum::<f64>() / surprises.len() as f64).exp())
}

/// Minus the log probability of each token but its window's first, in natural units.
///
/// An executor gives logits after the last token of a chunk only, so every window goes token by token. Stepping all
/// windows in one batch makes that nearly as fast as whole prompts, and the same bits as those.
fn surprises(
    executor: &mut dyn Executor,
    windows: &[Vec<u32>],
    places: &[Vec<BlockId>],
) -> Result<Vec<f64>, RuntimeError> {
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    let mut surprises = Vec::new();
    for position in 1..longest {
        let going = || windows.iter().zip(places).filter(|(window, _)| position < window.len());
        let chunks = going().map(|(window, blocks)| SequenceChunk {
            tokens: &window[position - 1..position],
            start: position as u32 - 1,
            blocks,
            logits: true,
        });
        let batch: Vec<SequenceChunk<'_>> = chunks.collect();
        let logits = executor.forward(&batch, &mut |_| {})?;
        let rows = logits.rows().zip(going());
        surprises.extend(rows.map(|(row, (window, _))| surprise(row, window[position] as usize)));
    }
    Ok(surprises)
}

/// Minus the log of a softmax, in double precision.
fn surprise(logits: &[f32], token: usize) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
    most + sum.ln() - f64::from(logits[token])
}
