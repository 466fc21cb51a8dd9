//! What became of the handoffs that this coordinator asked for, by the pair of instances they went between.
//!
//! Told by [`crate::dispatch`], once for a request at most; read by [`crate::registration`] for the controller, and so for
//! operators. The controller judges links by it; placement learns for itself, through its booking's `Credit`, and leaves aside
//! what waited for room on decode. It keeps as many links as the controller takes; one more, and the link that was used longest
//! ago is forgotten.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use baton_proto::{InstanceId, LINKS_MOST, LinkUse};
use parking_lot::Mutex;
use tokio::time::Instant;

/// How much of the mean the last measurement is: 1/8, so that a mean tells of the last ten or twenty handoffs.
const WEIGHT: f64 = 0.125;

/// Prefill and decode.
type Pair = (InstanceId, InstanceId);

#[derive(Debug)]
struct Entry {
    handoffs: u64,
    failures: u64,
    mean_micros: Option<f64>,
    used: Instant,
    /// Its key in `by_use`.
    turn: u64,
}

#[derive(Debug, Default)]
struct Table {
    links: HashMap<Arc<Pair>, Entry>,
    /// The same, in the order of their last use.
    by_use: BTreeMap<u64, Arc<Pair>>,
    turns: u64,
}

/// All links; locked for the time of one look-up.
#[derive(Debug, Default)]
pub struct Handoffs {
    table: Mutex<Table>,
}

/// How a handoff ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Decode went on from the cache, so long after the first token, if that was measured.
    Done(Option<Duration>),
    Failed,
}

impl Handoffs {
    fn tell(&self, pair: Pair, outcome: Outcome, now: Instant) {
        let table = &mut *self.table.lock();
        table.turns += 1;
        let turn = table.turns;
        let pair = match table.links.get(&pair).map(|entry| entry.turn) {
            Some(before) => table.by_use.remove(&before).unwrap_or_else(|| Arc::new(pair)),
            None => table.room_for(pair, now),
        };
        table.by_use.insert(turn, pair.clone());
        let Some(entry) = table.links.get_mut(&pair) else { return };
        (entry.turn, entry.used) = (turn, now);
        match outcome {
            Outcome::Failed => entry.failures += 1,
            Outcome::Done(took) => {
                entry.handoffs += 1;
                let took = took.map(|took| took.as_secs_f64() * 1e6);
                entry.mean_micros = match (entry.mean_micros, took) {
                    (Some(mean), Some(took)) => Some(mean + WEIGHT * (took - mean)),
                    (mean, took) => mean.or(took),
                };
            }
        }
    }

    /// Links that were used since, the last one first.
    pub fn used_since(&self, since: Instant) -> Vec<LinkUse> {
        let used: Vec<_> = {
            let table = self.table.lock();
            let latest = table.by_use.values().rev();
            let entries = latest.filter_map(|pair| Some((pair.clone(), table.links.get(pair)?)));
            let recent = entries.take_while(|(_, entry)| entry.used >= since);
            recent.map(|(pair, entry)| (pair, entry.handoffs, entry.failures, entry.mean_micros)).collect()
        };
        let link = |(pair, handoffs, failures, mean): (Arc<Pair>, u64, u64, Option<f64>)| LinkUse {
            prefill: pair.0.clone(),
            decode: pair.1.clone(),
            handoffs,
            failures,
            // 0 would say that nothing was measured.
            mean_micros: mean.map_or(0, |mean| (mean.round() as u64).max(1)),
        };
        used.into_iter().map(link).collect()
    }
}

impl Table {
    /// Enters a link, in the place of the one that was used longest ago if there are many.
    fn room_for(&mut self, pair: Pair, now: Instant) -> Arc<Pair> {
        if self.links.len() >= LINKS_MOST
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.links.remove(&oldest);
        }
        let pair = Arc::new(pair);
        let entry = Entry { handoffs: 0, failures: 0, mean_micros: None, used: now, turn: 0 };
        self.links.insert(pair.clone(), entry);
        pair
    }
}

