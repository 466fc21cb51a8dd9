//! Who is served next of those who wait for one model. Pure: time is an argument.
//!
//! - **Bands** go by priority: the lower comes first, but of [`TURNS`] turns one is another band's, each in its turn, so
//!   that nobody waits for ever.
//! - Within a band **tenants** share by weight: each has a time of its own that passes as its work is taken, the slower the
//!   more weight it has, and whoever's time is least is next (start-time fair queueing). One that comes back after a pause
//!   starts at the others' time: nobody saves up turns.
//! - Of a tenant's requests whoever's first token is wanted soonest is next. Those that are late already get every second
//!   turn at most: served first they would make all others late, too.
//!
//! Whoever is next may not fit where there is room: whoever is behind is asked as well ([`ASKED_MOST`]), and the order among
//! the rest stays.

mod drain;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound::{Excluded, Included, Unbounded},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use drain::Drain;

/// Of so many turns one is the next band's.
const TURNS: u32 = 20;
/// Requests that are asked in one go whether they fit. Where so many do not, nobody is asked any more: room is the fleet's,
/// and to look for it takes time in a large one.
const ASKED_MOST: usize = 2;

/// What the order goes by.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Lower is served first.
    pub priority: i32,
    pub tenant: Arc<str>,
    /// Of the tenant: twice the weight is twice the share. At least 1.
    pub weight: u32,
    /// When the first token is wanted.
    pub wanted: Instant,
    /// How much is to be done, in any unit.
    pub work: f64,
}

/// Whom one may outrank: of its own tenant those of a later priority, and all that are of later bands of keys.
#[derive(Debug, Clone, Copy)]
pub struct Rank<'a> {
    pub tenant: &'a str,
    pub priority: i32,
    /// The last priority of the band of its key.
    pub band_ends: i32,
}

/// One that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    priority: i32,
    tenant: Arc<str>,
    key: Key,
}

/// When it is wanted, and the order of arrival.
type Key = (Instant, u64);

#[derive(Debug)]
struct Entry<T> {
    work: f64,
    item: T,
}

#[derive(Debug)]
struct Tenant<T> {
    weight: u32,
    /// How much it has had, by weight.
    time: f64,
    waiting: BTreeMap<Key, Entry<T>>,
    /// Of all that wait.
    work: f64,
    /// Its last turn went to one that was late.
    late: bool,
}

impl<T> Tenant<T> {
    fn take(&mut self, key: &Key) -> Option<Entry<T>> {
        let entry = self.waiting.remove(key)?;
        self.work -= entry.work;
        Some(entry)
    }

    /// Its time when all that wait have been served.
    fn end(&self) -> f64 {
        self.time + self.work / f64::from(self.weight)
    }

    /// Its requests in the order in which they are asked.
    fn heads(&self, now: Instant) -> impl Iterator<Item = (&Key, &Entry<T>)> {
        let in_time = (Included((now, 0)), Unbounded);
        let skip_late = self.late && self.waiting.range(in_time).next().is_some();
        let first = self.waiting.range(in_time).take(if skip_late { usize::MAX } else { 0 });
        let rest = self.waiting.iter().filter(move |((wanted, _), _)| !skip_late || *wanted < now);
        first.chain(rest)
    }
}

#[derive(Debug)]
struct Band<T> {
    tenants: HashMap<Arc<str>, Tenant<T>>,
    /// The time of the tenant that was served last, before its turn.
    time: f64,
    /// Of all that wait.
    work: f64,
}

/// See the module.
#[derive(Debug)]
pub struct Queue<T> {
    bands: BTreeMap<i32, Band<T>>,
    arrivals: u64,
    turns: u32,
    waiting: usize,
    drain: Drain,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { bands: BTreeMap::new(), arrivals: 0, turns: 0, waiting: 0, drain: Drain::NEW }
    }
}

impl<T> Queue<T> {
    pub fn len(&self) -> usize {
        self.waiting
    }

    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// How long a new one of this priority would wait, if nobody comes after it; `None`: that cannot be told yet.
    pub fn wait(&self, priority: i32, now: Instant) -> Option<Duration> {
        let before = self.bands.range(..=priority);
        self.drain.takes(before.map(|(_, band)| band.work).sum(), now)
    }

    /// Adds one; `now` is when it begins to wait.
    pub fn push(&mut self, wish: Wish, item: T, now: Instant) -> Ticket {
        self.drain.waits(now);
        let Wish { priority, tenant, weight, wanted, work } = wish;
        self.arrivals += 1;
        self.waiting += 1;
        let band = self.bands.entry(priority).or_insert_with(|| Band {
            tenants: HashMap::new(),
            time: 0.0,
            work: 0.0,
        });
        band.work += work;
        let time = band.time;
        let new = || Tenant { weight, time, waiting: BTreeMap::new(), work: 0.0, late: false };
        let of = band.tenants.entry(tenant.clone()).or_insert_with(new);
        (of.weight, of.time) = (weight.max(1), of.time.max(time));
        let key = (wanted, self.arrivals);
        of.work += work;
        of.waiting.insert(key, Entry { work, item });
        Ticket { priority, tenant, key }
    }

