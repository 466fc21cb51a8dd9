//! `baton bench engine`: how fast one instance's engine is, beside llama.cpp on the same files in the same run.
//!
//! Both load each model and are then measured in turns, round after round, so that whatever else the machine does falls
//! on both; figures are medians over rounds, the ratio is the median of each round's own. [`baton`] is a server of its own,
//! [`llama_cpp`] a Python child with the package llama-cpp-python. [`limits`] says what the machine could do at best, in every round as well. [`report`] makes the table.

mod baton;
mod hogs;
mod limits;
mod llama_cpp;
mod report;

use std::path::{Path, PathBuf};

use baton_checkpoint::{Checkpoint, CheckpointError};
use clap::Args;
use indicatif::ProgressBar;

use super::{rounds_bar, server::ServerError};
use crate::{screen::say, up};
use baton::Baton;
use hogs::Hogs;
use limits::{Demand, Limits};
use llama_cpp::LlamaCpp;
use report::{Report, Row};

/// Measure the engine of one instance, beside llama.cpp where that is installed.
#[derive(Debug, Clone, Args)]
pub(crate) struct EngineArgs {
    /// A GGUF file or Hugging Face directory; may be repeated [default: the small model that `baton up` fetches].
    #[arg(long = "model", value_name = "PATH")]
    models: Vec<PathBuf>,
    /// Weight types to make of each model (by llama.cpp, kept in the cache directory) instead of measuring it as it is:
    /// BF16, F16, Q8_0, Q4_0, Q4_1, Q4_K_M, Q6_K.
    #[arg(long, value_delimiter = ',', requires = "llama_cpp")]
    types: Vec<String>,
    /// A Python that has llama-cpp-python (built with -march=native to be fair); without it only Baton is measured.
    #[arg(long, value_name = "PYTHON")]
    llama_cpp: Option<PathBuf>,
    /// Compute threads of each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    prompt_tokens: u32,
    /// Tokens of each answer after the first.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    decode_tokens: u32,
    /// Sequences of the batch that is decoded.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    batch: u32,
    /// Times that each is measured, after one round that does not count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Threads that do nothing but compute beside both, to see how they share a machine.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1024))]
    hogs: u16,
    /// A setting of the server, as in `runtime.kv_dtype=int8`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Write every round's figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    #[error(transparent)]
    Model(#[from] up::UpError),
    #[error("cannot read the model")]
    Checkpoint(#[from] CheckpointError),
    #[error("cannot start {program}")]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("the server could not measure products: {0}")]
    Products(String),
    #[error("{program} ended early; it said: {words}")]
    LlamaCpp { program: PathBuf, words: String },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
}

/// What is measured at once: prompts one after the other, then a token of every sequence a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
struct Work {
    sequences: u32,
    /// Of each sequence.
    prompt_tokens: u32,
    /// Further tokens of each sequence after the first.
    decode_tokens: u32,
}

impl EngineArgs {
    /// A prompt alone and a decode alone behind it; then a batch.
    fn works(&self) -> [Work; 2] {
        [1, self.batch].map(|sequences| Work {
            sequences,
            prompt_tokens: self.prompt_tokens,
            decode_tokens: self.decode_tokens,
        })
    }
}

/// Tokens a second.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Rates {
    prefill: f64,
    decode: f64,
}

/// Runs the whole measurement and prints its table.
pub(crate) async fn run(args: &EngineArgs) -> Result<(), EngineError> {
    let models = models(args).await?;
    let bar = rounds_bar(models.len() as u64 * u64::from(args.rounds + 1));
    let mut report = Report::new(args.threads, args.rounds);
    for model in &models {
        bar.set_message(format!("loading {}", name_of(model)));
        measure(args, model, &bar, &mut report).await?;
    }
    bar.finish_and_clear();
    say(&report.table());
    if let Some(path) = &args.json {
        let written = std::fs::write(path, report.json());
        written.map_err(|source| EngineError::Write { path: path.clone(), source })?;
    }
    Ok(())
}

/// All rounds of one model.
async fn measure(
    args: &EngineArgs,
    model: &Path,
    bar: &ProgressBar,
    report: &mut Report,
) -> Result<(), EngineError> {
    let works = args.works();
    let checkpoint = Checkpoint::open(model)?;
    let demand = Demand::of(&checkpoint)?;
    let vocabulary = checkpoint.config().vocabulary;
    drop(checkpoint);
    let mut baton = Baton::start(model, vocabulary, args.threads, &works, &args.set).await?;
    let mut llama_cpp = match &args.llama_cpp {
        Some(python) => Some(LlamaCpp::start(python, model, args.threads, &works).await?),
        None => None,
    };
    bar.set_message(name_of(model));
    let mut rows = works.map(|work| Row::new(name_of(model), work, demand));
    let _hogs = Hogs::start(args.hogs);
    for round in 0..=args.rounds {
        // The engines wait meanwhile: nothing has been asked of them.
        let limits = Limits::measure(args.threads, &args.set).await?;
        for (row, work) in rows.iter_mut().zip(works) {
            let ours = baton.measure(work, round).await?;
            let theirs = match &mut llama_cpp {
                Some(llama_cpp) => Some(llama_cpp.measure(work, round).await?),
                None => None,
            };
            if round > 0 {
                row.push(ours, theirs, limits);
            }
        }
        bar.inc(1);
    }
    baton.stop().await;
    report.yardstick(llama_cpp.as_ref().map(LlamaCpp::version));
    report.rows.extend(rows);
    Ok(())
}

/// The files to measure: as given, or of the weight types asked for.
async fn models(args: &EngineArgs) -> Result<Vec<PathBuf>, EngineError> {
    let given = if args.models.is_empty() { vec![up::default_model().await?] } else { args.models.clone() };
    let Some(python) = args.llama_cpp.as_ref().filter(|_| !args.types.is_empty()) else { return Ok(given) };
    let mut made = Vec::new();
    for model in &given {
        for kind in &args.types {
            made.push(llama_cpp::of_type(python, model, kind).await?);
        }
    }
    Ok(made)
}

fn name_of(model: &Path) -> String {
    model.file_stem().unwrap_or(model.as_os_str()).to_string_lossy().into_owned()
}
