//! The line of one model: who is served, who waits, and in which order those who wait are placed.
//!
//! A request goes at once if nobody waits, a seat is free and an instance has room. Else it waits in a [`Queue`], and a task
//! that lives for as long as anybody waits places whoever is next as soon as there is a seat and room: late, by what is
//! known then. Where no instance is there at all, one that is started again is worth a short wait. Requests that look for
//! another place after a failure do not come here again. Whoever leaves, or has waited too long, is taken out at once. Who
//! finds the line full may stand beside it and be prepared, if somebody waits who gives way to it ([`Rank`]); and takes the
//! place of that one, who is turned away, when it would wait itself.

mod attend;

use std::{sync::Arc, time::Duration};

use baton_proto::{ApiError, ErrorCode, RequestId};
use baton_schedule::{
    Among, NoPlace, Placement, Receipt,
    queue::{self, Queue, Rank, Wish},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};

use attend::attend;

use super::{Counted, Refusal, Ticket, at_once};
use crate::{
    config::LimitsConfig,
    keys::Tenant,
    metrics::ModelMetrics,
    place::{Booked, Placer},
    prepare::{Prepared, PreparedPrompt, Served},
};

/// See the module.
pub struct Line {
    /// One for each that is served or waits, or is being prepared for it.
    spots: Arc<Semaphore>,
    desk: Arc<Desk>,
    queue_timeout: Duration,
}

/// Where each prompt of a request goes, or why it is not placed and waits no longer.
type Found = Result<Vec<Booked>, NoPlace>;

/// A place in the line; `None`: beside it, until another gives way.
pub struct Spot(Option<OwnedSemaphorePermit>);

/// Leave to be served. Given back by drop.
pub struct Permit {
    _served: Counted<2>,
    _seat: Seat,
    _spot: OwnedSemaphorePermit,
    ticket: Ticket,
}

impl Permit {
    /// Gives back all but the request's room in the house, and for what it holds.
    pub fn into_ticket(self) -> Ticket {
        self.ticket
    }
}

/// What a request is to wait for, and how.
pub struct WaitTerms<'a> {
    pub request: &'a RequestId,
    pub tenant: &'a Tenant,
    /// When it came: its first tokens are wanted so long after that.
    pub arrived: Instant,
    /// It need not be served after this.
    pub deadline: Instant,
}

/// A request that is let in.
pub struct Admission {
    pub permit: Permit,
    pub prepared: Prepared,
    /// Where each of its prompts goes.
    pub bookings: Vec<Booked>,
    pub waited: Duration,
}

/// Why a request waits, and where it would go if it had to go now, room or not.
pub struct Waits {
    pub because: String,
    pub place: Option<(Placement, Receipt)>,
}

/// One that has been told to go on.
struct Bound {
    seat: Seat,
    spot: OwnedSemaphorePermit,
    prepared: Prepared,
    bookings: Vec<Booked>,
}

struct Waiter {
    request: RequestId,
    arrived: Instant,
    since: Instant,
    spot: OwnedSemaphorePermit,
    prepared: Prepared,
    goes: oneshot::Sender<Result<Bound, NoPlace>>,
}

#[derive(Default)]
struct State {
    /// Seats that are taken.
    seated: usize,
    queue: Queue<Waiter>,
    /// Since when nobody is there who serves the model, however busy.
    vacant: Option<Instant>,
    /// A task places those who wait.
    attended: bool,
}

struct Desk {
    served: Arc<Served>,
    seats: usize,
    /// Requests that wait at once.
    queued_most: usize,
    /// How long a request waits for an instance to be there.
    placement_timeout: Duration,
    state: Mutex<State>,
    /// A seat is free, or somebody has come.
    changed: Notify,
    counts: Arc<ModelMetrics>,
}

/// How many may be served and wait, of one model.
pub(super) fn length(limits: &LimitsConfig) -> usize {
    limits.max_concurrent.saturating_add(limits.max_queued).min(Semaphore::MAX_PERMITS)
}

