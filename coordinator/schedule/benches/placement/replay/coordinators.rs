//! Several coordinators at once: requests come to one after the other, and each places what comes to it by what it has
//! sent itself, what instances report of the work of all, and what their caches say.

use std::collections::HashMap;

use baton_proto::LegId;
use baton_schedule::Settings;

use super::{
    cache::Changes,
    chooser::{Choice, Chooser, Place, Report, Sight},
    production::Production,
};

/// Whose requests an instance was given, in order.
#[derive(Debug, Clone, Default)]
struct Given {
    to_come: Vec<usize>,
    /// How many of `to_come` reports have counted, and how many of these are each coordinator's.
    counted: usize,
    seen: Vec<u64>,
}

impl Given {
    fn new(coordinators: usize) -> Self {
        Self { seen: vec![0; coordinators], ..Self::default() }
    }

    /// A report knows of so many: the last of each coordinator's legs among them.
    fn seen(&mut self, taken: u64) -> &[u64] {
        while (self.counted as u64) < taken {
            self.seen[self.to_come[self.counted]] += 1;
            self.counted += 1;
        }
        &self.seen
    }
}

pub(crate) struct Coordinators {
    each: Vec<Production>,
    /// Who places the next request.
    next: usize,
    /// Who has placed a request.
    of: HashMap<usize, usize>,
    prefills: Vec<Given>,
    decodes: Vec<Given>,
}

impl Coordinators {
    pub(crate) fn new(many: usize, prefills: usize, decodes: usize, settings: Settings) -> Self {
        let one = |seed| Production::new(prefills, decodes, Settings { seed, ..settings });
        Self {
            each: (0..many as u32).map(one).collect(),
            next: 0,
            of: HashMap::new(),
            prefills: vec![Given::new(many); prefills],
            decodes: vec![Given::new(many); decodes],
        }
    }

    fn of(&mut self, index: usize) -> &mut Production {
        &mut self.each[self.of[&index]]
    }
}

impl Chooser for Coordinators {
    fn choose(&mut self, sight: &Sight<'_>) -> Option<Choice> {
        self.of.insert(sight.index, self.next);
        self.each[self.next].take_in(sight);
        self.next = (self.next + 1) % self.each.len();
        None
    }

    fn bind(&mut self, now_micros: u64) -> Option<(usize, Choice)> {
        // Nobody's requests go before those of the others, where any wait.
        let many = self.each.len();
        let mut turn = (0..many).map(|turn| (self.next + turn) % many);
        let (by, (index, choice)) = turn.find_map(|by| Some((by, self.each[by].bind(now_micros)?)))?;
        if let Some(prefill) = choice.prefill {
            self.prefills[prefill].to_come.push(by);
        }
        self.decodes[choice.decode].to_come.push(by);
        Some((index, choice))
    }

    fn prefilled(&mut self, index: usize, now_micros: u64) {
        self.of(index).prefilled(index, now_micros);
    }

    fn handed_off(&mut self, index: usize, now_micros: u64) {
        self.of(index).handed_off(index, now_micros);
    }

    fn finished(&mut self, index: usize, output_tokens: u32, now_micros: u64) {
        self.of(index).finished(index, output_tokens, now_micros);
        self.of.remove(&index);
    }

    fn heard(&mut self, place: Place, report: &Report, now_micros: u64) {
        let given = match place {
            Place::Prefill(index) => &mut self.prefills[index],
            Place::Decode(index) => &mut self.decodes[index],
        };
        for (one, seen) in self.each.iter_mut().zip(given.seen(report.taken)) {
            one.heard(place, report, LegId(*seen), now_micros);
        }
    }

    fn cached(&mut self, place: Place, changes: &Changes, now_micros: u64) {
        self.each.iter_mut().for_each(|one| one.cached(place, changes, now_micros));
    }
}