    /// Takes one out that does not wait any longer; `None`: it has been taken.
    pub fn remove(&mut self, ticket: &Ticket) -> Option<T> {
        let band = self.bands.get_mut(&ticket.priority)?;
        let of = band.tenants.get_mut(&ticket.tenant)?;
        let entry = of.take(&ticket.key)?;
        band.work -= entry.work;
        self.waiting -= 1;
        self.tidy(ticket.priority);
        Some(entry.item)
    }

    /// Whether anybody waits who gives way to one of this rank.
    pub fn has_behind(&self, rank: &Rank<'_>) -> bool {
        self.last_behind(rank).is_some()
    }

    /// Takes out whoever gives way to one of this rank: of the last band the tenant who would have had most for its weight
    /// when all of its are served, or else the tenant's own; and of those whoever's first token is wanted last. Of a band of
    /// others a [`TURNS`]th of all that wait stays.
    pub fn give_way(&mut self, rank: &Rank<'_>) -> Option<T> {
        let last = self.last_behind(rank)?;
        self.remove(&last)
    }

    fn last_behind(&self, rank: &Rank<'_>) -> Option<Ticket> {
        let of_others = self.bands.last_key_value().filter(|(priority, band)| {
            let waiting: usize = band.tenants.values().map(|of| of.waiting.len()).sum();
            **priority > rank.band_ends && waiting * TURNS as usize > self.waiting
        });
        let (priority, tenant, of) = match of_others {
            Some((priority, band)) => {
                let waiting = band.tenants.iter().filter(|(_, of)| !of.waiting.is_empty());
                let ends = waiting.map(|(tenant, of)| (of.end(), tenant, of));
                let last = ends.max_by(|(end, a, _), (other, b, _)| end.total_cmp(other).then(a.cmp(b)));
                let (_, tenant, of) = last?;
                (priority, tenant, of)
            }
            None => {
                let mut behind = self.bands.range((Excluded(rank.priority), Unbounded)).rev();
                behind.find_map(|(priority, band)| {
                    let (tenant, of) = band.tenants.get_key_value(rank.tenant)?;
                    (!of.waiting.is_empty()).then_some((priority, tenant, of))
                })?
            }
        };
        let (&key, _) = of.waiting.last_key_value()?;
        Some(Ticket { priority: *priority, tenant: tenant.clone(), key })
    }

    /// The first of the next few that fits.
    pub fn next<R>(&mut self, now: Instant, fits: impl FnMut(&T) -> Option<R>) -> Option<(T, R)> {
        let (ticket, found) = self.find(now, fits)?;
        Some((self.take(&ticket, now)?, found))
    }

    fn find<R>(&self, now: Instant, mut fits: impl FnMut(&T) -> Option<R>) -> Option<(Ticket, R)> {
        let mut asked = 0;
        for priority in self.order() {
            let band = &self.bands[&priority];
            let mut tenants: Vec<(&Arc<str>, &Tenant<T>)> = band.tenants.iter().collect();
            tenants.sort_by(|(a, of_a), (b, of_b)| of_a.time.total_cmp(&of_b.time).then(a.cmp(b)));
            for (tenant, of) in tenants {
                for (key, entry) in of.heads(now) {
                    if let Some(found) = fits(&entry.item) {
                        return Some((Ticket { priority, tenant: tenant.clone(), key: *key }, found));
                    }
                    asked += 1;
                    if asked == ASKED_MOST {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// Bands in the order in which they are asked.
    fn order(&self) -> Vec<i32> {
        let mut order: Vec<i32> = self.bands.keys().copied().collect();
        if self.turns % TURNS == TURNS - 1 && order.len() > 1 {
            // A lower one first, each in its turn.
            let which = 1 + (self.turns / TURNS) as usize % (order.len() - 1);
            order.swap(0, which);
        }
        order
    }

    fn take(&mut self, ticket: &Ticket, now: Instant) -> Option<T> {
        let band = self.bands.get_mut(&ticket.priority)?;
        let of = band.tenants.get_mut(&ticket.tenant)?;
        let entry = of.take(&ticket.key)?;
        band.time = band.time.max(of.time);
        of.time += entry.work / f64::from(of.weight);
        of.late = ticket.key.0 < now;
        band.work -= entry.work;
        self.drain.took(entry.work, now);
        self.waiting -= 1;
        self.turns = self.turns.wrapping_add(1);
        self.tidy(ticket.priority);
        Some(entry.item)
    }

    /// Forgets tenants that have nothing to wait for, and no more than their share behind them.
    fn tidy(&mut self, priority: i32) {
        if self.waiting == 0 {
            self.drain.rests();
        }
        let Some(band) = self.bands.get_mut(&priority) else { return };
        let time = band.time;
        band.tenants.retain(|_, of| !of.waiting.is_empty() || of.time > time);
        if band.tenants.values().all(|of| of.waiting.is_empty()) {
            self.bands.remove(&priority);
        }
    }
}

#[cfg(test)]
mod tests;
