//! A thousand transfers at a time over one link: how evenly they get on, and what memory they take.

use baton_kvtransfer::TransportKind;
use indicatif::ProgressBar;

use crate::{
    Args,
    error::BenchError,
    pair::Pair,
    protocol::Setup,
    report::{Fact, Report, median},
};

const SESSIONS: u32 = 1000;
const BLOCKS_EACH: u32 = 8;
const LAYERS: u32 = 8;
const SLICE_BYTES: u64 = 16 << 10;

pub(crate) async fn measure(args: &Args, bar: &ProgressBar, report: &mut Report) -> Result<(), BenchError> {
    let setup = Setup::new(TransportKind::Tcp, LAYERS, SESSIONS * BLOCKS_EACH, SLICE_BYTES);
    let mut pair = Pair::start(setup).await?;
    // The link stands, and all of the pools has been used, before memory is looked at.
    pair.stream(1).await?;
    let before = pair.peak_rss_bytes()?;
    let (mut spread, mut medians) = (Vec::new(), Vec::new());
    for round in 0..=args.rounds {
        bar.set_message(format!("{SESSIONS} sessions: round {round} of {}", args.rounds));
        let took = pair.crowd(SESSIONS).await?;
        if round > 0 {
            let longest = took.iter().copied().fold(0.0, f64::max);
            let typical = median(&took);
            spread.push(longest / typical);
            medians.push(typical * 1e3);
        }
    }
    let after = pair.peak_rss_bytes()?;
    let grown = |side: usize| vec![(after[side] - before[side]) as f64 / f64::from(1 << 20)];
    let what = format!("{SESSIONS} sessions at a time over tcp");
    report.facts.extend([
        Fact::new(format!("{what}: longest : median"), "", spread, Some(3.0)),
        Fact::new(format!("{what}: median"), "ms", medians, None),
        Fact::new(format!("{what}: peak memory grew by, sender"), "MiB", grown(0), None),
        Fact::new(format!("{what}: peak memory grew by, receiver"), "MiB", grown(1), None),
    ]);
    pair.stop().await
}
