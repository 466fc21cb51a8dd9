//! Rounds to medians, medians to a table for people and JSON for programs.

use serde::Serialize;
use serde_json::json;
use tabled::{builder::Builder, settings::Style};

use super::{Rates, Work};

/// All rounds of one work on one model.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    model: String,
    work: Work,
    baton: Vec<Rates>,
    llama_cpp: Vec<Rates>,
}

impl Row {
    pub(super) fn new(model: String, work: Work) -> Self {
        Self { model, work, baton: Vec::new(), llama_cpp: Vec::new() }
    }

    pub(super) fn push(&mut self, ours: Rates, theirs: Option<Rates>) {
        self.baton.push(ours);
        self.llama_cpp.extend(theirs);
    }

    /// Tokens a second of both and their ratio, each the median over rounds.
    fn medians(&self, of: fn(&Rates) -> f64) -> (f64, Option<(f64, f64)>) {
        let ratios = self.baton.iter().zip(&self.llama_cpp).map(|(ours, theirs)| of(ours) / of(theirs));
        let ratio = median(ratios.collect());
        let theirs = median(self.llama_cpp.iter().map(of).collect());
        (median(self.baton.iter().map(of).collect()).unwrap_or(f64::NAN), theirs.zip(ratio))
    }
}

/// The whole measurement.
#[derive(Debug)]
pub(super) struct Report {
    threads: u16,
    rounds: u32,
    llama_cpp: Option<String>,
    pub(super) rows: Vec<Row>,
}

impl Report {
    pub(super) fn new(threads: u16, rounds: u32) -> Self {
        Self { threads, rounds, llama_cpp: None, rows: Vec::new() }
    }

    /// Version of what Baton is compared with.
    pub(super) fn yardstick(&mut self, version: Option<String>) {
        self.llama_cpp = version;
    }

    pub(super) fn table(&self) -> String {
        let mut table = Builder::default();
        table.push_record(["model", "work", "Baton tok/s", "llama.cpp tok/s", "ratio"]);
        for row in &self.rows {
            let Work { sequences, prompt_tokens, .. } = row.work;
            let mut push = |work: String, of: fn(&Rates) -> f64| {
                let (ours, theirs) = row.medians(of);
                let (theirs, ratio) = theirs.map_or_else(
                    || ("-".to_owned(), "-".to_owned()),
                    |(theirs, ratio)| (format!("{theirs:.1}"), format!("{ratio:.2}")),
                );
                table.push_record([row.model.clone(), work, format!("{ours:.1}"), theirs, ratio]);
            };
            if sequences == 1 {
                push(format!("prefill {prompt_tokens}"), |rates| rates.prefill);
            }
            push(format!("decode, batch {sequences}, after {prompt_tokens}"), |rates| rates.decode);
        }
        let beside = self.llama_cpp.as_ref().map_or_else(String::new, |version| {
            format!("; llama.cpp of llama-cpp-python {version}, measured in turns")
        });
        let (threads, rounds) = (self.threads, self.rounds);
        format!(
            "{}\n{threads} threads, medians of {rounds} rounds{beside}",
            table.build().with(Style::sharp())
        )
    }

    /// Every round, tokens a second.
    pub(super) fn json(&self) -> String {
        let document = json!({
            "threads": self.threads,
            "rounds": self.rounds,
            "llama_cpp_python": self.llama_cpp,
            "rows": self.rows,
        });
        format!("{document:#}\n")
    }
}

/// `None` of no values; between two in the middle, their mean.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(prefill: f64) -> Rates {
        Rates { prefill, decode: 2.0 * prefill }
    }

    /// A machine that halves its speed in one round halves both; the ratio is not touched.
    #[test]
    fn ratios_are_of_one_round() {
        let mut row = Row::new("m".into(), Work { sequences: 1, prompt_tokens: 8, decode_tokens: 2 });
        row.push(rates(300.0), Some(rates(100.0)));
        row.push(rates(100.0), Some(rates(40.0)));
        row.push(rates(320.0), Some(rates(100.0)));
        assert_eq!(row.medians(|rates| rates.prefill), (300.0, Some((100.0, 3.0))));
        let mut report = Report::new(2, 3);
        report.yardstick(Some("1.0".into()));
        report.rows.push(row);
        let table = report.table();
        assert!(table.contains("300.0") && table.contains("3.00") && table.contains("prefill 8"), "{table}");
    }

    #[test]
    fn without_a_yardstick_there_is_no_ratio() {
        let mut row = Row::new("m".into(), Work { sequences: 8, prompt_tokens: 8, decode_tokens: 2 });
        row.push(rates(10.0), None);
        row.push(rates(20.0), None);
        assert_eq!(row.medians(|rates| rates.decode), (30.0, None));
        assert_eq!(median(Vec::new()), None);
    }
}
