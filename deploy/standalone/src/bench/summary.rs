//! What the timings come to: percentiles, rates, a table for people and JSON for programs.

use serde::Serialize;
use serde_json::json;
use tabled::{builder::Builder, settings::Style};

use super::{BenchArgs, load::Run, request::Timing};

/// Figures of one quantity over all requests that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Distribution {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Distribution {
    /// `None` of no values. Percentiles are nearest-rank: always a value that occurred.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let rank =
            |share: f64| values[((share * values.len() as f64).ceil() as usize).clamp(1, values.len()) - 1];
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Some(Self { mean, p50: rank(0.5), p90: rank(0.9), p99: rank(0.99), max })
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub(super) succeeded: usize,
    pub(super) failed: usize,
    pub(super) wall_seconds: f64,
    pub(super) requests_per_second: f64,
    pub(super) input_tokens_per_second: f64,
    pub(super) output_tokens_per_second: f64,
    pub(super) mean_input_tokens: f64,
    pub(super) mean_output_tokens: f64,
    pub(super) ttft_seconds: Option<Distribution>,
    pub(super) tpot_seconds: Option<Distribution>,
    /// Between one piece of text and the next, over all requests together.
    pub(super) itl_seconds: Option<Distribution>,
    pub(super) e2e_seconds: Option<Distribution>,
}

impl Summary {
    pub(super) fn of(run: &Run) -> Self {
        let good: Vec<&Timing> = run.timings.iter().filter(|timing| timing.error.is_none()).collect();
        let wall = run.wall.as_secs_f64().max(f64::EPSILON);
        let total =
            |count: fn(&Timing) -> u32| good.iter().map(|timing| f64::from(count(timing))).sum::<f64>();
        let (input, output) = (total(|t| t.prompt_tokens), total(|t| t.completion_tokens));
        let each =
            |value: fn(&Timing) -> f64| Distribution::of(good.iter().map(|timing| value(timing)).collect());
        Self {
            succeeded: good.len(),
            failed: run.timings.len() - good.len(),
            wall_seconds: wall,
            requests_per_second: good.len() as f64 / wall,
            input_tokens_per_second: input / wall,
            output_tokens_per_second: output / wall,
            mean_input_tokens: input / good.len().max(1) as f64,
            mean_output_tokens: output / good.len().max(1) as f64,
            ttft_seconds: each(|t| t.ttft_seconds),
            tpot_seconds: Distribution::of(good.iter().filter_map(|t| t.tpot_seconds()).collect()),
            itl_seconds: Distribution::of(good.iter().flat_map(|t| t.gaps_seconds.iter().copied()).collect()),
            e2e_seconds: each(|t| t.e2e_seconds),
        }
    }

    /// For people; milliseconds.
    pub(super) fn table(&self, args: &BenchArgs, model: &str) -> String {
        let mut rows = Builder::default();
        rows.push_record(["ms", "mean", "p50", "p90", "p99", "max"]);
        for (name, distribution) in [
            ("TTFT", &self.ttft_seconds),
            ("TPOT", &self.tpot_seconds),
            ("ITL", &self.itl_seconds),
            ("end to end", &self.e2e_seconds),
        ] {
            let Some(d) = distribution else { continue };
            let figures = [d.mean, d.p50, d.p90, d.p99, d.max].map(|seconds| format!("{:.1}", seconds * 1e3));
            rows.push_record([name.to_owned()].into_iter().chain(figures));
        }
        let load = match args.rate {
            Some(rate) => format!("{rate} requests/s (Poisson)"),
            None => format!("concurrency {}", args.concurrency.unwrap_or(4)),
        };
        format!(
            "{model} at {}: {load}, {:.0} tokens in, {:.0} out\n{}\n\
             {} succeeded, {} failed in {:.1} s: {:.2} requests/s, {:.1} output tok/s, {:.1} input tok/s",
            args.url,
            self.mean_input_tokens,
            self.mean_output_tokens,
            rows.build().with(Style::sharp()),
            self.succeeded,
            self.failed,
            self.wall_seconds,
            self.requests_per_second,
            self.output_tokens_per_second,
            self.input_tokens_per_second,
        )
    }

    /// For programs; seconds.
    pub(super) fn json(&self, args: &BenchArgs, model: &str, run: &Run) -> String {
        let document = json!({
            "settings": {
                "url": args.url,
                "model": model,
                "concurrency": args.rate.is_none().then(|| args.concurrency.unwrap_or(4)),
                "rate": args.rate,
                "input_tokens": args.input_tokens,
                "output_tokens": args.output_tokens,
                "warmup": args.warmup,
                "seed": args.seed,
            },
            "summary": self,
            "requests": run.timings,
        });
        format!("{document:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let d = Distribution::of((1..=100).rev().map(f64::from).collect()).expect("not empty");
        assert_eq!(d, Distribution { mean: 50.5, p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 });
        let one = Distribution::of(vec![7.0]).expect("not empty");
        assert_eq!(one, Distribution { mean: 7.0, p50: 7.0, p90: 7.0, p99: 7.0, max: 7.0 });
        assert_eq!(Distribution::of(Vec::new()), None);
    }

    #[test]
    fn failures_are_counted_and_kept_out_of_the_figures() {
        let good = Timing { ttft_seconds: 1.0, e2e_seconds: 2.0, completion_tokens: 10, ..Timing::default() };
        let bad = Timing { error: Some("no".into()), e2e_seconds: 99.0, ..Timing::default() };
        let run = Run { timings: vec![good.clone(), bad, good], wall: Duration::from_secs(4) };
        let summary = Summary::of(&run);
        assert_eq!((summary.succeeded, summary.failed), (2, 1));
        assert_eq!(summary.output_tokens_per_second, 5.0);
        assert_eq!(summary.e2e_seconds.map(|d| d.max), Some(2.0));
    }
}
