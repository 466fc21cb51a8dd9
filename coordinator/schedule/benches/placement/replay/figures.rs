//! What a replay comes to, in the figures that placement is judged by.

use super::{
    machine::{Machine, Target},
    simulation::{Answer, Outcome},
    trace::{Request, Trace},
};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figures {
    /// Time that prefill instances computed, as a share of the time in which requests came; above 1 is overload.
    pub(crate) load: f64,
    pub(crate) ttft_mean_seconds: f64,
    pub(crate) ttft_p99_seconds: f64,
    /// TTFT as a multiple of what the prompt takes alone on an instance that has nothing of it.
    pub(crate) slowdown_p99: f64,
    pub(crate) tpot_mean_millis: f64,
    pub(crate) tpot_p99_millis: f64,
    /// Share of the requests whose TTFT and TPOT are in time.
    pub(crate) goodput: f64,
    /// Share of the prompt tokens that were cached.
    pub(crate) hit: f64,
    /// Share of the requests whose prompt decode computed itself.
    pub(crate) local: f64,
    /// The busiest prefill instance, as a multiple of the mean.
    pub(crate) imbalance: f64,
}

impl Figures {
    pub(crate) fn of(trace: &Trace, machine: &Machine, outcome: &Outcome) -> Self {
        let pairs = || trace.requests.iter().zip(&outcome.answers);
        let ttft: Vec<f64> = outcome.answers.iter().map(ttft_micros).collect();
        let slowdown = pairs()
            .map(|(request, answer)| ttft_micros(answer) / machine.alone_micros(request.prompt_tokens));
        let tpot: Vec<f64> = pairs().filter_map(|(request, answer)| tpot_micros(request, answer)).collect();
        let good = pairs().filter(|(request, answer)| in_time(request, answer)).count();
        let found: f64 = outcome.answers.iter().map(|answer| f64::from(answer.found_tokens)).sum();
        let prompts: f64 = trace.requests.iter().map(|request| f64::from(request.prompt_tokens)).sum();
        let local = outcome.answers.iter().filter(|answer| answer.prefill.is_none()).count();
        let busy: Vec<f64> = outcome.prefill_busy_micros.iter().map(|micros| *micros as f64).collect();
        Self {
            load: mean(&busy) / outcome.span_micros.max(1) as f64,
            ttft_mean_seconds: mean(&ttft) / 1e6,
            ttft_p99_seconds: percentile(&ttft, 0.99) / 1e6,
            slowdown_p99: percentile(&slowdown.collect::<Vec<_>>(), 0.99),
            tpot_mean_millis: mean(&tpot) / 1e3,
            tpot_p99_millis: percentile(&tpot, 0.99) / 1e3,
            goodput: good as f64 / outcome.answers.len() as f64,
            hit: found / prompts,
            local: local as f64 / outcome.answers.len() as f64,
            imbalance: percentile(&busy, 1.0) / mean(&busy),
        }
    }

    /// Each figure is the median of its own.
    pub(crate) fn median(runs: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> f64| percentile(&runs.iter().map(figure).collect::<Vec<_>>(), 0.5);
        Self {
            load: of(|run| run.load),
            ttft_mean_seconds: of(|run| run.ttft_mean_seconds),
            ttft_p99_seconds: of(|run| run.ttft_p99_seconds),
            slowdown_p99: of(|run| run.slowdown_p99),
            tpot_mean_millis: of(|run| run.tpot_mean_millis),
            tpot_p99_millis: of(|run| run.tpot_p99_millis),
            goodput: of(|run| run.goodput),
            hit: of(|run| run.hit),
            local: of(|run| run.local),
            imbalance: of(|run| run.imbalance),
        }
    }
}

pub(crate) fn ttft_micros(answer: &Answer) -> f64 {
    (answer.first_micros - answer.arrived_micros) as f64
}

/// Mean time of each token after the first; `None` of one that is the only one.
pub(crate) fn tpot_micros(request: &Request, answer: &Answer) -> Option<f64> {
    let more = request.output_tokens - 1;
    (more > 0).then(|| (answer.last_micros - answer.first_micros) as f64 / f64::from(more))
}

fn in_time(request: &Request, answer: &Answer) -> bool {
    let steady = tpot_micros(request, answer).is_none_or(|micros| micros <= Target::TPOT_MICROS);
    steady && ttft_micros(answer) <= Target::ttft_micros(request)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The value that this share of all is not above; of an even number's median the upper. NaN of nothing.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