/// A handoff that has been asked for. Whoever drives the request says how it ended; dropped without, as when the client
/// leaves or prefill needs no decode, it counts for nothing.
#[derive(Debug)]
pub struct Handoff {
    handoffs: Arc<Handoffs>,
    pair: Pair,
}

impl Handoff {
    pub fn new(handoffs: &Arc<Handoffs>, prefill: &InstanceId, decode: &InstanceId) -> Self {
        Self { handoffs: handoffs.clone(), pair: (prefill.clone(), decode.clone()) }
    }

    /// Decode has gone on, so long after the first token, if both were seen in that order.
    pub fn done(self, took: Option<Duration>) {
        self.handoffs.tell(self.pair, Outcome::Done(took), Instant::now());
    }

    pub fn failed(self) {
        self.handoffs.tell(self.pair, Outcome::Failed, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> InstanceId {
        InstanceId::new(name).expect("a good id")
    }

    fn pair(prefill: &str, decode: &str) -> Pair {
        (id(prefill), id(decode))
    }

    fn done(micros: u64) -> Outcome {
        Outcome::Done(Some(Duration::from_micros(micros)))
    }

    fn view(of: &LinkUse) -> (String, u64, u64, u64) {
        (format!("{}>{}", of.prefill, of.decode), of.handoffs, of.failures, of.mean_micros)
    }

    #[test]
    fn counts_and_means_are_of_each_link() {
        let (all, now) = (Handoffs::default(), Instant::now());
        all.tell(pair("p", "d"), done(800), now);
        all.tell(pair("p", "e"), Outcome::Failed, now);
        all.tell(pair("p", "f"), Outcome::Done(None), now);
        all.tell(pair("p", "d"), done(1600), now);
        all.tell(pair("p", "d"), Outcome::Done(None), now);
        all.tell(pair("q", "d"), done(0), now);
        assert_eq!(
            all.used_since(now).iter().map(view).collect::<Vec<_>>(),
            [
                ("q>d".into(), 1, 0, 1),
                ("p>d".into(), 3, 0, 900),
                ("p>f".into(), 1, 0, 0),
                ("p>e".into(), 0, 1, 0)
            ]
        );
    }

    #[test]
    fn the_mean_follows_a_change_and_forgets_an_outlier() {
        let (all, now) = (Handoffs::default(), Instant::now());
        let mean = || all.used_since(now)[0].mean_micros;
        all.tell(pair("p", "d"), done(100_000), now);
        for _ in 0..50 {
            all.tell(pair("p", "d"), done(1000), now);
        }
        assert!((1000..1200).contains(&mean()), "{}", mean());
    }

    #[test]
    fn links_that_were_not_used_of_late_are_not_told() {
        let (all, now) = (Handoffs::default(), Instant::now());
        all.tell(pair("p", "d"), done(1), now);
        let later = now + Duration::from_secs(60);
        all.tell(pair("p", "e"), done(1), later);
        assert_eq!(all.used_since(later).iter().map(view).collect::<Vec<_>>(), [("p>e".into(), 1, 0, 1)]);
        // What is told again has all its counts.
        all.tell(pair("p", "d"), done(1), later);
        assert_eq!(all.used_since(later).len(), 2);
        assert_eq!(all.used_since(later)[0].handoffs, 2);
    }

    #[test]
    fn the_link_used_longest_ago_makes_room() {
        let (all, now) = (Handoffs::default(), Instant::now());
        let name = |number: usize| format!("p{number}");
        for number in 0..LINKS_MOST {
            all.tell(pair(&name(number), "d"), done(1), now);
        }
        all.tell(pair("p0", "d"), done(1), now);
        for number in LINKS_MOST..LINKS_MOST + 3 {
            all.tell(pair(&name(number), "d"), done(1), now);
        }
        let told = all.used_since(now);
        let has = |number: usize| told.iter().any(|link| link.prefill.as_str() == name(number));
        assert_eq!(told.len(), LINKS_MOST);
        assert!(has(0) && has(4) && has(LINKS_MOST + 2));
        assert!(!has(1) && !has(2) && !has(3));
        let table = all.table.lock();
        assert_eq!((table.links.len(), table.by_use.len()), (LINKS_MOST, LINKS_MOST));
    }
}
