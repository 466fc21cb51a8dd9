//! Bytes a second: whole transfers from offer to release over TCP and through shared memory, beside the yardsticks.

use baton_kvtransfer::TransportKind;
use indicatif::ProgressBar;

use crate::{
    Args,
    error::{BenchError, chain},
    iperf3::{Iperf3, MOST_AT_A_TIME},
    memcpy::Memcpy,
    mooncake::Mooncake,
    pair::Pair,
    protocol::Setup,
    report::{Report, Row, Sample},
};

pub(crate) const SLICES: [u64; 3] = [64 << 10, 1 << 20, 16 << 20];
const SHM_SLICE: u64 = 64 << 10;

const LAYERS: u32 = 16;
/// Memory of each pool, several times the caches; a round crosses it as often as needed.
const POOL_BYTES: u64 = 256 << 20;
/// Payload of one round.
const ROUND_BYTES: u64 = 1 << 30;

fn setup(transport: TransportKind, slice_bytes: u64) -> Setup {
    Setup::new(transport, LAYERS, (POOL_BYTES / slice_bytes / u64::from(LAYERS)) as u32, slice_bytes)
}

/// Slices of one size over TCP.
pub(crate) async fn tcp(
    args: &Args,
    slice_bytes: u64,
    bar: &ProgressBar,
    report: &mut Report,
) -> Result<(), BenchError> {
    let what = format!("tcp, slices of {}", size(slice_bytes));
    let mut pair = Pair::start(setup(TransportKind::Tcp, slice_bytes)).await?;
    let iperf3 = args.iperf3.clone().map(Iperf3::new);
    let mooncake = match args.mooncake.clone() {
        Some(program) => attempt(bar, Mooncake::start(program).await),
        None => None,
    };
    // What of iperf3 is to be reached: larger than it can send at a time, too; not where each slice is a small write.
    let target = (slice_bytes >= MOST_AT_A_TIME).then_some(0.90);
    let mut beside_iperf3 = Row::new(&what, "iperf3", target);
    let mut beside_mooncake = Row::new(&what, "Mooncake", Some(1.0));
    for round in 0..=args.rounds {
        bar.set_message(format!("{what}: round {round} of {}", args.rounds));
        let ours = pair.stream(ROUND_BYTES).await?;
        let iperf3 = match &iperf3 {
            Some(iperf3) => attempt(bar, iperf3.measure(slice_bytes, ROUND_BYTES).await),
            None => None,
        };
        let mooncake = match &mooncake {
            Some(mooncake) => attempt(bar, mooncake.measure(slice_bytes).await),
            None => None,
        };
        if round > 0 {
            beside_iperf3.push(ours, iperf3);
            beside_mooncake.push(ours, mooncake);
        }
    }
    report.rows.extend([beside_iperf3, beside_mooncake]);
    if let Some(mooncake) = mooncake {
        mooncake.stop().await?;
    }
    pair.stop().await
}

/// Through shared memory.
pub(crate) async fn shm(args: &Args, bar: &ProgressBar, report: &mut Report) -> Result<(), BenchError> {
    let what = format!("shm, slices of {}", size(SHM_SLICE));
    let mut pair = Pair::start(setup(TransportKind::Shm, SHM_SLICE)).await?;
    let mut memcpy = Memcpy::new(POOL_BYTES);
    let mut row = Row::new(&what, "memcpy", Some(0.70));
    for round in 0..=args.rounds {
        bar.set_message(format!("{what}: round {round} of {}", args.rounds));
        let ours = pair.stream(ROUND_BYTES).await?;
        let memcpy = memcpy.measure(ROUND_BYTES)?;
        if round > 0 {
            row.push(ours, Some(memcpy));
        }
    }
    report.rows.push(row);
    pair.stop().await
}

/// A yardstick that fails costs its figure of a round, not the run.
fn attempt<T>(bar: &ProgressBar, result: Result<T, BenchError>) -> Option<T> {
    result.inspect_err(|error| bar.suspend(|| eprintln!("warning: left out: {}", chain(error)))).ok()
}

fn size(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{} KiB", bytes >> 10),
        mib => format!("{mib} MiB"),
    }
}

/// Seconds that this many bytes take at the rate of a sample.
pub(crate) fn seconds_for(bytes: u64, sample: &Sample) -> f64 {
    bytes as f64 / sample.bytes as f64 * sample.seconds
}
