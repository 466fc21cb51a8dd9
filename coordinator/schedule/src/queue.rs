//! Who is served next of those who wait for one model. Pure: time is an argument.
//!
//! - **Bands** of keys: the lower comes first, but of [`TURNS`] turns one is another band's, each in its turn, so that nobody
//!   waits for ever whom there is room for when it is.
//! - Within a band **tenants** share by weight: each has a time of its own that passes as its work is taken, the slower the
//!   more weight it has, and whoever's time is least is next (start-time fair queueing). One that comes back after a pause
//!   starts at the others' time: nobody saves up turns. What priority a tenant's requests ask for is between them.
//! - Of a tenant's requests those of a lower **priority** come first, with turns for the others as among bands.
//! - Of the same priority whoever's first token is wanted soonest is next. Those that are late already get every second turn
//!   at most: served first they would make all others late, too.
//!
//! Where there is room for no more, one [gives way](Queue::give_way) who would be served after the one that comes.
//!
//! Whoever is next may not fit where there is room: whoever is behind is asked as well ([`ASKED_MOST`]), of another tenant if
//! there is one, and the order among the rest stays. That happens to one only so often ([`PASSED_OVER_MOST`]).

mod drain;
mod tenant;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound::{Excluded, Unbounded},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use drain::Drain;
use tenant::{Entry, Key, Tenant};

/// Of so many turns one is another's than the first's.
const TURNS: u32 = 20;
/// Requests that are asked in one go whether they fit. Where so many do not, nobody is asked any more: room is the fleet's,
/// and to look for it takes time in a large one.
const ASKED_MOST: usize = 4;
/// So often others may go before one that did not fit; when it is asked next, it is to be taken if anything is.
const PASSED_OVER_MOST: u32 = 8;

/// Whom a request goes before.
#[derive(Debug, Clone)]
pub struct Rank {
    /// Of its key: lower is served first.
    pub band: u8,
    pub tenant: Arc<str>,
    /// Of the tenant: twice the weight is twice the share. At least 1.
    pub weight: u32,
    /// Among those of the tenant: lower is served first.
    pub priority: i32,
}

/// What the order goes by.
#[derive(Debug, Clone)]
pub struct Wish {
    pub rank: Rank,
    /// When the first token is wanted.
    pub wanted: Instant,
    /// How much is to be done, in any unit.
    pub work: f64,
}

/// One that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    band: u8,
    tenant: Arc<str>,
    priority: i32,
    key: Key,
}

#[derive(Debug)]
struct Band<T> {
    tenants: HashMap<Arc<str>, Tenant<T>>,
    /// The time of the tenant that was served last, before its turn.
    time: f64,
    /// Of all that wait.
    work: f64,
}

impl<T> Default for Band<T> {
    fn default() -> Self {
        Self { tenants: HashMap::new(), time: 0.0, work: 0.0 }
    }
}

impl<T> Band<T> {
    fn waiting(&self) -> usize {
        self.tenants.values().map(|of| of.waiting).sum()
    }

    /// The work that goes before a new request of this rank.
    fn work_before(&self, rank: &Rank) -> f64 {
        let own = self.tenants.get(&rank.tenant);
        let before = own.map_or(0.0, |of| of.work_before(rank.priority));
        let start = self.start(own) + before / f64::from(rank.weight.max(1));
        let others = self.tenants.iter().filter(|(tenant, _)| **tenant != rank.tenant);
        let of_others = others.map(|(_, of)| of.work.min((start - of.time).max(0.0) * f64::from(of.weight)));
        before + of_others.sum::<f64>()
    }

    /// From which time on a tenant is served, were it to come now. One of which something waits keeps its own: where others
    /// went before what did not fit, its share is still to come.
    fn start(&self, of: Option<&Tenant<T>>) -> f64 {
        of.map_or(self.time, |of| if of.waiting > 0 { of.time } else { of.time.max(self.time) })
    }

