//! Replays to tables, and what is to be said against them.

use std::{collections::BTreeMap, fmt};

use tabled::{builder::Builder, settings::Style};

use crate::{
    Policy,
    replay::figures::{Figures, percentile},
};

/// Loads at which placement is judged: below them nothing queues, above them nobody can win.
const JUDGED_LOADS: std::ops::RangeInclusive<f64> = 0.60..=0.95;

/// What was replayed, but for the seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) cache_blocks: u32,
    pub(crate) speed_percent: u32,
    pub(crate) policy: Policy,
}

impl fmt::Display for Key {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} blocks, speed {}, {}", self.cache_blocks, speed(self), self.policy.name())
    }
}

/// The figures of each seed, in the order of seeds.
pub(crate) type Runs = BTreeMap<Key, Vec<Figures>>;

fn speed(key: &Key) -> String {
    format!("{:.2}", f64::from(key.speed_percent) / 100.0)
}

/// How far this placement is ahead of a peer: above 1 it is.
struct Ahead {
    goodput: f64,
    ttft_mean: f64,
    ttft_p99: f64,
}

impl Ahead {
    /// Each is the median of each seed's own.
    fn of(ours: &[Figures], theirs: &[Figures]) -> Self {
        let ratio = |of: fn(&Figures, &Figures) -> f64| {
            let each: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| of(ours, theirs)).collect();
            percentile(&each, 0.5)
        };
        Self {
            goodput: ratio(|ours, theirs| ours.goodput / theirs.goodput),
            ttft_mean: ratio(|ours, theirs| theirs.ttft_mean_seconds / ours.ttft_mean_seconds),
            ttft_p99: ratio(|ours, theirs| theirs.ttft_p99_seconds / ours.ttft_p99_seconds),
        }
    }
}

/// Every peer at every load, beside this placement there.
fn compared(runs: &Runs) -> impl Iterator<Item = (&Key, Figures, Ahead)> {
    runs.iter().filter(|(key, _)| key.policy != Policy::Production).filter_map(|(key, theirs)| {
        let ours = runs.get(&Key { policy: Policy::Production, ..*key })?;
        Some((key, Figures::median(ours), Ahead::of(ours, theirs)))
    })
}

pub(crate) fn text(runs: &Runs) -> String {
    let mut caches: Vec<u32> = runs.keys().map(|key| key.cache_blocks).collect();
    caches.dedup();
    let part = |blocks: &u32| {
        let figures = figures(runs, *blocks);
        let ratios = ratios(runs, *blocks);
        format!("prefill keeps {blocks} blocks of 512 tokens\n\n{figures}\n\n{ratios}")
    };
    caches.iter().map(part).collect::<Vec<_>>().join("\n\n")
}

fn figures(runs: &Runs, cache_blocks: u32) -> String {
    let mut table = Builder::default();
    table.push_record([
        "speed",
        "placed by",
        "load",
        "TTFT mean s",
        "TTFT p99 s",
        "slowdown p99",
        "TPOT mean ms",
        "TPOT p99 ms",
        "goodput %",
        "cached %",
        "by decode %",
        "imbalance",
    ]);
    for (key, each) in runs.iter().filter(|(key, _)| key.cache_blocks == cache_blocks) {
        let run = Figures::median(each);
        table.push_record([
            speed(key),
            key.policy.name().to_owned(),
            format!("{:.2}", run.load),
            format!("{:.2}", run.ttft_mean_seconds),
            format!("{:.1}", run.ttft_p99_seconds),
            format!("{:.1}", run.slowdown_p99),
            format!("{:.1}", run.tpot_mean_millis),
            format!("{:.1}", run.tpot_p99_millis),
            format!("{:.1}", run.goodput * 100.0),
            format!("{:.1}", run.hit * 100.0),
            format!("{:.1}", run.local * 100.0),
            format!("{:.2}", run.imbalance),
        ]);
    }
    table.build().with(Style::markdown()).to_string()
}

fn ratios(runs: &Runs, cache_blocks: u32) -> String {
    let mut table = Builder::default();
    table.push_record(["speed", "ahead of", "goodput", "TTFT mean", "TTFT p99"]);
    for (key, _, ahead) in compared(runs).filter(|(key, ..)| key.cache_blocks == cache_blocks) {
        table.push_record([
            speed(key),
            key.policy.name().to_owned(),
            format!("{:.3}", ahead.goodput),
            format!("{:.3}", ahead.ttft_mean),
            format!("{:.3}", ahead.ttft_p99),
        ]);
    }
    let table = table.build().with(Style::markdown()).to_string();
    format!("baton beside each: above 1 it is ahead, below 1 behind\n\n{table}")
}

/// Where this placement is not ahead of a peer, at the loads that count. What it would be if it were told to do otherwise
/// is no peer.
pub(crate) fn faults(runs: &Runs) -> Vec<String> {
    let mut faults = Vec::new();
    let mut judged = 0;
    let peers = compared(runs).filter(|(key, ..)| key.policy != Policy::Apart);
    for (key, ours, ahead) in peers.filter(|(_, ours, _)| JUDGED_LOADS.contains(&ours.load)) {
        judged += 1;
        for (what, ratio) in [("goodput", ahead.goodput), ("p99 TTFT", ahead.ttft_p99)] {
            // NaN is not ahead either.
            if ratio.is_nan() || ratio <= 1.0 {
                faults.push(format!("{key}, load {:.2}: not ahead on {what}, {ratio:.3}", ours.load));
            }
        }
    }
    if judged == 0 {
        faults.push("no peer was met at a load of .60 to .95: nothing is shown".to_owned());
    }
    faults
}
