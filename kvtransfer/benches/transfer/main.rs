//! How fast KV caches travel between two processes of one machine, beside what else moves bytes there.
//!
//! `cargo bench -p baton-kvtransfer --bench transfer -- --help`; `deploy/run bench transfer` brings the yardsticks along.
//! Everything is measured in turns, round after round, so that whatever else the machine does falls on all alike:
//! figures are medians over rounds, a ratio is the median of each round's own. Read the ratios; the rest is noise of the
//! machine.
//!
//! This program is three: the one that measures, and its own children, which each run one node ([`peer`]) and are told
//! what to do, a line of JSON at a time ([`protocol`], [`pair`]). Yardsticks are `iperf3`, `mooncake` and `memcpy`. The
//! measurements stand in `throughput`, `sessions` and `latency`; `report` prints them.

mod error;
mod iperf3;
mod latency;
mod memcpy;
mod mooncake;
mod pair;
mod peer;
mod pool;
mod process;
mod protocol;
mod report;
mod sessions;
mod throughput;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use error::BenchError;
use report::Report;

#[derive(Debug, Parser)]
#[command(name = "transfer", about = "How fast KV caches travel, beside what else moves bytes")]
struct Args {
    /// Times that each is measured, after one round that does not count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Measure these only.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Section::ALL)]
    only: Vec<Section>,
    /// The program iperf3; without it, its column stays empty.
    #[arg(long, value_name = "PROGRAM")]
    iperf3: Option<PathBuf>,
    /// Mooncake's program transfer_engine_bench; without it, its column stays empty.
    #[arg(long, value_name = "PROGRAM")]
    mooncake: Option<PathBuf>,
    /// Write every round's figures to this file, a line of JSON for each row.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
    /// This process is one of the two that move bytes, set up as this says.
    #[arg(long, hide = true, value_name = "JSON")]
    peer: Option<String>,
}

/// A part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    Tcp,
    Shm,
    Sessions,
    Latency,
}

impl Section {
    const ALL: [Self; 4] = [Self::Tcp, Self::Shm, Self::Sessions, Self::Latency];
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = tokio::runtime::Runtime::new()
        .map_err(|source| BenchError::Io { what: "start the runtime".into(), source })
        .and_then(|runtime| match &args.peer {
            Some(setup) => runtime.block_on(peer::run(setup)),
            // Ending this future kills the children, each of which belongs to it.
            None => runtime.block_on(async {
                tokio::select! {
                    result = measure(&args) => result,
                    _ = tokio::signal::ctrl_c() => Err(BenchError::Interrupted),
                }
            }),
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error::chain(&error));
            ExitCode::FAILURE
        }
    }
}

async fn measure(args: &Args) -> Result<(), BenchError> {
    let wanted = |section| args.only.contains(&section);
    let bar = progress();
    let mut report = Report::new(args.rounds);
    report.iperf3 = args.iperf3.is_some();
    report.mooncake = args.mooncake.is_some();
    if wanted(Section::Tcp) {
        for slice_bytes in throughput::SLICES {
            throughput::tcp(args, slice_bytes, &bar, &mut report).await?;
        }
    }
    if wanted(Section::Shm) {
        throughput::shm(args, &bar, &mut report).await?;
    }
    if wanted(Section::Sessions) {
        sessions::measure(args, &bar, &mut report).await?;
    }
    if wanted(Section::Latency) {
        latency::measure(args, &bar, &mut report).await?;
    }
    bar.finish_and_clear();
    println!("{}", report.text());
    if let Some(path) = &args.json {
        let written = std::fs::write(path, report.json());
        written.map_err(|source| BenchError::Io { what: format!("write {}", path.display()), source })?;
    }
    Ok(())
}

fn progress() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let style = ProgressStyle::with_template("{spinner} {elapsed} gone, {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
