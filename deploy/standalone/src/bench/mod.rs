//! `baton bench`: an own load generator against any OpenAI endpoint, and what it measured as a table and as JSON;
//! `baton bench engine`, one instance's engine beside llama.cpp ([`engine`]); `baton bench handoff`, the time between
//! prefill and decode ([`handoff`]). The last two start servers of their own ([`server`]).
//!
//! Order of things: [`prompt`] calibrates and makes prompts, [`load`] sends them by concurrency or by rate and times
//! each ([`request`]), [`summary`] turns timings into percentiles. Load is closed (`--concurrency`: a new request when
//! one ends) or open (`--rate`: Poisson arrivals, whatever is still running), never both.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{ArgGroup, Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

mod engine;
mod handoff;
mod load;
mod prompt;
mod request;
mod server;
mod summary;

use crate::screen::say;
use request::Endpoint;

/// Measure an OpenAI endpoint: TTFT, TPOT and throughput under a load of your choice.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchCommand {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    load: BenchArgs,
}

#[derive(Debug, Clone, Subcommand)]
enum What {
    Engine(engine::EngineArgs),
    Handoff(handoff::HandoffArgs),
}

/// A load and the endpoint that takes it.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("load").args(["concurrency", "rate"]))]
#[command(group = ArgGroup::new("length").args(["requests", "duration_seconds"]))]
pub(crate) struct BenchArgs {
    /// Base address of the endpoint, without `/v1`.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Model to ask for [default: the first that the endpoint lists].
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// File with the API key that the endpoint asks for, if it does.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Closed load: this many requests at a time [default: 4].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) concurrency: Option<u32>,
    /// Open load: this many requests a second, at random moments (Poisson).
    #[arg(long, value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// How many requests to measure [default: 40].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) requests: Option<u32>,
    /// Instead of a number of requests: begin new ones for this many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = positive)]
    pub(crate) duration_seconds: Option<f64>,
    /// Tokens of each prompt, chat template included; met to within a few by calibration.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) input_tokens: u32,
    /// Tokens of each answer, exactly (asks the endpoint to ignore end-of-sequence).
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) output_tokens: u32,
    /// Requests sent first and not counted.
    #[arg(long, default_value_t = 2)]
    pub(crate) warmup: u32,
    /// Prompts and arrival times are a function of this number; the same again finds its prompts in the prefix cache
    /// [default: drawn anew].
    #[arg(long, default_value_t = drawn(), hide_default_value = true)]
    pub(crate) seed: u64,
    /// Seconds after which a request counts as failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, value_parser = positive)]
    pub(crate) timeout_seconds: f64,
    /// Write settings, summary and every request's timings to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("{url} does not answer: is a cluster up there? (`--url` sets the address)")]
    Unreachable { url: String, source: reqwest::Error },
    #[error("the file {path} of --api-key-file cannot be read")]
    KeyFile { path: PathBuf, source: std::io::Error },
    #[error("the file {0} of --api-key-file does not hold an API key: one line of visible characters")]
    Key(PathBuf),
    #[error("{0} wants an API key that it knows: give one with `--api-key-file`")]
    Unauthorized(String),
    #[error("{url} lists no model: name one with `--model`")]
    NoModel { url: String },
    #[error("a trial request failed: {0}")]
    Trial(String),
    #[error("all {0} requests failed; the first said: {1}")]
    AllFailed(usize, String),
    #[error("cannot set up the HTTP client")]
    Client(#[source] reqwest::Error),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Engine(#[from] engine::EngineError),
    #[error(transparent)]
    Handoff(#[from] handoff::HandoffError),
}

/// Rates and seconds with which times can be computed.
const POSITIVE_LEAST: f64 = 1e-6;
const POSITIVE_MOST: f64 = 1e9;

/// Another number each time.
fn drawn() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    prompt::mix(now.as_nanos() as u64)
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|n| (POSITIVE_LEAST..=POSITIVE_MOST).contains(n))
        .ok_or_else(|| format!("must be a number from {POSITIVE_LEAST} to {POSITIVE_MOST}"))
}

/// Runs the whole measurement and prints its table.
pub(crate) async fn run(command: &BenchCommand) -> Result<(), BenchError> {
    let args = match &command.what {
        Some(What::Engine(args)) => return Ok(engine::run(args).await?),
        Some(What::Handoff(args)) => return Ok(handoff::run(args).await?),
        None => &command.load,
    };
    let endpoint = Endpoint::connect(args).await?;
    let prompts = prompt::Prompts::calibrate(&endpoint, args.input_tokens, args.seed).await?;
    let bar = progress(args);
    load::warm_up(&endpoint, &prompts, args).await?;
    let run = load::run(&endpoint, &prompts, args, &bar).await;
    bar.finish_and_clear();
    let summary = summary::Summary::of(&run);
    if let (0, Some(error)) = (summary.succeeded, run.first_error()) {
        return Err(BenchError::AllFailed(run.timings.len(), error.to_owned()));
    }
    say(&summary.table(args, endpoint.model()));
    if let Some(path) = &args.json {
        let text = summary.json(args, endpoint.model(), &run);
        fs::write(path, text).map_err(|source| BenchError::Write { path: path.clone(), source })?;
    }
    Ok(())
}

fn progress(args: &BenchArgs) -> ProgressBar {
    let bar = match args.duration_seconds {
        Some(_) => ProgressBar::new_spinner(),
        None => ProgressBar::new(load::requests(args).into()),
    };
    let style = match args.duration_seconds {
        Some(_) => "{spinner} {pos} requests in {elapsed}",
        None => "{bar:32} {pos}/{len} requests, {elapsed} gone, {eta} to go",
    };
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// The bar of a measurement in rounds.
fn rounds_bar(rounds: u64) -> ProgressBar {
    let bar = ProgressBar::new(rounds);
    let style =
        ProgressStyle::with_template("{bar:32} round {pos}/{len}, {elapsed} gone, {eta} to go, {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_no_time_can_be_made_of_are_refused() {
        for text in ["0", "-1", "1e-20", "1e300", "inf", "nan", "x"] {
            assert!(positive(text).is_err(), "{text}");
        }
        for text in ["0.000001", "1e9", "0.5"] {
            let number = positive(text).expect(text);
            // What is made of a rate and of a time.
            let _ = (Duration::from_secs_f64(37.0 / number), Duration::from_secs_f64(number));
        }
    }
}
