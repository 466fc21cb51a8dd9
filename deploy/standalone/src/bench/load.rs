//! Sends requests by a closed or an open load and collects their timings.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use indicatif::ProgressBar;

use super::{
    BenchArgs, BenchError,
    prompt::{Prompts, mix},
    request::{Endpoint, Timing},
};

/// Open load never holds more requests than this; further arrivals wait, and the wait shows as a late `sent_seconds`.
const MOST_IN_FLIGHT: usize = 8192;

/// Everything that was measured.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) timings: Vec<Timing>,
    /// From the first request sent to the last answer's end.
    pub(super) wall: Duration,
}

impl Run {
    pub(super) fn first_error(&self) -> Option<&str> {
        self.timings.iter().find_map(|timing| timing.error.as_deref())
    }
}

/// How many requests will be measured when no duration is given.
pub(super) fn requests(args: &BenchArgs) -> u32 {
    args.requests.unwrap_or(40)
}

/// Requests that are not counted; their failure ends the measurement early.
pub(super) async fn warm_up(
    endpoint: &Endpoint,
    prompts: &Prompts,
    args: &BenchArgs,
) -> Result<(), BenchError> {
    for i in 0..u64::from(args.warmup) {
        let timing = endpoint.ask(&prompts.make(u64::MAX / 2 + i), args.output_tokens).await;
        timing.error.map_or(Ok(()), |error| Err(BenchError::Trial(error)))?;
    }
    Ok(())
}

/// The measured part.
pub(super) async fn run(endpoint: &Endpoint, prompts: &Prompts, args: &BenchArgs, bar: &ProgressBar) -> Run {
    let begin = Instant::now();
    let more = |index: u64| match args.duration_seconds {
        Some(seconds) => begin.elapsed().as_secs_f64() < seconds,
        None => index < u64::from(requests(args)),
    };
    let ask = async |index: u64| {
        let sent_seconds = begin.elapsed().as_secs_f64();
        let timing = endpoint.ask(&prompts.make(index), args.output_tokens).await;
        bar.inc(1);
        Timing { sent_seconds, ..timing }
    };
    let timings = match args.rate {
        None => {
            let next = AtomicU64::new(0);
            let worker = async || {
                let mut own = Vec::new();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if !more(index) {
                        return own;
                    }
                    own.push(ask(index).await);
                }
            };
            let workers = (0..args.concurrency.unwrap_or(4)).map(|_| worker());
            futures::future::join_all(workers).await.concat()
        }
        Some(rate) => {
            let (mut timings, mut running) = (Vec::new(), FuturesUnordered::new());
            let mut due = Duration::ZERO;
            for index in 0.. {
                due += gap(args.seed, index, rate);
                let arrival = tokio::time::sleep_until((begin + due).into());
                tokio::pin!(arrival);
                loop {
                    tokio::select! {
                        () = &mut arrival, if running.len() < MOST_IN_FLIGHT => break,
                        Some(timing) = running.next(), if !running.is_empty() => timings.push(timing),
                    }
                }
                if !more(index) {
                    break;
                }
                running.push(ask(index));
            }
            timings.extend(running.collect::<Vec<_>>().await);
            timings
        }
    };
    Run { timings, wall: begin.elapsed() }
}

/// Exponential time between arrivals, so that arrivals are Poisson.
fn gap(seed: u64, index: u64, rate: f64) -> Duration {
    let uniform = (mix(mix(seed) ^ index) >> 11) as f64 / (1u64 << 53) as f64;
    Duration::from_secs_f64(-(1.0 - uniform).ln() / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_come_at_the_rate_and_repeat() {
        let total: Duration = (0..20_000).map(|index| gap(1, index, 50.0)).sum();
        let mean = total.as_secs_f64() / 20_000.0;
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
        assert_eq!(gap(1, 7, 50.0), gap(1, 7, 50.0));
        assert_ne!(gap(1, 7, 50.0), gap(2, 7, 50.0));
    }
}