impl Line {
    pub fn new(limits: &LimitsConfig, served: Arc<Served>, counts: Arc<ModelMetrics>) -> Self {
        let (seats, placement_timeout) = (limits.max_concurrent, limits.placement_timeout);
        let (state, changed) = (Mutex::default(), Notify::new());
        let queued_most = limits.max_queued;
        let desk = Desk { served, seats, queued_most, placement_timeout, state, changed, counts };
        Self {
            spots: Arc::new(Semaphore::new(length(limits))),
            desk: Arc::new(desk),
            queue_timeout: limits.queue_timeout,
        }
    }

    /// Lets a request of this rank stand in line, or beside it if another may give it its place, or turns it away.
    pub fn enter(&self, rank: &Rank) -> Result<Spot, ApiError> {
        let spot = if self.is_full() { None } else { at_once(&self.spots).ok() };
        match spot {
            Some(spot) => Ok(Spot(Some(spot))),
            None if self.has_behind(rank) => Ok(Spot(None)),
            None => Err(self.desk.full(self.drain())),
        }
    }

    /// Whether anybody waits who gives way to one of this rank.
    pub fn has_behind(&self, rank: &Rank) -> bool {
        self.desk.state.lock().queue.has_behind(rank)
    }

    /// How long all that wait are predicted to take until they are served; `None`: that cannot be told yet.
    pub fn drain(&self) -> Option<Duration> {
        self.desk.state.lock().queue.wait_of_all(Instant::now())
    }

    /// Whether a request that came now would find no place of its own.
    pub fn is_full(&self) -> bool {
        let waiting = self.desk.state.lock().queue.len();
        self.spots.available_permits() == 0 || (waiting > 0 && waiting >= self.desk.queued_most)
    }

    /// What a request waits for, if it waits; of several prompts the first.
    pub fn explain(&self, request: &RequestId, placer: &Placer) -> Option<Waits> {
        let desk = &self.desk;
        let (prompt, arrived, seated) = {
            let state = desk.state.lock();
            let waiter = state.queue.iter().find(|waiter| waiter.request == *request)?;
            (waiter.prepared.prompts.first()?.clone(), waiter.arrived, state.seated)
        };
        let look = |among| placer.look(&desk.served, placer.asked(&prompt, arrived), among);
        let because = match look(Among::Roomy) {
            _ if seated >= desk.seats => {
                format!(
                    "as many requests are being served as may be at a time (limits.max_concurrent: {seated})"
                )
            }
            Err(NoPlace::Busy) => "no instance has room for it".to_owned(),
            Err(reason) => reason.to_string(),
            Ok(_) => "others go before it, or it is about to go".to_owned(),
        };
        Some(Waits { because, place: look(Among::All).ok() })
    }

    /// Waits for a seat and for room on an instance. Errors: 429 if it waits too long, or is sure to, or if its place is
    /// another's now; 503 if no instance is there, nor comes soon; 400 if none that is could hold it.
    pub async fn admit(
        &self,
        placer: &Arc<Placer>,
        ticket: Ticket,
        spot: Spot,
        prepared: Prepared,
        terms: WaitTerms<'_>,
    ) -> Result<Admission, ApiError> {
        let (desk, began) = (&self.desk, Instant::now());
        placer.board.arrived(&desk.served.revision);
        // Meanwhile there may be one.
        let spot = spot.0.or_else(|| at_once(&self.spots).ok());
        let book = || placer.book_all(&desk.served, &prepared.prompts, terms.arrived, Among::Roomy);
        let booked = spot.as_ref().and_then(|_| desk.at_once(book));
        let bound = match (spot, booked) {
            (Some(spot), Some((seat, found))) => {
                let bookings = found.map_err(|reason| desk.error_of(reason))?;
                Bound { seat, spot, prepared, bookings }
            }
            (spot, _) => self.wait(placer, spot, prepared, &terms, began).await?,
        };
        let (Bound { seat, spot, prepared, bookings }, waited) = (bound, began.elapsed());
        desk.counts.queue_wait.observe(waited.as_secs_f64());
        let served = Counted::new(&[desk.counts.all_in_flight.clone(), desk.counts.in_flight.clone()]);
        let permit = Permit { _served: served, _seat: seat, _spot: spot, ticket };
        Ok(Admission { permit, prepared, bookings, waited })
    }