    /// Whose turn would come last, of all but one tenant's, and at which time of its tenant.
    fn last(&self, but: Option<&Arc<str>>) -> Option<(&Arc<str>, i32, Key, f64)> {
        let others = self.tenants.iter().filter(|(tenant, _)| Some(*tenant) != but);
        let lasts = others.filter_map(|(tenant, of)| {
            let (priority, key, work) = of.last(None)?;
            Some((tenant, priority, key, of.end() - work / f64::from(of.weight)))
        });
        lasts.max_by(|(a, .., turn), (b, .., other)| turn.total_cmp(other).then(a.cmp(b)))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Queue<T> {
    bands: BTreeMap<u8, Band<T>>,
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

    /// Those that wait, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.bands.values().flat_map(|band| band.tenants.values().flat_map(Tenant::iter))
    }

    /// How long a new one of this rank would wait, if nobody comes after it; `None`: that cannot be told yet.
    pub fn wait(&self, rank: &Rank, now: Instant) -> Option<Duration> {
        let earlier: f64 = self.bands.range(..rank.band).map(|(_, band)| band.work).sum();
        let own = self.bands.get(&rank.band).map_or(0.0, |band| band.work_before(rank));
        self.drain.takes(earlier + own, now)
    }

    /// How long all that wait take; `None`: that cannot be told yet.
    pub fn wait_of_all(&self, now: Instant) -> Option<Duration> {
        self.drain.takes(self.bands.values().map(|band| band.work).sum(), now)
    }

    /// Adds one; `now` is when it begins to wait.
    pub fn push(&mut self, wish: Wish, item: T, now: Instant) -> Ticket {
        self.drain.waits(now);
        let Wish { rank: Rank { band: of_band, tenant, weight, priority }, wanted, work } = wish;
        self.arrivals += 1;
        self.waiting += 1;
        let band = self.bands.entry(of_band).or_default();
        band.work += work;
        let start = band.start(band.tenants.get(&tenant));
        let of = band.tenants.entry(tenant.clone()).or_insert_with(|| Tenant::new(weight, start));
        (of.weight, of.time) = (weight.max(1), start);
        let key = (wanted, self.arrivals);
        of.push(priority, key, Entry { work, item, passed_over: 0 });
        Ticket { band: of_band, tenant, priority, key }
    }

    /// Takes one out that does not wait any longer; `None`: it has been taken.
    pub fn remove(&mut self, ticket: &Ticket) -> Option<T> {
        let band = self.bands.get_mut(&ticket.band)?;
        let entry = band.tenants.get_mut(&ticket.tenant)?.remove(ticket.priority, &ticket.key)?;
        band.work -= entry.work;
        self.waiting -= 1;
        self.tidy(ticket.band);
        Some(entry.item)
    }

    /// Whether anybody waits who gives way to one of this rank.
    pub fn has_behind(&self, rank: &Rank) -> bool {
        self.last_behind(rank).is_some()
    }

    /// Takes out whoever gives way to one of this rank, the first of these that there is:
    ///
    /// - one of a later band than its own, the last of which more than a [`TURNS`]th of all that wait is;
    /// - of its own band one of another tenant, whose turn would come after it, as that tenant has more than its share;
    /// - one of its own tenant, of a later priority.
    ///
    /// In a band it is whoever's turn would come last, of a tenant's whoever is of the last priority and wanted last.
    pub fn give_way(&mut self, rank: &Rank) -> Option<T> {
        let last = self.last_behind(rank)?;
        self.remove(&last)
    }

    fn last_behind(&self, rank: &Rank) -> Option<Ticket> {
        let mut later = self.bands.range((Excluded(rank.band), Unbounded)).rev();
        let later = later.find(|(_, band)| band.waiting() * TURNS as usize > self.waiting);
        if let Some((&later, band)) = later {
            let (tenant, priority, key, _) = band.last(None)?;
            return Some(Ticket { band: later, tenant: tenant.clone(), priority, key });
        }
        let band = self.bands.get(&rank.band)?;
        let own = band.tenants.get(&rank.tenant);
        let turn = band.start(own) + own.map_or(0.0, |of| of.work) / f64::from(rank.weight.max(1));
        let over = band.last(Some(&rank.tenant)).filter(|(.., theirs)| *theirs > turn);
        let over = over.map(|(tenant, priority, key, _)| (tenant, priority, key));
        let (tenant, priority, key) = over.or_else(|| {
            let (priority, key, _) = own?.last(Some(rank.priority))?;
            Some((&rank.tenant, priority, key))
        })?;
        Some(Ticket { band: rank.band, tenant: tenant.clone(), priority, key })
    }

    /// The first of the next few that fits, or of which is found that it need not wait: an error takes it out as one that leaves,
    /// and is nobody's turn. It is asked of each, and whether others have gone before it so often that it does if anything does.
    pub fn next<R, E>(
        &mut self,
        now: Instant,
        fits: impl FnMut(&T, bool) -> Option<Result<R, E>>,
    ) -> Option<(T, Result<R, E>)> {
        let mut passed_over = Vec::new();
        let (ticket, found) = self.find(now, fits, &mut passed_over)?;
        if found.is_err() {
            return Some((self.remove(&ticket)?, found));
        }
        for Ticket { band, tenant, priority, key } in &passed_over {
            let of = self.bands.get_mut(band).and_then(|band| band.tenants.get_mut(tenant));
            of.into_iter().for_each(|of| of.pass_over(*priority, key));
        }
        Some((self.take(&ticket, now)?, found))
    }

    /// Tells those, too, that were asked before.
    fn find<R>(
        &self,
        now: Instant,
        mut fits: impl FnMut(&T, bool) -> Option<R>,
        passed_over: &mut Vec<Ticket>,
    ) -> Option<(Ticket, R)> {
        let mut left = ASKED_MOST;
        for (of_band, most) in in_turn(self.bands.keys().copied(), self.turns) {
            if left == 0 {
                break;
            }
            let band = &self.bands[&of_band];
            let mut tenants: Vec<(&Arc<str>, &Tenant<T>)> =
                band.tenants.iter().filter(|(_, of)| of.waiting > 0).collect();
            tenants.sort_by(|(a, of_a), (b, of_b)| of_a.time.total_cmp(&of_b.time).then(a.cmp(b)));
            // Another tenant's first before the second of one: what does not fit of that one is in nobody else's way.
            let mut heads = tenants
                .iter()
                .take(ASKED_MOST)
                .map(|(tenant, of)| (*tenant, of.heads(now)))
                .collect::<Vec<_>>();
            let turn = |_| {
                heads.iter_mut().filter_map(|(tenant, of)| Some((*tenant, of.next()?))).collect::<Vec<_>>()
            };
            let in_order: Vec<_> = (0..ASKED_MOST).flat_map(turn).take(most.min(left)).collect();
            let mut asked = 0;
            for (tenant, (priority, key, entry)) in in_order {
                let ticket = Ticket { band: of_band, tenant: tenant.clone(), priority, key: *key };
                if let Some(found) = fits(&entry.item, entry.passed_over >= PASSED_OVER_MOST) {
                    return Some((ticket, found));
                }
                passed_over.push(ticket);
                asked += 1;
            }
            if most == ASKED_MOST {
                left -= asked;
            }
        }
        None
    }

    fn take(&mut self, ticket: &Ticket, now: Instant) -> Option<T> {
        let band = self.bands.get_mut(&ticket.band)?;
        let of = band.tenants.get_mut(&ticket.tenant)?;
        let before = of.time;
        let entry = of.serve(ticket.priority, &ticket.key, now)?;
        band.time = band.time.max(before);
        band.work -= entry.work;
        self.drain.took(entry.work, now);
        self.waiting -= 1;
        self.turns = self.turns.wrapping_add(1);
        self.tidy(ticket.band);
        Some(entry.item)
    }

    /// Forgets tenants that have nothing to wait for, and no more than their share behind them.
    fn tidy(&mut self, of_band: u8) {
        if self.waiting == 0 {
            self.drain.rests();
        }
        let Some(band) = self.bands.get_mut(&of_band) else { return };
        let time = band.time;
        band.tenants.retain(|_, of| of.waiting > 0 || of.time > time);
        if band.tenants.values().all(|of| of.waiting == 0) {
            self.bands.remove(&of_band);
        }
    }
}

/// These, ascending, in the order in which they are asked, and how many requests of each are. Of [`TURNS`] one begins with a
/// later one, each in its turn: if what that one wants first does not fit, it is the others' turn.
fn in_turn<K>(ascending: impl Iterator<Item = K>, turns: u32) -> Vec<(K, usize)> {
    let mut order: Vec<_> = ascending.map(|key| (key, ASKED_MOST)).collect();
    if turns % TURNS == TURNS - 1 && order.len() > 1 {
        let which = 1 + (turns / TURNS) as usize % (order.len() - 1);
        order[..=which].rotate_right(1);
        order[0].1 = 1;
    }
    order
}

#[cfg(test)]
mod tests;
