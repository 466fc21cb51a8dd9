//! Outcomes to figures, figures to tables, and what is to be said against them.

use std::fmt;

use tabled::{builder::Builder, settings::Style};

use crate::{
    lines::{Answer, Line, Prompt},
    protocol::Outcome,
    run::Runs,
    targets::Target,
};

/// Of the best other's processor time, for a request that is streamed at an engine's pace.
const PACED_SHARE: f64 = 0.5;
/// Requests of 220 KB that a core carries in a second, if its tokeniser lets it.
const LONG_PER_CORE: f64 = 500.0;

/// Of one line of one target in one round; times in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    /// Processor time of a request.
    cpu: f64,
    peak_megabytes: f64,
    first_p50: f64,
    first_p99: f64,
    whole_p50: f64,
    whole_p99: f64,
    per_second: f64,
}

type Field = fn(&Figures) -> f64;

fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

impl Figures {
    /// Nothing was measured.
    pub(crate) const NONE: Self = Self {
        cpu: f64::NAN,
        peak_megabytes: f64::NAN,
        first_p50: f64::NAN,
        first_p99: f64::NAN,
        whole_p50: f64::NAN,
        whole_p99: f64::NAN,
        per_second: f64::NAN,
    };

    pub(crate) fn of(outcome: &Outcome, cpu_millis: f64, peak_megabytes: f64) -> Self {
        let millis = |micros: &[u64]| micros.iter().map(|micros| *micros as f64 / 1e3).collect::<Vec<_>>();
        let (first, whole) = (millis(&outcome.first_micros), millis(&outcome.whole_micros));
        let requests = whole.len().max(1) as f64;
        Self {
            cpu: cpu_millis / requests,
            peak_megabytes,
            first_p50: percentile(&first, 0.5),
            first_p99: percentile(&first, 0.99),
            whole_p50: percentile(&whole, 0.5),
            whole_p99: percentile(&whole, 0.99),
            per_second: requests / (outcome.wall_micros as f64 / 1e6),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, first_p50, first_p99, whole_p50, whole_p99, per_second, .. } = self;
        write!(
            to,
            "{cpu:.2} ms of a processor, first token {first_p50:.1} / {first_p99:.1} ms, whole {whole_p50:.1} / {whole_p99:.1} ms, \
             {per_second:.0} a second"
        )
    }
}

/// What the tables are made of.
pub(crate) struct Report<'a> {
    pub(crate) runs: &'a Runs,
    /// Prompts of 220 KB that one core tokenises in a second.
    pub(crate) tokenised_per_second: f64,
}