    async fn wait(
        &self,
        placer: &Arc<Placer>,
        spot: Option<OwnedSemaphorePermit>,
        prepared: Prepared,
        terms: &WaitTerms<'_>,
        began: Instant,
    ) -> Result<Bound, ApiError> {
        let (desk, by) = (&self.desk, (began + self.queue_timeout).min(terms.deadline));
        let tenant = terms.tenant;
        let rank = tenant.rank(prepared.priority);
        let first = prepared.prompts.first().map_or(0, PreparedPrompt::prompt_tokens);
        let wish = Wish {
            rank: rank.clone(),
            wanted: terms.arrived + placer.board.ttft_target(first),
            work: work(&prepared, placer.board.expected_tokens(&desk.served.revision)),
        };
        if desk.queued_most == 0 {
            desk.serves(placer).map_err(|reason| desk.error_of(reason))?;
        }
        let (goes, told) = oneshot::channel();
        let (waiting, outranked) = {
            let state = &mut *desk.state.lock();
            let wait = state.queue.wait(&rank, began);
            if state.vacant.is_none() && wait.is_some_and(|wait| wait > by - began) {
                let message = "the requests that are waiting take longer than this one can wait";
                return Err(desk.refuse(Refusal::Backlog, message, wait));
            }
            let outranked = match spot {
                Some(_) if state.queue.len() < desk.queued_most => None,
                _ => Some(state.queue.give_way(&rank).ok_or_else(|| desk.full(wait))?),
            };
            let (theirs, outranked) =
                outranked.map(|Waiter { spot, prepared, goes, .. }| (spot, (prepared, goes))).unzip();
            let Some(spot) = spot.or(theirs) else { return Err(desk.full(wait)) };
            let (request, arrived) = (terms.request.clone(), terms.arrived);
            let waiter = Waiter { request, arrived, since: began, spot, prepared, goes };
            let ticket = state.queue.push(wish, waiter, began);
            if !std::mem::replace(&mut state.attended, true) {
                tokio::spawn(attend(desk.clone(), placer.clone()));
            }
            (Waiting { desk: desk.clone(), ticket, _counted: desk.waits(tenant) }, outranked)
        };
        // Whoever it was hears of it by that.
        drop(outranked);
        desk.changed.notify_one();
        let Some(told) = placer.closed.run_until_cancelled(timeout_at(by, told)).await else {
            return Err(ApiError::new(
                ErrorCode::Unavailable,
                "this coordinator is shutting down: send it again, to another",
            ));
        };
        let (why, message) = match told {
            Ok(Ok(bound)) => return bound.map_err(|reason| desk.error_of(reason)),
            Ok(Err(_)) => (Refusal::Outranked, "others who go before it came while the line was full"),
            Err(_) => {
                if let Err(reason) = desk.serves(placer) {
                    return Err(desk.error_of(reason));
                }
                (Refusal::Wait, "the request waited too long to be served")
            }
        };
        drop(waiting);
        let wait = desk.state.lock().queue.wait(&rank, Instant::now());
        Err(desk.refuse(why, message, wait))
    }
}

/// In tokens: of its prompts, and as many as its answers are expected to have.
fn work(prepared: &Prepared, expected_tokens: u32) -> f64 {
    let of_prompt = |prompt: &PreparedPrompt| {
        let answer = f64::from(prompt.sampling.max_tokens.min(expected_tokens));
        f64::from(prompt.prompt_tokens()) + f64::from(prompt.sampling.choices) * answer
    };
    prepared.prompts.iter().map(of_prompt).sum()
}

