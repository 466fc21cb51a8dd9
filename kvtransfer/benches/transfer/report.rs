//! Rounds to medians, medians to tables for people and lines of JSON for programs.

use serde::Serialize;
use tabled::{builder::Builder, settings::Style};

/// Bytes moved, the time that took, and the processor time that all processes involved spent on it.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Sample {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
}

impl Sample {
    fn gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }

    fn cpu_seconds_per_gigabyte(&self) -> f64 {
        self.cpu_seconds / self.bytes as f64 * 1e9
    }
}

/// All rounds of one measurement, beside those of a yardstick.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    what: String,
    yardstick: &'static str,
    target: Option<f64>,
    ours: Vec<Sample>,
    /// Of the same rounds.
    theirs: Vec<Option<Sample>>,
}

impl Row {
    pub(crate) fn new(what: &str, yardstick: &'static str, target: Option<f64>) -> Self {
        Self { what: what.to_owned(), yardstick, target, ours: Vec::new(), theirs: Vec::new() }
    }

    pub(crate) fn push(&mut self, ours: Sample, theirs: Option<Sample>) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    fn cells(&self) -> [String; 8] {
        let theirs: Vec<Sample> = self.theirs.iter().flatten().copied().collect();
        let both = self.ours.iter().zip(&self.theirs);
        let ratios = both.filter_map(|(ours, theirs)| {
            theirs.as_ref().map(|theirs| ours.gigabytes_per_second() / theirs.gigabytes_per_second())
        });
        let speed = |samples: &[Sample]| median_of(samples, Sample::gigabytes_per_second);
        let cost = |samples: &[Sample]| median_of(samples, Sample::cpu_seconds_per_gigabyte);
        [
            self.what.clone(),
            shown(speed(&self.ours)),
            shown(cost(&self.ours)),
            self.yardstick.to_owned(),
            shown(speed(&theirs)),
            shown(cost(&theirs)),
            shown(median(&ratios.collect::<Vec<_>>())),
            self.target.map_or_else(String::new, |target| format!(">= {target:.2}")),
        ]
    }
}

/// Something measured that has no yardstick.
#[derive(Debug, Serialize)]
pub(crate) struct Fact {
    what: String,
    unit: &'static str,
    values: Vec<f64>,
    /// It should be no more than that.
    target: Option<f64>,
}

impl Fact {
    pub(crate) fn new(what: String, unit: &'static str, values: Vec<f64>, target: Option<f64>) -> Self {
        Self { what, unit, values, target }
    }
}

/// The whole measurement.
#[derive(Debug)]
pub(crate) struct Report {
    rounds: u32,
    pub(crate) iperf3: bool,
    pub(crate) mooncake: bool,
    pub(crate) rows: Vec<Row>,
    pub(crate) facts: Vec<Fact>,
}

impl Report {
    pub(crate) fn new(rounds: u32) -> Self {
        Self { rounds, iperf3: false, mooncake: false, rows: Vec::new(), facts: Vec::new() }
    }

    pub(crate) fn text(&self) -> String {
        let mut parts = Vec::new();
        if !self.rows.is_empty() {
            let mut table = Builder::default();
            let head = ["transfers", "GB/s", "CPU s/GB", "beside", "GB/s", "CPU s/GB", "ratio", "target"];
            table.push_record(head);
            self.rows.iter().for_each(|row| table.push_record(row.cells()));
            parts.push(table.build().with(Style::markdown()).to_string());
        }
        if !self.facts.is_empty() {
            let mut table = Builder::default();
            table.push_record(["measured", "median", "target"]);
            for fact in &self.facts {
                let value = format!("{} {}", shown(median(&fact.values)), fact.unit);
                let target = fact.target.map_or_else(String::new, |target| format!("<= {target:.2}"));
                table.push_record([fact.what.clone(), value.trim_end().to_owned(), target]);
            }
            parts.push(table.build().with(Style::markdown()).to_string());
        }
        parts.push(format!("medians of {} rounds, everything in turns", self.rounds));
        parts.push(self.missing());
        parts.retain(|part| !part.is_empty());
        parts.join("\n\n")
    }

    /// What to do about columns that are empty.
    fn missing(&self) -> String {
        let beside = |yardstick: &str| self.rows.iter().any(|row| row.yardstick == yardstick);
        let lines = [("iperf3", self.iperf3, "--iperf3"), ("Mooncake", self.mooncake, "--mooncake")];
        let missing = lines.iter().filter(|(name, given, _)| beside(name) && !given);
        let say = |(name, _, flag): &(&str, bool, &str)| {
            format!(
                "not measured: {name}; ./deploy/run bench transfer brings it, or say where it is with {flag}"
            )
        };
        missing.map(say).collect::<Vec<_>>().join("\n")
    }

    /// One line for each row and fact.
    pub(crate) fn json(&self) -> String {
        let rows = self.rows.iter().map(serde_json::to_string);
        let facts = self.facts.iter().map(serde_json::to_string);
        rows.chain(facts).filter_map(Result::ok).map(|line| line + "\n").collect()
    }
}

fn shown(value: f64) -> String {
    match value.is_nan() {
        true => "-".to_owned(),
        false => format!("{value:.2}"),
    }
}

fn median_of(samples: &[Sample], figure: fn(&Sample) -> f64) -> f64 {
    median(&samples.iter().map(figure).collect::<Vec<_>>())
}

/// NaN of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value that this share of all is not above. NaN of nothing.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
