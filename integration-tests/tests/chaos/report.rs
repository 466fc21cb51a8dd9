//! What is said at the end: the faults by kind, and how the requests that they met fared.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use baton_integration_tests::metrics;

use crate::{clients::Flight, faults::Fault, fleet::Fleet};

/// A fault counts for what runs so long after its end as well.
const AFTERMATH: Duration = Duration::from_secs(5);

/// How many answers were moved, over the coordinators' lives.
#[derive(Debug, Default)]
pub(crate) struct Moves(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// What each coordinator said last.
    last: BTreeMap<usize, f64>,
    /// All that was said until then.
    sums: Vec<(Instant, f64)>,
}

impl Moves {
    /// Reads it from the metrics of these coordinators, for ever.
    pub(crate) async fn watch(&self, urls: &[String]) {
        let client = crate::clients::client();
        loop {
            for (index, url) in urls.iter().enumerate() {
                let asked = client.get(format!("{url}/metrics")).timeout(Duration::from_millis(500)).send();
                let Ok(answer) = asked.await else { continue };
                let Ok(text) = answer.text().await else { continue };
                let now = metrics::sum(&text, "baton_coordinator_migrations_total", "").unwrap_or(0.0);
                let mut counts = self.0.lock().expect("nobody panics with it");
                let before = counts.last.insert(index, now).unwrap_or(0.0);
                let more = if now < before { now } else { now - before };
                let sum = counts.sums.last().map_or(0.0, |(_, sum)| *sum);
                counts.sums.push((Instant::now(), sum + more));
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    fn between(&self, from: Instant, to: Instant) -> f64 {
        let counts = self.0.lock().expect("nobody panics with it");
        let until =
            |at: Instant| counts.sums.iter().rfind(|(when, _)| *when <= at).map_or(0.0, |(_, sum)| *sum);
        until(to) - until(from)
    }
}

#[derive(Default)]
struct Row<'a> {
    faults: usize,
    moved: f64,
    /// By where they are, so that one that two faults met is there once.
    flights: BTreeMap<usize, &'a Flight>,
}

impl Row<'_> {
    fn line(&self, name: &str) -> String {
        let mut took: Vec<_> = self.flights.values().map(|flight| flight.took().as_secs_f64()).collect();
        took.sort_by(f64::total_cmp);
        let at = |share: f64| took.get(((took.len() as f64 * share) as usize).min(took.len().max(1) - 1));
        let at = |share| at(share).copied().unwrap_or(0.0);
        let resent: usize = self.flights.values().map(|flight| flight.resent).sum();
        let gap = self.flights.values().map(|flight| flight.gap).max().unwrap_or_default().as_secs_f64();
        let (faults, moved, flights) = (self.faults, self.moved, self.flights.len());
        format!(
            "| {name} | {faults} | {flights} | {moved} | {resent} | {:.1} / {:.1} / {:.1} | {gap:.1} |",
            at(0.5),
            at(0.99),
            at(1.0)
        )
    }
}

/// A table in Markdown.
pub(crate) fn table(faults: &[Fault], flights: &[Flight], moves: &Moves) -> String {
    let mut rows = BTreeMap::<&str, Row<'_>>::new();
    let mut calm: BTreeMap<usize, &Flight> = flights.iter().enumerate().collect();
    for fault in faults {
        let row = rows.entry(&fault.name).or_default();
        let (from, to) = (fault.began, fault.ended + AFTERMATH);
        row.faults += 1;
        row.moved += moves.between(from, to);
        for (index, flight) in flights.iter().enumerate().filter(|(_, flight)| flight.overlaps(from, to)) {
            row.flights.insert(index, flight);
            calm.remove(&index);
        }
    }
    let first = flights.iter().map(|flight| flight.began).min();
    let last = flights.iter().map(|flight| flight.ended).max();
    let moved = first.zip(last).map_or(0.0, |(first, last)| moves.between(first, last));
    let all = Row { faults: faults.len(), moved, flights: flights.iter().enumerate().collect() };
    let mut lines = vec![
        "| fault | times | requests | moved | sent again | latency p50 / p99 / most, s | longest gap, s |"
            .to_owned(),
        "|---|---|---|---|---|---|---|".to_owned(),
    ];
    lines.extend(rows.iter().map(|(name, row)| row.line(name)));
    lines.push(Row { faults: 0, moved: 0.0, flights: calm }.line("none"));
    lines.push(all.line("all"));
    lines.join("\n")
}

/// What servers and coordinators hold that they should not, when nobody asks anything.
pub(crate) async fn held(fleet: &Fleet) -> Vec<String> {
    const COORDINATORS: [&str; 3] =
        ["baton_coordinator_in_flight", "baton_coordinator_queued", "baton_coordinator_body_reserved_bytes"];
    use crate::fleet::Kind;
    let client = crate::clients::client();
    let mut held = Vec::new();
    for (kind, names) in
        [(Kind::Server, &metrics::HELD_BY_SERVERS[..]), (Kind::Coordinator, &COORDINATORS[..])]
    {
        for index in fleet.of(kind) {
            let who = &fleet.member(index).name;
            let Some(text) = fleet.metrics(&client, index).await else {
                held.push(format!("{who} does not answer"));
                continue;
            };
            for name in names {
                match metrics::sum(&text, name, "") {
                    Some(0.0) => {}
                    value => held.push(format!("{who}: {name} is {value:?}")),
                }
            }
            if kind == Kind::Server {
                let of = |name| metrics::sum(&text, name, "");
                let (free, all) = (of("baton_server_kv_blocks_free"), of("baton_server_kv_blocks_capacity"));
                if free != all {
                    held.push(format!("{who}: of {all:?} blocks {free:?} are free"));
                }
            }
        }
    }
    held
}