impl Desk {
    /// A seat, and what `book` finds, if nobody waits and it is worth waiting for nothing.
    fn at_once(self: &Arc<Self>, book: impl FnOnce() -> Found) -> Option<(Seat, Found)> {
        let seat = {
            let mut state = self.state.lock();
            if state.seated >= self.seats || !state.queue.is_empty() {
                return None;
            }
            state.seated += 1;
            Seat(self.clone())
        };
        match book() {
            Err(reason) if reason.may_pass() => None,
            found => Some((seat, found)),
        }
    }

    /// Lets the next one go, if there is a seat for it, and room; or if there is nobody to wait for.
    fn place_next(self: &Arc<Self>, placer: &Placer) -> bool {
        let (Waiter { spot, prepared, goes, .. }, found, seat) = {
            let state = &mut *self.state.lock();
            if state.seated >= self.seats {
                return false;
            }
            let (now, vacant) = (Instant::now(), &mut state.vacant);
            // An instance takes what waits there in order: with it one waits for room that others would take all the time.
            let fits = |waiter: &Waiter, overdue: bool| {
                let among = if overdue { Among::Waiting } else { Among::Roomy };
                let Waiter { prepared, arrived, .. } = waiter;
                let book = || placer.book_all(&self.served, &prepared.prompts, *arrived, among);
                let lacks = |found: &Found| matches!(found, Err(reason) if reason.may_pass() && *reason != NoPlace::Busy);
                let mut found = book();
                if lacks(&found) {
                    if self.serves(placer).is_err() {
                        let since = waiter.since.max(*vacant.get_or_insert(now));
                        let waited = now.saturating_duration_since(since);
                        return (waited >= self.placement_timeout).then_some(found);
                    }
                    // Somebody has just come. Whoever is away that alone could hold it is not waited for: nobody else would
                    // be served meanwhile.
                    found = book();
                }
                *vacant = None;
                Some(found).filter(|found| !matches!(found, Err(NoPlace::Busy)))
            };
            let Some((waiter, found)) = state.queue.next(now, fits) else { return false };
            state.seated += 1;
            (waiter, found, Seat(self.clone()))
        };
        // One that has left in this very moment gives all of it back.
        drop(goes.send(found.map(|bookings| Bound { seat, spot, prepared, bookings })));
        true
    }

    /// Whether anybody is there who serves the model, however busy.
    fn serves(&self, placer: &Placer) -> Result<(), NoPlace> {
        placer.board.can_serve(&self.served.revision)
    }

    fn error_of(&self, reason: NoPlace) -> ApiError {
        reason.into_api_error(&self.served.name)
    }

    /// Whether nobody waits: then nobody attends to the line any more.
    fn is_left(&self) -> bool {
        let state = &mut *self.state.lock();
        state.attended = !state.queue.is_empty();
        if !state.attended {
            state.vacant = None;
        }
        !state.attended
    }

    fn waits(&self, tenant: &Tenant) -> Counted<3> {
        let counts = &self.counts;
        let of_band = counts.queued_by_band[tenant.band as usize].clone();
        Counted::new(&[counts.all_queued.clone(), counts.queued.clone(), of_band])
    }

    fn full(&self, wait: Option<Duration>) -> ApiError {
        self.refuse(Refusal::Line, "too many requests are waiting", wait)
    }

    fn refuse(&self, why: Refusal, message: &str, wait: Option<Duration>) -> ApiError {
        why.refuse(message, wait, &self.counts.all_refusals)
    }
}

/// Of [`LimitsConfig::max_concurrent`] one. Not to be dropped while its desk is locked.
struct Seat(Arc<Desk>);

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.seated -= 1;
        if state.attended {
            self.0.changed.notify_one();
        }
    }
}

/// Takes a request out of the queue when it does not wait any longer.
struct Waiting {
    desk: Arc<Desk>,
    ticket: queue::Ticket,
    _counted: Counted<3>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Dropped when the desk is not locked any more.
        let _left = self.desk.state.lock().queue.remove(&self.ticket);
    }
}

#[cfg(test)]
mod tests;
