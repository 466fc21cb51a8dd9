//! Those of one tenant who wait: by priority, and of the same priority whoever's first token is wanted soonest.

use std::{
    collections::BTreeMap,
    ops::Bound::{Included, Unbounded},
};

use tokio::time::Instant;

use super::in_turn;

/// When it is wanted, and the order of arrival.
pub(super) type Key = (Instant, u64);

#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) work: f64,
    pub(super) item: T,
    /// How often others have gone before it as it did not fit.
    pub(super) passed_over: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tenant<T> {
    pub(super) weight: u32,
    /// How much it has had, by weight.
    pub(super) time: f64,
    /// Of all that wait.
    pub(super) work: f64,
    pub(super) waiting: usize,
    turns: u32,
    priorities: BTreeMap<i32, Deadlines<T>>,
}

/// Those of one priority.
#[derive(Debug)]
struct Deadlines<T> {
    waiting: BTreeMap<Key, Entry<T>>,
    work: f64,
    /// The last turn went to one that was late.
    late: bool,
}

impl<T> Tenant<T> {
    pub(super) fn new(weight: u32, time: f64) -> Self {
        Self { weight, time, work: 0.0, waiting: 0, turns: 0, priorities: BTreeMap::new() }
    }

    pub(super) fn push(&mut self, priority: i32, key: Key, entry: Entry<T>) {
        let none = || Deadlines { waiting: BTreeMap::new(), work: 0.0, late: false };
        let of = self.priorities.entry(priority).or_insert_with(none);
        of.work += entry.work;
        self.work += entry.work;
        self.waiting += 1;
        of.waiting.insert(key, entry);
    }

    /// Takes one out that leaves.
    pub(super) fn remove(&mut self, priority: i32, key: &Key) -> Option<Entry<T>> {
        let of = self.priorities.get_mut(&priority)?;
        let entry = of.waiting.remove(key)?;
        of.work -= entry.work;
        self.work -= entry.work;
        self.waiting -= 1;
        if of.waiting.is_empty() {
            self.priorities.remove(&priority);
        }
        Some(entry)
    }

    /// Takes out one whose turn it is.
    pub(super) fn serve(&mut self, priority: i32, key: &Key, now: Instant) -> Option<Entry<T>> {
        let entry = self.remove(priority, key)?;
        self.time += entry.work / f64::from(self.weight);
        self.turns = self.turns.wrapping_add(1);
        if let Some(of) = self.priorities.get_mut(&priority) {
            of.late = key.0 < now;
        }
        Some(entry)
    }

    /// Another goes before this one.
    pub(super) fn pass_over(&mut self, priority: i32, key: &Key) {
        if let Some(entry) = self.priorities.get_mut(&priority).and_then(|of| of.waiting.get_mut(key)) {
            entry.passed_over = entry.passed_over.saturating_add(1);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.priorities.values().flat_map(|of| of.waiting.values().map(|entry| &entry.item))
    }

    /// Its requests in the order in which they are asked, with their priorities.
    pub(super) fn heads(&self, now: Instant) -> impl Iterator<Item = (i32, &Key, &Entry<T>)> {
        let order = in_turn(self.priorities.keys().copied(), self.turns).into_iter();
        order.flat_map(move |(priority, most)| {
            let of = self.priorities.get(&priority).into_iter().flat_map(move |of| of.heads(now));
            of.map(move |(key, entry)| (priority, key, entry)).take(most)
        })
    }

    /// Work that goes before a new one of this priority.
    pub(super) fn work_before(&self, priority: i32) -> f64 {
        self.priorities.range(..=priority).map(|(_, of)| of.work).sum()
    }

    /// Whoever is asked last of those of a later priority than this, or of all.
    pub(super) fn last(&self, behind: Option<i32>) -> Option<(i32, Key, f64)> {
        let (&priority, of) = self.priorities.last_key_value()?;
        let (key, entry) = of.waiting.last_key_value()?;
        behind.is_none_or(|behind| priority > behind).then_some((priority, *key, entry.work))
    }

    /// Its time when all that wait have been served.
    pub(super) fn end(&self) -> f64 {
        self.time + self.work / f64::from(self.weight)
    }
}

impl<T> Deadlines<T> {
    fn heads(&self, now: Instant) -> impl Iterator<Item = (&Key, &Entry<T>)> {
        let in_time = (Included((now, 0)), Unbounded);
        let skip_late = self.late && self.waiting.range(in_time).next().is_some();
        let first = self.waiting.range(in_time).take(if skip_late { usize::MAX } else { 0 });
        let rest = self.waiting.iter().filter(move |((wanted, _), _)| !skip_late || *wanted < now);
        first.chain(rest)
    }
}