impl Report<'_> {
    fn lines(&self) -> Vec<Line> {
        let mut lines: Vec<Line> = self.runs.keys().map(|(line, _)| *line).collect();
        lines.dedup();
        lines
    }

    /// The median over the rounds.
    fn of(&self, line: Line, target: Target, field: Field) -> Option<f64> {
        let each = self.runs.get(&(line, target))?;
        Some(median(&each.iter().map(field).collect::<Vec<_>>()))
    }

    /// The median of what each round had more than the worker alone had in it.
    fn added(&self, line: Line, target: Target, field: Field) -> Option<f64> {
        let (each, direct) = (self.runs.get(&(line, target))?, self.runs.get(&(line, Target::Direct))?);
        Some(median(
            &each.iter().zip(direct).map(|(one, other)| field(one) - field(other)).collect::<Vec<_>>(),
        ))
    }

    /// The least of the others.
    fn best(&self, of: impl Fn(Target) -> Option<f64>) -> Option<f64> {
        Target::PEERS.into_iter().filter_map(of).min_by(f64::total_cmp)
    }

    /// All tables.
    pub(crate) fn text(&self) -> String {
        let tables = [
            (
                "processor time of a request, ms (user and system, the router and all of its children)",
                self.cpu(),
            ),
            ("added to the time to the first token by the worker alone, p50 / p99, ms", {
                self.latency(|figures| figures.first_p50, |figures| figures.first_p99)
            }),
            ("added to the time of a whole request by the worker alone, p50 / p99, ms", {
                self.latency(|figures| figures.whole_p50, |figures| figures.whole_p99)
            }),
            ("most memory in use, MB", self.plain(|figures| figures.peak_megabytes, 0)),
            ("requests a second", self.plain(|figures| figures.per_second, 0)),
        ];
        tables.map(|(what, table)| format!("{what}\n\n{table}")).join("\n\n")
    }

    /// A row for each line, with a cell for each of the columns after it.
    fn table(&self, columns: &[&str], row: impl Fn(Line) -> Vec<String>) -> String {
        let mut table = Builder::default();
        table.push_record(["prompt, answer, streams"].into_iter().chain(columns.iter().copied()));
        for line in self.lines() {
            table.push_record([line.to_string()].into_iter().chain(row(line)));
        }
        table.build().with(Style::markdown()).to_string()
    }

    fn cpu(&self) -> String {
        let routers: Vec<Target> =
            Target::ALL.into_iter().filter(|target| *target != Target::Direct).collect();
        let names = routers.iter().map(|target| target.name());
        let columns: Vec<&str> = names.chain(["baton / best", "to be", ""]).collect();
        self.table(&columns, |line| {
            let mut cells: Vec<String> = routers
                .iter()
                .map(|&target| number(self.of(line, target, |figures| figures.cpu), 2))
                .collect();
            let ratio = self.ratio(line, Target::Baton);
            cells.push(number(ratio, 2));
            let share = share(line);
            cells.push(if share < 1.0 { format!("<= {share}") } else { "< 1".into() });
            cells.push(verdict(ratio.map(|ratio| within(ratio, share))));
            cells
        })
    }

    fn ratio(&self, line: Line, target: Target) -> Option<f64> {
        let best = self.best(|peer| self.of(line, peer, |figures| figures.cpu))?;
        Some(self.of(line, target, |figures| figures.cpu)? / best)
    }

    fn latency(&self, p50: Field, p99: Field) -> String {
        let routers: Vec<Target> =
            Target::ALL.into_iter().filter(|target| *target != Target::Direct).collect();
        let names = routers.iter().map(|target| target.name());
        let columns: Vec<&str> = names.chain(["direct", "p99 <= best"]).collect();
        self.table(&columns, |line| {
            let mut cells: Vec<String> = Vec::new();
            for &target in &routers {
                let (half, most) = (self.added(line, target, p50), self.added(line, target, p99));
                cells.push(format!("{} / {}", number(half, 1), number(most, 1)));
            }
            let direct = |field| number(self.of(line, Target::Direct, field), 1);
            cells.push(format!("{} / {}", direct(p50), direct(p99)));
            let best = self.best(|peer| self.added(line, peer, p99));
            let ours = self.added(line, Target::Baton, p99);
            cells.push(verdict(ours.zip(best).map(|(ours, best)| ours <= best)));
            cells
        })
    }

    fn plain(&self, field: Field, digits: usize) -> String {
        let names: Vec<&str> = Target::ALL.into_iter().map(Target::name).collect();
        self.table(&names, |line| {
            Target::ALL.into_iter().map(|target| number(self.of(line, target, field), digits)).collect()
        })
    }

    /// Where it is not as it is to be.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for line in self.lines() {
            if let Some(ratio) = self.ratio(line, Target::Baton).filter(|ratio| !within(*ratio, share(line)))
            {
                faults.push(format!("{line}: {ratio:.2} of the best other's processor time"));
            }
            let fields: [(&str, Field); 2] = [
                ("first token", |figures| figures.first_p99),
                ("whole request", |figures| figures.whole_p99),
            ];
            for (what, field) in fields {
                let best = self.best(|peer| self.added(line, peer, field));
                if let Some((ours, best)) = self.added(line, Target::Baton, field).zip(best)
                    && ours > best
                {
                    faults.push(format!(
                        "{line}: adds {ours:.1} ms to the p99 of the {what}, the best other {best:.1}"
                    ));
                }
            }
            let rss = |target| self.of(line, target, |figures| figures.peak_megabytes);
            if let Some((ours, best)) = rss(Target::Baton).zip(self.best(rss))
                && ours >= best
            {
                faults.push(format!("{line}: {ours:.0} MB in use, the best other {best:.0}"));
            }
        }
        faults.extend(self.long().filter(|(_, passes)| !passes).map(|(text, _)| text));
        faults
    }

    /// How many requests of 220 KB a core carries, and whether these are enough. Where the tokeniser
    /// alone, of texts never seen, does fewer than that, nine tenths of it are wanted.
    pub(crate) fn long(&self) -> impl Iterator<Item = (String, bool)> {
        let wanted = LONG_PER_CORE.min(self.tokenised_per_second * 0.9);
        self.lines().into_iter().filter(|line| line.prompt == Prompt::Bytes220k).filter_map(move |line| {
            let cpu = self.of(line, Target::Baton, |figures| figures.cpu)?;
            let (per_core, limit) = (1e3 / cpu, self.tokenised_per_second);
            let text = format!(
                "{line}: {per_core:.0} requests a second and core, to be {wanted:.0}; its tokeniser alone does {limit:.0}"
            );
            Some((text, per_core >= wanted))
        })
    }
}

/// How much of the best other's processor time a line may take; below it, if that is all.
fn share(line: Line) -> f64 {
    if line.answer == Answer::Paced { PACED_SHARE } else { 1.0 }
}

fn within(ratio: f64, share: f64) -> bool {
    if share < 1.0 { ratio <= share } else { ratio < share }
}

fn verdict(passes: Option<bool>) -> String {
    passes.map_or("-", |passes| if passes { "yes" } else { "no" }).to_owned()
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.filter(|value| value.is_finite()).map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}
