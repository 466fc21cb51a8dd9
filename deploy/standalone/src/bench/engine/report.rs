//! Rounds to medians, medians to a table for people and JSON for programs.

use serde::Serialize;
use serde_json::json;
use tabled::{builder::Builder, settings::Style};

use super::{
    Rates, Work,
    limits::{Demand, Limits},
};

/// All rounds of one work on one model.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    model: String,
    work: Work,
    demand: Option<Demand>,
    baton: Vec<Rates>,
    llama_cpp: Vec<Rates>,
    limits: Vec<Limits>,
}

/// One figure of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Prefill,
    Decode,
}

impl Figure {
    fn of(self, rates: &Rates) -> f64 {
        match self {
            Self::Prefill => rates.prefill,
            Self::Decode => rates.decode,
        }
    }
}

impl Row {
    pub(super) fn new(model: String, work: Work, demand: Option<Demand>) -> Self {
        Self { model, work, demand, baton: Vec::new(), llama_cpp: Vec::new(), limits: Vec::new() }
    }

    pub(super) fn push(&mut self, ours: Rates, theirs: Option<Rates>, limits: Limits) {
        self.baton.push(ours);
        self.llama_cpp.extend(theirs);
        self.limits.push(limits);
    }

    /// Tokens a second of both and their ratio, each the median over rounds.
    fn medians(&self, figure: Figure) -> (f64, Option<(f64, f64)>) {
        let of = |rates: &Rates| figure.of(rates);
        let ratios = self.baton.iter().zip(&self.llama_cpp).map(|(ours, theirs)| of(ours) / of(theirs));
        let ratio = median(ratios.collect());
        let theirs = median(self.llama_cpp.iter().map(of).collect());
        (median(self.baton.iter().map(of).collect()).unwrap_or(f64::NAN), theirs.zip(ratio))
    }

    /// What share of the machine's limit that is: of products for prefill (attention's among them), of
    /// reading the file's weights for the decode of one sequence. Several sequences share what they read.
    fn of_limit(&self, figure: Figure) -> Option<f64> {
        let demand = self.demand?;
        if figure == Figure::Decode && self.work.sequences > 1 {
            return None;
        }
        let share = |(rates, limits): (&Rates, &Limits)| match figure {
            Figure::Prefill => rates.prefill * demand.operations(self.work.prompt_tokens) / limits.products,
            Figure::Decode => rates.decode * demand.bytes / limits.read,
        };
        median(self.baton.iter().zip(&self.limits).map(share).collect())
    }

    fn limit(&self, of: fn(&Limits) -> f64) -> Option<f64> {
        median(self.limits.iter().map(of).collect())
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
        table.push_record(["model", "work", "Baton tok/s", "llama.cpp tok/s", "ratio", "of limit"]);
        for row in &self.rows {
            let Work { sequences, prompt_tokens, .. } = row.work;
            let mut push = |work: String, figure: Figure| {
                let (ours, theirs) = row.medians(figure);
                let share = row
                    .of_limit(figure)
                    .map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0));
                let (theirs, ratio) = theirs.map_or_else(
                    || ("-".to_owned(), "-".to_owned()),
                    |(theirs, ratio)| (format!("{theirs:.1}"), format!("{ratio:.2}")),
                );
                table.push_record([row.model.clone(), work, format!("{ours:.1}"), theirs, ratio, share]);
            };
            if sequences == 1 {
                push(format!("prefill {prompt_tokens}"), Figure::Prefill);
            }
            push(format!("decode, batch {sequences}, after {prompt_tokens}"), Figure::Decode);
        }
        let beside = self.llama_cpp.as_ref().map_or_else(String::new, |version| {
            format!("; llama.cpp of llama-cpp-python {version}, measured in turns")
        });
        let (threads, rounds) = (self.threads, self.rounds);
        let limit = |of: fn(&Limits) -> f64| {
            median(self.rows.iter().filter_map(|row| row.limit(of)).collect()).unwrap_or(f64::NAN) / 1e9
        };
        let (read, products) = (limit(|limits| limits.read), limit(|limits| limits.products));
        format!(
            "{}\n{threads} threads, medians of {rounds} rounds{beside}\nlimits, measured in every round: memory is read \
             at {read:.1} GB/s (decode of one sequence, by the bytes of the file's weights: who keeps them in fewer can pass 100 %), products with bf16 weights make \
             {products:.0} Gop/s (prefill)",
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

    const LIMITS: Limits = Limits { read: 1e9, products: 1e12 };

    fn rates(prefill: f64) -> Rates {
        Rates { prefill, decode: 2.0 * prefill }
    }

    fn row(sequences: u32, demand: Option<Demand>) -> Row {
        Row::new("m".into(), Work { sequences, prompt_tokens: 8, decode_tokens: 2 }, demand)
    }

    /// A machine that halves its speed in one round halves both; the ratio is not touched.
    #[test]
    fn ratios_are_of_one_round() {
        let mut row = row(1, None);
        row.push(rates(300.0), Some(rates(100.0)), LIMITS);
        row.push(rates(100.0), Some(rates(40.0)), LIMITS);
        row.push(rates(320.0), Some(rates(100.0)), LIMITS);
        assert_eq!(row.medians(Figure::Prefill), (300.0, Some((100.0, 3.0))));
        assert_eq!(row.of_limit(Figure::Prefill), None, "of a mixture of experts");
        let mut report = Report::new(2, 3);
        report.yardstick(Some("1.0".into()));
        report.rows.push(row);
        let table = report.table();
        assert!(table.contains("300.0") && table.contains("3.00") && table.contains("prefill 8"), "{table}");
    }

    #[test]
    fn shares_are_of_the_same_round_s_limit() {
        // Of 8 tokens each sees 4.5.
        let demand = Demand { bytes: 1e6, weights: 1e9 - 4.5e7, attention: 1e7 };
        let mut row = row(1, Some(demand));
        row.push(rates(400.0), None, LIMITS);
        row.push(rates(200.0), None, Limits { read: 0.5e9, products: 0.5e12 });
        assert_eq!((row.of_limit(Figure::Prefill), row.of_limit(Figure::Decode)), (Some(0.4), Some(0.8)));
        let mut batch = super::tests::row(8, Some(demand));
        batch.push(rates(400.0), None, LIMITS);
        assert_eq!(batch.of_limit(Figure::Decode), None);
    }

    #[test]
    fn without_a_yardstick_there_is_no_ratio() {
        let mut row = row(8, None);
        row.push(rates(10.0), None, LIMITS);
        row.push(rates(20.0), None, LIMITS);
        assert_eq!(row.medians(Figure::Decode), (30.0, None));
        assert_eq!(median(Vec::new()), None);
    }
}
