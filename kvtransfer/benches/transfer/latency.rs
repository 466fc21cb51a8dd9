//! From seal to sealed: how long a decode waits for a prompt whose last layer has just been computed.

use baton_kvtransfer::TransportKind;
use indicatif::ProgressBar;

use crate::{
    Args,
    error::BenchError,
    pair::Pair,
    protocol::Setup,
    report::{Fact, Report, percentile},
    throughput::seconds_for,
};

const LAYERS: u32 = 16;
const BLOCKS: u32 = 4;
const SLICE_BYTES: u64 = 24 << 10;
/// Of one round.
const TRANSFERS: usize = 40;

pub(crate) async fn measure(args: &Args, bar: &ProgressBar, report: &mut Report) -> Result<(), BenchError> {
    let mut pairs = Vec::new();
    for transport in [TransportKind::Tcp, TransportKind::Shm] {
        let pair = Pair::start(Setup::new(transport, LAYERS, 128, SLICE_BYTES)).await?;
        pairs.push((transport, pair, Vec::new(), Vec::new()));
    }
    for round in 0..=args.rounds {
        bar.set_message(format!("seal to sealed: round {round} of {}", args.rounds));
        for (_, pair, waits, bytes_take) in &mut pairs {
            let rate = pair.stream(256 << 20).await?;
            for _ in 0..TRANSFERS {
                let wait = pair.seal_to_sealed(BLOCKS).await?;
                if round > 0 {
                    waits.push(wait * 1e3);
                    bytes_take.push(seconds_for(u64::from(BLOCKS) * SLICE_BYTES, &rate) * 1e3);
                }
            }
        }
    }
    for (transport, pair, waits, bytes_take) in pairs {
        let what =
            format!("seal to sealed over {transport}, last layer of {BLOCKS} x {} KiB", SLICE_BYTES >> 10);
        let beyond = waits.iter().zip(&bytes_take).map(|(wait, bytes)| wait - bytes).collect();
        let late = vec![percentile(&waits, 0.99)];
        report.facts.extend([
            Fact::new(format!("{what}: median"), "ms", waits, None),
            Fact::new(format!("{what}: p99"), "ms", late, None),
            Fact::new(format!("{what}: median without the time its bytes take"), "ms", beyond, None),
        ]);
        pair.stop().await?;
    }
    Ok(())
}
